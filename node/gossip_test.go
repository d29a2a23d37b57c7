package node

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/worker/gossip"
)

// TestGossipSession: what gossip hears of a message of the session.
func TestGossipSession(t *testing.T) {
	m := &member{saved: savedState{ListenAddr: "192.0.2.1:2377", AdvertiseAddr: "192.0.2.7:2377"}}
	peer := func(id, addr string) *api.WeightedPeer {
		return &api.WeightedPeer{Peer: &api.Peer{NodeId: id, Addr: addr}}
	}
	msg := &api.SessionMessage{
		Node:     &api.Node{Id: "self", Status: &api.NodeStatus{Addr: "192.0.2.1"}},
		Managers: []*api.WeightedPeer{peer("self", "192.0.2.1:2377"), peer("other", "192.0.2.2:2377"), peer("six", "[2001:db8::1]:2377"), peer("odd", "host:2377")},
		NetworkBootstrapKeys: []*api.EncryptionKey{
			{Subsystem: pki.GossipKeys, LamportTime: 1, Key: []byte("a")}, {Subsystem: pki.OverlayKeys, LamportTime: 2, Key: []byte("b")},
		},
	}
	want := gossip.Session{
		NodeID: "self", Bind: netip.MustParseAddr("192.0.2.1"), Advertise: netip.MustParseAddr("192.0.2.1"), Keys: []gossip.Key{{Time: 1, Key: []byte("a")}},
		Managers: []netip.Addr{netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8::1")},
	}
	addrs := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	if diff := cmp.Diff(want, m.gossipSession(msg), addrs); diff != "" {
		t.Error(diff)
	}
	for _, addr := range []string{"", "0.0.0.0", "@"} { // a manager that does not know yet where others reach it
		msg.Node.Status.Addr = addr
		if got := m.gossipSession(msg).Advertise.String(); got != "192.0.2.7" {
			t.Errorf("with the address %q it is reached at %s", addr, got)
		}
	}
}
