package pki

import (
	"crypto/sha256"
	"crypto/subtle"

	"google.golang.org/protobuf/types/known/anypb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// PeersKind is the kind, and the name, of the resource that is there while running managers
// unlock restarted ones.
const PeersKind = "skep.unlock-peers"

// PeerCredentialSize is the length of a credential to be unlocked by other managers, and of
// its digest.
const PeerCredentialSize = sha256.Size

// PeerDigest returns what the swarm keeps of a credential or of the key that it is for.
func PeerDigest(secret []byte) []byte {
	sum := sha256.Sum256(secret)
	return sum[:]
}

// SameDigest reports in constant time whether digest is that of a secret.
func SameDigest(digest, secret []byte) bool {
	return len(secret) > 0 && subtle.ConstantTimeCompare(digest, PeerDigest(secret)) == 1
}

// PeerUnlocking returns the resource of kind PeersKind and what it says, nil where managers
// do not unlock each other.
func PeerUnlocking(s *store.Snapshot) (*api.Resource, *skepv1.UnlockPeers) {
	r, _ := s.OnlyOf(PeersKind)
	if r == nil {
		return nil, nil
	}
	peers := new(skepv1.UnlockPeers)
	if r.GetPayload().UnmarshalTo(peers) != nil {
		peers = new(skepv1.UnlockPeers) // no credential is valid
	}
	return r, peers
}

// PutPeers returns a copy of a resource that says peers.
func PutPeers(r *api.Resource, peers *skepv1.UnlockPeers) (*api.Resource, error) {
	payload, err := anypb.New(peers)
	if err != nil {
		return nil, model.Wrap(model.Internal, err, "write credentials of managers")
	}
	r = model.Clone(r)
	r.Payload = payload
	return r, nil
}
