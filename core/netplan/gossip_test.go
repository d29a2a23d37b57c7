package netplan

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api/networkdb"
	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/netdb"
)

// clearNetwork is one that Docker Engines can be in.
func clearNetwork(i int) *skepv1.OverlayNetwork {
	n := network(i)
	n.Subnets = n.Subnets[:1]
	return n
}

// gossiping is a node in a swarm with Docker Engines, with tasks a of s1 and f of s2 in n1 and a
// in the ingress network; n2 is encrypted, n3 has IPv6.
func gossiping() *State {
	s := NewState()
	sealed := clearNetwork(2)
	sealed.Encrypted = true
	s.Merge(&skepv1.NetworkUpdate{
		Complete: true, Version: 1, Node: &skepv1.LocalNode{Id: "node1", DataAddr: "192.0.2.1", IngressAddr: "10.0.0.250/24", Gossip: true},
		Networks: []*skepv1.OverlayNetwork{clearNetwork(0), clearNetwork(1), sealed, network(3)},
		Services: []*skepv1.BalancedService{service("s1", true, 0, 1), service("s2", false)},
		Endpoints: []*skepv1.OverlayEndpoint{
			ep("n1", "a", "s1", "node1", 3, true), ep("n0", "a", "s1", "node1", 3, true), ep("n1", "b", "s1", "node2", 4, true),
			ep("n1", "f", "s2", "node1", 6, false), ep("n2", "a", "s1", "node1", 3, true), ep("n3", "a", "s1", "node1", 3, true),
			{Key: &skepv1.EndpointKey{NetworkId: "n0", TaskId: "node1"}, NodeId: "node1", NodeAddr: "192.0.2.1", Addresses: []string{"10.0.0.250/24"}},
			{Key: &skepv1.EndpointKey{NetworkId: "n0", TaskId: "node2"}, NodeId: "node2", NodeAddr: "192.0.2.2", Addresses: []string{"10.0.0.251/24"}},
		},
	})
	return s
}

// here are sandboxes of this node in all networks, one of which the State does not know.
func here() []Attached {
	var out []Attached
	for i := range 4 {
		out = append(out, Attached{fmt.Sprintf("n%d", i), netip.AddrFrom4([4]byte{10, 0, byte(i), 3}), []string{"0123456789ab", "s1-too"}})
	}
	return append(out, Attached{"n1", netip.MustParseAddr("10.0.1.6"), nil}, Attached{"n1", netip.MustParseAddr("10.0.1.99"), nil}, Attached{"n9", netip.MustParseAddr("10.0.9.1"), nil})
}

// readRows is what rows say, without their keys.
func readRows(t *testing.T, rows map[string][]netdb.Row) []string {
	t.Helper()
	var out []string
	keys := map[string]bool{}
	for id, list := range rows {
		for _, r := range list {
			if len(r.Key) != 64 || keys[r.Table+r.Key] {
				t.Errorf("key %s is no 64 digits, or twice there", r.Key)
			}
			keys[r.Table+r.Key] = true
			var peer networkdb.PeerRecord
			var e networkdb.EndpointRecord
			switch r.Table {
			case "overlay_peer_table":
				if err := proto.Unmarshal(r.Value, &peer); err != nil {
					t.Fatal(err)
				}
				out = append(out, fmt.Sprintf("%s peer %s %s %s", id, peer.GetEndpointIp(), peer.GetEndpointMac(), peer.GetTunnelEndpointIp()))
			case "endpoint_table":
				if err := proto.Unmarshal(r.Value, &e); err != nil {
					t.Fatal(err)
				}
				text := fmt.Sprintf("%s endpoint %s of %s(%s) %s vip %q aliases %v %v", id, e.GetName(), e.GetServiceName(), e.GetServiceId(), e.GetEndpointIp(), e.GetVirtualIp(), e.GetAliases(), e.GetTaskAliases())
				for _, p := range e.GetIngressPorts() {
					text += fmt.Sprintf(" %d:%d/%s", p.GetPublishedPort(), p.GetTargetPort(), p.GetProtocol())
				}
				if e.GetServiceDisabled() {
					text += " disabled"
				}
				out = append(out, text)
			default:
				t.Errorf("table %s", r.Table)
			}
		}
	}
	slices.Sort(out)
	return out
}

// TestPublish: Docker Engines hear of this node's sandboxes in networks that they can be in.
func TestPublish(t *testing.T) {
	var p Publisher
	s := gossiping()
	want := []string{
		`n0 endpoint s1.a of s1(s1) 10.0.0.3 vip "10.0.0.201" aliases [s1-too] [0123456789ab] 8001:80/TCP`,
		`n0 peer 10.0.0.250/24 02:42:0a:00:00:fa 192.0.2.1`,
		`n0 peer 10.0.0.3/24 02:42:0a:00:00:03 192.0.2.1`,
		`n1 endpoint s1.a of s1(s1) 10.0.1.3 vip "10.0.1.201" aliases [s1-too] [0123456789ab]`,
		`n1 peer 10.0.1.3/24 02:42:0a:00:01:03 192.0.2.1`,
		`n1 peer 10.0.1.6/24 02:42:0a:00:01:06 192.0.2.1`,
	}
	if diff := cmp.Diff(want, readRows(t, p.Rows(s, here()))); diff != "" {
		t.Error(diff)
	}
	off := proto.CloneOf(s.Node())
	off.Gossip = false
	s.Merge(&skepv1.NetworkUpdate{Version: 2, Node: off})
	if rows := p.Rows(s, here()); rows != nil {
		t.Errorf("without Docker Engines there are %v", rows)
	}
}

// TestPublishLife: Docker Engine 20.10 takes no update of an endpoint but that it is disabled,
// so everything else is a new one.
func TestPublishLife(t *testing.T) {
	var p Publisher
	s := gossiping()
	last := map[string]bool{}
	for i, step := range []struct {
		change  *skepv1.OverlayEndpoint
		want    string // of the row, empty for none
		created bool
	}{
		{ep("n1", "f", "s2", "node1", 6, false), "", false},
		{ep("n1", "f", "s2", "node1", 6, true), "enabled", true},
		{ep("n1", "f", "s2", "node1", 6, false), "disabled", false},
		{ep("n1", "f", "s2", "node1", 6, true), "enabled", true},
		{func() *skepv1.OverlayEndpoint {
			e := ep("n1", "f", "s2", "node1", 6, true)
			e.Aliases = []string{"other"}
			return e
		}(), "enabled", true},
	} {
		s.Merge(&skepv1.NetworkUpdate{Version: uint64(2 + i), Endpoints: []*skepv1.OverlayEndpoint{step.change}})
		var got string
		now := map[string]bool{}
		created := false
		for _, r := range p.Rows(s, here())["n1"] {
			var e networkdb.EndpointRecord
			if r.Table != endpointTable || proto.Unmarshal(r.Value, &e) != nil || !strings.HasPrefix(e.GetName(), "s2") {
				continue
			}
			got = "enabled"
			if e.GetServiceDisabled() {
				got = "disabled"
			}
			now[r.Key] = true
			created = created || !last[r.Key]
		}
		if got != step.want || created != step.created {
			t.Errorf("step %d: it is %q, created: %t", i, got, created)
		}
		last = now
	}
}
