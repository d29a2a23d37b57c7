package dataplane

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/netplan"
	"github.com/skep-dev/skep/worker/runtime"
)

func web(ports ...uint32) *skepv1.BalancedService {
	v := &skepv1.BalancedService{Id: "s1", Name: "web", Virtual: true, Vips: []*skepv1.VirtualAddress{{NetworkId: "n1", Addr: "10.0.1.100/24"}}}
	for _, p := range ports {
		v.Ports = append(v.Ports, &skepv1.MeshPort{Protocol: unix.IPPROTO_TCP, Target: 80, Published: p}, &skepv1.MeshPort{Protocol: unix.IPPROTO_UDP, Target: 80, Published: p})
	}
	return v
}

// front is a lab of two nodes with a client and two tasks of a service that serve port 80.
func front(t *testing.T) (l *lab, client, web1, web2 string) {
	t.Helper()
	l = newLab(t, 2)
	a, b := l.nodes[0], l.nodes[1]
	l.tell(&skepv1.NetworkUpdate{Complete: true, Networks: nets(), Services: []*skepv1.BalancedService{web()}, Endpoints: append(l.legs(),
		endpointOf(a, "n1", "client", "", "10.0.1.2", true),
		endpointOf(a, "n1", "web.1", "s1", "10.0.1.3", true),
		endpointOf(b, "n1", "web.2", "s1", "10.0.1.4", true),
	)})
	client = l.attach(a, "client", "n1=10.0.1.2").NetNS
	web1 = l.attach(a, "web.1", "n1=10.0.1.3").NetNS
	web2 = l.attach(b, "web.2", "n1=10.0.1.4").NetNS
	echo(t, web1, 80, "web.1")
	echo(t, web2, 80, "web.2")
	return l, client, web1, web2
}

// wantBoth fails unless both tasks answer behind an address, and see whom they should.
func wantBoth(t *testing.T, path, network, to, seen string) {
	t.Helper()
	names := map[string]int{}
	for range 40 {
		name, from, err := whoIn(path, network, to)
		if err != nil || seen != "" && from != seen {
			t.Fatalf("%s %s: %q saw %q, %v", network, to, name, from, err)
		}
		names[name]++
	}
	if len(names) != 2 {
		t.Errorf("%s %s is not balanced: %v", network, to, names)
	}
}

func TestOverlayAcrossNodes(t *testing.T) {
	l, client, _, _ := front(t)
	wantWho(t, client, "tcp4", "10.0.1.3:80", "web.1", "10.0.1.2")
	wantWho(t, client, "tcp4", "10.0.1.4:80", "web.2", "10.0.1.2")
	wantWho(t, client, "udp4", "10.0.1.4:80", "web.2", "10.0.1.2")
	for _, to := range []string{"10.0.1.4", "10.0.1.100"} {
		if err := ping(client, to); err != nil {
			t.Errorf("ping %s: %v", to, err)
		}
	}
	wantBoth(t, client, "tcp4", "10.0.1.100:80", "10.0.1.2")
	wantBoth(t, client, "udp4", "10.0.1.100:80", "10.0.1.2")
	l.wantClean()
}

func TestNamesInSandbox(t *testing.T) {
	l, client, _, web2 := front(t)
	wantNames(t, client, "web", dns.TypeA, "NOERROR", "10.0.1.100")
	wantNames(t, client, "web", dns.TypeAAAA, "NOERROR")
	wantNames(t, client, "WEB.front", dns.TypeA, "NOERROR", "10.0.1.100")
	wantNames(t, client, "tasks.web", dns.TypeA, "NOERROR", "10.0.1.3", "10.0.1.4")
	wantNames(t, client, "web.2", dns.TypeA, "NOERROR", "10.0.1.4")
	wantNames(t, client, "h-web.1", dns.TypeA, "NOERROR", "10.0.1.3")
	wantNames(t, client, "4.1.0.10.in-addr.arpa", dns.TypePTR, "NOERROR", "web.2.front.")
	wantNames(t, client, "99.1.0.10.in-addr.arpa", dns.TypePTR, "NXDOMAIN")
	wantNames(t, web2, "client", dns.TypeA, "NOERROR", "10.0.1.2")
	// Who is on another network learns nothing, and internal networks tell nothing outside.
	n := l.nodes[0]
	closed := l.attach(n, "closed", "n3=10.0.3.2")
	if closed.Endpoint != nil || len(closed.Ports) != 0 {
		t.Errorf("a container on an internal network has a way out: %+v", closed)
	}
	wantNames(t, closed.NetNS, "web", dns.TypeA, "NXDOMAIN")
	wantNames(t, closed.NetNS, "example.org", dns.TypeA, "NXDOMAIN")
	wantNames(t, closed.NetNS, "h-closed", dns.TypeA, "NOERROR", "10.0.3.2")
	h, err := handleAt(closed.NetNS)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	routes, err := h.RouteList(nil, netlink.FAMILY_V4)
	if err != nil || len(routes) != 1 {
		t.Errorf("routes of a container on an internal network: %v, %v", routes, err)
	}
}

