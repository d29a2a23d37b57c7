package netplan

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
)

// espPeer is node2, or another, as a manager tells node1 of it after some rotations.
func espPeer(network, node string, generation uint32) *skepv1.NetworkPeer {
	p := &skepv1.NetworkPeer{Key: &skepv1.PeerKey{NetworkId: network, NodeId: node}, Addr: "192.0.2." + node[4:]}
	for g := generation; g+3 > generation && g > 0; g-- {
		p.EspKeys = append(p.EspKeys, &skepv1.EspKey{
			OutSpi: 0x1000 + g, OutKey: bytes.Repeat([]byte{1, byte(g)}, 10), InSpi: 0x2000 + uint32(node[4])<<8 + g, InKey: bytes.Repeat([]byte{2, byte(g)}, 10),
			Sending: g == generation-1, Generation: uint64(g),
		})
	}
	return p
}

func espState(networks ...string) *State {
	s := NewState()
	u := &skepv1.NetworkUpdate{Complete: true, Version: 1, Node: &skepv1.LocalNode{Id: "node1", DataAddr: "192.0.2.1"}}
	for _, id := range networks {
		u.Networks = append(u.Networks, &skepv1.OverlayNetwork{Id: id, Name: id, Encrypted: true, Encryption: model.ESP})
	}
	s.Merge(u)
	return s
}

// did carries operations out on what the kernel has, and tells them.
func did(have *ESP, ops []ESPOp) string {
	var out []string
	for _, op := range ops {
		verb := "-"
		if op.Put {
			verb = "+"
		}
		have.Do(op)
		if op.Way != nil {
			out = append(out, fmt.Sprintf("%sway %s %x", verb, op.Way.Dst, op.Way.SPI))
		} else {
			out = append(out, fmt.Sprintf("%s%s %x", verb, op.SA.Dst, op.SA.SPI))
		}
	}
	return strings.Join(out, ", ")
}

func TestESPPlan(t *testing.T) {
	s := espState("a", "b")
	have := NewESP()
	version := uint64(1)
	step := func(what string, u *skepv1.NetworkUpdate, want string) {
		t.Helper()
		version++
		u.Version = version
		s.Merge(u)
		plan := s.ESP([]string{"a", "b"})
		ops := plan.Diff(have)
		if got := did(&have, ops); got != want {
			t.Errorf("%s:\n got %s\nwant %s", what, got, want)
		}
		if again := plan.Diff(have); len(again) > 0 {
			t.Errorf("%s: there is more to do: %v", what, again)
		}
		if all := Additions(ops); len(all) > len(ops) || len(all) > 0 && !all[len(all)-1].Put {
			t.Errorf("%s: additions take away: %v", what, all)
		}
	}
	peers := func(list ...*skepv1.NetworkPeer) *skepv1.NetworkUpdate { return &skepv1.NetworkUpdate{Peers: list} }
	step("a node comes", peers(espPeer("a", "node2", 4)), "+192.0.2.1 5202, +192.0.2.1 5203, +192.0.2.1 5204, +192.0.2.2 1003, +way 192.0.2.2 1003")
	step("in another network as well", peers(espPeer("b", "node2", 4)), "")
	step("keys rotate", peers(espPeer("a", "node2", 5), espPeer("b", "node2", 5)),
		"+192.0.2.1 5205, +192.0.2.2 1004, +way 192.0.2.2 1004, -192.0.2.1 5202, -192.0.2.2 1003")
	step("it leaves one", &skepv1.NetworkUpdate{RemovedPeers: []*skepv1.PeerKey{{NetworkId: "a", NodeId: "node2"}}}, "")
	other := espPeer("b", "node2", 5)
	other.EspKeys[1].OutKey = bytes.Repeat([]byte{9}, 20)
	step("another key for what is sent", peers(other), "-192.0.2.2 1004, +192.0.2.2 1004")
	silent := espPeer("b", "node2", 5)
	silent.EspKeys = nil
	step("nobody says the keys", peers(silent), "")
	step("it is gone", &skepv1.NetworkUpdate{RemovedPeers: []*skepv1.PeerKey{{NetworkId: "b", NodeId: "node2"}}},
		"-way 192.0.2.2 1004, -192.0.2.1 5203, -192.0.2.1 5204, -192.0.2.1 5205, -192.0.2.2 1004")
	twin := espPeer("a", "node3", 3)
	twin.EspKeys[0].InSpi = 0x5203 // which node2 has as well
	step("two with one index", peers(espPeer("a", "node2", 3), twin),
		"+192.0.2.1 5201, +192.0.2.1 5202, +192.0.2.1 5203, +192.0.2.1 5301, +192.0.2.1 5302, +192.0.2.2 1002, +192.0.2.3 1002, +way 192.0.2.2 1002, +way 192.0.2.3 1002")
	if clashes := s.ESP([]string{"a"}).Clashes; len(clashes) != 1 || !strings.Contains(clashes[0], "node3 sends cannot be told from what node node2 sends") {
		t.Errorf("clashes %q", clashes)
	}
	// A kernel that does not show keys is believed.
	for id, sa := range have.SAs {
		sa.Key = ESPKey{}
		have.SAs[id] = sa
	}
	if ops := s.ESP([]string{"a"}).Diff(have); len(ops) != 0 {
		t.Errorf("hidden keys: %v", ops)
	}
	if text := fmt.Sprintf("%v %+v %#v", s.ESP([]string{"a"}), have, ESPKey{7}); strings.Contains(text, "[2 3 2 3") || strings.Contains(text, "0x7") {
		t.Errorf("a key is printed: %s", text)
	}
}

