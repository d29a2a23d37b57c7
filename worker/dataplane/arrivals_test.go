package dataplane

import (
	"testing"

	"github.com/vishvananda/netns"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/netplan"
)

// TestPublishedPortsFromDockerEngines: what a Docker Engine leads to a task still has the
// published port, which is another's target here.
func TestPublishedPortsFromDockerEngines(t *testing.T) {
	l := newLab(t, 3)
	service := web(8080)
	service.Ports = append(service.Ports, &skepv1.MeshPort{Protocol: 6, Target: 8080, Published: 90})
	legs := l.legs()
	legs[2].LeadsToPublished = true
	tasks := []*skepv1.OverlayEndpoint{kept(l.nodes[0], "web.1", "10.0.0.3")}
	l.tell(&skepv1.NetworkUpdate{Complete: true, Networks: nets(), Services: []*skepv1.BalancedService{service}, Endpoints: append(legs, tasks...)})
	path := l.attach(l.nodes[0], "web.1", "ingress=10.0.0.3").NetNS
	echo(t, path, 80, "page")
	echo(t, path, 8080, "admin")
	// The third node is a Docker Engine: it sends from its address there, to the published port.
	engine, skep := l.nodes[2].meshNS(), l.nodes[1].meshNS()
	check := func() {
		t.Helper()
		wantWho(t, engine, "tcp4", "10.0.0.3:8080", "page", "10.0.0.202")
		wantWho(t, engine, "udp4", "10.0.0.3:8080", "page", "10.0.0.202")
		wantWho(t, engine, "tcp4", "10.0.0.3:90", "admin", "10.0.0.202")
		wantWho(t, skep, "tcp4", "10.0.0.3:8080", "admin", "10.0.0.201") // it has translated already
		l.wantClean()
	}
	check()
	// A daemon that starts again finds what is there, somebody's change is mended.
	n := l.nodes[0]
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	l.start(n)
	check()
	if err := withinPath(path, func(ns netns.NsHandle) error { return n.sandboxes["web.1"].arrivals.rules.remove(ns) }); err != nil {
		t.Fatal(err)
	}
	if found, err := n.Examine(t.Context()); err != nil || len(found) != 1 || !found[0].GetMended() {
		t.Errorf("found %v, %v", found, err)
	}
	check()
	// The port changes; then the engine goes, and with it the rules.
	moved := web(8081)
	l.tell(&skepv1.NetworkUpdate{Services: []*skepv1.BalancedService{moved}})
	wantWho(t, engine, "tcp4", "10.0.0.3:8081", "page", "10.0.0.202")
	wantWho(t, engine, "tcp4", "10.0.0.3:8080", "admin", "10.0.0.202")
	legs[2].LeadsToPublished = false
	l.tell(&skepv1.NetworkUpdate{Endpoints: legs[2:]})
	if _, _, err := whoIn(engine, "tcp4", "10.0.0.3:8081"); err == nil {
		t.Error("a port is translated for a node that is no engine")
	}
	l.wantClean()
}

// TestMTUBesideDockerEngines: a packet that a container may send must fit where an engine takes it.
func TestMTUBesideDockerEngines(t *testing.T) {
	d := &Dataplane{want: netplan.NewState()}
	for _, c := range []struct {
		gossip, encrypted bool
		says              uint32
		vxlan, want       int
	}{
		{false, false, 0, 8950, 8950},
		{false, false, 1300, 8950, 1300},
		{true, false, 0, 8950, 1450},
		{true, false, 0, 1400, 1400},
		{true, false, 1300, 8950, 1250},
		{true, false, 9000, 8950, 8950},
		{true, true, 0, 8950, insideMTU(&skepv1.OverlayNetwork{Encrypted: true}, 8950)},
	} {
		n := &skepv1.OverlayNetwork{Id: "n", Encrypted: c.encrypted, Mtu: c.says}
		d.want.Merge(&skepv1.NetworkUpdate{Complete: true, Node: &skepv1.LocalNode{Id: "x", Gossip: c.gossip}, Networks: []*skepv1.OverlayNetwork{n}})
		if got := d.insideMTU(n, c.vxlan); got != c.want {
			t.Errorf("%+v: MTU %d", c, got)
		}
	}
}