// TestForeignNamesAreForwarded asks a server of the container's own choice, by UDP and,
// since that truncates, by TCP.
func TestForeignNamesAreForwarded(t *testing.T) {
	l, _, web1, _ := front(t)
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		_, udp := w.RemoteAddr().(*net.UDPAddr)
		if m.Truncated = udp && q.Question[0].Name == "long.example."; !m.Truncated {
			m.Answer = append(m.Answer, &dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.IPv4(192, 0, 2, 99)})
		}
		_ = w.WriteMsg(m)
	})
	var packets net.PacketConn
	var stream net.Listener
	err := withinPath(web1, func(netns.NsHandle) (err error) {
		var lc net.ListenConfig
		// A server of names in a container: its port 53 is free.
		if packets, err = lc.ListenPacket(t.Context(), "udp4", ":53"); err != nil {
			return err
		}
		stream, err = lc.Listen(t.Context(), "tcp4", ":53")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []*dns.Server{{PacketConn: packets, Handler: handler}, {Listener: stream, Handler: handler}} {
		ready, done := make(chan struct{}), make(chan struct{})
		s.NotifyStartedFunc = func() { close(ready) }
		go func() { defer close(done); _ = s.ActivateAndServe() }()
		<-ready
		t.Cleanup(func() { _ = s.Shutdown(); <-done })
	}
	l.tell(&skepv1.NetworkUpdate{Endpoints: []*skepv1.OverlayEndpoint{endpointOf(l.nodes[0], "n1", "asker", "", "10.0.1.9", true)}})
	s, err := l.nodes[0].Attach(t.Context(), runtime.SandboxRequest{
		ContainerID: "asker", Name: "asker", DNS: []netip.Addr{netip.MustParseAddr("10.0.1.3")},
		Overlays: []runtime.OverlayRequest{{NetworkID: "n1", Name: "front", Address: netip.MustParsePrefix("10.0.1.9/24")}},
	})
	if err != nil {
		t.Fatal(err)
	}
	wantNames(t, s.NetNS, "short.example", dns.TypeA, "NOERROR", "192.0.2.99")
	wantNames(t, s.NetNS, "long.example", dns.TypeA, "NOERROR", "192.0.2.99")
	wantNames(t, s.NetNS, "web", dns.TypeA, "NOERROR", "10.0.1.100")
	if got := strings.Join(s.Nameservers, " ") + " " + strings.Join(s.Options, " "); !strings.HasPrefix(got, "127.0.0.11 ") || !strings.HasSuffix(got, "ndots:0") {
		t.Errorf("resolv.conf: %s", got)
	}
}

func TestTwinNetworksDoNotMeet(t *testing.T) {
	l, client, _, _ := front(t)
	a, b := l.nodes[0], l.nodes[1]
	l.tell(&skepv1.NetworkUpdate{Endpoints: []*skepv1.OverlayEndpoint{
		endpointOf(a, "n2", "twin.1", "", "10.0.1.2", true), endpointOf(b, "n2", "twin.2", "", "10.0.1.4", true),
	}})
	one := l.attach(a, "twin.1", "n2=10.0.1.2").NetNS
	two := l.attach(b, "twin.2", "n2=10.0.1.4").NetNS
	echo(t, two, 80, "twin.2")
	wantWho(t, one, "tcp4", "10.0.1.4:80", "twin.2", "10.0.1.2")
	wantWho(t, client, "tcp4", "10.0.1.4:80", "web.2", "10.0.1.2")
	wantUnknown(t, one, "web")
	if _, _, err := whoIn(one, "tcp4", "10.0.1.3:80"); err == nil {
		t.Error("a container reached another network")
	}
	// Nor over the local network, which is the way out of both.
	echo(t, client, 80, "client")
	if _, _, err := whoIn(one, "tcp4", a.state.Leases["client"].Addr.String()+":80"); err == nil {
		t.Error("a container reached one that it shares no network with by its way out")
	}
	l.wantClean()
}

// TestNothingIsFlooded captures on the wire and at a neighbour of the same bridge while a
// container asks for addresses that nobody has, sends to hardware addresses that nobody has,
// and pretends to be somebody else.
func TestNothingIsFlooded(t *testing.T) {
	l, client, web1, web2 := front(t)
	wantWho(t, client, "tcp4", "10.0.1.4:80", "web.2", "10.0.1.2")
	wire, neighbour, there := capture(t, l.nodes[0].path, "eth0"), capture(t, web1, "eth0"), capture(t, web2, "eth0")
	if _, err := dialIn(client, "tcp4", "10.0.1.77:80"); err == nil {
		t.Error("nobody answered")
	}
	const mark = 0x88b5 // a protocol for experiments
	nobody, web1MAC, web2MAC := [6]byte{2, 0x42, 10, 0, 1, 77}, netplan.MAC(netip.MustParseAddr("10.0.1.3")), netplan.MAC(netip.MustParseAddr("10.0.1.4"))
	own := netplan.MAC(netip.MustParseAddr("10.0.1.2"))
	all, some := [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, [6]byte{1, 0, 0x5e, 0, 0, 9}
	send := func(to, from [6]byte, text string) { inject(t, client, to, from, mark, text) }
	send(nobody, own, "unknown")
	send(all, own, "for all")
	send(some, own, "for some")
	send(all, web2MAC, "learn this") // the next to web.2 must not come to the client
	send(all, web1MAC, "and this")
	send(web2MAC, own, "known there")
	send(web1MAC, own, "known here")
	wantWho(t, client, "tcp4", "10.0.1.4:80", "web.2", "10.0.1.2")
	wantWho(t, client, "tcp4", "10.0.1.3:80", "web.1", "10.0.1.2")
	const outer = 14 + 20 + 8 + 8
	carried := 0
	var texts []string
	for _, p := range wire() {
		if len(p) < outer+14 || p[12] != 8 || p[23] != unix.IPPROTO_UDP || p[36] != 0x12 || p[37] != 0xb5 {
			continue
		}
		carried++
		if p[outer+12] == mark>>8 && p[outer+13] == mark&0xff {
			texts = append(texts, strings.TrimRight(string(p[outer+14:]), "\x00"))
		} else if p[outer]&1 != 0 && p[outer+12] == 8 { // to all, IPv4 or ARP
			texts = append(texts, "to all")
		}
	}
	if want := []string{"known there"}; carried < 2 || !slices.Equal(texts, want) {
		t.Errorf("of %d packets between nodes %q, want %q", carried, texts, want)
	}
	of := func(list [][]byte) (texts []string) {
		for _, p := range list {
			if p[12] == mark>>8 && p[13] == mark&0xff {
				texts = append(texts, strings.TrimRight(string(p[14:]), "\x00"))
			}
		}
		return texts
	}
	// What is for all is for those here.
	if got, want := of(neighbour()), []string{"for all", "for some", "learn this", "and this", "known here"}; !slices.Equal(got, want) {
		t.Errorf("a neighbour was sent %q, want %q", got, want)
	}
	if got, want := of(there()), []string{"known there"}; !slices.Equal(got, want) {
		t.Errorf("a container of another node was sent %q, want %q", got, want)
	}
	l.wantClean()
}

// capture listens on a link and returns a function that returns what came in or went out.
func capture(t *testing.T, path, name string) func() [][]byte {
	t.Helper()
	fd := packetSocket(t, path, name)
	return func() (out [][]byte) {
		buf := make([]byte, 2048)
		for {
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				return out
			}
			out = append(out, slices.Clone(buf[:n]))
		}
	}
}

// inject sends a frame from a container as it is.
func inject(t *testing.T, path string, to, from [6]byte, protocol uint16, text string) {
	t.Helper()
	frame := append(append(to[:], from[:]...), byte(protocol>>8), byte(protocol))
	if _, err := unix.Write(packetSocket(t, path, "eth0"), append(frame, text...)); err != nil {
		t.Fatal(err)
	}
}

func packetSocket(t *testing.T, path, name string) (fd int) {
	t.Helper()
	err := withinPath(path, func(netns.NsHandle) (err error) {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0x0300); err != nil {
			return err
		}
		t.Cleanup(func() { _ = unix.Close(fd) })
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: 0x0300, Ifindex: link.Attrs().Index})
	})
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func TestBackendsComeAndGo(t *testing.T) {
	l, client, _, _ := front(t)
	a, b := l.nodes[0], l.nodes[1]
	// A backend that drains keeps its connections and gets no new ones.
	var old net.Conn
	for old == nil {
		c, err := dialIn(client, "tcp4", "10.0.1.100:80")
		if err != nil {
			t.Fatal(err)
		}
		if name, _, err := whoOver(c); err != nil {
			t.Fatal(err)
		} else if name == "web.2" {
			old = c
		} else {
			_ = c.Close()
		}
	}
	defer old.Close()
	l.tell(&skepv1.NetworkUpdate{Endpoints: []*skepv1.OverlayEndpoint{endpointOf(b, "n1", "web.2", "s1", "10.0.1.4", false)}})
	for range 20 {
		wantWho(t, client, "tcp4", "10.0.1.100:80", "web.1", "10.0.1.2")
	}
	if name, _, err := whoOver(old); err != nil || name != "web.2" {
		t.Errorf("a draining backend lost its connection: %q, %v", name, err)
	}
	wantNames(t, client, "tasks.web", dns.TypeA, "NOERROR", "10.0.1.3")
	// Once it is gone, the connection ends, even of one that only waits.
	ended := make(chan error, 1)
	if err := old.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	go func() { _, err := old.Read(make([]byte, 1)); ended <- err }()
	l.tell(&skepv1.NetworkUpdate{RemovedEndpoints: []*skepv1.EndpointKey{{NetworkId: "n1", TaskId: "web.2"}}})
	if err := b.Detach(t.Context(), "web.2"); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err == nil || os.IsTimeout(err) {
			t.Errorf("a connection to a removed backend ended with %v", err)
		}
	case <-time.After(2 * time.Second): // the kernel cannot end idle sockets; a write must do
		_, _ = io.WriteString(old, "who\n")
		if err := <-ended; err == nil || os.IsTimeout(err) {
			t.Errorf("a connection to a removed backend ended with %v", err)
		}
	}
	wantUnknown(t, client, "web.2")
	// The node without tasks of the network has nothing of it any more.
	if link, err := b.fabric.find(vxlanName(4097)); err != nil || link != nil {
		t.Errorf("network of no container: %v, %v", link, err)
	}
	// Without backends connections are refused at once.
	l.tell(&skepv1.NetworkUpdate{RemovedEndpoints: []*skepv1.EndpointKey{{NetworkId: "n1", TaskId: "web.1"}}})
	start := time.Now()
	if _, err := dialIn(client, "tcp4", "10.0.1.100:80"); err == nil || !strings.Contains(err.Error(), "refused") || time.Since(start) > 2*time.Second {
		t.Errorf("without backends: %v after %s", err, time.Since(start))
	}
	// And a new one, at the same address on another node, is found.
	l.tell(&skepv1.NetworkUpdate{Endpoints: []*skepv1.OverlayEndpoint{endpointOf(a, "n1", "web.3", "s1", "10.0.1.4", true)}})
	echo(t, l.attach(a, "web.3", "n1=10.0.1.4").NetNS, 80, "web.3")
	wantWho(t, client, "tcp4", "10.0.1.100:80", "web.3", "10.0.1.2")
	l.tell(&skepv1.NetworkUpdate{RemovedServices: []string{"s1"}})
	wantUnknown(t, client, "web")
	l.wantClean()
}

