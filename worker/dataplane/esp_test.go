package dataplane

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/netplan"
)

// tap listens to what nodes send each other.
type tap struct {
	l   *lab
	how string
	fd  int
}

// tap begins to listen on the wire.
func (l *lab) tap(how string) *tap {
	l.t.Helper()
	tp := &tap{l: l, how: how}
	err := withinPath(l.wire, func(netns.NsHandle) (err error) {
		link, err := netlink.LinkByName("w-node1")
		if err != nil {
			return err
		}
		if tp.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0x0300); err != nil {
			return err
		}
		return unix.Bind(tp.fd, &unix.SockaddrLinklayer{Protocol: 0x0300, Ifindex: link.Attrs().Index})
	})
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { _ = unix.Close(tp.fd) })
	return tp
}

// end fails unless everything that was sent between nodes was encrypted, and returns the length
// of the largest packet.
func (tp *tap) end() (largest int) {
	tp.l.t.Helper()
	buf, node := make([]byte, 1<<17), map[netip.Addr]bool{}
	for _, n := range tp.l.nodes {
		node[n.addr] = true
	}
	between, others := 0, 0
	for {
		n, _, err := unix.Recvfrom(tp.fd, buf, 0)
		if err != nil {
			break
		}
		packet, protocol, payload := buf[14:n], byte(0), []byte(nil)
		var from, to netip.Addr
		switch kind := binary.BigEndian.Uint16(buf[12:]); {
		case kind == unix.ETH_P_IP && len(packet) > 28:
			protocol, payload = packet[9], packet[20:]
			from, to = netip.AddrFrom4([4]byte(packet[12:])), netip.AddrFrom4([4]byte(packet[16:]))
			if packet[6]&0x3f|packet[7] != 0 {
				protocol = unix.IPPROTO_FRAGMENT
			}
		case kind == unix.ETH_P_IPV6 && len(packet) > 48:
			protocol, payload = packet[6], packet[40:]
			from, to = netip.AddrFrom16([16]byte(packet[8:])), netip.AddrFrom16([16]byte(packet[24:]))
		}
		if bytes.Contains(packet, []byte("who\n")) {
			others++
		}
		if !node[from] || !node[to] || protocol == unix.IPPROTO_ICMPV6 {
			continue // how they find each other
		}
		between++
		port := binary.BigEndian.Uint16(payload[2:])
		if protocol != unix.IPPROTO_ESP && (tp.how != model.WireGuard || protocol != unix.IPPROTO_UDP || port != 51820 && port != 51821) {
			others++
		}
		largest = max(largest, len(packet))
	}
	if between == 0 || others > 0 {
		tp.l.t.Errorf("of %d packets between nodes %d are in clear or fragments", between, others)
	}
	return largest
}

// kernel returns what the kernel of a node has of ESP.
func (n *labNode) kernel(t *testing.T) observed {
	t.Helper()
	x, err := openXfrm(n.hostNS, n.addr.Is6())
	if err != nil {
		t.Fatal(err)
	}
	defer x.close()
	have, err := x.observe(map[netip.Addr]bool{n.addr: true})
	if err != nil {
		t.Fatal(err)
	}
	return have
}

