package dataplane

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"

	"github.com/miekg/dns"
	"github.com/moby/moby/api/types/network"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/netplan"
	"github.com/skep-dev/skep/worker/runtime"
)

// onBridge connects a container to a network of the node and returns its place.
func onBridge(t *testing.T, n *labNode, id, name string, wanted ...netip.Addr) runtime.Sandbox {
	t.Helper()
	s, err := n.Attach(t.Context(), runtime.SandboxRequest{
		ContainerID: id, Name: id, Hostname: "h-" + id, Mode: "bridge", Overlays: []runtime.OverlayRequest{{Name: name, Aliases: []string{"a-" + id}, Wanted: wanted}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestNetworksOfOneNodeAreNotGossiped: Docker Engines have no part in them.
func TestNetworksOfOneNodeAreNotGossiped(t *testing.T) {
	l := newLab(t, 1)
	n := l.nodes[0]
	if _, err := n.CreateBridge(t.Context(), network.CreateRequest{Name: "mine"}); err != nil {
		t.Fatal(err)
	}
	onBridge(t, n, "one", "mine")
	n.version++
	if err := n.Apply(t.Context(), &skepv1.NetworkUpdate{Complete: true, Version: n.version, Node: &skepv1.LocalNode{Id: n.id, DataAddr: n.addr.String(), Gossip: true}}); err != nil {
		t.Fatal(err)
	}
	var p netplan.Publisher
	if rows, _ := n.rows(&p); rows.NodeID != n.id || len(rows.Networks) > 0 {
		t.Errorf("published %v", rows)
	}
}

// TestNetworksOfOneNode connects containers to a bridge of their own, without any swarm, and
// keeps it over what the managers say and over a restart.
func TestNetworksOfOneNode(t *testing.T) {
	l := newLab(t, 1)
	n := l.nodes[0]
	create := func(req network.CreateRequest) string {
		t.Helper()
		id, err := n.CreateBridge(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	id := create(network.CreateRequest{Name: "mine"})
	other := create(network.CreateRequest{Name: "other", IPAM: &network.IPAM{Config: []network.IPAMConfig{{Subnet: netip.MustParsePrefix("10.9.0.0/24")}}}})
	one, two := onBridge(t, n, "one", "mine"), onBridge(t, n, "two", id)
	far := onBridge(t, n, "far", "other", netip.MustParseAddr("10.9.0.77"))
	if got := far.Overlays["other"]; got == nil || got.IPAddress != netip.MustParseAddr("10.9.0.77") || got.NetworkID != other {
		t.Fatalf("an address that was asked for: %+v", got)
	}
	addr := two.Overlays["mine"].IPAddress
	echo(t, two.NetNS, 80, "two")
	wantWho(t, one.NetNS, "tcp4", addr.String()+":80", "two", one.Overlays["mine"].IPAddress.String())
	for _, name := range []string{"two", "h-two", "a-two", "two.mine"} {
		wantNames(t, one.NetNS, name, dns.TypeA, "NOERROR", addr.String())
	}
	if _, err := n.Attach(t.Context(), runtime.SandboxRequest{
		ContainerID: "two", Name: "new", Former: "two", Hostname: "h-two", Mode: "bridge", Overlays: two.Attached,
	}); err != nil {
		t.Fatal(err)
	}
	wantNames(t, one.NetNS, "new", dns.TypeA, "NOERROR", addr.String())
	wantNames(t, one.NetNS, "a-two", dns.TypeA, "NOERROR", addr.String())
	wantNames(t, far.NetNS, "two", dns.TypeA, "SERVFAIL") // asked outside, where nobody answers here
	l.wantClean()

	// A swarm comes, and what it says leaves the node's own networks alone.
	told := &skepv1.NetworkUpdate{Complete: true, Networks: nets(), Endpoints: append(l.legs(), endpointOf(n, "n1", "task", "", "10.0.1.3", true))}
	l.tell(told)
	want := netplan.NewState()
	want.Merge(told)
	want.Merge(&skepv1.NetworkUpdate{Node: n.want.Node()})
	if !bytes.Equal(n.Digest(), netplan.Digest(want.Snapshot())) {
		t.Error("the node's own networks are part of what the managers compare")
	}
	wantNames(t, one.NetNS, "two", dns.TypeA, "NOERROR", addr.String())
	l.attach(n, "task", "n1=10.0.1.3")
	wantWho(t, one.NetNS, "tcp4", addr.String()+":80", "two", one.Overlays["mine"].IPAddress.String())
	l.wantClean()

	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	l.start(n)
	wantNames(t, one.NetNS, "two", dns.TypeA, "NOERROR", addr.String())
	wantWho(t, one.NetNS, "tcp4", addr.String()+":80", "two", one.Overlays["mine"].IPAddress.String())
	l.wantClean()

	if err := n.RemoveBridge(t.Context(), id); model.KindOf(err) != model.Denied || !strings.Contains(err.Error(), "has active endpoints") {
		t.Errorf("a network in use: %v", err)
	}
	for _, c := range []string{"one", "two"} {
		if err := n.Detach(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.RemoveBridge(t.Context(), id); err != nil {
		t.Error(err)
	}
	if list := n.ListBridges(); len(list) != 1 || list[0].Name != "other" || list[0].IPAM.Config[0].Gateway != netip.MustParseAddr("10.9.0.1") {
		t.Errorf("left: %+v", list)
	}
	l.wantClean()
}

func TestBridgesAreRefused(t *testing.T) {
	l := newLab(t, 1)
	n := l.nodes[0]
	on := true
	subnet := func(text string) *network.IPAM {
		return &network.IPAM{Config: []network.IPAMConfig{{Subnet: netip.MustParsePrefix(text)}}}
	}
	if _, err := n.CreateBridge(t.Context(), network.CreateRequest{Name: "small", IPAM: subnet("10.8.0.0/30")}); err != nil {
		t.Fatal(err)
	}
	onBridge(t, n, "one", "small")
	for want, req := range map[string]network.CreateRequest{
		"already exists":               {Name: "small"},
		"Pool overlaps":                {Name: "x", IPAM: subnet("10.8.0.0/16")},
		"doesn't contain this address": {Name: "x", IPAM: &network.IPAM{Config: []network.IPAMConfig{{Subnet: netip.MustParsePrefix("10.7.0.0/24"), Gateway: netip.MustParseAddr("10.6.0.1")}}}},
		"IPv6 is not implemented":      {Name: "x", EnableIPv6: &on},
		"the option com.docker.network.bridge.name is not implemented": {Name: "x", Options: map[string]string{"com.docker.network.bridge.name": "y"}},
		"invalid network name": {Name: "a/b"},
	} {
		if _, err := n.CreateBridge(t.Context(), req); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v; want %q", req, err, want)
		}
	}
	for want, o := range map[string]runtime.OverlayRequest{
		"no address is free":             {Name: "small"},
		"no configured subnet contains":  {Name: "small", Wanted: []netip.Addr{netip.MustParseAddr("10.1.1.1")}},
		"Address already in use":         {Name: "small", Wanted: []netip.Addr{netip.MustParseAddr("10.8.0.1")}},
		"IPv6 of bridge networks is not": {Name: "small", Wanted: []netip.Addr{netip.MustParseAddr("fd00::1")}},
	} {
		if _, err := n.Attach(t.Context(), runtime.SandboxRequest{ContainerID: "two", Mode: "bridge", Overlays: []runtime.OverlayRequest{o}}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v; want %q", o, err, want)
		}
	}
	l.wantClean()
}
