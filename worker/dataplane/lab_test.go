package dataplane

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
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
	"github.com/skep-dev/skep/worker/runtime"
)

// lab is some nodes in network namespaces of their own, joined by a bridge.
type lab struct {
	t     *testing.T
	dir   string
	nodes []*labNode
	wire  string // the namespace of the bridge that joins them
	// program is this test's, which is also a userspace WireGuard device.
	program string
	six     bool // the wire carries IPv6
}

type labNode struct {
	*Dataplane

	id, dir, path string
	addr          netip.Addr
	version       uint64
}

func newLab(t *testing.T, nodes int) *lab {
	t.Helper()
	return newLabOver(t, nodes, false)
}

// newLabOver is newLab whose nodes reach each other by IPv4 or IPv6.
func newLabOver(t *testing.T, nodes int, six bool) *lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for network namespaces")
	}
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{t: t, dir: t.TempDir(), program: program, six: six}
	l.wire = filepath.Join(l.dir, "wire")
	l.namespace(l.wire)
	err = withinPath(l.wire, func(netns.NsHandle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.Flags = "wire", net.FlagUp
		off := false
		return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &off})
	})
	if err != nil {
		t.Fatal(err)
	}
	for i := range nodes {
		n := &labNode{id: fmt.Sprintf("node%d", i+1), addr: l.at(byte(i + 1))}
		n.path, n.dir = filepath.Join(l.dir, n.id), filepath.Join(l.dir, n.id+"-state")
		l.host(n.id, n.addr)
		l.start(n)
		t.Cleanup(func() {
			if err := errors.Join(n.Destroy(context.Background()), n.Close()); err != nil {
				t.Error(err)
			}
		})
		l.nodes = append(l.nodes, n)
	}
	return l
}

// at returns an address on the wire, a node's by its number.
func (l *lab) at(host byte) netip.Addr {
	if l.six {
		return netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 15: host})
	}
	return netip.AddrFrom4([4]byte{192, 0, 2, host})
}

func (l *lab) namespace(path string) {
	l.t.Helper()
	if err := makeNamespace(path); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		if err := removeNamespace(path); err != nil {
			l.t.Error(err)
		}
	})
}

// host makes a namespace on the wire.
func (l *lab) host(name string, addr netip.Addr) string {
	l.t.Helper()
	path := filepath.Join(l.dir, name)
	l.namespace(path)
	err := withinPath(path, func(ns netns.NsHandle) error {
		return withinPath(l.wire, func(netns.NsHandle) error {
			master, err := netlink.LinkByName("wire")
			if err != nil {
				return err
			}
			attrs := netlink.NewLinkAttrs()
			attrs.Name, attrs.Flags, attrs.MasterIndex = "w-"+name, net.FlagUp, master.Attrs().Index
			return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(ns))})
		})
	})
	if err == nil {
		err = withinPath(path, func(netns.NsHandle) error {
			eth, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			if addr.Is4() {
				return errors.Join(netlink.AddrAdd(eth, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(addr, 24))}), netlink.LinkSetUp(eth))
			}
			return netlink.LinkSetUp(eth)
		})
	}
	if err != nil {
		l.t.Fatal(err)
	}
	if addr.Is6() {
		l.address6(path, addr.String()+"/64")
	}
	return path
}

// start makes the node's Dataplane, as a started daemon does.
func (l *lab) start(n *labNode) {
	l.t.Helper()
	err := withinPath(n.path, func(netns.NsHandle) (err error) {
		n.Dataplane, err = New(Config{
			Dir: filepath.Join(n.dir, "d"), ExecDir: filepath.Join(n.dir, "x"), Address: netip.MustParsePrefix("172.30.0.1/16"),
			WireGuard: []string{l.program, deviceCommand},
			Log:       slog.New(slog.NewTextHandler(l.t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})),
		})
		return err
	})
	if err != nil {
		l.t.Fatal(err)
	}
}

// tell gives all nodes an update; each learns about itself in complete ones.
func (l *lab) tell(u *skepv1.NetworkUpdate) {
	l.t.Helper()
	for i, n := range l.nodes {
		mine := &skepv1.NetworkUpdate{
			Complete: u.GetComplete(), Networks: u.GetNetworks(), RemovedNetworks: u.GetRemovedNetworks(), Endpoints: u.GetEndpoints(),
			RemovedEndpoints: u.GetRemovedEndpoints(), Services: u.GetServices(), RemovedServices: u.GetRemovedServices(),
		}
		n.version++
		mine.Version = n.version
		if u.GetComplete() {
			mine.Node = &skepv1.LocalNode{Id: n.id, DataAddr: n.addr.String(), IngressAddr: fmt.Sprintf("10.0.0.%d/24", 200+i)}
		}
		if err := n.Apply(l.t.Context(), mine); err != nil {
			l.t.Fatal(err)
		}
	}
}

