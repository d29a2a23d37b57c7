package netplan

import (
	"net/netip"
	"slices"
	"testing"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
)

// TestTunnelAddr: addresses are told apart, lie in their network and stay as they are, since
// nodes of several versions must agree on them.
func TestTunnelAddr(t *testing.T) {
	a, b := TunnelAddr("node1"), TunnelAddr("node2")
	if a == b || !TunnelNetwork().Contains(a) || !TunnelNetwork().Contains(b) || !a.IsPrivate() {
		t.Errorf("%s and %s in %s", a, b, TunnelNetwork())
	}
	if want := netip.MustParseAddr("fd73:6b65:7000:ca12:f31b:8cbf:5f29:e268"); a != want {
		t.Errorf("node1 has %s, want %s", a, want)
	}
}

// TestEncryptedNetworksToLookAt: an endpoint changes what is behind a node, but in the ingress
// network, where it is the node's own address.
func TestEncryptedNetworksToLookAt(t *testing.T) {
	s := NewState()
	s.Merge(&skepv1.NetworkUpdate{Complete: true, Networks: []*skepv1.OverlayNetwork{
		{Id: "mesh", Ingress: true, Encrypted: true}, {Id: "clear"}, {Id: "sealed", Encrypted: true},
	}})
	u := new(skepv1.NetworkUpdate)
	for _, id := range []string{"mesh", "clear", "sealed"} {
		u.Endpoints = append(u.Endpoints, &skepv1.OverlayEndpoint{Key: &skepv1.EndpointKey{NetworkId: id, TaskId: "t"}, NodeId: "n2"})
	}
	if got := s.Merge(u).Encrypted; !slices.Equal(got, []string{"sealed"}) {
		t.Errorf("endpoints came: %v", got)
	}
	peer := &skepv1.NetworkPeer{Key: &skepv1.PeerKey{NetworkId: "mesh", NodeId: "n2"}}
	if got := s.Merge(&skepv1.NetworkUpdate{Peers: []*skepv1.NetworkPeer{peer}}).Encrypted; !slices.Equal(got, []string{"mesh"}) {
		t.Errorf("a node came: %v", got)
	}
}
