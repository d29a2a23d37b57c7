package dataplane

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/netplan"
	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/wireguard"
)

const sealedPort = 51822

// sealedIngress are the networks of most tests, the ingress network encrypted.
func sealedIngress() []*skepv1.OverlayNetwork {
	list := nets()
	list[0].Encrypted, list[0].Encryption, list[0].EncryptionPort = true, model.WireGuard, sealedPort
	return list
}

// sealedEdge is a lab like edge, with an encrypted ingress network.
func sealedEdge(t *testing.T) (l *lab, outside string, in map[string]string) {
	t.Helper()
	l = newLab(t, 3)
	if len(l.nodes[0].encryption) == 0 {
		t.Skip("this kernel has neither WireGuard nor TUN")
	}
	if !l.nodes[0].keepsSource {
		t.Skip("the kernel cannot answer clients by their own addresses")
	}
	return l, l.host("outside", netip.MustParseAddr("192.0.2.50")), l.publish(sealedIngress()...)
}

// publish tells all nodes of some networks, with port 8080 of a service that has a task on the
// first node and one on the second.
func (l *lab) publish(networks ...*skepv1.OverlayNetwork) map[string]string {
	l.t.Helper()
	id := networks[0].GetId()
	u := &skepv1.NetworkUpdate{
		Complete: true, Networks: networks, Services: []*skepv1.BalancedService{web(8080)},
		Endpoints: append(l.legs(), kept(l.nodes[0], "web.1", "10.0.0.3"), kept(l.nodes[1], "web.2", "10.0.0.4")),
	}
	for _, e := range u.GetEndpoints() {
		e.Key.NetworkId = id
	}
	l.tell(u)
	if networks[0].GetEncrypted() {
		l.tellPeers(1, networks[0])
	}
	in := map[string]string{}
	for i, addr := range []string{"10.0.0.3", "10.0.0.4"} {
		name := fmt.Sprint("web.", i+1)
		in[name] = l.attach(l.nodes[i], name, id+"="+addr).NetNS
		echo(l.t, in[name], 80, name)
	}
	return in
}

// wantAnswers fails unless each node leads to a task that sees who asks.
func (l *lab) wantAnswers(outside string) {
	l.t.Helper()
	for _, n := range l.nodes {
		for _, network := range []string{"tcp4", "udp4"} {
			wantBoth(l.t, outside, network, n.addr.String()+":8080", "192.0.2.50")
		}
	}
}

// onWire captures what all links of the wire carry. The function returned fails the test about
// each packet that is neither between a client and a published port nor encrypted, and returns
// how many were encrypted and how long the longest was.
func (l *lab) onWire() (look func() (sealed, longest int)) {
	l.t.Helper()
	var fd int
	all := uint16(unix.ETH_P_ALL)
	err := withinPath(l.wire, func(netns.NsHandle) (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(all>>8|all<<8))
		return err
	})
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { _ = unix.Close(fd) })
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20); err != nil {
		l.t.Fatal(err)
	}
	member := func(a netip.Addr) bool {
		return slices.ContainsFunc(l.nodes, func(n *labNode) bool { return n.addr == a })
	}
	return func() (sealed, longest int) {
		l.t.Helper()
		buf := make([]byte, 1<<17)
		for {
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				return sealed, longest
			}
			p := buf[14:n]
			if binary.BigEndian.Uint16(buf[12:]) != unix.ETH_P_IP || len(p) < 28 {
				continue // ARP, and what links say by themselves
			}
			from, to := netip.AddrFrom4([4]byte(p[12:])), netip.AddrFrom4([4]byte(p[16:]))
			sport, dport := binary.BigEndian.Uint16(p[20:]), binary.BigEndian.Uint16(p[22:])
			switch {
			case member(from) && member(to) && p[9] == unix.IPPROTO_UDP && dport == sealedPort && binary.BigEndian.Uint16(p[6:])&0x3fff == 0:
				sealed++
				longest = max(longest, len(p))
			case member(from) && sport == 8080 || member(to) && dport == 8080:
			default:
				l.t.Errorf("%s to %s, protocol %d, port %d to %d, %d bytes: not encrypted", from, to, p[9], sport, dport, len(p))
			}
		}
	}
}

func TestEncryptedIngressKeepsClientAddress(t *testing.T) {
	l, outside, _ := sealedEdge(t)
	look := l.onWire()
	l.wantAnswers(outside)
	if sealed, _ := look(); sealed == 0 {
		t.Error("nothing encrypted was seen")
	}
	l.wantClean()
}