// nets are the networks of most tests.
func nets() []*skepv1.OverlayNetwork {
	return []*skepv1.OverlayNetwork{
		{Id: "ingress", Name: "ingress", Ingress: true, Subnets: []*skepv1.OverlaySubnet{{Subnet: "10.0.0.0/24", Gateway: "10.0.0.1", Vni: 4096}}},
		{Id: "n1", Name: "front", Subnets: []*skepv1.OverlaySubnet{{Subnet: "10.0.1.0/24", Gateway: "10.0.1.1", Vni: 4097}}},
		{Id: "n2", Name: "twin", Subnets: []*skepv1.OverlaySubnet{{Subnet: "10.0.1.0/24", Gateway: "10.0.1.1", Vni: 4098}}},
		{Id: "n3", Name: "closed", Internal: true, Subnets: []*skepv1.OverlaySubnet{{Subnet: "10.0.3.0/24", Gateway: "10.0.3.1", Vni: 4099}}},
	}
}

// endpointOf describes the attachment of a task on a node.
func endpointOf(n *labNode, network, task, service, addr string, routable bool) *skepv1.OverlayEndpoint {
	return &skepv1.OverlayEndpoint{
		Key: &skepv1.EndpointKey{NetworkId: network, TaskId: task}, ServiceId: service, Name: task, NodeId: n.id, NodeAddr: n.addr.String(),
		Addresses: []string{addr + "/24"}, Routable: routable,
	}
}

// legs are the nodes' own attachments to the ingress network.
func (l *lab) legs() []*skepv1.OverlayEndpoint {
	var out []*skepv1.OverlayEndpoint
	for i, n := range l.nodes {
		e := endpointOf(n, "ingress", n.id, "", fmt.Sprintf("10.0.0.%d", 200+i), true)
		e.Name = ""
		out = append(out, e)
	}
	return out
}

// attach connects a container to networks, given as "id=address".
func (l *lab) attach(n *labNode, id string, overlays ...string) runtime.Sandbox {
	l.t.Helper()
	req := runtime.SandboxRequest{ContainerID: id, Name: id, Hostname: "h-" + id, Mode: "bridge"}
	for _, o := range overlays {
		req.Overlays = append(req.Overlays, overlayOf(n, o))
	}
	s, err := n.Attach(l.t.Context(), req)
	if err != nil {
		l.t.Fatal(err)
	}
	return s
}

// overlayOf reads a request for a network, "id=address".
func overlayOf(n *labNode, text string) runtime.OverlayRequest {
	network, addr, _ := strings.Cut(text, "=")
	name := network
	if d := n.want.Network(network); d != nil {
		name = d.GetName()
	}
	return runtime.OverlayRequest{NetworkID: network, Name: name, Address: netip.MustParsePrefix(addr + "/24")}
}

// echo answers, in a namespace, every TCP connection and UDP datagram to a port with its
// name and the address that it sees, until the test ends.
func echo(t *testing.T, path string, port int, name string) {
	t.Helper()
	echoOn(t, "4", path, port, name)
}

// echoOn is echo on IPv4 or IPv6.
func echoOn(t *testing.T, family, path string, port int, name string) {
	t.Helper()
	var l net.Listener
	var p net.PacketConn
	err := withinPath(path, func(netns.NsHandle) (err error) {
		var lc net.ListenConfig
		if l, err = lc.Listen(t.Context(), "tcp"+family, fmt.Sprintf(":%d", port)); err != nil {
			return err
		}
		p, err = lc.ListenPacket(t.Context(), "udp"+family, fmt.Sprintf(":%d", port))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = l.Close(), p.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
				buf := make([]byte, 256)
				for {
					n, err := c.Read(buf)
					if err != nil {
						return
					}
					if strings.HasPrefix(string(buf[:n]), "who") {
						_, _ = fmt.Fprintf(c, "%s %s\n", name, host)
					}
				}
			}()
		}
	}()
	go func() {
		buf := make([]byte, 2048)
		for {
			_, from, err := p.ReadFrom(buf)
			if err != nil {
				return
			}
			host, _, _ := net.SplitHostPort(from.String())
			_, _ = p.WriteTo(fmt.Appendf(nil, "%s %s\n", name, host), from)
		}
	}()
}

// dialIn connects from a namespace.
func dialIn(path, network, to string) (net.Conn, error) {
	var c net.Conn
	err := withinPath(path, func(netns.NsHandle) (err error) {
		c, err = (&net.Dialer{Timeout: 3 * time.Second}).Dial(network, to)
		return err
	})
	return c, err
}

// whoIn asks an echo from a namespace and returns its name and whom it saw.
func whoIn(path, network, to string) (name, seen string, err error) {
	c, err := dialIn(path, network, to)
	if err != nil {
		return "", "", err
	}
	defer c.Close()
	return whoOver(c)
}

