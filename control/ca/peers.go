package ca

import (
	"context"
	"crypto/rand"
	"log/slog"
	"maps"
	"net"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
	"github.com/skep-dev/skep/platform/wire"
)

// Peers gives the unlock key to managers that were restarted. It implements
// skepv1.UnlockServer on the leader.
type Peers struct {
	skepv1.UnimplementedUnlockServer

	state   replica.State
	members func() []*api.RaftMember
	log     *slog.Logger
	asked   func(nodeID, addr string, err error)
	calls   *limiter
}

// PeersConfig is what Peers works with. All fields must be set.
type PeersConfig struct {
	State replica.State
	// Members are the managers, with their addresses.
	Members func() []*api.RaftMember
	// Asked hears of each request for the key and how it ended.
	Asked func(nodeID, addr string, err error)
	Log   *slog.Logger
}

// NewPeers returns a Peers.
func NewPeers(c PeersConfig) *Peers {
	return &Peers{state: c.State, members: c.Members, asked: c.Asked, log: c.Log, calls: newLimiter()}
}

// Configure switches unlocking by other managers on or off.
func (p *Peers) Configure(ctx context.Context, req *skepv1.ConfigureUnlockRequest) (*skepv1.UnlockState, error) {
	_, err := p.state.Update(ctx, func(tx *store.Tx) error {
		s := tx.Snapshot()
		r, _ := pki.PeerUnlocking(s)
		switch {
		case !req.GetOn() && r != nil:
			return tx.Remove(model.Resources, r.GetId())
		case !req.GetOn() || r != nil:
			return nil
		case len(pki.ManagersKEK(s.Cluster())) == 0:
			return model.Errorf(model.Unavailable, "this swarm does not lock its managers: docker swarm update --autolock=true")
		}
		return createPeers(tx)
	})
	if err != nil {
		return nil, err
	}
	p.log.Info("unlocking by other managers was set", slog.Bool("on", req.GetOn()))
	return p.GetState(ctx, nil)
}

// createPeers makes the resource of kind PeersKind, and the kind.
func createPeers(tx *store.Tx) error {
	none, err := anypb.New(new(skepv1.UnlockPeers))
	if err != nil {
		return model.Wrap(model.Internal, err, "write credentials of managers")
	}
	return tx.CreateOnly(rand.Reader, pki.PeersKind, "managers that others may unlock, see skep lock peers", none)
}

// GetState tells whether other managers unlock, and whom.
func (p *Peers) GetState(ctx context.Context, _ *skepv1.GetUnlockStateRequest) (*skepv1.UnlockState, error) {
	s, err := p.state.Read(ctx)
	if err != nil {
		return nil, err
	}
	r, peers := pki.PeerUnlocking(s)
	kek := pki.ManagersKEK(s.Cluster())
	resp := &skepv1.UnlockState{On: r != nil && len(kek) > 0}
	for id, c := range peers.GetCredentials() {
		if pki.SameDigest(c.GetKeyDigest(), kek) && p.manager(s, id) != nil {
			resp.Registered = append(resp.Registered, id)
		}
	}
	slices.Sort(resp.Registered)
	return resp, nil
}

// manager returns the member of raft that a node is, nil unless it is a manager and is to
// stay one.
func (p *Peers) manager(s *store.Snapshot, id string) *api.RaftMember {
	n := s.Node(id)
	_, removed := s.Cluster().GetBlacklistedCertificates()[id]
	if n == nil || removed || n.GetRole() != api.NodeRole_MANAGER || n.GetSpec().GetDesiredRole() != api.NodeRole_MANAGER {
		return nil
	}
	for _, m := range p.members() {
		if m.GetNodeId() == id {
			return m
		}
	}
	return nil
}

