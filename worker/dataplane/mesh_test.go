package dataplane

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/netplan"
	"github.com/skep-dev/skep/worker/runtime"
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

// TestChangesOfTasksLeaveTheHostAlone: only a port that comes or goes touches the host's rules.
func TestChangesOfTasksLeaveTheHostAlone(t *testing.T) {
	l := newLab(t, 1)
	n := l.nodes[0]
	l.tell(&skepv1.NetworkUpdate{Complete: true, Networks: nets(), Services: []*skepv1.BalancedService{web(8080)}, Endpoints: append(l.legs(), kept(n, "web.1", "10.0.0.3"))})
	at := func() (gen uint32) {
		if err := within(n.hostNS, func() (err error) { gen, err = generation(); return err }); err != nil {
			t.Fatal(err)
		}
		return gen
	}
	before := at()
	l.tell(&skepv1.NetworkUpdate{Endpoints: []*skepv1.OverlayEndpoint{kept(n, "web.2", "10.0.0.4")}})
	l.tell(&skepv1.NetworkUpdate{RemovedEndpoints: []*skepv1.EndpointKey{{NetworkId: "ingress", TaskId: "web.1"}}})
	l.tell(&skepv1.NetworkUpdate{RemovedEndpoints: []*skepv1.EndpointKey{{NetworkId: "ingress", TaskId: "web.2"}}})
	if now := at(); now != before {
		t.Errorf("the host's rules changed %d times", now-before)
	}
	l.wantClean()
	l.tell(&skepv1.NetworkUpdate{Services: []*skepv1.BalancedService{web(8080, 8081)}})
	if now := at(); now != before+1 {
		t.Errorf("the host's rules changed %d times by one new port", now-before)
	}
	l.wantClean()
}

// TestConnectionsOfTheHostEnd: one to a task that is gone ends, even if it only waits.
func TestConnectionsOfTheHostEnd(t *testing.T) {
	l := newLab(t, 1)
	n := l.nodes[0]
	l.tell(&skepv1.NetworkUpdate{Complete: true, Networks: nets(), Services: []*skepv1.BalancedService{web(8080)}, Endpoints: append(l.legs(), kept(n, "web.1", "10.0.0.3"))})
	echo(t, l.attach(n, "web.1", "ingress=10.0.0.3").NetNS, 80, "web.1")
	var open []net.Conn
	for _, at := range []string{"127.0.0.1:8080", "192.0.2.1:8080"} {
		c, err := dialIn(n.path, "tcp4", at)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if name, _, err := whoOver(c); err != nil || name != "web.1" {
			t.Fatalf("%s: %q, %v", at, name, err)
		}
		open = append(open, c)
	}
	if err := n.Detach(t.Context(), "web.1"); err != nil {
		t.Fatal(err)
	}
	l.tell(&skepv1.NetworkUpdate{RemovedEndpoints: []*skepv1.EndpointKey{{NetworkId: "ingress", TaskId: "web.1"}}})
	for _, c := range open {
		wantEnd(t, c)
	}
}

// wantEnd fails unless a connection to something that is gone ends: at once where the kernel
// can end idle sockets, with the next write elsewhere.
func wantEnd(t *testing.T, c net.Conn) {
	t.Helper()
	ended := make(chan error, 1)
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	go func() { _, err := c.Read(make([]byte, 1)); ended <- err }()
	var err error
	select {
	case err = <-ended:
	case <-time.After(2 * time.Second):
		_, _ = io.WriteString(c, "who\n")
		err = <-ended
	}
	if err == nil || os.IsTimeout(err) {
		t.Errorf("a connection to what is gone ended with %v", err)
	}
}

