package dataplane

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/worker/runtime"
)

// dual is an endpoint with addresses of both families: 10.0.NET.HOST and fd00:NET::HOST.
func dual(n *labNode, network, task, service string, segment, host int) *skepv1.OverlayEndpoint {
	e := endpointOf(n, network, task, service, fmt.Sprintf("10.0.%d.%d", segment, host), true)
	e.Addresses = append(e.Addresses, fmt.Sprintf("fd00:%d::%x/64", segment, host))
	e.KeepsSource = true
	return e
}

func (l *lab) attachDual(n *labNode, id, network string, segment, host int) string {
	l.t.Helper()
	s, err := n.Attach(l.t.Context(), runtime.SandboxRequest{ContainerID: id, Name: id, Mode: "bridge", Overlays: []runtime.OverlayRequest{{
		NetworkID: network, Name: network, Address: netip.MustParsePrefix(fmt.Sprintf("10.0.%d.%d/24", segment, host)),
		Address6: netip.MustParsePrefix(fmt.Sprintf("fd00:%d::%x/64", segment, host)),
	}}})
	if err != nil {
		l.t.Fatal(err)
	}
	return s.NetNS
}

// address6 gives a host on the wire an IPv6 address.
func (l *lab) address6(path, addr string) {
	l.t.Helper()
	err := withinPath(path, func(netns.NsHandle) error {
		eth, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return errors.Join(sysctl("net/ipv6/conf/eth0/disable_ipv6", "0"),
			netlink.AddrAdd(eth, &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix(addr)), Flags: unix.IFA_F_NODAD}))
	})
	if err != nil {
		l.t.Fatal(err)
	}
}

// TestIPv6: addresses, service addresses, names and published ports.
func TestIPv6(t *testing.T) { testIPv6(t, nets()[:2]) }

func testIPv6(t *testing.T, networks []*skepv1.OverlayNetwork) {
	t.Helper()
	l := newLab(t, 2)
	outside := l.host("outside", netip.MustParseAddr("192.0.2.50"))
	l.address6(outside, "2001:db8::50/64")
	u := &skepv1.NetworkUpdate{Complete: true, Networks: networks, Services: []*skepv1.BalancedService{web(8080)}}
	u.Services[0].Vips = append(u.Services[0].Vips, &skepv1.VirtualAddress{NetworkId: "n1", Addr: "fd00:1::64/64"})
	for i, n := range u.GetNetworks() {
		n.Subnets = append(n.Subnets, &skepv1.OverlaySubnet{Subnet: fmt.Sprintf("fd00:%d::/64", i), Gateway: fmt.Sprintf("fd00:%d::1", i)})
	}
	for i, n := range l.nodes {
		l.address6(n.path, fmt.Sprintf("2001:db8::%d/64", i+1))
		leg := dual(n, "ingress", n.id, "", 0, 200+i)
		leg.Name = ""
		u.Endpoints = append(u.Endpoints, leg,
			dual(n, "n1", fmt.Sprint("client.", i), "", 1, 2+i), dual(n, "n1", fmt.Sprint("web.", i), "s1", 1, 4+i), dual(n, "ingress", fmt.Sprint("web.", i), "s1", 0, 4+i))
	}
	for i, n := range l.nodes {
		mine := &skepv1.NetworkUpdate{Complete: true, Version: 1, Networks: u.GetNetworks(), Services: u.GetServices(), Endpoints: u.GetEndpoints(), Node: &skepv1.LocalNode{
			Id: n.id, DataAddr: n.addr.String(), IngressAddr: fmt.Sprintf("10.0.0.%d/24", 200+i), IngressAddr6: fmt.Sprintf("fd00:0::%x/64", 200+i),
		}}
		if err := n.Apply(t.Context(), mine); err != nil {
			t.Fatal(err)
		}
		n.version = 1
	}
	if networks[0].GetEncrypted() {
		l.tellPeers(1, networks[0])
	}
	var clients []string
	for i, n := range l.nodes {
		name := fmt.Sprint("web.", i)
		clients = append(clients, l.attachDual(n, fmt.Sprint("client.", i), "n1", 1, 2+i))
		inside := l.attachDual(n, name, "n1", 1, 4+i)
		echoOn(t, "6", inside, 80, name)
		edge := l.attachDual(n, name+"-edge", "ingress", 0, 4+i)
		echoOn(t, "6", edge, 80, name)
	}
	for i, client := range clients {
		seen := fmt.Sprintf("fd00:1::%x", 2+i)
		for _, network := range []string{"tcp6", "udp6"} {
			wantWho(t, client, network, "[fd00:1::4]:80", "web.0", seen)
			wantWho(t, client, network, "[fd00:1::5]:80", "web.1", seen)
			wantBoth(t, client, network, "[fd00:1::64]:80", seen)
		}
		wantNames(t, client, "web", dns.TypeAAAA, "NOERROR", "fd00:1::64")
		wantNames(t, client, "tasks.web", dns.TypeAAAA, "NOERROR", "fd00:1::4", "fd00:1::5")
		wantNames(t, client, "web", dns.TypeA, "NOERROR", "10.0.1.100")
	}
	for i, n := range l.nodes {
		at := fmt.Sprintf("[2001:db8::%d]:8080", i+1)
		wantBoth(t, outside, "tcp6", at, "2001:db8::50")
		wantBoth(t, outside, "udp6", at, "")
		wantBoth(t, n.path, "tcp6", at, "")
		wantBoth(t, n.path, "udp6", at, "")
		for _, network := range []string{"tcp6", "udp6"} { // the node itself, seen as such
			wantBoth(t, n.path, network, "[::1]:8080", fmt.Sprintf("fd00::%x", 200+i))
		}
	}
	// One port of a client through both nodes, each time to one task or to two.
	for round := range 16 {
		var open []net.Conn
		for i := range l.nodes {
			c, err := dialFrom(outside, "tcp6", 21000+round, fmt.Sprintf("[2001:db8::%d]:8080", i+1))
			if err != nil {
				t.Fatalf("round %d, entry node %d: %v", round, i+1, err)
			}
			defer c.Close()
			open = append(open, c)
		}
		for range 3 {
			for _, c := range open {
				if _, seen, err := whoOver(c); err != nil || seen != "2001:db8::50" {
					t.Fatalf("round %d: saw %q, %v", round, seen, err)
				}
			}
		}
	}
	l.wantClean()
}

// TestRemovedTablesComeBack: a firewall that is loaded anew removes ours too; they come back
// at once, and only they.
func TestRemovedTablesComeBack(t *testing.T) {
	l := newLab(t, 1)
	n := l.nodes[0]
	l.tell(&skepv1.NetworkUpdate{Complete: true, Networks: nets(), Services: []*skepv1.BalancedService{web(8080)}, Endpoints: append(l.legs(),
		endpointOf(n, "ingress", "web.1", "s1", "10.0.0.3", true))})
	echo(t, l.attach(n, "web.1", "ingress=10.0.0.3").NetNS, 80, "web.1")
	outside := l.host("outside", netip.MustParseAddr("192.0.2.50"))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	for range 3 {
		c, err := openNFT(n.hostNS)
		if err != nil {
			t.Fatal(err)
		}
		c.FlushRuleset()
		if err := c.Flush(); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		for name := ""; name != "web.1"; name, _, err = whoIn(outside, "tcp4", "192.0.2.1:8080") {
			if time.Since(begin) > 5*time.Second {
				t.Fatalf("the port is not published again: %v", err)
			}
		}
	}
	l.wantClean()
}
