package dataplane

import (
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

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