// TestPublishedPortsOutliveTheDaemon: a connection through the mesh goes on while a daemon ends
// and the next one starts.
func TestPublishedPortsOutliveTheDaemon(t *testing.T) {
	l, outside := edge(t)
	n := l.nodes[2] // an entry node without tasks
	var open []net.Conn
	for _, network := range []string{"tcp4", "udp4"} {
		c, err := dialIn(outside, network, "192.0.2.3:8080")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		open = append(open, c)
	}
	alive := func(when string) {
		t.Helper()
		for _, c := range open {
			if _, seen, err := whoOver(c); err != nil || seen != "192.0.2.50" {
				t.Errorf("%s: saw %q, %v", when, seen, err)
			}
		}
	}
	alive("at first")
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	alive("without a daemon")
	l.start(n)
	alive("after a restart")
	wantBoth(t, outside, "tcp4", "192.0.2.3:8080", "192.0.2.50")
	l.wantClean()
}

// TestLegInTheHostsNamespaceIsTakenOver: an older daemon left the leg into the ingress network
// and all rules in the host's namespace. A connection goes on over the upgrade.
func TestLegInTheHostsNamespaceIsTakenOver(t *testing.T) {
	l := newLab(t, 1)
	n := l.nodes[0]
	if !n.keepsSource {
		t.Skip("the kernel cannot answer clients by their own addresses")
	}
	l.tell(&skepv1.NetworkUpdate{Complete: true, Networks: nets(), Services: []*skepv1.BalancedService{web(8080)}, Endpoints: append(l.legs(), kept(n, "web.1", "10.0.0.3"))})
	echo(t, l.attach(n, "web.1", "ingress=10.0.0.3").NetNS, 80, "web.1")
	outside := l.host("outside", netip.MustParseAddr("192.0.2.50"))
	bridge := n.fabric.links[4096].bridge
	if err := n.removeMesh(&drift{repair: true}); err != nil {
		t.Fatal(err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.MasterIndex, attrs.Flags = "ingress", 1450, bridge, net.FlagUp
	hardware := netplan.MAC(netip.MustParseAddr("10.0.0.200"))
	_, leg, err := n.fabric.pair(attrs, &fabric{ns: n.hostNS, h: n.host}, n.ingressLink(), hardware[:])
	if err != nil {
		t.Fatal(err)
	}
	old := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: n.meshTable()}
	published := publishedSet(old)
	p := netplan.Published{Protocol: unix.IPPROTO_TCP, Published: 8080, Target: 80, Backends: []netip.Addr{netip.MustParseAddr("10.0.0.3")}}
	published.elements = []nftables.SetElement{publishedElement(p)}
	err = errors.Join(
		n.host.AddrAdd(leg, &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix("10.0.0.200/24"))}), n.host.LinkSetUp(leg),
		(&ruleset{table: old, sets: []*ruleSet{published}, chains: []*ruleChain{
			{baseChain(old, "prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest), []rule{
				{exprs: slices.Concat(toLocal(), []expr.Any{
					&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg0},
					&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
					&expr.Lookup{SourceRegister: reg0, SetName: published.Name, IsDestRegSet: true, DestRegister: unix.NFT_REG_VERDICT},
				})},
			}},
			publishedChain(old, p),
		}}).write(n.hostNS))
	if err != nil {
		t.Fatal(err)
	}
	c, err := dialIn(outside, "tcp4", "192.0.2.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	alive := func(when string) {
		t.Helper()
		if name, seen, err := whoOver(c); err != nil || name != "web.1" || seen != "192.0.2.50" {
			t.Errorf("%s: %q saw %q, %v", when, name, seen, err)
		}
	}
	alive("before the upgrade")
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	l.start(n)
	alive("after the upgrade")
	wantWho(t, outside, "tcp4", "192.0.2.1:8080", "web.1", "192.0.2.50")
	wantWho(t, outside, "udp4", "192.0.2.1:8080", "web.1", "192.0.2.50")
	routes, err := n.host.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range routes {
		if r.Dst != nil && r.Dst.IP.Equal(net.IPv4(10, 0, 0, 0)) {
			t.Errorf("the host has the ingress network's route: %s", r)
		}
	}
	l.wantClean()
}