// Register replaces the credential of the calling manager, and forgets those of nodes that
// are no managers any more.
func (p *Peers) Register(ctx context.Context, req *skepv1.RegisterUnlockRequest) (*skepv1.RegisterUnlockResponse, error) {
	caller, _ := wire.Caller(ctx)
	if len(req.GetDigest()) != pki.PeerCredentialSize {
		return nil, model.Errorf(model.Invalid, "the digest of a credential has %d bytes", pki.PeerCredentialSize)
	}
	now, err := p.state.Update(ctx, func(tx *store.Tx) error {
		s := tx.Snapshot()
		r, peers := pki.PeerUnlocking(s)
		kek := pki.ManagersKEK(s.Cluster())
		if r == nil || len(kek) == 0 {
			return model.Errorf(model.Unavailable, "managers do not unlock each other in this swarm")
		}
		if p.manager(s, caller.NodeID) == nil {
			return model.Errorf(model.Denied, "node %s is no manager of this swarm", caller.NodeID)
		}
		next := &skepv1.UnlockPeers{Credentials: maps.Clone(peers.GetCredentials())}
		if next.Credentials == nil {
			next.Credentials = map[string]*skepv1.UnlockCredential{}
		}
		maps.DeleteFunc(next.Credentials, func(id string, _ *skepv1.UnlockCredential) bool { return p.manager(s, id) == nil })
		next.Credentials[caller.NodeID] = &skepv1.UnlockCredential{Digest: req.GetDigest(), KeyDigest: pki.PeerDigest(kek), Addr: ipOf(caller.Addr)}
		return update(tx, r, next)
	})
	if err != nil {
		return nil, err
	}
	return &skepv1.RegisterUnlockResponse{Index: now.Index()}, nil
}

func update(tx *store.Tx, r *api.Resource, peers *skepv1.UnlockPeers) error {
	r, err := pki.PutPeers(r, peers)
	if err != nil {
		return err
	}
	return tx.Update(r)
}

// Ask gives the unlock key to a locked manager. That its credential is used up is written
// first, so a quorum of the managers agrees that the node is one of them.
func (p *Peers) Ask(ctx context.Context, req *skepv1.AskUnlockRequest) (*skepv1.AskUnlockResponse, error) {
	caller, _ := wire.Caller(ctx)
	if p.calls.admit(caller.Addr, time.Now()) != nil {
		return nil, status.Error(codes.ResourceExhausted, "too many managers ask to be unlocked; try again")
	}
	if len(req.GetNodeId()) > model.IDLength || len(req.GetCredential()) != pki.PeerCredentialSize {
		return nil, model.Errorf(model.Invalid, "a request to be unlocked has a node id and a credential of %d bytes", pki.PeerCredentialSize)
	}
	var kek []byte
	_, err := p.state.Update(ctx, func(tx *store.Tx) (err error) {
		kek, err = p.consume(tx, req, ipOf(caller.Addr))
		return err
	})
	p.asked(req.GetNodeId(), caller.Addr, err)
	if err != nil {
		p.log.Warn("manager not unlocked", slog.String("node_id", req.GetNodeId()), slog.String("addr", caller.Addr), slog.Any("error", err))
		return nil, err
	}
	p.log.Info("manager unlocked by the others", slog.String("node_id", req.GetNodeId()), slog.String("addr", caller.Addr))
	return &skepv1.AskUnlockResponse{Key: kek}, nil
}

// consume uses up the credential of a request from an address and returns the key.
func (p *Peers) consume(tx *store.Tx, req *skepv1.AskUnlockRequest, from string) ([]byte, error) {
	s, id := tx.Snapshot(), req.GetNodeId()
	r, peers := pki.PeerUnlocking(s)
	kek := pki.ManagersKEK(s.Cluster())
	credential := peers.GetCredentials()[id]
	member := p.manager(s, id)
	switch {
	case r == nil || len(kek) == 0:
		return nil, model.Errorf(model.Denied, "managers do not unlock each other in this swarm")
	case !pki.SameDigest(credential.GetDigest(), req.GetCredential()):
		return nil, model.Errorf(model.Denied, "the credential of node %q is not valid: it was used, replaced, or never registered", id)
	case member == nil:
		return nil, model.Errorf(model.Denied, "node %q is no manager of this swarm", id)
	case from == "" || from != credential.GetAddr() && from != ipOf(member.GetAddr()):
		return nil, model.Errorf(model.Denied, "node %q is not unlocked from another address than its own", id)
	case !pki.SameDigest(credential.GetKeyDigest(), kek):
		return nil, model.Errorf(model.Denied, "the unlock key was changed while node %q was down: unlock it by hand with the key of before", id)
	}
	next := &skepv1.UnlockPeers{Credentials: maps.Clone(peers.GetCredentials())}
	delete(next.Credentials, id)
	return kek, update(tx, r, next)
}

// ipOf returns the IP address of ip:port, "" where there is none.
func ipOf(addr string) string {
	host, _, err := net.SplitHostPort(addr)
	if ip := net.ParseIP(host); err == nil && ip != nil {
		return ip.String()
	}
	return ""
}
