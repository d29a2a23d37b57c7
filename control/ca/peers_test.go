package ca

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
	"github.com/skep-dev/skep/platform/wire"
)

// quorum is a state that can lose its quorum: then what was to be written is not.
type quorum struct {
	*replica.Memory

	lost bool
}

var errNoQuorum = errors.New("no quorum")

func (q *quorum) Update(ctx context.Context, fn func(*store.Tx) error) (*store.Snapshot, error) {
	if q.lost {
		_ = fn(store.Begin(q.View(), 0, time.Now()))
		return nil, errNoQuorum
	}
	return q.Memory.Update(ctx, fn)
}

const (
	lockedNode = "manager1"
	nodeAddr   = "10.0.0.2:2377"
	// fromAddr is where the locked node calls from.
	fromAddr = "10.0.0.2:40000"
)

// peersRig is a swarm with autolock and a manager that has registered a credential.
type peersRig struct {
	*testing.T

	state      *quorum
	p          *Peers
	credential []byte
	asked      []error
}

func newPeersRig(t *testing.T) *peersRig {
	t.Helper()
	r := &peersRig{T: t, state: &quorum{Memory: replica.NewMemory(store.Empty())}, credential: bytes.Repeat([]byte{7}, pki.PeerCredentialSize)}
	r.p = NewPeers(PeersConfig{
		State: r.state, Log: slog.New(slog.DiscardHandler),
		Members: func() []*api.RaftMember {
			return []*api.RaftMember{{NodeId: lockedNode, Addr: nodeAddr}, {NodeId: "manager2", Addr: "10.0.0.3:2377"}}
		},
		Asked: func(_, _ string, err error) { r.asked = append(r.asked, err) },
	})
	r.update(func(tx *store.Tx) error {
		manager := func(id string) *api.Node {
			return &api.Node{Id: id, Role: api.NodeRole_MANAGER, Spec: &api.NodeSpec{DesiredRole: api.NodeRole_MANAGER}}
		}
		return errors.Join(tx.Create(&api.Cluster{
			Id: "swarm", Spec: &api.ClusterSpec{Annotations: &api.Annotations{Name: "default"}},
			UnlockKeys: []*api.EncryptionKey{{Subsystem: pki.ManagerRole, Key: []byte("kek")}},
		}), tx.Create(manager(lockedNode)), tx.Create(manager("manager2")))
	})
	r.configure(true)
	r.register(lockedNode, "@", r.credential)
	return r
}

func (r *peersRig) update(f func(*store.Tx) error) {
	r.Helper()
	if _, err := r.state.Update(r.Context(), f); err != nil {
		r.Fatal(err)
	}
}

func (r *peersRig) cluster(change func(*api.Cluster)) {
	r.Helper()
	r.update(func(tx *store.Tx) error {
		c := model.Clone(tx.Snapshot().Cluster())
		change(c)
		return tx.Update(c)
	})
}

func (r *peersRig) node(change func(*api.Node)) {
	r.Helper()
	r.update(func(tx *store.Tx) error {
		n := model.Clone(tx.Snapshot().Node(lockedNode))
		change(n)
		return tx.Update(n)
	})
}

func (r *peersRig) configure(on bool) {
	r.Helper()
	if s, err := r.p.Configure(r.Context(), &skepv1.ConfigureUnlockRequest{On: on}); err != nil || s.GetOn() != on {
		r.Fatalf("configure %t: %v, %v", on, s, err)
	}
}

func (r *peersRig) register(id, addr string, credential []byte) {
	r.Helper()
	ctx := wire.WithIdentity(r.Context(), wire.Identity{NodeID: id, ClusterID: "swarm", OUs: []string{pki.ManagerRole}, Addr: addr})
	if _, err := r.p.Register(ctx, &skepv1.RegisterUnlockRequest{Digest: pki.PeerDigest(credential)}); err != nil {
		r.Fatal(err)
	}
}

func (r *peersRig) ask(addr string, credential []byte) ([]byte, error) {
	ctx := wire.WithIdentity(r.Context(), wire.Identity{Addr: addr})
	resp, err := r.p.Ask(ctx, &skepv1.AskUnlockRequest{NodeId: lockedNode, Credential: credential})
	return resp.GetKey(), err
}

// wantKey asks rightly and gets the key.
func (r *peersRig) wantKey() {
	r.Helper()
	if key, err := r.ask(fromAddr, r.credential); err != nil || string(key) != "kek" {
		r.Fatalf("the key is %q, %v", key, err)
	}
}

// wantRefused asks and gets none.
func (r *peersRig) wantRefused(addr string, credential []byte, why string) {
	r.Helper()
	key, err := r.ask(addr, credential)
	if key != nil || model.KindOf(err) != model.Denied || !strings.Contains(err.Error(), why) {
		r.Errorf("got %q, %v; want to be refused with %q", key, err, why)
	}
	if n := len(r.asked); n == 0 || !errors.Is(r.asked[n-1], err) {
		r.Errorf("recorded %v", r.asked)
	}
}