func whoOver(c net.Conn) (name, seen string, err error) { return whoWithin(c, 3*time.Second) }

func whoWithin(c net.Conn, patience time.Duration) (name, seen string, err error) {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", "", err
	}
	if _, err := io.WriteString(c, "who\n"); err != nil {
		return "", "", err
	}
	buf := make([]byte, 256)
	n, err := c.Read(buf)
	if err != nil {
		return "", "", err
	}
	name, seen, _ = strings.Cut(strings.TrimSpace(string(buf[:n])), " ")
	return name, seen, nil
}

// wantWho fails unless the echo named answers and sees the address given.
func wantWho(t *testing.T, path, network, to, name, seen string) {
	t.Helper()
	gotName, gotSeen, err := whoIn(path, network, to)
	if err != nil || gotName != name || gotSeen != seen {
		t.Errorf("%s %s: %q saw %q, %v; want %q to see %q", network, to, gotName, gotSeen, err, name, seen)
	}
}

// resolve asks a sandbox's resolver and returns the answer code and sorted records.
func resolve(t *testing.T, path, name string, kind uint16) (string, []string) {
	t.Helper()
	m := new(dns.Msg).SetQuestion(dns.Fqdn(name), kind)
	var answers [2]*dns.Msg
	for i, network := range []string{"udp4", "tcp4"} {
		c, err := dialIn(path, network, "127.0.0.11:53")
		if err != nil {
			t.Fatalf("ask for %s by %s: %v", name, network, err)
		}
		client := dns.Client{Net: network, Timeout: 5 * time.Second}
		answers[i], _, err = client.ExchangeWithConn(m, &dns.Conn{Conn: c})
		_ = c.Close()
		if err != nil {
			t.Fatalf("ask for %s by %s: %v", name, network, err)
		}
	}
	texts := func(m *dns.Msg) []string {
		var out []string
		for _, rr := range m.Answer {
			if rr.Header().Ttl != 0 {
				t.Errorf("%s may be kept for %d s", name, rr.Header().Ttl)
			}
			switch rr := rr.(type) {
			case *dns.A:
				out = append(out, rr.A.String())
			case *dns.AAAA:
				out = append(out, rr.AAAA.String())
			case *dns.PTR:
				out = append(out, rr.Ptr)
			}
		}
		slices.Sort(out)
		return out
	}
	udp, tcp := texts(answers[0]), texts(answers[1])
	if answers[0].Rcode != answers[1].Rcode || !slices.Equal(udp, tcp) {
		t.Errorf("%s: %v by UDP, %v by TCP", name, answers[0], answers[1])
	}
	return dns.RcodeToString[answers[0].Rcode], udp
}

func wantNames(t *testing.T, path, name string, kind uint16, code string, want ...string) {
	t.Helper()
	gotCode, got := resolve(t, path, name, kind)
	if gotCode != code || !slices.Equal(got, want) {
		t.Errorf("%s %s: %s %v, want %s %v", name, dns.TypeToString[kind], gotCode, got, code, want)
	}
}

// wantUnknown fails if a name leads anywhere. It may be asked of the host's resolvers,
// which cannot be reached.
func wantUnknown(t *testing.T, path, name string) {
	t.Helper()
	if code, got := resolve(t, path, name, dns.TypeA); code == "NOERROR" || len(got) > 0 {
		t.Errorf("%s: %s %v, want nothing", name, code, got)
	}
}

// wantClean fails if the kernel of any node differs from its plan.
func (l *lab) wantClean() {
	l.t.Helper()
	for _, n := range l.nodes {
		found, err := n.Check(l.t.Context())
		if err != nil || len(found) > 0 {
			l.t.Errorf("%s: %q, %v", n.id, found, err)
		}
	}
}

// ping sends one ICMP echo request from a namespace and waits for its answer.
func ping(path, to string) error {
	return withinPath(path, func(netns.NsHandle) error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		tv := unix.NsecToTimeval((3 * time.Second).Nanoseconds())
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			return err
		}
		request := []byte{8, 0, 0, 0, 0x12, 0x34, 0, 1}
		sum := uint32(8<<8) + 0x1234 + 1
		request[2], request[3] = byte(^sum>>8), byte(^sum)
		dst := netip.MustParseAddr(to)
		if err := unix.Sendto(fd, request, 0, &unix.SockaddrInet4{Addr: dst.As4()}); err != nil {
			return err
		}
		buf := make([]byte, 256)
		for {
			n, from, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				return err
			}
			if n < 28 || buf[20] != 0 || buf[24] != 0x12 || buf[25] != 0x34 {
				continue
			}
			if a, ok := from.(*unix.SockaddrInet4); !ok || a.Addr != dst.As4() {
				return fmt.Errorf("answer from %v", from)
			}
			return nil
		}
	})
}
