package dataplane

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"sync/atomic"
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

// deviceCommand makes the test's own program a userspace WireGuard device.
const deviceCommand = "run-wireguard-device"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == deviceCommand {
		ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
		err := wireguard.ServeArgs(ctx, os.Args[2:])
		stop()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// sealed are two encrypted networks with the same subnet, the first with IPv6 as well.
func sealed(how string) []*skepv1.OverlayNetwork {
	one := func(id string, vni, port uint32) *skepv1.OverlayNetwork {
		return &skepv1.OverlayNetwork{
			Id: id, Name: id, Encrypted: true, Encryption: how, EncryptionPort: port,
			Subnets: []*skepv1.OverlaySubnet{{Subnet: "10.0.8.0/24", Gateway: "10.0.8.1", Vni: vni}},
		}
	}
	list := []*skepv1.OverlayNetwork{one("sealed", 4104, 51820), one("twin-of-it", 4105, 51821)}
	list[0].Subnets = append(list[0].Subnets, &skepv1.OverlaySubnet{Subnet: "fd00:8::/64", Gateway: "fd00:8::1"})
	return list
}

// tellPeers tells each node of all others, with keys of one generation.
func (l *lab) tellPeers(generation byte, networks ...*skepv1.OverlayNetwork) {
	l.t.Helper()
	for i, n := range l.nodes {
		n.version++
		u := &skepv1.NetworkUpdate{Version: n.version}
		for j, other := range l.nodes {
			for k, network := range networks {
				if i == j {
					continue
				}
				public := other.private.Public()
				shared := make([]byte, 32)
				shared[0], shared[1], shared[2] = generation, byte(i+j), byte(k)
				u.Peers = append(u.Peers, &skepv1.NetworkPeer{
					Key: &skepv1.PeerKey{NetworkId: network.GetId(), NodeId: other.id}, Addr: other.addr.String(), PublicKey: public[:], PresharedKey: shared,
					EspKeys: espKeys(n, other, generation),
				})
			}
		}
		if err := n.Apply(l.t.Context(), u); err != nil {
			l.t.Fatal(err)
		}
	}
}

// espKeys are what a node is told of another: three generations, as managers tell them.
func espKeys(n, other *labNode, generation byte) []*skepv1.EspKey {
	var out []*skepv1.EspKey
	for g := generation; g+3 > generation; g-- {
		key := func(from, to *labNode) []byte {
			sum := sha256.Sum256(fmt.Append(nil, from.id, to.id, from.esp.memory.Epoch, to.esp.memory.Epoch, g))
			return sum[:model.ESPKeySize]
		}
		index := func(from, to *labNode) uint32 {
			return uint32(from.addr.As16()[15])<<16 | uint32(to.addr.As16()[15])<<24 | uint32(g)
		}
		out = append(out, &skepv1.EspKey{
			OutSpi: index(n, other), OutKey: key(n, other), InSpi: index(other, n), InKey: key(other, n), Sending: g == generation-1, Generation: uint64(g),
		})
	}
	return out
}

// way is one to encrypt, between nodes that reach each other by IPv4 or IPv6.
type way struct {
	how string
	six bool
}

// eachWay runs a test for every way to encrypt.
func eachWay(t *testing.T, f func(t *testing.T, w way)) {
	t.Helper()
	for _, w := range []way{{how: model.WireGuard}, {how: model.ESP}, {how: model.WireGuard, six: true}, {how: model.ESP, six: true}} {
		name := w.how
		if w.six {
			name += " by IPv6"
		}
		t.Run(name, func(t *testing.T) { f(t, w) })
	}
}

// sealedLab is two nodes with containers on both twin networks: a1 and a2 on the first, b1
// and b2 on the second with their addresses.
func sealedLab(t *testing.T, w way) (l *lab, paths map[string]string) {
	t.Helper()
	how := w.how
	l = newLabOver(t, 2, w.six)
	switch can := l.nodes[0].encryption; {
	case how == model.ESP && !slices.Contains(can, how):
		t.Skipf("this kernel has no ESP: %v", l.nodes[0].probeESP())
	case len(can) == 0:
		t.Skip("this kernel has neither WireGuard nor TUN")
	}
	var endpoints []*skepv1.OverlayEndpoint
	for i, n := range l.nodes {
		a := endpointOf(n, "sealed", fmt.Sprintf("a%d", i+1), "s1", fmt.Sprintf("10.0.8.%d", i+2), true)
		a.Addresses = append(a.Addresses, fmt.Sprintf("fd00:8::%d/64", i+2))
		endpoints = append(endpoints, a, endpointOf(n, "twin-of-it", fmt.Sprintf("b%d", i+1), "", fmt.Sprintf("10.0.8.%d", i+2), true))
	}
	service := &skepv1.BalancedService{Id: "s1", Name: "web", Virtual: true, Vips: []*skepv1.VirtualAddress{{NetworkId: "sealed", Addr: "10.0.8.100/24"}}}
	l.tell(&skepv1.NetworkUpdate{Complete: true, Networks: append(nets(), sealed(how)...), Endpoints: append(l.legs(), endpoints...), Services: []*skepv1.BalancedService{service}})
	l.tellPeers(3, sealed(how)...)
	paths = map[string]string{}
	for i, n := range l.nodes {
		for network, name := range map[string]string{"sealed": "a", "twin-of-it": "b"} {
			name = fmt.Sprintf("%s%d", name, i+1)
			o := overlayOf(n, fmt.Sprintf("%s=10.0.8.%d", network, i+2))
			if network == "sealed" {
				o.Address6 = netip.MustParsePrefix(fmt.Sprintf("fd00:8::%d/64", i+2))
			}
			s, err := n.Attach(t.Context(), runtime.SandboxRequest{ContainerID: name, Name: name, Hostname: name, Mode: "bridge", Overlays: []runtime.OverlayRequest{o}})
			if err != nil {
				t.Fatal(err)
			}
			paths[name] = s.NetNS
			echo(t, s.NetNS, 80, name)
		}
	}
	return l, paths
}

func TestEncryptedAcrossNodes(t *testing.T) { eachWay(t, encryptedAcrossNodes) }

func encryptedAcrossNodes(t *testing.T, w way) {
	l, in := sealedLab(t, w)
	for _, network := range []string{"tcp4", "udp4"} {
		wantWho(t, in["a1"], network, "10.0.8.3:80", "a2", "10.0.8.2")
		wantWho(t, in["a2"], network, "10.0.8.2:80", "a1", "10.0.8.3")
		wantWho(t, in["b1"], network, "10.0.8.3:80", "b2", "10.0.8.2")
		wantWho(t, in["b2"], network, "10.0.8.2:80", "b1", "10.0.8.3")
	}
	for _, to := range []string{"10.0.8.3", "10.0.8.100"} {
		if err := ping(in["a1"], to); err != nil {
			t.Errorf("ping %s: %v", to, err)
		}
	}
	names := map[string]bool{}
	for range 40 {
		name, _, err := whoIn(in["a1"], "tcp4", "10.0.8.100:80")
		if err != nil {
			t.Fatal(err)
		}
		names[name] = true
	}
	if len(names) != 2 {
		t.Errorf("the service address leads to %v", names)
	}
	if err := ping(in["b1"], "10.0.8.77"); err == nil {
		t.Error("somebody answers for an address that nobody has")
	}
	wantV6(t, in["a1"], in["a2"], "fd00:8::3")
	wantV6(t, in["a2"], in["a1"], "fd00:8::2")
	l.wantClean()
	if w.how == model.ESP {
		t.Log("by the kernel's ESP")
	} else if _, kernel := l.nodes[0].crypts["sealed"].tunnel.(*wireguard.Kernel); kernel {
		t.Log("by the kernel's WireGuard")
	}
}

// TestEncryptedCarriesFullPackets: what fills packets to the last byte gets through, and
// all of a large transfer.
func TestEncryptedCarriesFullPackets(t *testing.T) { eachWay(t, encryptedCarriesFullPackets) }

func encryptedCarriesFullPackets(t *testing.T, w way) {
	l, in := sealedLab(t, w)
	tap := l.tap(w.how)
	wantWhoSoon(t, in["a1"], "10.0.8.3:80", "a2", "10.0.8.2")
	const size = 4 << 20
	for _, way := range [][3]string{{"a1", "a2", "10.0.8.3:83"}, {"a2", "a1", "10.0.8.2:83"}} {
		var listen net.Listener
		if err := withinPath(in[way[1]], func(netns.NsHandle) (err error) {
			listen, err = (&net.ListenConfig{}).Listen(t.Context(), "tcp4", way[2])
			return err
		}); err != nil {
			t.Fatal(err)
		}
		got := make(chan int64, 1)
		go func() {
			var n int64
			if c, err := listen.Accept(); err == nil {
				_ = c.SetDeadline(time.Now().Add(20 * time.Second))
				n, _ = io.Copy(io.Discard, c)
				_ = c.Close()
			}
			got <- n
		}()
		c, err := dialIn(in[way[0]], "tcp4", way[2])
		if err != nil {
			t.Fatal(err)
		}
		if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		_, err = c.Write(make([]byte, size))
		if err := errors.Join(err, c.Close()); err != nil {
			t.Errorf("%s to %s: %v", way[0], way[1], err)
		}
		if n := <-got; n != size {
			t.Errorf("%s to %s: %d of %d bytes arrived", way[0], way[1], n, size)
		}
		_ = listen.Close()
	}
	// The echo cuts what it gets, but answers.
	c, err := dialIn(in["a1"], "udp4", "10.0.8.3:80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	inside := 1450
	if w.six {
		inside = 1430
	}
	full := insideMTU(sealed(w.how)[0], inside) - 28 // the headers of a datagram
	for _, length := range []int{full - 15, full - 1, full} {
		if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(make([]byte, length)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 64)); err != nil {
			t.Errorf("a datagram of %d bytes: %v", length, err)
		}
	}
	// WireGuard may hand over several packets at once.
	if largest := tap.end(); largest < 1480 || w.how == model.ESP && largest > 1500 {
		t.Errorf("the largest packet between nodes has %d bytes", largest)
	}
	l.wantClean()
}

// wantV6 sends a datagram by IPv6 and wants it to arrive.
func wantV6(t *testing.T, from, to, addr string) {
	t.Helper()
	var p net.PacketConn
	if err := withinPath(to, func(netns.NsHandle) (err error) {
		p, err = (&net.ListenConfig{}).ListenPacket(t.Context(), "udp6", "["+addr+"]:81")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	c, err := dialIn(from, "udp6", "["+addr+"]:81")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("six")); err != nil {
		t.Fatal(err)
	}
	if err := p.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 16)
	if n, _, err := p.ReadFrom(buf); err != nil || string(buf[:n]) != "six" {
		t.Errorf("%s got %q, %v", addr, buf[:n], err)
	}
}

// TestEncryptedTakesOnlyItsOwn: what a container sends under another's address goes nowhere.
func TestEncryptedTakesOnlyItsOwn(t *testing.T) {
	l, in := sealedLab(t, way{how: model.WireGuard})
	var p net.PacketConn
	if err := withinPath(in["a2"], func(netns.NsHandle) (err error) {
		p, err = (&net.ListenConfig{}).ListenPacket(t.Context(), "udp4", ":82")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	send := func(from string) {
		err := withinPath(in["a1"], func(netns.NsHandle) error {
			link, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			if from != "10.0.8.2" {
				a := &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix(from + "/32"))}
				if err := netlink.AddrAdd(link, a); err != nil {
					return err
				}
				defer netlink.AddrDel(link, a)
			}
			c, err := (&net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(from)}}).DialContext(t.Context(), "udp4", "10.0.8.3:82")
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write([]byte(from))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, from := range []string{"10.0.8.9", "10.0.8.3", "10.0.8.2"} {
		send(from)
	}
	if err := p.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	n, from, err := p.ReadFrom(buf)
	if err != nil || string(buf[:n]) != "10.0.8.2" {
		t.Errorf("the first datagram that arrives says %q and comes from %v, %v", buf[:n], from, err)
	}
	l.wantClean()
}

// load asks an echo again and again, one datagram after the other.
type load struct {
	stop   chan struct{}
	result chan error
	more   chan struct{}
	count  atomic.Int64
}

// newLoad begins to load the echo of a given name, from a namespace.
func newLoad(t *testing.T, path, to, name string) *load {
	t.Helper()
	c, err := dialIn(path, "udp4", to)
	if err != nil {
		t.Fatal(err)
	}
	l := &load{stop: make(chan struct{}), result: make(chan error, 1), more: make(chan struct{}, 1)}
	go func() {
		defer c.Close()
		for {
			if got, _, err := whoOver(c); err != nil || got != name {
				l.result <- fmt.Errorf("datagram %d: %q, %w", l.count.Load(), got, err)
				return
			}
			l.count.Add(1)
			select {
			case <-l.stop:
				l.result <- nil
				return
			case l.more <- struct{}{}:
			default: // nobody waits
			}
		}
	}()
	return l
}

// wait returns when n more datagrams have been answered.
func (l *load) wait(t *testing.T, n int64) {
	t.Helper()
	for enough := l.count.Load() + n; l.count.Load() < enough; {
		select {
		case <-l.more:
		case err := <-l.result:
			t.Fatal(err)
		}
	}
}

// end stops the load, and fails if any datagram had no answer.
func (l *load) end(t *testing.T) int64 {
	t.Helper()
	close(l.stop)
	if err := <-l.result; err != nil {
		t.Error(err)
	}
	return l.count.Load()
}

func TestEncryptedKeysRotate(t *testing.T) { eachWay(t, encryptedKeysRotate) }

func encryptedKeysRotate(t *testing.T, w way) {
	l, in := sealedLab(t, w)
	wantWhoSoon(t, in["a1"], "10.0.8.3:80", "a2", "10.0.8.2") // with a session
	tap := l.tap(w.how)
	rotate(t, l, sealed(w.how), newLoad(t, in["a1"], "10.0.8.3:80", "a2"), newLoad(t, in["a2"], "10.0.8.2:80", "a1"))
	tap.end()
	l.wantClean()
}

// rotate changes the keys of some networks ten times under loads, which it ends.
func rotate(t *testing.T, l *lab, networks []*skepv1.OverlayNetwork, loads ...*load) {
	t.Helper()
	for generation := byte(4); generation < 14; generation++ {
		for _, one := range loads {
			one.wait(t, 20)
		}
		l.tellPeers(generation, networks...)
		for _, n := range l.nodes {
			if netplan.ByESP(networks[0]) {
				n.wantGeneration(t, generation)
				continue
			}
			have, err := n.crypts[networks[0].GetId()].tunnel.Read()
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range have.Peers {
				if p.Preshared[0] != generation {
					t.Errorf("%s has a key of generation %d, want %d", n.id, p.Preshared[0], generation)
				}
			}
		}
	}
	count := int64(0)
	for _, one := range loads {
		count += one.end(t)
	}
	t.Logf("%d datagrams there and back under ten rotations", count)
}

func TestEncryptedIsMended(t *testing.T) {
	l, in := sealedLab(t, way{how: model.WireGuard})
	n := l.nodes[0]
	spoil := map[string]func(*crypt) error{
		"route": func(c *crypt) error {
			return c.h.RouteDel(&netlink.Route{Dst: ipNet(netip.MustParsePrefix("10.0.8.2/32")), Scope: netlink.SCOPE_NOWHERE})
		},
		"link": func(c *crypt) error {
			wg, err := c.h.LinkByName(wireguard.Link)
			if err != nil {
				return err
			}
			return c.h.LinkSetDown(wg)
		},
		"peer": func(c *crypt) error {
			return c.tunnel.Write(wireguard.Changes{Remove: []wireguard.Key{l.nodes[1].private.Public()}})
		},
		"stranger": func(c *crypt) error {
			return c.tunnel.Write(wireguard.Changes{Peers: []wireguard.Change{{Key: wireguard.Key{5}, New: true, Add: []netip.Prefix{netip.MustParsePrefix("10.0.8.3/32")}}}})
		},
		"port": func(c *crypt) error { return c.tunnel.Write(wireguard.Changes{Port: 7777}) },
	}
	for _, what := range sortedKeys(spoil) {
		if err := spoil[what](n.crypts["sealed"]); err != nil {
			t.Fatalf("spoil %s: %v", what, err)
		}
		if found, err := n.Check(t.Context()); err != nil || len(found) == 0 {
			t.Errorf("%s: %q, %v, want a difference", what, found, err)
		}
		n.check(t.Context())
		l.wantClean()
		wantWhoSoon(t, in["a1"], "10.0.8.3:80", "a2", "10.0.8.2")
	}
}

// wantWhoSoon is wantWho by datagrams, again and again: a device that was just spoilt may
// make others wait five seconds for the next handshake.
func wantWhoSoon(t *testing.T, path, to, name, seen string) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; {
		gotName, gotSeen, err := whoIn(path, "udp4", to)
		if err == nil && gotName == name && gotSeen == seen {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: %q saw %q, %v; want %q to see %q", to, gotName, gotSeen, err, name, seen)
		}
	}
}

// TestEncryptedOutlivesTheDaemon: traffic goes on without it, and the next one takes over.
func TestEncryptedOutlivesTheDaemon(t *testing.T) { eachWay(t, encryptedOutlivesTheDaemon) }

func encryptedOutlivesTheDaemon(t *testing.T, w way) {
	l, in := sealedLab(t, w)
	n := l.nodes[0]
	wantWhoSoon(t, in["a1"], "10.0.8.3:80", "a2", "10.0.8.2")
	there := newLoad(t, in["a1"], "10.0.8.3:80", "a2")
	key, epoch := n.private, n.esp.memory.Epoch
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	there.wait(t, 20)
	wantWho(t, in["a2"], "tcp4", "10.0.8.2:80", "a1", "10.0.8.3")
	l.start(n)
	if w.how == model.WireGuard && n.private != key || n.esp.memory.Epoch != epoch {
		t.Error("the node has another key or epoch now")
	}
	there.wait(t, 20)
	l.wantClean() // without any manager, which alone knows the keys
	n.check(t.Context())
	there.wait(t, 20)
	l.tellPeers(3, sealed(w.how)...)
	there.wait(t, 20)
	there.end(t)
	l.wantClean()
	wantWho(t, in["a2"], "udp4", "10.0.8.2:80", "a1", "10.0.8.3")
	if w.how == model.ESP {
		return
	}

	p, userspace := n.crypts["sealed"].tunnel.(*wireguard.Process)
	if !userspace {
		return // the kernel's device does not end
	}
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-n.ended
	n.check(t.Context())
	l.wantClean()
	wantWhoSoon(t, in["a1"], "10.0.8.3:80", "a2", "10.0.8.2")
}

func TestEncryptedEndpointsComeAndGo(t *testing.T) {
	l, in := sealedLab(t, way{how: model.WireGuard})
	allowed := func() []string {
		have, err := l.nodes[0].crypts["sealed"].tunnel.Read()
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, p := range have.Peers {
			for _, a := range p.Allowed {
				out = append(out, a.String())
			}
		}
		slices.Sort(out)
		return out
	}
	want := func(what string, list ...string) {
		t.Helper()
		if got := allowed(); !slices.Equal(got, list) {
			t.Errorf("%s: behind the other node are %v, want %v", what, got, list)
		}
	}
	want("at first", "10.0.8.3/32", "fd00:8::3/128")
	l.tell(&skepv1.NetworkUpdate{Endpoints: []*skepv1.OverlayEndpoint{endpointOf(l.nodes[1], "sealed", "a3", "s1", "10.0.8.4", true)}})
	want("one came", "10.0.8.3/32", "10.0.8.4/32", "fd00:8::3/128")
	l.tell(&skepv1.NetworkUpdate{RemovedEndpoints: []*skepv1.EndpointKey{{NetworkId: "sealed", TaskId: "a3"}}})
	want("it went", "10.0.8.3/32", "fd00:8::3/128")
	for i, n := range l.nodes {
		for _, name := range []string{"a", "b"} {
			if err := n.Detach(t.Context(), fmt.Sprintf("%s%d", name, i+1)); err != nil {
				t.Error(err)
			}
			delete(in, fmt.Sprintf("%s%d", name, i+1))
		}
		left, err := filepath.Glob(filepath.Join(n.dir, "x", cryptPrefix+"*"))
		if err != nil || len(left) > 0 || len(n.crypts) > 0 {
			t.Errorf("%s: %v is left, %v", n.id, left, err)
		}
	}
}