// TestESPOfAMovedNode: what is sent by from its former address goes, though the other node stays.
func TestESPOfAMovedNode(t *testing.T) {
	s := espState("a")
	s.Merge(&skepv1.NetworkUpdate{Version: 2, Peers: []*skepv1.NetworkPeer{espPeer("a", "node2", 2)}})
	have := s.ESP([]string{"a"})
	s.Merge(&skepv1.NetworkUpdate{Version: 3, Node: &skepv1.LocalNode{Id: "node1", DataAddr: "192.0.2.9"}})
	plan, ways := s.ESP([]string{"a"}), []string{}
	for _, op := range Additions(plan.Diff(have)) {
		if op.Way != nil {
			ways = append(ways, fmt.Sprintf("%t %s", op.Put, op.Way.Src))
		}
	}
	if want := []string{"false 192.0.2.1", "true 192.0.2.9"}; !slices.Equal(ways, want) {
		t.Errorf("ways %q, want %q", ways, want)
	}
	did(&have, plan.Diff(have))
	if again := plan.Diff(have); len(again) > 0 {
		t.Errorf("there is more to do: %v", again)
	}
}

// TestESPOfTwoWithOneAddress: what is sent there is encrypted for the first, as what comes from
// there is decrypted for it.
func TestESPOfTwoWithOneAddress(t *testing.T) {
	s := espState("a")
	one := espPeer("a", "node2", 2)
	s.Merge(&skepv1.NetworkUpdate{Version: 2, Peers: []*skepv1.NetworkPeer{one}})
	first := s.ESP([]string{"a"})
	twin := espPeer("a", "node3", 2)
	twin.Addr = "192.0.2.2"
	for i, k := range twin.EspKeys {
		k.InSpi, k.OutKey = one.EspKeys[i].GetInSpi(), bytes.Repeat([]byte{9}, 20)
	}
	s.Merge(&skepv1.NetworkUpdate{Version: 3, Peers: []*skepv1.NetworkPeer{twin}})
	both := s.ESP([]string{"a"})
	if ops := both.Diff(first); len(ops) > 0 {
		t.Errorf("the second changes %v", ops)
	}
	if text := strings.Join(both.Clashes, "\n"); !strings.Contains(text, "sent to node node3 at 192.0.2.2 cannot be told from what is sent to node node2") {
		t.Errorf("clashes %q", text)
	}
}

// TestESPEndpointsAreNoneOfItsBusiness: VXLAN knows what is behind a node.
func TestESPEndpointsAreNoneOfItsBusiness(t *testing.T) {
	s := espState("n1")
	u := &skepv1.NetworkUpdate{Version: 2, Endpoints: []*skepv1.OverlayEndpoint{ep("n1", "a", "s", "node2", 3, true)}}
	if p := s.Merge(u); len(p.Encrypted) != 0 {
		t.Errorf("an endpoint changes %v", p.Encrypted)
	}
	if p := s.Merge(&skepv1.NetworkUpdate{Version: 3, Peers: []*skepv1.NetworkPeer{espPeer("n1", "node2", 4)}}); len(p.Encrypted) != 1 {
		t.Errorf("a node changes %v", p.Encrypted)
	}
}