func TestPeerCredentialIsGoodOnce(t *testing.T) {
	r := newPeersRig(t)
	r.register("manager2", "10.0.0.3:5", bytes.Repeat([]byte{8}, pki.PeerCredentialSize))
	wrong := bytes.Repeat([]byte{9}, pki.PeerCredentialSize)
	r.wantRefused(fromAddr, wrong, "is not valid")
	r.wantRefused(fromAddr, bytes.Repeat([]byte{8}, pki.PeerCredentialSize), "is not valid") // another node's
	r.wantKey()
	if n := len(r.asked); r.asked[n-1] != nil {
		t.Errorf("recorded %v", r.asked)
	}
	r.wantRefused(fromAddr, r.credential, "it was used, replaced, or never registered")
	if s, err := r.p.GetState(t.Context(), nil); err != nil || strings.Join(s.GetRegistered(), " ") != "manager2" {
		t.Errorf("registered are %v, %v", s, err)
	}
	r.register(lockedNode, "@", wrong)
	r.wantRefused(fromAddr, r.credential, "is not valid")
	if key, err := r.ask(fromAddr, wrong); err != nil || string(key) != "kek" {
		t.Errorf("a new credential: %q, %v", key, err)
	}
}

func TestPeerAddress(t *testing.T) {
	r := newPeersRig(t)
	for _, addr := range []string{"10.0.0.3:2377", "10.0.0.20:2377", "[fd00::2]:2377", "@", ""} {
		r.wantRefused(addr, r.credential, "another address")
	}
	r.wantKey() // refusals used nothing up
	// A node with two addresses is known by the one that it registered from, too.
	r.register(lockedNode, "192.0.2.7:999", r.credential)
	if key, err := r.ask("192.0.2.7:1000", r.credential); err != nil || string(key) != "kek" {
		t.Errorf("from the second address: %q, %v", key, err)
	}
}

func TestPeerOfNoManager(t *testing.T) {
	for name, change := range map[string]func(*peersRig){
		"removed": func(r *peersRig) {
			r.update(func(tx *store.Tx) error { return tx.Remove(model.Nodes, lockedNode) })
		},
		"barred": func(r *peersRig) {
			r.cluster(func(c *api.Cluster) {
				c.BlacklistedCertificates = map[string]*api.BlacklistedCertificate{lockedNode: {}}
			})
		},
		"to be demoted": func(r *peersRig) {
			r.node(func(n *api.Node) { n.Spec.DesiredRole = api.NodeRole_WORKER })
		},
		"demoted": func(r *peersRig) { r.node(func(n *api.Node) { n.Role = api.NodeRole_WORKER }) },
		"not in raft": func(r *peersRig) {
			r.p.members = func() []*api.RaftMember { return nil }
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newPeersRig(t)
			change(r)
			r.wantRefused(fromAddr, r.credential, "is no manager of this swarm")
			ctx := wire.WithIdentity(t.Context(), wire.Identity{NodeID: lockedNode, Addr: fromAddr})
			if _, err := r.p.Register(ctx, &skepv1.RegisterUnlockRequest{Digest: pki.PeerDigest(r.credential)}); model.KindOf(err) != model.Denied {
				t.Errorf("register: %v", err)
			}
		})
	}
}

func TestPeerUnlockingOff(t *testing.T) {
	r := newPeersRig(t)
	r.configure(false)
	r.wantRefused(fromAddr, r.credential, "do not unlock each other")
	r.configure(true)
	r.wantRefused(fromAddr, r.credential, "is not valid") // off made it void
	r.register(lockedNode, "@", r.credential)
	r.cluster(func(c *api.Cluster) { c.UnlockKeys[0].Key = []byte("next") })
	r.wantRefused(fromAddr, r.credential, "the unlock key was changed")
	r.cluster(func(c *api.Cluster) { c.UnlockKeys = nil })
	r.wantRefused(fromAddr, r.credential, "do not unlock each other")
	if s, err := r.p.GetState(t.Context(), nil); err != nil || s.GetOn() {
		t.Errorf("without autolock it is %v, %v", s, err)
	}
	r.configure(false)
	if _, err := r.p.Configure(t.Context(), &skepv1.ConfigureUnlockRequest{On: true}); err == nil || !strings.Contains(err.Error(), "--autolock=true") {
		t.Errorf("on without autolock: %v", err)
	}
}

func TestPeerWithoutQuorum(t *testing.T) {
	r := newPeersRig(t)
	r.state.lost = true
	if key, err := r.ask(fromAddr, r.credential); key != nil || !errors.Is(err, errNoQuorum) {
		t.Errorf("without a quorum: %q, %v", key, err)
	}
	r.state.lost = false
	r.wantKey()
}

func TestPeerRequestIsBounded(t *testing.T) {
	r := newPeersRig(t)
	if _, err := r.ask(fromAddr, nil); model.KindOf(err) != model.Invalid {
		t.Errorf("no credential: %v", err)
	}
	for range sourceBurst {
		_, _ = r.ask("10.9.9.9:1", nil)
	}
	var last error
	for range 2 * sourceBurst {
		if _, last = r.ask("10.9.9.9:1", nil); status.Code(last) == codes.ResourceExhausted {
			break
		}
	}
	if status.Code(last) != codes.ResourceExhausted {
		t.Errorf("a flood: %v", last)
	}
	r.wantKey()
}