// counted returns how far the associations of a node have counted.
func (n *labNode) counted(t *testing.T) map[netplan.SAID]counters {
	t.Helper()
	x, err := openXfrm(n.hostNS, n.addr.Is6())
	if err != nil {
		t.Fatal(err)
	}
	defer x.close()
	out := map[netplan.SAID]counters{}
	for id := range n.kernel(t).SAs {
		if _, out[id], err = x.look(id); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

// wantGeneration fails unless a node receives with a generation and the two before it, and sends
// with the one before it.
func (n *labNode) wantGeneration(t *testing.T, generation byte) {
	t.Helper()
	have := n.kernel(t)
	var receives, sends []byte
	for id := range have.SAs {
		if id.Dst == n.addr {
			receives = append(receives, byte(id.SPI))
		} else {
			sends = append(sends, byte(id.SPI))
		}
	}
	slices.Sort(receives)
	if !bytes.Equal(receives, []byte{generation - 2, generation - 1, generation}) || !bytes.Equal(sends, []byte{generation - 1}) {
		t.Errorf("%s receives with %v and sends with %v, want generation %d", n.id, receives, sends, generation)
	}
	for _, w := range have.Ways {
		if byte(w.SPI) != generation-1 {
			t.Errorf("%s encrypts by generation %d, want %d", n.id, byte(w.SPI), generation-1)
		}
	}
}

// sealedMixed is sealedLab for ESP, with a clear network besides: c1 and c2.
func sealedMixed(t *testing.T, six bool) (*lab, map[string]string) {
	t.Helper()
	l, in := sealedLab(t, way{how: model.ESP, six: six})
	var endpoints []*skepv1.OverlayEndpoint
	for i, n := range l.nodes {
		endpoints = append(endpoints, endpointOf(n, "n1", fmt.Sprintf("c%d", i+1), "", fmt.Sprintf("10.0.1.%d", i+2), true))
	}
	l.tell(&skepv1.NetworkUpdate{Endpoints: endpoints})
	for i, n := range l.nodes {
		name := fmt.Sprintf("c%d", i+1)
		in[name] = l.attach(n, name, fmt.Sprintf("n1=10.0.1.%d", i+2)).NetNS
		echo(t, in[name], 80, name)
	}
	return l, in
}

// forged returns a VXLAN packet with a datagram to port 82 of an address, and what it says.
func forged(vni uint32, from, to, text string) []byte {
	src, dst := netip.MustParseAddr(from), netip.MustParseAddr(to)
	b := []byte{8, 0, 0, 0, byte(vni >> 16), byte(vni >> 8), byte(vni), 0}
	dstMAC, srcMAC := netplan.MAC(dst), netplan.MAC(src)
	b = append(append(append(b, dstMAC[:]...), srcMAC[:]...), 8, 0)
	ip := []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}
	ip = append(append(ip, src.AsSlice()...), dst.AsSlice()...)
	binary.BigEndian.PutUint16(ip[2:], uint16(28+len(text)))
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum))
	udp := []byte{0x30, 0x39, 0, 82, 0, byte(8 + len(text)), 0, 0} // without a checksum
	return append(append(append(b, ip...), udp...), text...)
}

// sendAs sends a datagram from a namespace, as a user if that is not root, with a mark unless
// that is zero. Its thread ends with it.
func sendAs(path string, user, mark int, to string, data []byte) error {
	done := make(chan error, 1)
	go func() {
		goruntime.LockOSThread() // and never unlocked
		done <- func() error {
			ns, err := netns.GetFromPath(path)
			if err != nil {
				return err
			}
			defer ns.Close()
			if err := netns.Set(ns); err != nil {
				return err
			}
			if user != 0 {
				if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(user), uintptr(user), uintptr(user)); errno != 0 {
					return errno
				}
			}
			at := netip.MustParseAddrPort(to)
			domain, addr := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: int(at.Port()), Addr: at.Addr().As16()})
			if at.Addr().Is4() {
				domain, addr = unix.AF_INET, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}
			}
			fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			if mark != 0 {
				if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark); err != nil {
					return err
				}
			}
			return unix.Sendto(fd, data, 0, addr)
		}()
	}()
	return <-done
}