func TestRoutingMesh(t *testing.T) {
	l := newLab(t, 2)
	a, b := l.nodes[0], l.nodes[1]
	l.tell(&skepv1.NetworkUpdate{Complete: true, Networks: nets(), Services: []*skepv1.BalancedService{web(8080)}, Endpoints: append(l.legs(),
		endpointOf(b, "ingress", "web.1", "s1", "10.0.0.3", true), endpointOf(b, "ingress", "web.2", "s1", "10.0.0.4", true),
		endpointOf(a, "n1", "local", "", "10.0.1.2", true),
	)})
	echo(t, l.attach(b, "web.1", "ingress=10.0.0.3").NetNS, 80, "web.1")
	echo(t, l.attach(b, "web.2", "ingress=10.0.0.4").NetNS, 80, "web.2")
	local := l.attach(a, "local", "n1=10.0.1.2")
	outside := l.host("outside", netip.MustParseAddr("192.0.2.50"))
	for from, to := range map[string][]string{
		outside:     {"192.0.2.1:8080", "192.0.2.2:8080"},
		a.path:      {"127.0.0.1:8080", "192.0.2.1:8080", "192.0.2.2:8080"},
		b.path:      {"127.0.0.1:8080"},
		local.NetNS: {local.Endpoint.Gateway.String() + ":8080", "192.0.2.1:8080", "192.0.2.2:8080"},
	} {
		for _, at := range to {
			wantBoth(t, from, "tcp4", at, "")
			wantBoth(t, from, "udp4", at, "")
		}
	}
	// Nothing but what is published is open.
	err := withinPath(outside, func(netns.NsHandle) error {
		return netlink.RouteAdd(&netlink.Route{Dst: ipNet(netip.MustParsePrefix("10.0.0.0/24")), Gw: net.IPv4(192, 0, 2, 1)})
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := dialIn(outside, "tcp4", "10.0.0.3:80"); err == nil {
		t.Error("a task of the ingress network is open to the outside")
	}
	l.wantClean()
	// Without backends, and without the service, nobody answers.
	l.tell(&skepv1.NetworkUpdate{RemovedEndpoints: []*skepv1.EndpointKey{{NetworkId: "ingress", TaskId: "web.1"}, {NetworkId: "ingress", TaskId: "web.2"}}})
	if _, err := dialIn(outside, "tcp4", "192.0.2.1:8080"); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("without backends: %v", err)
	}
	l.tell(&skepv1.NetworkUpdate{RemovedServices: []string{"s1"}})
	l.wantClean()
	// The ingress network can be removed.
	l.tell(&skepv1.NetworkUpdate{RemovedNetworks: []string{"ingress"}})
	l.wantClean()
	if _, err := a.host.LinkByName(a.ingressLink()); err == nil {
		t.Error("the leg into a removed ingress network is left")
	}
}

// TestDatagramsFindTheirWay: a client that goes on sending from one port reaches a task that
// came after it, also when there was none for a while.
func TestDatagramsFindTheirWay(t *testing.T) {
	l := newLab(t, 1)
	n := l.nodes[0]
	outside := l.host("outside", netip.MustParseAddr("192.0.2.50"))
	task := endpointOf(n, "ingress", "web.1", "s1", "10.0.0.3", true)
	l.tell(&skepv1.NetworkUpdate{Complete: true, Networks: nets(), Endpoints: append(l.legs(), task)})
	echo(t, l.attach(n, "web.1", "ingress=10.0.0.3").NetNS, 80, "web.1")
	c, err := dialIn(outside, "udp4", "192.0.2.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	nobody := func() {
		t.Helper()
		if name, _, err := whoOver(c); err == nil {
			t.Errorf("%s answered", name)
		}
	}
	somebody := func() {
		t.Helper()
		var err error
		for range 2 { // an old refusal may come first
			var name string
			if name, _, err = whoOver(c); name == "web.1" {
				return
			}
		}
		t.Errorf("nobody answered: %v", err)
	}
	nobody()
	l.tell(&skepv1.NetworkUpdate{Services: []*skepv1.BalancedService{web(8080)}})
	somebody()
	l.tell(&skepv1.NetworkUpdate{RemovedEndpoints: []*skepv1.EndpointKey{{NetworkId: "ingress", TaskId: "web.1"}}})
	nobody()
	l.tell(&skepv1.NetworkUpdate{Endpoints: []*skepv1.OverlayEndpoint{task}})
	somebody()
}

// TestPublishedPortsAreHeld: a process of the node cannot get a published port, and one that
// has it keeps it.
func TestPublishedPortsAreHeld(t *testing.T) {
	l := newLab(t, 1)
	n := l.nodes[0]
	outside := l.host("outside", netip.MustParseAddr("192.0.2.50"))
	listen := func(port int) (tcp net.Listener, err error) {
		err = withinPath(n.path, func(netns.NsHandle) (err error) {
			tcp, err = new(net.ListenConfig).Listen(t.Context(), "tcp4", fmt.Sprintf(":%d", port))
			return err
		})
		return tcp, err
	}
	early, err := listen(8080)
	if err != nil {
		t.Fatal(err)
	}
	defer early.Close()
	l.tell(&skepv1.NetworkUpdate{Complete: true, Networks: nets(), Services: []*skepv1.BalancedService{web(8080, 8081)}, Endpoints: append(l.legs(),
		endpointOf(n, "ingress", "web.1", "s1", "10.0.0.3", true))})
	echo(t, l.attach(n, "web.1", "ingress=10.0.0.3").NetNS, 80, "web.1")
	if _, err := listen(8081); err == nil {
		t.Error("a process got a published port")
	}
	if c, err := dialIn(outside, "tcp4", "192.0.2.1:8080"); err != nil {
		t.Errorf("a listening process hears nothing: %v", err)
	} else if got, err := early.Accept(); err != nil {
		t.Error(err)
	} else {
		_, _ = got.Close(), c.Close()
	}
	wantFound := func(text string, n1 int) {
		t.Helper()
		found, err := n.Check(t.Context())
		if err != nil || len(found) != n1 || !strings.Contains(strings.Join(found, ""), text) {
			t.Errorf("the check says %q, %v; want %q", found, err, text)
		}
	}
	self, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	wantFound("port 8080/tcp is not published here: "+strings.TrimSpace(string(self))+" (process ", 1)
	if name, _, err := whoIn(outside, "tcp4", "192.0.2.1:8081"); err != nil || name != "web.1" {
		t.Errorf("the other port: %q, %v", name, err)
	}
	if err := early.Close(); err != nil {
		t.Fatal(err)
	}
	n.check(t.Context())
	wantFound("", 0)
	if name, _, err := whoIn(outside, "tcp4", "192.0.2.1:8080"); err != nil || name != "web.1" {
		t.Errorf("after the process went: %q, %v", name, err)
	}
	// A port that is published no more is free.
	l.tell(&skepv1.NetworkUpdate{Services: []*skepv1.BalancedService{web(8081)}})
	if again, err := listen(8080); err != nil {
		t.Errorf("a port published no more: %v", err)
	} else {
		_ = again.Close()
	}
	l.wantClean()
}

// TestRepair breaks things by hand.
func TestRepair(t *testing.T) {
	l, client, web1, _ := front(t)
	l.tell(&skepv1.NetworkUpdate{Services: []*skepv1.BalancedService{web(8080)}, Endpoints: []*skepv1.OverlayEndpoint{
		endpointOf(l.nodes[0], "ingress", "web.1", "s1", "10.0.0.3", true),
	}})
	n := l.nodes[0]
	echo(t, l.attach(n, "edge", "ingress=10.0.0.3").NetNS, 80, "edge")
	outside := l.host("outside", netip.MustParseAddr("192.0.2.50"))
	del := func(path, name string) error {
		return withinPath(path, func(netns.NsHandle) error {
			link, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			return netlink.LinkDel(link)
		})
	}
	squeeze := func(link netlink.Link) error { return netlink.LinkSetMTU(link, 1300) }
	squeezeAt := func(path, name string) error {
		return withinPath(path, func(netns.NsHandle) error {
			link, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			return squeeze(link)
		})
	}
	flush := func(path string) error {
		return withinPath(path, func(netns.NsHandle) error {
			c, err := openNFT(0) // where the thread is
			if err != nil {
				return err
			}
			c.FlushRuleset()
			return c.Flush()
		})
	}
	for name, wreck := range map[string]func() error{
		"VXLAN device":          func() error { return del(n.switchNS(), vxlanName(4097)) },
		"bridge":                func() error { return del(n.switchNS(), bridgeName(4097)) },
		"MTU of a bridge":       func() error { return inSwitch(n, bridgeName(4097), squeeze) },
		"MTU of a port":         func() error { return inSwitch(n, portName("client", "n1"), squeeze) },
		"MTU in a container":    func() error { return squeezeAt(client, "eth0") },
		"MTU of the edge":       func() error { return squeezeAt(n.path, n.ingressLink()) },
		"MTU of the mesh":       func() error { return squeezeAt(n.meshNS(), toHost) },
		"MTU of the leg":        func() error { return squeezeAt(n.meshNS(), toIngress) },
		"MTU of the leg's port": func() error { return inSwitch(n, toIngress, squeeze) },
		"former network's device": func() error { // of the same number, which was encrypted
			return inSwitch(n, bridgeName(4097), func(bridge netlink.Link) error {
				attrs := netlink.NewLinkAttrs()
				attrs.Name, attrs.MasterIndex = espName(4097), bridge.Attrs().Index
				return netlink.LinkAdd(&netlink.Vxlan{LinkAttrs: attrs, VxlanId: 4097, Port: model.ESPPort})
			})
		},
		"link":            func() error { return del(client, "eth0") },
		"way out":         func() error { return del(client, "eth1") },
		"ingress":         func() error { return del(n.path, n.ingressLink()) },
		"sandbox's rules": func() error { return flush(client) },
		"backend's rules": func() error { return flush(web1) },
		"host's rules":    func() error { return flush(n.path) },
		"mesh's rules":    func() error { return flush(n.meshNS()) },
		"mesh's leg":      func() error { return del(n.meshNS(), toIngress) },
		"mesh's end":      func() error { return del(n.meshNS(), toHost) },
		"mesh":            func() error { return removeNamespace(n.meshNS()) },
		"mesh's way": func() error {
			return withinPath(n.meshNS(), func(netns.NsHandle) error {
				return netlink.RouteDel(&netlink.Route{Dst: ipNet(netip.MustParsePrefix("0.0.0.0/0")), Gw: n.state.Address.Addr().AsSlice()})
			})
		},
		"host's neighbour": func() error {
			return withinPath(n.path, func(netns.NsHandle) error {
				link, err := netlink.LinkByName(n.ingressLink())
				if err != nil {
					return err
				}
				return netlink.NeighDel(&netlink.Neigh{LinkIndex: link.Attrs().Index, IP: n.state.Mesh.AsSlice()})
			})
		},
		"port that is sent what is unknown": func() error {
			return inSwitch(n, portName("client", "n1"), func(link netlink.Link) error { return netlink.LinkSetFlood(link, true) })
		},
		"port that learns": func() error {
			return inSwitch(n, portName("client", "n1"), func(link netlink.Link) error { return netlink.LinkSetLearning(link, true) })
		},
		"port that was forgotten": func() error {
			return inSwitch(n, portName("client", "n1"), func(link netlink.Link) error {
				return netlink.NeighDel(&netlink.Neigh{
					LinkIndex: link.Attrs().Index, Family: unix.AF_BRIDGE, Flags: unix.NTF_MASTER, HardwareAddr: net.HardwareAddr{0x02, 0x42, 10, 0, 1, 2},
				})
			})
		},
		"device that is not sent what is unknown": func() error {
			return inSwitch(n, vxlanName(4097), func(link netlink.Link) error { return netlink.LinkSetFlood(link, false) })
		},
		"way for what is unknown": func() error {
			return inSwitch(n, vxlanName(4097), func(link netlink.Link) error {
				return netlink.NeighAppend(&netlink.Neigh{
					LinkIndex: link.Attrs().Index, Family: unix.AF_BRIDGE, Flags: unix.NTF_SELF, State: unix.NUD_PERMANENT,
					HardwareAddr: make(net.HardwareAddr, 6), IP: net.IPv4(192, 0, 2, 2),
				})
			})
		},
		"address": func() error {
			return inSwitch(n, vxlanName(4097), func(link netlink.Link) error {
				return netlink.NeighDel(&netlink.Neigh{LinkIndex: link.Attrs().Index, Family: unix.AF_INET, IP: net.IPv4(10, 0, 1, 4)})
			})
		},
		"former version": func() error { // whose bridges knew the endpoints, and whose devices did not answer
			return inSwitch(n, vxlanName(4097), func(link netlink.Link) error {
				now := link.(*netlink.Vxlan)
				old, bridge := netlink.Vxlan{LinkAttrs: netlink.NewLinkAttrs(), VxlanId: now.VxlanId, SrcAddr: now.SrcAddr, Port: now.Port}, now.MasterIndex
				if err := netlink.LinkDel(link); err != nil {
					return err
				}
				old.Name, old.MTU = now.Name, now.MTU
				err := withinPath(n.path, func(netns.NsHandle) error {
					sw, err := netns.GetFromPath(n.switchNS())
					if err != nil {
						return err
					}
					defer sw.Close()
					old.Namespace = netlink.NsFd(int(sw))
					return netlink.LinkAdd(&old)
				})
				if err != nil {
					return err
				}
				vx, err := netlink.LinkByName(old.Name)
				if err != nil {
					return err
				}
				mac := net.HardwareAddr{0x02, 0x42, 10, 0, 1, 4}
				return errors.Join(netlink.LinkSetMasterByIndex(vx, bridge), netlink.LinkSetUp(vx), netlink.LinkSetFlood(vx, false), netlink.LinkSetLearning(vx, false), netlink.LinkSetBrNeighSuppress(vx, true),
					netlink.NeighSet(&netlink.Neigh{
						LinkIndex: vx.Attrs().Index, Family: unix.AF_BRIDGE, State: static, Flags: unix.NTF_SELF | unix.NTF_MASTER, HardwareAddr: mac, IP: net.IPv4(192, 0, 2, 2),
					}),
					netlink.NeighSet(&netlink.Neigh{LinkIndex: bridge, State: unix.NUD_PERMANENT, IP: net.IPv4(10, 0, 1, 4), HardwareAddr: mac}))
			})
		},
		"forwarding table": func() error {
			return withinPath(n.switchNS(), func(netns.NsHandle) error {
				vx, err := netlink.LinkByName(vxlanName(4097))
				if err != nil {
					return err
				}
				return netlink.NeighDel(&netlink.Neigh{
					LinkIndex: vx.Attrs().Index, Family: unix.AF_BRIDGE, Flags: unix.NTF_SELF,
					HardwareAddr: net.HardwareAddr{0x02, 0x42, 10, 0, 1, 4}, IP: net.IPv4(192, 0, 2, 2),
				})
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			if err := wreck(); err != nil {
				t.Fatal(err)
			}
			found, err := n.Check(t.Context())
			if err != nil || len(found) == 0 {
				t.Errorf("the check found %q, %v", found, err)
			}
			n.check(t.Context())
			if found, err := n.Check(t.Context()); err != nil || len(found) != 0 {
				t.Errorf("after the repair: %q, %v", found, err)
			}
			wantBoth(t, client, "tcp4", "10.0.1.100:80", "10.0.1.2")
			wantNames(t, client, "web", dns.TypeA, "NOERROR", "10.0.1.100")
			wantWho(t, outside, "tcp4", "192.0.2.1:8080", "edge", "10.0.0.200")
		})
	}
}

// TestSegmentNames: of two networks with one number only the links of that which is there stay.
func TestSegmentNames(t *testing.T) {
	n := sealed(model.ESP)[1]
	if got := segmentNames([]*skepv1.OverlayNetwork{n, nets()[1]}); !maps.Equal(got, map[string]bool{"br4105": true, "es4105": true, "br4097": true, "vx4097": true}) {
		t.Errorf("%v stay", got)
	}
}

// inSwitch gives f a link of a node's switch, in its namespace.
func inSwitch(n *labNode, name string, f func(netlink.Link) error) error {
	return withinPath(n.switchNS(), func(netns.NsHandle) error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return f(link)
	})
}

// TestRestartKeepsTraffic ends one Dataplane and starts the next, as a restarted daemon does.
func TestRestartKeepsTraffic(t *testing.T) {
	l, client, _, _ := front(t)
	n := l.nodes[0]
	l.tell(&skepv1.NetworkUpdate{Endpoints: []*skepv1.OverlayEndpoint{endpointOf(l.nodes[1], "n1", "late", "", "10.0.1.8", true)}})
	l.tell(&skepv1.NetworkUpdate{RemovedEndpoints: []*skepv1.EndpointKey{{NetworkId: "n1", TaskId: "late"}}})
	c, err := dialIn(client, "tcp4", "10.0.1.100:80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, _, err := whoOver(c); err != nil {
		t.Fatal(err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := whoOver(c); err != nil {
		t.Errorf("without a daemon: %v", err)
	}
	wantBoth(t, client, "tcp4", "10.0.1.100:80", "10.0.1.2")
	l.start(n)
	if _, _, err := whoOver(c); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	wantNames(t, client, "web", dns.TypeA, "NOERROR", "10.0.1.100")
	wantUnknown(t, client, "late")
	wantBoth(t, client, "tcp4", "10.0.1.100:80", "10.0.1.2")
	l.wantClean()
	// A manager then says everything again, and nothing is disturbed.
	l.tell(&skepv1.NetworkUpdate{Complete: true, Networks: nets(), Services: []*skepv1.BalancedService{web()}, Endpoints: append(l.legs(),
		endpointOf(n, "n1", "client", "", "10.0.1.2", true), endpointOf(n, "n1", "web.1", "s1", "10.0.1.3", true),
		endpointOf(l.nodes[1], "n1", "web.2", "s1", "10.0.1.4", true))})
	if _, _, err := whoOver(c); err != nil {
		t.Errorf("after a complete update: %v", err)
	}
	l.wantClean()
}

func TestAttachWaitsForItsNetwork(t *testing.T) {
	l := newLab(t, 1)
	n := l.nodes[0]
	req := runtime.SandboxRequest{ContainerID: "early", Overlays: []runtime.OverlayRequest{{NetworkID: "n1", Name: "front", Address: netip.MustParsePrefix("10.0.1.2/24")}}}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := n.Attach(ctx, req); model.KindOf(err) != model.Unavailable {
		t.Errorf("an unknown network gave %v", err)
	}
	done := make(chan error, 1)
	go func() { _, err := n.Attach(t.Context(), req); done <- err }()
	secret := nets()[2]
	secret.Encrypted = true
	l.tell(&skepv1.NetworkUpdate{Complete: true, Networks: append(nets()[:2], secret)})
	if err := <-done; err != nil {
		t.Errorf("an announced network gave %v", err)
	}
	req.ContainerID, req.Overlays[0].NetworkID = "clear", "n2"
	if _, err := n.Attach(t.Context(), req); model.KindOf(err) != model.Unimplemented {
		t.Errorf("an encrypted network gave %v", err)
	}
	req.Overlays[0].NetworkID, req.Overlays[0].Address = "n1", netip.MustParsePrefix("10.9.9.9/24")
	if _, err := n.Attach(t.Context(), req); model.KindOf(err) != model.Invalid {
		t.Errorf("a foreign address gave %v", err)
	}
}

func TestThousandsOfBackends(t *testing.T) {
	l, client, _, _ := front(t)
	big := &skepv1.OverlayNetwork{Id: "big", Name: "big", Subnets: []*skepv1.OverlaySubnet{{Subnet: "10.16.0.0/16", Vni: 4100}}}
	u := &skepv1.NetworkUpdate{Networks: []*skepv1.OverlayNetwork{big}, Services: []*skepv1.BalancedService{{
		Id: "s9", Name: "many", Virtual: true,
		Vips: []*skepv1.VirtualAddress{{NetworkId: "big", Addr: "10.16.0.9/16"}},
	}}}
	for i := range 2500 {
		e := endpointOf(l.nodes[1], "big", fmt.Sprint("x", i), "s9", "", true)
		e.Addresses = []string{netip.AddrFrom4([4]byte{10, 16, byte(1 + i>>8), byte(i)}).String() + "/16"}
		u.Endpoints = append(u.Endpoints, e)
	}
	l.tell(u)
	l.attach(l.nodes[0], "reader", "big=10.16.0.2")
	l.wantClean()
	_, many := resolve(t, l.nodes[0].netns("reader"), "many", dns.TypeA)
	if len(many) != 1 || many[0] != "10.16.0.9" {
		t.Errorf("many is %v", many)
	}
	wantBoth(t, client, "tcp4", "10.0.1.100:80", "10.0.1.2")
}

func TestDestroyLeavesNothing(t *testing.T) {
	l, _, _, _ := front(t)
	n := l.nodes[0]
	if err := n.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(n.dir, "x", "*"))
	hidden, err2 := filepath.Glob(filepath.Join(n.dir, "x", ".*"))
	if err != nil || err2 != nil || len(left)+len(hidden) != 0 {
		t.Errorf("left: %v %v", left, hidden)
	}
	links, err := n.host.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		if name := link.Attrs().Name; name != "lo" && name != "eth0" && !strings.HasPrefix(name, vethPrefix(n.bridge)) {
			t.Errorf("link %s is left", name)
		}
	}
	c, err := openNFT(n.hostNS)
	if err != nil {
		t.Fatal(err)
	}
	if tables, err := c.ListTables(); err != nil || len(tables) != 0 {
		t.Errorf("tables %v are left, %v", tables, err)
	}
}

// A complete update may change what rules lead where, though nobody has touched the rules.
func TestCompleteUpdateIsProgrammed(t *testing.T) {
	l, client, _, _ := front(t)
	a := l.nodes[0]
	l.wantClean() // the kernel is as planned and known to be
	l.tell(&skepv1.NetworkUpdate{Complete: true, Networks: nets(), Services: []*skepv1.BalancedService{web()}, Endpoints: append(l.legs(),
		endpointOf(a, "n1", "client", "", "10.0.1.2", true),
		endpointOf(a, "n1", "web.1", "s1", "10.0.1.3", true),
	)})
	for range 20 {
		wantWho(t, client, "tcp4", "10.0.1.100:80", "web.1", "10.0.1.2")
	}
	l.wantClean()
}

// ofVXLAN matches the host's flows of encapsulated packets.
type ofVXLAN struct{}

func (ofVXLAN) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	return f.Forward.Protocol == unix.IPPROTO_UDP && f.Forward.DstPort == defaultVXLANPort
}

// TestConnectionsDoNotFillTheHostsTable: each connection between nodes had two entries in the
// connection table of either host, for half a minute after it had ended.
func TestConnectionsDoNotFillTheHostsTable(t *testing.T) {
	l, client, _, _ := front(t)
	const connections = 200
	for range connections {
		c, err := dialIn(client, "tcp4", "10.0.1.4:80")
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := whoOver(c); err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
	}
	for _, n := range l.nodes {
		var flows []*netlink.ConntrackFlow
		err := within(n.hostNS, func() (err error) { flows, err = flowsOf(unix.AF_INET, ofVXLAN{}); return err })
		if err != nil {
			t.Fatal(err)
		}
		if most := 2 * (lastSourcePort - firstSourcePort); len(flows) > most || len(flows) < 4 {
			t.Errorf("%s: %d flows of encapsulated packets for %d connections, want a few and no more than %d", n.id, len(flows), connections, most)
		}
		ports := map[uint16]bool{}
		for _, f := range flows {
			ports[f.Forward.SrcPort] = true
		}
		if len(ports) < 4 { // nothing could be spread by them
			t.Errorf("%s: they leave from %d ports only", n.id, len(ports))
		}
	}
}
