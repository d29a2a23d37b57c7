package dataplane

import (
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netns"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/netplan"
)

// strangers are nodes that are nowhere, from the first up to the last, with keys of a generation.
func strangers(network string, first, last int, generation uint32) []*skepv1.NetworkPeer {
	var out []*skepv1.NetworkPeer
	for i := first; i < last; i++ {
		p := &skepv1.NetworkPeer{Key: &skepv1.PeerKey{NetworkId: network, NodeId: fmt.Sprintf("stranger%04d", i)}, Addr: fmt.Sprintf("198.18.%d.%d", i/250, i%250+1)}
		for g := generation; g > generation-3; g-- {
			sum := sha256.Sum256(fmt.Append(nil, i, g))
			spi := uint32(i)<<16 | g
			p.EspKeys = append(p.EspKeys, &skepv1.EspKey{
				OutSpi: spi + 0x1000, OutKey: sum[:model.ESPKeySize], InSpi: spi + 0x1000, InKey: sum[12:], Sending: g == generation-1, Generation: uint64(g),
			})
		}
		out = append(out, p)
	}
	return out
}

// TestESPOneChangeIsFlat: what a change of one node costs does not grow with the number of others.
func TestESPOneChangeIsFlat(t *testing.T) {
	l := newLab(t, 1)
	n := l.nodes[0]
	if !n.canESP() {
		t.Skipf("this kernel has no ESP: %v", n.probeESP())
	}
	networks := sealed(model.ESP)[:1]
	l.tell(&skepv1.NetworkUpdate{Complete: true, Networks: networks, Endpoints: []*skepv1.OverlayEndpoint{endpointOf(n, "sealed", "a1", "", "10.0.8.2", true)}})
	l.attach(n, "a1", "sealed=10.0.8.2")
	tell := func(peers []*skepv1.NetworkPeer) {
		n.version++
		if err := n.Apply(t.Context(), &skepv1.NetworkUpdate{Version: n.version, Peers: peers}); err != nil {
			t.Fatal(err)
		}
	}
	generation, known := uint32(3), 0
	cost := func(others int) float64 {
		tell(strangers("sealed", known+1, others+1, 3))
		known = others
		begin, changes := time.Now(), 0
		allocs := testing.AllocsPerRun(20, func() {
			generation++
			changes++
			tell(strangers("sealed", 0, 1, generation))
		})
		t.Logf("%d others: %.0f allocations and %s for a change", others, allocs, (time.Since(begin) / time.Duration(changes)).Round(10*time.Microsecond))
		return allocs
	}
	few, many := cost(25), cost(400)
	if many > 1.5*few {
		t.Errorf("a change of one node costs %.0f allocations beside 25 others, %.0f beside 400", few, many)
	}
	if have := n.kernel(t); len(have.SAs) != 4*401 || len(have.Ways) != 401 {
		t.Errorf("%d associations and %d ways", len(have.SAs), len(have.Ways))
	}
	l.wantClean()
}