// TestEncryptedIngressOnePortAtSeveralNodes: tasks tell entry nodes apart through the tunnel.
func TestEncryptedIngressOnePortAtSeveralNodes(t *testing.T) {
	l, outside, _ := sealedEdge(t)
	l.tell(&skepv1.NetworkUpdate{RemovedEndpoints: []*skepv1.EndpointKey{{NetworkId: "ingress", TaskId: "web.1"}}})
	for _, network := range []string{"tcp4", "udp4"} {
		wantOnePort(t, l, outside, network)
	}
}

func TestEncryptedIngressIPv6(t *testing.T) { testIPv6(t, sealedIngress()[:2]) }

// TestEncryptedIngressCarriesFullPackets: a packet of the network's size fills one of the
// wire's to the last byte, and is never cut.
func TestEncryptedIngressCarriesFullPackets(t *testing.T) {
	l, outside, in := sealedEdge(t)
	wantWhoSoon(t, in["web.1"], "10.0.0.4:80", "web.2", "10.0.0.3")
	look := l.onWire()
	c, err := dialIn(in["web.1"], "udp4", "10.0.0.4:80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	raw, err := c.(*net.UDPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var failed error
	if err := raw.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
	}); err != nil || failed != nil {
		t.Fatal(err, failed)
	}
	const full = 1500 - 60 - 70 - 28 // WireGuard, VXLAN, and a datagram's own headers
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(make([]byte, full)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 64)); err != nil {
		t.Errorf("a datagram of %d bytes: %v", full, err)
	}
	if _, err := c.Write(make([]byte, full+1)); err == nil {
		t.Error("a datagram was sent that the wire cannot carry whole")
	}
	if _, longest := look(); longest != 1500 {
		t.Errorf("the longest packet on the wire has %d bytes", longest)
	}
	// A large transfer in both directions, from a client whose packets are larger.
	l.tell(&skepv1.NetworkUpdate{RemovedEndpoints: []*skepv1.EndpointKey{{NetworkId: "ingress", TaskId: "web.1"}}})
	big := web(8080)
	big.Ports = []*skepv1.MeshPort{{Protocol: unix.IPPROTO_TCP, Target: 83, Published: 8080}}
	l.tell(&skepv1.NetworkUpdate{Services: []*skepv1.BalancedService{big}})
	var listen net.Listener
	if err := withinPath(in["web.2"], func(netns.NsHandle) (err error) {
		listen, err = (&net.ListenConfig{}).Listen(t.Context(), "tcp4", ":83")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer listen.Close()
	const size = 2 << 20
	done := make(chan error, 1)
	go func() {
		c, err := listen.Accept()
		if err == nil {
			_ = c.SetDeadline(time.Now().Add(30 * time.Second))
			if _, err = io.CopyN(io.Discard, c, size); err == nil {
				_, err = c.Write(make([]byte, size))
			}
			_ = c.Close()
		}
		done <- err
	}()
	stream, err := dialIn(outside, "tcp4", "192.0.2.3:8080")
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if err := stream.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, stream); err != nil || n != size {
		t.Errorf("%d of %d bytes came back: %v", n, size, err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	look()
	l.wantClean()
}

// encapsulated returns a VXLAN packet of the ingress network with a datagram to port 82.
func encapsulated(from, to netip.Addr, payload string) []byte {
	udp := binary.BigEndian.AppendUint16(nil, 999)
	udp = binary.BigEndian.AppendUint16(udp, 82)
	udp = binary.BigEndian.AppendUint16(udp, uint16(8+len(payload)))
	udp = append(append(udp, 0, 0), payload...)
	ip := slices.Concat([]byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}, from.AsSlice(), to.AsSlice())
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+len(udp)))
	var sum uint32
	for i := 0; i < len(ip); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum+sum>>16))
	source, target := netplan.MAC(from), netplan.MAC(to)
	return slices.Concat([]byte{8, 0, 0, 0, 0, 0x10, 0, 0}, target[:], source[:], []byte{8, 0}, ip, udp) // VXLAN 4096
}

// send sends a datagram from an address of a namespace, or from any.
func send(path string, from netip.Addr, to netip.AddrPort, data []byte) error {
	return withinPath(path, func(netns.NsHandle) error {
		d := net.Dialer{}
		if from.IsValid() {
			d.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
		}
		c, err := d.Dial("udp", to.String())
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write(data)
		return err
	})
}

