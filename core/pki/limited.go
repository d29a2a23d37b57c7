package pki

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"time"

	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
)

// TokenKind is the kind of the resources that hold what the swarm knows of its limited
// join tokens.
const TokenKind = "skep.join-token" //nolint:gosec // a name, not a token

// MaxTokenLife bounds how long a limited token may admit nodes.
const MaxTokenLife = 366 * 24 * time.Hour

// TokenName returns the name of the resource of a limited token: a digest, so that a copy
// of the state admits nobody.
func TokenName(token string) string {
	sum := sha256.Sum256([]byte(token))
	return hex.EncodeToString(sum[:])
}

// NewLimited makes a join token that ends at a time or after a number of uses, 0 for any
// number, and its resource, which has no id yet.
func NewLimited(random io.Reader, ca *api.RootCA, fips bool, role string, expires time.Time, uses uint32, labels map[string]string) (token string, r *api.Resource, err error) {
	if token, err = NewToken(random, ca.GetCaCert(), fips); err != nil {
		return "", nil, err
	}
	r, err = PutLimited(&api.Resource{
		Annotations: &api.Annotations{Name: TokenName(token), Labels: labels}, Kind: TokenKind,
	}, &skepv1.JoinToken{Role: role, Expires: timestamppb.New(expires), Uses: uses, CaCertHash: CertHash(ca.GetCaCert())})
	return token, r, err
}

// Limited reads a limited token's resource.
func Limited(r *api.Resource) (*skepv1.JoinToken, error) {
	t := new(skepv1.JoinToken)
	if r.GetKind() != TokenKind {
		return nil, model.Errorf(model.Invalid, "resource %s is not a join token", r.GetId())
	}
	if err := r.GetPayload().UnmarshalTo(t); err != nil {
		return nil, model.Wrap(model.Invalid, err, "read join token")
	}
	return t, nil
}

// PutLimited returns a copy of a resource that says t.
func PutLimited(r *api.Resource, t *skepv1.JoinToken) (*api.Resource, error) {
	payload, err := anypb.New(t)
	if err != nil {
		return nil, model.Wrap(model.Internal, err, "write join token")
	}
	r = model.Clone(r)
	r.Payload = payload
	return r, nil
}

// Void says why a limited token admits nobody under a root, or returns "".
func Void(t *skepv1.JoinToken, ca *api.RootCA, now time.Time) string {
	switch {
	case t.GetCaCertHash() != CertHash(ca.GetCaCert()):
		return "it is of an earlier root certificate"
	case !now.Before(t.GetExpires().AsTime()):
		return "it expired " + t.GetExpires().AsTime().UTC().Format(time.RFC3339)
	case t.GetUses() > 0 && t.GetUsed() >= t.GetUses():
		return "it has been used up"
	case t.GetRole() != WorkerRole && t.GetRole() != ManagerRole:
		return "it is for no role that this version knows"
	default:
		return ""
	}
}