// TestIngressNetworkMadeAnew: with another subnet, in one update and in two.
func TestIngressNetworkMadeAnew(t *testing.T) {
	l := newLab(t, 1)
	n := l.nodes[0]
	outside := l.host("outside", netip.MustParseAddr("192.0.2.50"))
	tell := func(third byte, ingress ...*skepv1.OverlayNetwork) {
		t.Helper()
		n.version++
		u := &skepv1.NetworkUpdate{Complete: true, Version: n.version, Networks: ingress, Services: []*skepv1.BalancedService{web(8080)}, Node: &skepv1.LocalNode{Id: n.id, DataAddr: n.addr.String()}}
		if len(ingress) > 0 {
			u.Node.IngressAddr = fmt.Sprintf("10.0.%d.200/24", third)
			e := kept(n, fmt.Sprint("web.", third), fmt.Sprintf("10.0.%d.3", third))
			e.Key.NetworkId = ingress[0].GetId()
			u.Endpoints = []*skepv1.OverlayEndpoint{e}
		}
		if err := n.Apply(t.Context(), u); err != nil {
			t.Fatal(err)
		}
		l.wantClean()
	}
	ingress := func(third byte) *skepv1.OverlayNetwork {
		return &skepv1.OverlayNetwork{
			Id: fmt.Sprint("ingress", third), Name: "ingress", Ingress: true,
			Subnets: []*skepv1.OverlaySubnet{{Subnet: fmt.Sprintf("10.0.%d.0/24", third), Gateway: fmt.Sprintf("10.0.%d.1", third), Vni: 4096 + uint32(third)}},
		}
	}
	serve := func(third byte) {
		t.Helper()
		name := fmt.Sprint("web.", third)
		echo(t, l.attach(n, name, fmt.Sprintf("ingress%d=10.0.%d.3", third, third)).NetNS, 80, name)
		wantWho(t, outside, "tcp4", "192.0.2.1:8080", name, "192.0.2.50")
		wantWho(t, n.path, "tcp4", "127.0.0.1:8080", name, fmt.Sprintf("10.0.%d.200", third))
	}
	tell(0, ingress(0))
	serve(0)
	tell(0)
	if pinned(n.meshNS()) {
		t.Error("the mesh outlives its network")
	}
	tell(7, ingress(7))
	serve(7)
	tell(9, ingress(9))
	serve(9)
}

// TestTwoMeshesOfOneHost: two daemons of one host publish a port each.
func TestTwoMeshesOfOneHost(t *testing.T) {
	inNamespace(t)
	for i, d := range []*Dataplane{open(t, t.TempDir()), open(t, t.TempDir())} {
		t.Cleanup(func() {
			if err := errors.Join(d.Destroy(context.Background()), d.Close()); err != nil {
				t.Error(err)
			}
		})
		port, node := uint32(8080+i), fmt.Sprint("node", i)
		n := &labNode{Dataplane: d, id: node, addr: netip.MustParseAddr("127.0.0.1")}
		err := d.Apply(t.Context(), &skepv1.NetworkUpdate{
			Complete: true, Version: 1, Networks: nets()[:1], Services: []*skepv1.BalancedService{web(port)},
			Endpoints: []*skepv1.OverlayEndpoint{kept(n, "web.1", "10.0.0.3")},
			Node:      &skepv1.LocalNode{Id: node, DataAddr: n.addr.String(), VxlanPort: 4789 + uint32(i), IngressAddr: "10.0.0.200/24"},
		})
		if err != nil {
			t.Fatal(err)
		}
		s, err := d.Attach(t.Context(), runtime.SandboxRequest{ContainerID: node, Overlays: []runtime.OverlayRequest{overlayOf(n, "ingress=10.0.0.3")}})
		if err != nil {
			t.Fatal(err)
		}
		serveIn(t, s.NetNS, 80, node)
	}
	for i := range 2 {
		if got, err := ask(t, fmt.Sprintf("127.0.0.1:%d", 8080+i)); got != fmt.Sprint("node", i) {
			t.Errorf("port %d: %q, %v", 8080+i, got, err)
		}
	}
}