// TestEncryptedIngressTakesNothingForged: what looks like the network's packets reaches no task,
// whoever sends it to whichever port of the host, nor what a node sends in another's name.
func TestEncryptedIngressTakesNothingForged(t *testing.T) {
	l, outside, in := sealedEdge(t)
	var p net.PacketConn
	if err := withinPath(in["web.1"], func(netns.NsHandle) (err error) {
		p, err = (&net.ListenConfig{}).ListenPacket(t.Context(), "udp4", ":82")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	victim, other := l.nodes[0], l.nodes[1]
	leg, task := netip.MustParseAddr("10.0.0.201"), netip.MustParseAddr("10.0.0.3")
	forged := encapsulated(leg, task, "forged")
	for _, sender := range []string{outside, other.path, victim.path} {
		for _, port := range []uint16{defaultVXLANPort, sealedPort} {
			for range 3 { // the first may be answered by an error that the second is told
				_ = send(sender, netip.Addr{}, netip.AddrPortFrom(victim.addr, port), forged)
			}
		}
	}
	// From within the tunnel, where another node's address is given to this one.
	tunnel, to := other.cryptNS("ingress"), netip.AddrPortFrom(netplan.TunnelAddr(victim.id), defaultVXLANPort)
	stolen := netplan.TunnelAddr(l.nodes[2].id)
	if err := withinPath(tunnel, func(netns.NsHandle) error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.AddrAdd(lo, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(stolen, 128)), Flags: unix.IFA_F_NODAD})
	}); err != nil {
		t.Fatal(err)
	}
	if err := send(tunnel, stolen, to, forged); err != nil {
		t.Fatal(err)
	}
	if err := send(tunnel, netplan.TunnelAddr(other.id), to, encapsulated(leg, task, "real")); err != nil {
		t.Fatal(err)
	}
	if err := p.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	if n, from, err := p.ReadFrom(buf); err != nil || string(buf[:n]) != "real" {
		t.Errorf("the first datagram that arrives says %q and comes from %v, %v", buf[:n], from, err)
	}
}

// TestEncryptedIngressKeysRotate: a client's datagrams get there and back while keys change.
func TestEncryptedIngressKeysRotate(t *testing.T) {
	l, outside, _ := sealedEdge(t)
	l.tell(&skepv1.NetworkUpdate{RemovedEndpoints: []*skepv1.EndpointKey{{NetworkId: "ingress", TaskId: "web.1"}}})
	wantWhoSoon(t, outside, "192.0.2.3:8080", "web.2", "192.0.2.50")
	rotate(t, l, sealedIngress()[:1], newLoad(t, outside, "192.0.2.3:8080", "web.2"))
}

// TestEncryptedIngressOutlivesTheDaemon: a client's connection goes on without the daemons of
// both nodes, and over their return.
func TestEncryptedIngressOutlivesTheDaemon(t *testing.T) {
	l, outside, _ := sealedEdge(t)
	l.tell(&skepv1.NetworkUpdate{RemovedEndpoints: []*skepv1.EndpointKey{{NetworkId: "ingress", TaskId: "web.1"}}})
	wantWhoSoon(t, outside, "192.0.2.3:8080", "web.2", "192.0.2.50")
	c, err := dialIn(outside, "tcp4", "192.0.2.3:8080")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	works := func(when string) {
		t.Helper()
		if name, seen, err := whoOver(c); err != nil || name != "web.2" || seen != "192.0.2.50" {
			t.Errorf("%s: %q saw %q, %v", when, name, seen, err)
		}
	}
	works("at first")
	for _, n := range l.nodes[1:] {
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
		works("without the daemon of " + n.id)
	}
	for _, n := range l.nodes[1:] {
		l.start(n)
		works("with another daemon on " + n.id)
	}
	l.wantClean()

	n := l.nodes[2]
	p, userspace := n.crypts["ingress"].tunnel.(*wireguard.Process)
	if !userspace {
		return // the kernel's device does not end
	}
	l.tellPeers(1, sealedIngress()[0])
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-n.ended
	n.check(t.Context())
	l.wantClean()
	wantWhoSoon(t, outside, "192.0.2.3:8080", "web.2", "192.0.2.50")
}