// TestESPOneByOneIsAsAllAtOnce: changes of single nodes leave what a comparison of all would make,
// also where nodes take each other's addresses and indexes.
func TestESPOneByOneIsAsAllAtOnce(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 1))
	networks := []string{"a", "b"}
	s := netplan.NewState()
	s.Merge(&skepv1.NetworkUpdate{Version: 1, Node: &skepv1.LocalNode{Id: "n", DataAddr: "192.0.2.1"}, Networks: []*skepv1.OverlayNetwork{
		{Id: "a", Encrypted: true, Encryption: model.ESP}, {Id: "b", Encrypted: true, Encryption: model.ESP},
	}})
	local, kernel := netip.MustParseAddr("192.0.2.1"), netplan.NewESP()
	var known *espKnown
	alone, together, clashes := 0, 0, 0
	for version := uint64(2); version < 1500; version++ {
		u := &skepv1.NetworkUpdate{Version: version}
		for range 1 + r.IntN(2) {
			key := &skepv1.PeerKey{NetworkId: networks[r.IntN(2)], NodeId: fmt.Sprint("node", r.IntN(5))}
			if r.IntN(3) == 0 {
				u.RemovedPeers = append(u.RemovedPeers, key)
				continue
			}
			p := strangers(key.GetNetworkId(), r.IntN(8), 8, uint32(3+r.IntN(3)))[0]
			if p.Key = key; r.IntN(8) == 0 {
				p.EspKeys = nil
			}
			u.Peers = append(u.Peers, p)
		}
		s.Merge(u)
		nodes, want := peersOf(u, networks), s.ESP(networks)
		if wants := known.plan(s, local, networks, nodes); wants != nil {
			alone++
			for _, id := range nodes {
				for _, op := range wants[id].Diff(known.nodes[id]) {
					kernel.Do(op)
					known.did(id, op)
				}
			}
		} else {
			together++
			clashes += len(want.Clashes)
			for _, op := range want.Diff(kernel) {
				kernel.Do(op)
			}
			known = knowESP(local, kernel, want)
		}
		if left := want.Diff(kernel); len(left) > 0 {
			t.Fatalf("seed %d, update %d %v: left to do: %v", seed, version, u, left)
		}
	}
	if alone < 100 || together < 100 || clashes == 0 {
		t.Errorf("%d alone, %d together with %d clashes: want some of each", alone, together, clashes)
	}
}

// stream sends what it can from one namespace to a TCP port of another for a while and returns how
// many bits arrived a second.
func stream(t *testing.T, from, to, addr string, d time.Duration) float64 {
	t.Helper()
	var listen net.Listener
	if err := withinPath(to, func(netns.NsHandle) (err error) {
		listen, err = (&net.ListenConfig{}).Listen(t.Context(), "tcp4", addr)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer listen.Close()
	arrived := make(chan int64, 1)
	go func() {
		var n int64
		if c, err := listen.Accept(); err == nil {
			_ = c.SetDeadline(time.Now().Add(d + 30*time.Second))
			n, _ = io.Copy(io.Discard, c)
			_ = c.Close()
		}
		arrived <- n
	}()
	c, err := dialIn(from, "tcp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	begin, sent := time.Now(), int64(0)
	if err := c.SetDeadline(begin.Add(d + 30*time.Second)); err != nil {
		t.Fatal(err)
	}
	for buf := make([]byte, 64<<10); time.Since(begin) < d; {
		n, err := c.Write(buf)
		if sent += int64(n); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	n := <-arrived
	if n != sent {
		t.Errorf("%d of %d bytes arrived at %s", n, sent, addr)
	}
	return float64(8*n) / time.Since(begin).Seconds()
}

// TestESPThroughput measures a stream through ESP and one through WireGuard beside one through
// plain VXLAN, in turns. A guest without acceleration emulates the instructions for ciphers one by
// one: there the ratios say little about other machines.
func TestESPThroughput(t *testing.T) {
	e, in := sealedMixed(t, false)
	w, inside := sealedLab(t, way{how: model.WireGuard})
	wantWho(t, in["a1"], "udp4", "10.0.8.3:80", "a2", "10.0.8.2")
	wantWho(t, in["c1"], "udp4", "10.0.1.3:80", "c2", "10.0.1.2")
	wantWhoSoon(t, inside["a1"], "10.0.8.3:80", "a2", "10.0.8.2")
	var esp, wireguard, plain float64
	const turns, each = 3, time.Second
	for range turns {
		esp += stream(t, in["a1"], in["a2"], "10.0.8.3:84", each) / turns
		wireguard += stream(t, inside["a1"], inside["a2"], "10.0.8.3:84", each) / turns
		plain += stream(t, in["c1"], in["c2"], "10.0.1.3:84", each) / turns
	}
	t.Logf("a stream by plain VXLAN makes %.0f Mbit/s; by ESP %.0f, %.2f of it; by WireGuard %.0f, %.2f of it",
		plain/1e6, esp/1e6, esp/plain, wireguard/1e6, wireguard/plain)
	e.wantClean()
	w.wantClean()
}
