package dataplane

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
)

// kept is endpointOf a task that sees its clients.
func kept(n *labNode, task, addr string) *skepv1.OverlayEndpoint {
	e := endpointOf(n, "ingress", task, "s1", addr, true)
	e.KeepsSource = true
	return e
}

// edge is a lab of three nodes, all of which publish port 8080 of a service with a task on
// the first and one on the second.
func edge(t *testing.T) (l *lab, outside string) {
	t.Helper()
	l = newLab(t, 3)
	if !l.nodes[0].keepsSource {
		t.Skip("the kernel cannot answer clients by their own addresses")
	}
	l.tell(&skepv1.NetworkUpdate{
		Complete: true, Networks: nets(), Services: []*skepv1.BalancedService{web(8080)},
		Endpoints: append(l.legs(), kept(l.nodes[0], "web.1", "10.0.0.3"), kept(l.nodes[1], "web.2", "10.0.0.4")),
	})
	echo(t, l.attach(l.nodes[0], "web.1", "ingress=10.0.0.3").NetNS, 80, "web.1")
	echo(t, l.attach(l.nodes[1], "web.2", "ingress=10.0.0.4").NetNS, 80, "web.2")
	return l, l.host("outside", netip.MustParseAddr("192.0.2.50"))
}

func TestClientAddressAtPublishedPorts(t *testing.T) {
	l, outside := edge(t)
	for _, n := range l.nodes {
		for _, network := range []string{"tcp4", "udp4"} {
			wantBoth(t, outside, network, n.addr.String()+":8080", "192.0.2.50")
			for _, m := range l.nodes {
				seen := m.addr.String()
				if m == n { // the node's own address is on every way, that of its leg on one
					seen = fmt.Sprintf("10.0.0.%d", 200+slices.Index(l.nodes, n))
				}
				wantBoth(t, m.path, network, n.addr.String()+":8080", seen)
			}
		}
	}
	l.wantClean()
	// A task whose node cannot answer, and a service that does not want to, see the entry node.
	deaf := kept(l.nodes[1], "web.2", "10.0.0.4")
	deaf.KeepsSource = false
	l.tell(&skepv1.NetworkUpdate{Endpoints: []*skepv1.OverlayEndpoint{deaf}, RemovedEndpoints: []*skepv1.EndpointKey{{NetworkId: "ingress", TaskId: "web.1"}}})
	wantWho(t, outside, "tcp4", "192.0.2.3:8080", "web.2", "10.0.0.202")
	l.tell(&skepv1.NetworkUpdate{Endpoints: []*skepv1.OverlayEndpoint{kept(l.nodes[1], "web.2", "10.0.0.4")}})
	wantWho(t, outside, "tcp4", "192.0.2.3:8080", "web.2", "192.0.2.50")
	shy := web(8080)
	shy.MeshSource = skepv1.MeshSource_MESH_SOURCE_MASQUERADE
	l.tell(&skepv1.NetworkUpdate{Services: []*skepv1.BalancedService{shy}})
	wantWho(t, outside, "tcp4", "192.0.2.3:8080", "web.2", "10.0.0.202")
	// What the ingress network says counts for services that say nothing.
	shy.MeshSource = skepv1.MeshSource_MESH_SOURCE_UNSPECIFIED
	strict := nets()[0]
	strict.MeshSource = skepv1.MeshSource_MESH_SOURCE_MASQUERADE
	l.tell(&skepv1.NetworkUpdate{Networks: []*skepv1.OverlayNetwork{strict}, Services: []*skepv1.BalancedService{shy}})
	wantWho(t, outside, "udp4", "192.0.2.3:8080", "web.2", "10.0.0.202")
	l.wantClean()
}

// dialFrom connects from one port of a namespace, which other connections may have too. It is
// to be none that the kernel gives out by itself, which are 32768 to 60999.
func dialFrom(path, network string, port int, to string) (net.Conn, error) {
	d := net.Dialer{Timeout: 3 * time.Second, Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) }); e != nil {
			return e
		}
		return err
	}}
	d.LocalAddr = &net.TCPAddr{Port: port}
	if network == "udp4" {
		d.LocalAddr = &net.UDPAddr{Port: port}
	}
	var c net.Conn
	err := withinPath(path, func(netns.NsHandle) (err error) {
		c, err = d.DialContext(context.Background(), network, to)
		return err
	})
	return c, err
}

// TestOnePortAtSeveralEntryNodes: connections from one port of a client through all nodes,
// at once and to the same task, all live.
func TestOnePortAtSeveralEntryNodes(t *testing.T) {
	l, outside := edge(t)
	l.tell(&skepv1.NetworkUpdate{RemovedEndpoints: []*skepv1.EndpointKey{{NetworkId: "ingress", TaskId: "web.1"}}})
	for _, network := range []string{"tcp4", "udp4"} {
		wantOnePort(t, l, outside, network)
	}
}

func wantOnePort(t *testing.T, l *lab, outside, network string) {
	t.Helper()
	for round := range 3 { // the later ones meet what the former left in conntrack
		var open []net.Conn
		for _, n := range l.nodes {
			c, err := dialFrom(outside, network, 20000, n.addr.String()+":8080")
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			open = append(open, c)
		}
		for range 20 {
			for i, c := range open {
				if name, seen, err := whoOver(c); err != nil || name != "web.2" || seen != "192.0.2.50" {
					t.Fatalf("%s round %d, entry node %d: %q saw %q, %v", network, round, i+1, name, seen, err)
				}
			}
		}
		for _, c := range open {
			if tcp, ok := c.(*net.TCPConn); ok {
				_ = tcp.SetLinger(0) // the port is free at once
			}
			_ = c.Close()
		}
	}
}