func TestEncryptedIngressIsMended(t *testing.T) {
	l, outside, _ := sealedEdge(t)
	l.tell(&skepv1.NetworkUpdate{RemovedEndpoints: []*skepv1.EndpointKey{{NetworkId: "ingress", TaskId: "web.1"}}})
	n := l.nodes[2]
	own, others := netplan.TunnelAddr(n.id), netplan.TunnelNetwork()
	del := func(c *crypt, name string) error {
		link, err := c.h.LinkByName(name)
		if err != nil {
			return err
		}
		return c.h.LinkDel(link)
	}
	spoil := map[string]func(*crypt) error{
		"address": func(c *crypt) error {
			return c.h.AddrDel(c.wg, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(own, 128))})
		},
		"route": func(c *crypt) error {
			return c.h.RouteDel(&netlink.Route{LinkIndex: c.wg.Attrs().Index, Dst: ipNet(others)})
		},
		"bridge": func(c *crypt) error { return del(c, bridgeName(4096)) },
		"vxlan":  func(c *crypt) error { return del(c, vxlanName(4096)) },
		"leg":    func(c *crypt) error { return del(c, "ingress") },
		"link":   func(c *crypt) error { return c.h.LinkSetDown(c.wg) },
		"way": func(c *crypt) error {
			mac := netplan.MAC(netip.MustParseAddr("10.0.0.4"))
			return c.h.NeighDel(&netlink.Neigh{
				LinkIndex: c.links[4096].vxlan, Family: unix.AF_BRIDGE, Flags: unix.NTF_SELF, HardwareAddr: mac[:], IP: netplan.TunnelAddr(l.nodes[1].id).AsSlice(),
			})
		},
		"peer": func(c *crypt) error {
			return c.tunnel.Write(wireguard.Changes{Remove: []wireguard.Key{l.nodes[1].private.Public()}})
		},
		"stolen address": func(c *crypt) error {
			return c.tunnel.Write(wireguard.Changes{Peers: []wireguard.Change{{
				Key: l.nodes[0].private.Public(), Add: []netip.Prefix{netip.PrefixFrom(netplan.TunnelAddr(l.nodes[1].id), 128)},
			}}})
		},
	}
	for _, what := range sortedKeys(spoil) {
		if err := spoil[what](n.crypts["ingress"]); err != nil {
			t.Fatalf("spoil %s: %v", what, err)
		}
		if found, err := n.Check(t.Context()); err != nil || len(found) == 0 {
			t.Errorf("%s: %q, %v, want a difference", what, found, err)
		}
		n.check(t.Context())
		l.wantClean()
		wantWhoSoon(t, outside, "192.0.2.3:8080", "web.2", "192.0.2.50")
	}
}

// TestEncryptedIngressIsMadeAnew removes the ingress network and makes it clear, encrypted, and
// clear again. Nothing is left of the former one.
func TestEncryptedIngressIsMadeAnew(t *testing.T) {
	l, outside, _ := sealedEdge(t)
	for i, list := range [][]*skepv1.OverlayNetwork{nets(), sealedIngress(), nets()} {
		list[0].Id = fmt.Sprint("ingress-", i+2)
		for j, n := range l.nodes[:2] {
			if err := n.Detach(t.Context(), fmt.Sprint("web.", j+1)); err != nil {
				t.Fatal(err)
			}
		}
		l.tell(&skepv1.NetworkUpdate{Complete: true, Networks: list[1:]})
		l.wantClean()
		l.publish(list...)
		look := l.onWire()
		wantBoth(t, outside, "tcp4", "192.0.2.3:8080", "192.0.2.50")
		l.wantClean()
		if list[0].GetEncrypted() {
			look()
		}
		for _, n := range l.nodes {
			left, err := filepath.Glob(filepath.Join(n.dir, "x", cryptPrefix+"*"))
			if err != nil || (len(left) > 0) != list[0].GetEncrypted() || (n.fabric != nil) == list[0].GetEncrypted() {
				t.Errorf("%s: with encryption %v there are %q, the switch %v, %v", n.id, list[0].GetEncrypted(), left, n.fabric, err)
			}
		}
	}
}

