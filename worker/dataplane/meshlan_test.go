package dataplane

import (
	"errors"
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
)

// address4 gives a host on the wire another address.
func (l *lab) address4(path, addr string) {
	l.t.Helper()
	err := withinPath(path, func(netns.NsHandle) error {
		eth, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.AddrAdd(eth, &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix(addr))})
	})
	if err != nil {
		l.t.Fatal(err)
	}
}

// TestLANWithTheIngressNetworksAddresses: the hosts' LAN is the ingress network's subnet.
// Peers with the addresses of the node itself in the ingress network, of a task and of nobody
// stay where they are, and are served.
func TestLANWithTheIngressNetworksAddresses(t *testing.T) {
	l := newLab(t, 2)
	a, b := l.nodes[0], l.nodes[1]
	l.address4(a.path, "10.0.0.5/24")
	l.address4(b.path, "10.0.0.6/24")
	peers := map[string]string{}
	for _, addr := range []string{"10.0.0.200", "10.0.0.201", "10.0.0.3", "10.0.0.77"} {
		name := "p" + netip.MustParseAddr(addr).String()[len("10.0.0."):]
		peers[addr] = l.host(name, netip.MustParseAddr(addr))
		echo(t, peers[addr], 80, name)
	}
	outside := l.host("outside", netip.MustParseAddr("192.0.2.50"))
	l.tell(&skepv1.NetworkUpdate{
		Complete: true, Networks: nets(), Services: []*skepv1.BalancedService{web(8080)},
		Endpoints: append(l.legs(), kept(a, "web.1", "10.0.0.3"), kept(b, "web.2", "10.0.0.4")),
	})
	echo(t, l.attach(a, "web.1", "ingress=10.0.0.3").NetNS, 80, "web.1")
	echo(t, l.attach(b, "web.2", "ingress=10.0.0.4").NetNS, 80, "web.2")
	for addr, peer := range peers {
		name := "p" + addr[len("10.0.0."):]
		for _, network := range []string{"tcp4", "udp4"} {
			wantWho(t, a.path, network, addr+":80", name, "10.0.0.5")
			wantWho(t, b.path, network, addr+":80", name, "10.0.0.6")
			// The task sees the entry node's address, as it would be its own neighbour otherwise.
			wantBoth(t, peer, network, "10.0.0.5:8080", "10.0.0.200")
			wantBoth(t, peer, network, "10.0.0.6:8080", "10.0.0.201")
		}
	}
	for _, network := range []string{"tcp4", "udp4"} {
		wantBoth(t, a.path, network, "10.0.0.5:8080", "10.0.0.200")
		wantBoth(t, a.path, network, "127.0.0.1:8080", "10.0.0.200")
		wantBoth(t, outside, network, "192.0.2.1:8080", "192.0.2.50")
	}
	// Nothing that is not published leads in, neither by the tasks' addresses nor by the mesh's.
	err := withinPath(outside, func(netns.NsHandle) error {
		return errors.Join(
			netlink.RouteAdd(&netlink.Route{Dst: ipNet(netip.PrefixFrom(a.state.Mesh, 32)), Gw: net.IPv4(192, 0, 2, 1)}),
			netlink.RouteAdd(&netlink.Route{Dst: ipNet(netip.MustParsePrefix("10.0.0.4/32")), Gw: net.IPv4(192, 0, 2, 1)}))
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{a.state.Mesh.String() + ":8080", "10.0.0.4:80"} {
		if name, _, err := whoIn(outside, "tcp4", to); err == nil {
			t.Errorf("%s is open to the outside: %s", to, name)
		}
	}
	l.wantClean()
	links, err := a.host.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		addrs, err := a.host.AddrList(link, netlink.FAMILY_V4)
		if err != nil {
			t.Fatal(err)
		}
		for _, addr := range addrs {
			if name := link.Attrs().Name; name != "eth0" && netip.MustParsePrefix("10.0.0.0/24").Contains(netip.MustParseAddr(addr.IP.String())) {
				t.Errorf("%s of the host has %s", name, addr.IP)
			}
		}
	}
}