// hear listens to datagrams at port 82 of a namespace.
func hear(t *testing.T, path string) net.PacketConn {
	t.Helper()
	var p net.PacketConn
	if err := withinPath(path, func(netns.NsHandle) (err error) {
		p, err = (&net.ListenConfig{}).ListenPacket(t.Context(), "udp4", ":82")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

// wantOnly fails unless the next datagrams that arrive are those that come from a namespace now.
func wantOnly(t *testing.T, p net.PacketConn, from, to string) {
	t.Helper()
	for _, text := range []string{"true one", "true two"} {
		if err := sendAs(from, 0, 0, to, []byte(text)); err != nil {
			t.Fatal(err)
		}
		if err := p.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 64)
		n, _, err := p.ReadFrom(buf)
		if err != nil || string(buf[:n]) != text {
			t.Errorf("%q arrived, %v; want %q", buf[:n], err, text)
		}
	}
}

// TestEncryptedKeepsForgedOut: nobody but the switch of another node gets a packet into a
// network that ESP encrypts.
func TestEncryptedKeepsForgedOut(t *testing.T) {
	t.Run("by IPv4", func(t *testing.T) { keepsForgedOut(t, false) })
	t.Run("by IPv6", func(t *testing.T) { keepsForgedOut(t, true) })
}

func keepsForgedOut(t *testing.T, six bool) {
	l, in := sealedMixed(t, six)
	stranger := l.host("stranger", l.at(77))
	a1, a2, c2 := hear(t, in["a1"]), hear(t, in["a2"]), hear(t, in["c2"])
	wantWho(t, in["a1"], "udp4", "10.0.8.3:80", "a2", "10.0.8.2")
	wantWho(t, in["c1"], "udp4", "10.0.1.3:80", "c2", "10.0.1.2")
	const sealedVNI, clearVNI = 4104, 4097
	toSealed, toClear := forged(sealedVNI, "10.0.8.2", "10.0.8.3", "forged"), forged(clearVNI, "10.0.1.2", "10.0.1.3", "forged")
	to := func(host netip.Addr, port uint16) string { return netip.AddrPortFrom(host, port).String() }
	clearPort, sealedPort := to(l.at(2), defaultVXLANPort), to(l.at(2), model.ESPPort)

	// What the clear network's port takes, as VXLAN does: the packet is one.
	if err := sendAs(stranger, 65534, 0, clearPort, toClear); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	if err := c2.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if n, _, err := c2.ReadFrom(buf); err != nil || string(buf[:n]) != "forged" {
		t.Fatalf("a clear network got %q, %v", buf[:n], err)
	}

	// From a machine outside, to both ports.
	for _, to := range []string{sealedPort, clearPort} {
		if err := sendAs(stranger, 65534, 0, to, toSealed); err != nil {
			t.Fatal(err)
		}
	}
	// The clear network is not behind the other port.
	if err := sendAs(stranger, 65534, 0, sealedPort, toClear); err != nil {
		t.Fatal(err)
	}
	// From members' own hosts and containers: refused there, or lost.
	member := l.nodes[0].path
	refused := func(what, path string, user, mark int, to string, data []byte) {
		t.Helper()
		if err := sendAs(path, user, mark, to, data); err == nil && path == member {
			t.Errorf("%s was sent", what)
		}
	}
	refused("what a user of a member sent", member, 65534, 0, sealedPort, toSealed)
	refused("what root of a member sent", member, 0, 0, sealedPort, toSealed)
	refused("what was marked by root", member, 0, espMark, sealedPort, toSealed)
	refused("", in["a1"], 0, 0, sealedPort, toSealed)
	refused("", in["c1"], 0, 0, sealedPort, toSealed)
	refused("", in["a1"], 0, espMark, sealedPort, toSealed)
	wantOnly(t, a2, in["a1"], "10.0.8.3:82")
	wantOnly(t, c2, in["c1"], "10.0.1.3:82")

	// To the host itself, where policies do not apply.
	for _, own := range []netip.Addr{l.at(1), map[bool]netip.Addr{false: netip.MustParseAddr("127.0.0.1"), true: netip.IPv6Loopback()}[six]} {
		if err := sendAs(member, 65534, 0, to(own, model.ESPPort), forged(sealedVNI, "10.0.8.3", "10.0.8.2", "forged")); err != nil && !os.IsPermission(err) {
			t.Fatal(err)
		}
	}
	wantOnly(t, a1, in["a2"], "10.0.8.2:82")
	l.wantClean()
}

func TestEncryptedByESPIsMended(t *testing.T) {
	l, in := sealedMixed(t, false)
	n := l.nodes[0]
	x, err := openXfrm(n.hostNS, false)
	if err != nil {
		t.Fatal(err)
	}
	defer x.close()
	sends := func() netplan.SA {
		for id, sa := range n.kernel(t).SAs {
			if id.Dst == l.nodes[1].addr {
				return sa
			}
		}
		t.Fatal("it sends by nothing")
		return netplan.SA{}
	}
	stranger := netplan.SA{SAID: netplan.SAID{Dst: n.addr, SPI: 0x9999}, Src: netip.MustParseAddr("192.0.2.99"), Key: netplan.ESPKey{9}}
	for _, c := range []struct {
		what  string
		spoil func() error
		lost  bool // the kernel has forgotten how far it had counted
	}{
		{"way", func() error { return x.removeWay(netplan.ESPWay{Src: n.addr, SAID: sends().SAID}) }, false},
		{"stranger", func() error { return x.put(stranger, counters{}) }, false},
		{"strange way", func() error {
			return x.putWay(netplan.ESPWay{Src: n.addr, SAID: netplan.SAID{Dst: stranger.Src, SPI: 7}})
		}, false},
		{"block", func() error { return x.h.XfrmPolicyDel(x.guards()[0]) }, false},
		{"require", func() error { return x.h.XfrmPolicyDel(x.guards()[1]) }, false},
		{"policies", func() error { return x.h.XfrmPolicyFlush() }, false},
		{"marks", func() error { return espMarks().remove(n.fabric.ns) }, false},
		{"rules", func() error { return n.espRules(n.addr).remove(n.hostNS) }, false},
		{"association", func() error { return x.remove(sends()) }, true},
		{"another key", func() error {
			sa := sends()
			sa.Key[3]++
			if err := x.remove(sa); err != nil {
				return err
			}
			return x.put(sa, counters{})
		}, true},
		{"everything", func() error { return x.h.XfrmStateFlush(netlink.XFRM_PROTO_ESP) }, true},
	} {
		if err := c.spoil(); err != nil {
			t.Fatalf("spoil %s: %v", c.what, err)
		}
		// Whatever is missing, nothing goes in clear meanwhile.
		wire := l.tap(model.ESP)
		for range 3 {
			if c.lost {
				break // what is sent is lost
			}
			if err := sendAs(in["a1"], 0, 0, "10.0.8.3:82", []byte("who\n")); err != nil {
				t.Errorf("%s: %v", c.what, err)
			}
		}
		found, err := n.Check(t.Context())
		if err != nil || len(found) == 0 {
			t.Errorf("%s: %q, %v, want a difference", c.what, found, err)
		}
		epoch := n.esp.memory.Epoch
		n.check(t.Context())
		if lost := n.esp.memory.Epoch != epoch; lost != c.lost {
			t.Errorf("%s: the node takes other keys: %v, want %v", c.what, lost, c.lost)
		}
		if c.lost {
			select {
			case <-n.LabelsChanged():
			default:
				t.Errorf("%s: nobody is told that the node needs other keys", c.what)
			}
			if !slices.ContainsFunc(n.Labels(), func(s string) bool { return s == model.ESPEpochLabel+"="+n.esp.memory.Epoch }) {
				t.Errorf("%s: labels %q", c.what, n.Labels())
			}
			l.tellPeers(3, sealed(model.ESP)...)
		}
		l.wantClean()
		wantWho(t, in["a1"], "udp4", "10.0.8.3:80", "a2", "10.0.8.2")
		wire.end()
		wantWho(t, in["c1"], "udp4", "10.0.1.3:80", "c2", "10.0.1.2")
	}
}

// TestEncryptedByESPComesAndGoes: associations are there as long as a network needs them, and
// one that comes back goes on counting.
func TestEncryptedByESPComesAndGoes(t *testing.T) {
	l, in := sealedLab(t, way{how: model.ESP})
	n := l.nodes[0]
	for range 5 {
		wantWho(t, in["a1"], "udp4", "10.0.8.3:80", "a2", "10.0.8.2")
	}
	before, counted := n.kernel(t), n.counted(t)
	if len(before.SAs) != 4 || len(before.Ways) != 1 {
		t.Fatalf("%d associations and %d ways", len(before.SAs), len(before.Ways))
	}
	gone := func(networks ...string) {
		var keys []*skepv1.PeerKey
		for _, id := range networks {
			keys = append(keys, &skepv1.PeerKey{NetworkId: id, NodeId: "node2"})
		}
		n.version++
		if err := n.Apply(t.Context(), &skepv1.NetworkUpdate{Version: n.version, RemovedPeers: keys}); err != nil {
			t.Fatal(err)
		}
	}
	gone("sealed")
	if have := n.kernel(t); len(have.SAs) != 4 || len(have.Ways) != 1 {
		t.Errorf("the other network lost its associations: %v", have.SAs)
	}
	gone("twin-of-it")
	if have := n.kernel(t); len(have.SAs)+len(have.Ways) != 0 {
		t.Errorf("the node is gone, but %v and %v are there", have.SAs, have.Ways)
	}
	if _, _, err := whoIn(in["a1"], "udp4", "10.0.8.3:80"); err == nil {
		t.Error("a node that is gone answers")
	}
	l.tellPeers(3, sealed(model.ESP)...)
	wantWho(t, in["a1"], "udp4", "10.0.8.3:80", "a2", "10.0.8.2")
	for id, c := range n.counted(t) {
		was := counted[id]
		if id.Dst != n.addr && (was.OSeq < 5 || c.OSeq < was.OSeq+sentMeanwhile) || id.Dst == n.addr && c.Seq < was.Seq {
			t.Errorf("association %v had counted %+v and counts %+v", id, was, c)
		}
	}
	l.wantClean()

	// A daemon that starts again knows how far they had counted.
	gone("sealed", "twin-of-it")
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	l.start(n)
	l.tellPeers(3, sealed(model.ESP)...)
	wantWho(t, in["a1"], "udp4", "10.0.8.3:80", "a2", "10.0.8.2")

	// One that finds them lost takes other keys before anybody is told.
	epoch := n.esp.memory.Epoch
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if err := withinPath(n.path, func(netns.NsHandle) error { return netlink.XfrmStateFlush(netlink.XFRM_PROTO_ESP) }); err != nil {
		t.Fatal(err)
	}
	l.start(n)
	if n.esp.memory.Epoch == epoch {
		t.Error("the node uses keys of associations that are lost")
	}
	l.tellPeers(3, sealed(model.ESP)...)
	wantWho(t, in["a1"], "udp4", "10.0.8.3:80", "a2", "10.0.8.2")
	l.wantClean()

	// So does one that finds them lost when they are to be removed: they could come back.
	epoch = n.esp.memory.Epoch
	if err := withinPath(n.path, func(netns.NsHandle) error { return netlink.XfrmStateFlush(netlink.XFRM_PROTO_ESP) }); err != nil {
		t.Fatal(err)
	}
	gone("sealed", "twin-of-it")
	if n.esp.memory.Epoch == epoch {
		t.Error("the node would use keys of associations that were lost before they were removed")
	}
	l.tellPeers(3, sealed(model.ESP)...)
	wantWho(t, in["a1"], "udp4", "10.0.8.3:80", "a2", "10.0.8.2")
	l.wantClean()

	for i, n := range l.nodes {
		for _, name := range []string{"a", "b"} {
			if err := n.Detach(t.Context(), fmt.Sprintf("%s%d", name, i+1)); err != nil {
				t.Error(err)
			}
		}
		have := n.kernel(t)
		if len(have.SAs)+len(have.Ways) != 0 || slices.Contains(have.guards, true) {
			t.Errorf("%s: %v, %v and guards %v are left", n.id, have.SAs, have.Ways, have.guards)
		}
		if diff, err := n.espRules(n.addr).differs(n.hostNS); err != nil || !strings.Contains(diff, "is missing") {
			t.Errorf("%s: rules: %q, %v", n.id, diff, err)
		}
	}
}

// TestEncryptedIngressByESP: an ingress network that ESP encrypts is one like others.
func TestEncryptedIngressByESP(t *testing.T) {
	l := newLab(t, 3)
	if !l.nodes[0].canESP() || !l.nodes[0].keepsSource {
		t.Skip("this kernel has no ESP, or cannot answer clients by their own addresses")
	}
	networks := sealedIngress()
	networks[0].Encryption, networks[0].EncryptionPort = model.ESP, model.ESPPort
	outside := l.host("outside", netip.MustParseAddr("192.0.2.50"))
	l.publish(networks...)
	l.wantAnswers(outside)
	for _, n := range l.nodes {
		if name, _, err := whoIn(n.path, "tcp4", n.addr.String()+":8080"); err != nil || name == "" {
			t.Errorf("a process of %s reaches %q, %v", n.id, name, err)
		}
	}
	l.wantClean()
}

// TestESPKeysAreNotWritten: neither the journal nor the memory of associations holds a key.
func TestESPKeysAreNotWritten(t *testing.T) {
	key := bytes.Repeat([]byte("secret-of-esp.."), 2)[:model.ESPKeySize]
	u := &skepv1.NetworkUpdate{Peers: []*skepv1.NetworkPeer{{
		Key: &skepv1.PeerKey{NetworkId: "n", NodeId: "m"}, PresharedKey: key, EspKeys: []*skepv1.EspKey{{InKey: key, OutKey: key}},
	}}}
	record, err := encodeRecord(u)
	if err != nil {
		t.Fatal(err)
	}
	m := &espMemory{Seen: map[string]espSeen{}}
	sa := netplan.SA{Key: netplan.ESPKey(key)}
	m.made(sa)
	file, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	for what, text := range map[string]string{"journal": string(record), "file": string(file), "log": fmt.Sprintf("%v %+v %#v", sa, sa, sa)} {
		if strings.Contains(text, "secret") || strings.Contains(text, "0x73, 0x65") || strings.Contains(text, "115 101") || text == "" {
			t.Errorf("the %s holds a key: %q", what, text)
		}
	}
}

func TestESPMTU(t *testing.T) {
	for vxlan, want := range map[int]int{1450: 1424, 1430: 1404, 1451: 1424, 1454: 1428, 8950: 8924} {
		if got := espMTU(vxlan); got != want {
			t.Errorf("%d inside VXLAN: %d, want %d", vxlan, got, want)
		}
	}
}

// TestLostAssociations: an association is made again only with another key, unless it was removed
// on purpose.
func TestLostAssociations(t *testing.T) {
	m := &espMemory{Seen: map[string]espSeen{}}
	sa := netplan.SA{SAID: netplan.SAID{Dst: netip.MustParseAddr("192.0.2.1"), SPI: 1000}, Key: netplan.ESPKey{1}, Generation: 5}
	other := sa
	other.Key = netplan.ESPKey{2}
	want := func(what string, sa netplan.SA, c counters, usable, lost bool) {
		t.Helper()
		gotC, gotUsable := m.counters(sa)
		if gotC != c || gotUsable != usable || m.lost != lost {
			t.Errorf("%s: %+v, usable %v, lost %v", what, gotC, gotUsable, m.lost)
		}
	}
	want("new", sa, counters{}, true, false)
	m.made(sa)
	m.removed(sa, counters{OSeq: 0xffffffff, Seq: 9})
	want("removed", sa, counters{OSeq: sentMeanwhile - 1, OSeqHi: 1, Seq: 9}, true, false)
	m.made(sa)
	want("lost", sa, counters{}, false, true)
	m.lost = false
	want("still lost", sa, counters{}, false, false)
	want("another key", other, counters{}, true, false)
	m.made(other)
	m.removed(sa, counters{})
	want("replaced by somebody", other, counters{}, false, true)
	found := sa
	found.SPI, found.Generation, found.Key = 3000, 0, netplan.ESPKey{}
	m.made(found)
	later := map[netplan.SAID]netplan.SA{{Dst: sa.Dst, SPI: 2000}: {Generation: 6}}
	m.forget(later, nil)
	if _, kept := m.Seen[saidText(found.SAID)]; len(m.Seen) != 1 || !kept {
		t.Errorf("%v is remembered, want what was found, of which nothing was told", m.Seen)
	}
	known := found
	known.Key, known.Generation = sa.Key, 5
	m.told(map[netplan.SAID]netplan.SA{known.SAID: known}, map[netplan.SAID]netplan.SA{found.SAID: found})
	if got := m.Seen[saidText(found.SAID)]; got.Generation != 5 || got.Key != fingerprint(sa.Key) {
		t.Errorf("what was told of it: %+v", got)
	}
	m.forget(later, nil)
	if len(m.Seen) != 0 {
		t.Errorf("%v is remembered although its generation is over", m.Seen)
	}
}

// TestFormerKeys: a key that comes back after another one is not used again, however often
// leaders derive keys otherwise, and other keys are asked for once.
func TestFormerKeys(t *testing.T) {
	path := filepath.Join(t.TempDir(), "esp")
	m := &espMemory{Seen: map[string]espSeen{}}
	sa := func(key byte) netplan.SA {
		return netplan.SA{SAID: netplan.SAID{Dst: netip.MustParseAddr("192.0.2.1"), SPI: 1000}, Key: netplan.ESPKey{key}, Generation: 5}
	}
	use := func(key byte) {
		t.Helper()
		if _, usable := m.counters(sa(key)); !usable || m.lost {
			t.Fatalf("key %d: usable %t, lost %t", key, usable, m.lost)
		}
		m.made(sa(key))
	}
	refuse := func(what string, key byte, lost bool) {
		t.Helper()
		if c, usable := m.counters(sa(key)); usable || c != (counters{}) || m.lost != lost {
			t.Errorf("%s: %+v, usable %t, lost %t", what, c, usable, m.lost)
		}
		m.lost = false
	}
	use(1)
	use(2)
	refuse("the first one again", 1, true)
	refuse("before other keys came", 1, false)
	use(3)
	m.removed(sa(3), counters{OSeq: 7})
	refuse("one of three that are gone", 2, true)
	use(4)
	refuse("one that was removed", 3, true)
	if err := m.rewrite(path); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if *m = decodeMemory(data); len(m.Seen) != 1 {
		t.Fatalf("read %+v", m)
	}
	use(5)
	refuse("after a restart of the process", 1, true)
	for key := byte(6); key < 6+formerKeys; key++ {
		use(key)
	}
	if got := len(m.Seen[saidText(sa(1).SAID)].Former); got != formerKeys {
		t.Errorf("%d former keys are remembered", got)
	}
	refuse("of many", 7, true)
	later := sa(0)
	later.SPI, later.Generation = 2000, 6
	m.forget(map[netplan.SAID]netplan.SA{later.SAID: later}, nil)
	if len(m.Seen) != 0 {
		t.Errorf("remembered although their generation is over: %v", m.Seen)
	}
}

// TestMemoryFile: what was appended counts as what was written whole, up to a torn line.
func TestMemoryFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "esp")
	m := &espMemory{Boot: "boot", Epoch: "epoch", Local: netip.MustParseAddr("192.0.2.1"), Seen: map[string]espSeen{}}
	sa := func(spi uint32) netplan.SA {
		return netplan.SA{SAID: netplan.SAID{Dst: m.Local, SPI: spi}, Key: netplan.ESPKey{byte(spi)}, Generation: uint64(spi)}
	}
	m.made(sa(1))
	m.made(sa(2))
	if err := m.rewrite(path); err != nil {
		t.Fatal(err)
	}
	clear(m.changed)
	m.removed(sa(2), counters{OSeq: 7})
	m.made(sa(3))
	m.forget(map[netplan.SAID]netplan.SA{sa(3).SAID: sa(3)}, nil)
	if err := m.append(path); err != nil {
		t.Fatal(err)
	}
	clear(m.changed)
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	was := decodeMemory(before)
	m.made(sa(4))
	if err := m.append(path); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	got := decodeMemory(data)
	if diff := cmp.Diff(m.Seen, got.Seen); diff != "" || got.Boot != m.Boot || got.Epoch != m.Epoch || got.Local != m.Local || len(got.Seen) != 2 {
		t.Errorf("read %+v\n%s", got, diff)
	}
	for end := len(before); end < len(data)-1; end++ {
		if got := decodeMemory(data[:end]); !cmp.Equal(got.Seen, was.Seen) || got.Epoch != m.Epoch {
			t.Fatalf("with %d of %d bytes it holds %v", end, len(data), got.Seen)
		}
	}
	if got := decodeMemory(data[:9]); got.Epoch != "" || got.Seen != nil {
		t.Errorf("a torn file holds %+v", got)
	}
}

// FuzzMemory: no file ends the daemon.
func FuzzMemory(f *testing.F) {
	f.Add([]byte(`{"Boot":"b","Epoch":"e","Local":"192.0.2.1","Seen":{"192.0.2.1 00001000":{"Key":"k","Generation":3}}}` + "\n" + `{"ID":"192.0.2.1 00001000","Seen":null}` + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m := decodeMemory(b)
		if m.Seen == nil {
			m.Seen = map[string]espSeen{}
		}
		m.made(netplan.SA{SAID: netplan.SAID{SPI: 1}})
	})
}

// FuzzCounters: what the kernel tells is read as it was written, and nothing it could tell ends
// the daemon.
func FuzzCounters(f *testing.F) {
	f.Add(counters{1, 2, 3, 4}.encode())
	f.Add(make([]byte, 300))
	f.Fuzz(func(t *testing.T, b []byte) {
		c := decodeCounters(b)
		if got := decodeCounters(c.encode()); got != c {
			t.Errorf("%+v became %+v", c, got)
		}
		readSA(b)
	})
}