// TestEncryptedIngressWithoutEncryption: a node that cannot encrypt takes no part in the mesh,
// says so, and is in nobody's way.
func TestEncryptedIngressWithoutEncryption(t *testing.T) {
	l := newLab(t, 3)
	if len(l.nodes[0].encryption) == 0 {
		t.Skip("this kernel has neither WireGuard nor TUN")
	}
	outside := l.host("outside", netip.MustParseAddr("192.0.2.50"))
	unable := l.nodes[2]
	unable.encryption = nil
	look := l.onWire()
	l.publish(sealedIngress()...) // which it takes over without an error
	for _, n := range l.nodes[:2] {
		wantBoth(t, outside, "tcp4", n.addr.String()+":8080", "")
	}
	if c, err := dialIn(outside, "tcp4", "192.0.2.3:8080"); err == nil {
		_ = c.Close()
		t.Error("a node that cannot encrypt publishes a port")
	}
	look()
	found, err := unable.Check(t.Context())
	if text := strings.Join(found, "\n"); err != nil || text != "routing mesh: no port is published on this node: network ingress is encrypted by wireguard, which this node cannot do" {
		t.Errorf("its check says %q, %v", text, err)
	}
	told, err := unable.Examine(t.Context())
	if err != nil || len(told) != 1 || told[0].GetMended() || told[0].GetText() != found[0] {
		t.Errorf("an examination says %v, %v", told, err)
	}
	_, err = unable.Attach(t.Context(), runtime.SandboxRequest{
		ContainerID: "web.3", Name: "web.3", Mode: "bridge", Overlays: []runtime.OverlayRequest{overlayOf(unable, "ingress=10.0.0.5")},
	})
	if model.KindOf(err) != model.Unimplemented {
		t.Errorf("a container with published ports there: %v", err)
	}
}

// TestEncryptedIngressPortInUse: a node on which somebody else has the port takes no part in the
// mesh until that one ends, says so, and is in nobody's way.
func TestEncryptedIngressPortInUse(t *testing.T) {
	l := newLab(t, 3)
	if len(l.nodes[0].encryption) == 0 {
		t.Skip("this kernel has neither WireGuard nor TUN")
	}
	outside := l.host("outside", netip.MustParseAddr("192.0.2.50"))
	blocked := l.nodes[2]
	var p net.PacketConn
	if err := withinPath(blocked.path, func(netns.NsHandle) (err error) {
		p, err = (&net.ListenConfig{}).ListenPacket(t.Context(), "udp4", fmt.Sprint(":", sealedPort))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	l.publish(sealedIngress()...)
	for _, n := range l.nodes[:2] {
		wantBoth(t, outside, "tcp4", n.addr.String()+":8080", "")
	}
	if c, err := dialIn(outside, "tcp4", "192.0.2.3:8080"); err == nil {
		_ = c.Close()
		t.Error("a node that hears nobody publishes a port")
	}
	found, err := blocked.Check(t.Context())
	if !slices.ContainsFunc(found, func(text string) bool {
		return strings.Contains(text, "UDP port 51822 is in use on this node: free it")
	}) {
		t.Errorf("its check says %q, %v", found, err)
	}
	l.tell(&skepv1.NetworkUpdate{Endpoints: []*skepv1.OverlayEndpoint{kept(blocked, "web.3", "10.0.0.5")}})
	web3 := runtime.SandboxRequest{ContainerID: "web.3", Name: "web.3", Mode: "bridge", Overlays: []runtime.OverlayRequest{overlayOf(blocked, "ingress=10.0.0.5")}}
	if _, err := blocked.Attach(t.Context(), web3); model.KindOf(err) != model.Conflict {
		t.Errorf("a container with published ports there: %v", err)
	}
	l.tell(&skepv1.NetworkUpdate{RemovedEndpoints: []*skepv1.EndpointKey{{NetworkId: "ingress", TaskId: "web.3"}}})
	_ = p.Close()
	blocked.check(t.Context())
	l.wantClean()
	wantBoth(t, outside, "tcp4", "192.0.2.3:8080", "")
	if _, err := blocked.Attach(t.Context(), web3); err != nil {
		t.Error(err)
	}
}

func TestTunnelMTU(t *testing.T) {
	n := sealedIngress()[0]
	for vxlan, want := range map[int]int{
		1450: 1370, 8950: 8870, 1430: 1350, // over IPv4 with 1500 and 9000 bytes, over IPv6 with 1500
		1290: 1210, 1289: 1194, // what a link with IPv6 may have at least, and less
	} {
		if got := insideMTU(n, vxlan); got != want {
			t.Errorf("%d bytes inside VXLAN leave %d, want %d", vxlan, got, want)
		}
	}
	n.Mtu = 1200
	if got := insideMTU(n, 1450); got != 1200 {
		t.Errorf("a network of 1200 bytes has %d", got)
	}
}
