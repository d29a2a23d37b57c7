package dataplane

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netns"
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api/networkdb"
	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/netplan"
	"github.com/skep-dev/skep/worker/gossip"
)

// peersIn are the overlay peers of a network among rows, and the names of its endpoints.
func peersIn(t *testing.T, r gossip.Rows, network string) (out []string) {
	t.Helper()
	for _, row := range r.Networks[network] {
		var peer networkdb.PeerRecord
		var e networkdb.EndpointRecord
		switch row.Table {
		case "overlay_peer_table":
			if err := proto.Unmarshal(row.Value, &peer); err != nil {
				t.Fatal(err)
			}
			out = append(out, strings.Join([]string{peer.GetEndpointIp(), peer.GetEndpointMac(), peer.GetTunnelEndpointIp()}, " "))
		case "endpoint_table":
			if err := proto.Unmarshal(row.Value, &e); err != nil {
				t.Fatal(err)
			}
			out = append(out, e.GetName()+" "+strings.Join(e.GetTaskAliases(), ","))
		}
	}
	slices.Sort(out)
	return out
}

// TestPublish: Docker Engines hear of the containers that are here, by the hardware addresses
// that they have, as soon as they come and go.
func TestPublish(t *testing.T) {
	l, _, path, _ := front(t)
	n := l.nodes[0]
	var p netplan.Publisher
	rows, changed := n.rows(&p)
	if rows.NodeID != "" || rows.Networks != nil {
		t.Errorf("in a swarm without Docker Engines there is %v", rows)
	}
	n.version++
	if err := n.Apply(t.Context(), &skepv1.NetworkUpdate{Version: n.version, Node: &skepv1.LocalNode{
		Id: n.id, DataAddr: n.addr.String(), IngressAddr: "10.0.0.200/24", Gossip: true, GossipPeers: []string{"192.0.2.9", "nobody"},
	}}); err != nil {
		t.Fatal(err)
	}
	<-changed
	rows, changed = n.rows(&p)
	if rows.NodeID != n.id || !slices.Equal(rows.Peers, []netip.Addr{netip.MustParseAddr("192.0.2.9")}) {
		t.Errorf("node %q gossips with %v", rows.NodeID, rows.Peers)
	}
	var hardware string
	if err := withinPath(path, func(ns netns.NsHandle) error {
		h, err := handleAt(path)
		if err != nil {
			return err
		}
		defer h.Close()
		link, err := h.LinkByName("eth0")
		if err == nil {
			hardware = link.Attrs().HardwareAddr.String()
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"10.0.1.2/24 02:42:0a:00:01:02 192.0.2.1", "10.0.1.3/24 " + hardware + " 192.0.2.1", "client client,h-client", "web.1 h-web.1,web.1",
	}
	if diff := cmp.Diff(want, peersIn(t, rows, "n1")); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"10.0.0.200/24 02:42:0a:00:00:c8 192.0.2.1"}, peersIn(t, rows, "ingress")); diff != "" {
		t.Error(diff)
	}
	if err := n.Detach(t.Context(), "web.1"); err != nil {
		t.Fatal(err)
	}
	<-changed
	rows, _ = n.rows(&p)
	if diff := cmp.Diff([]string{want[0], want[2]}, peersIn(t, rows, "n1")); diff != "" {
		t.Error(diff)
	}
}
