package netplan

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
)

// ESPKey is a key for ESP. It prints as nothing.
type ESPKey [model.ESPKeySize]byte

// String keeps the key out of logs.
func (ESPKey) String() string { return "[redacted]" }

// GoString does so as well.
func (ESPKey) GoString() string { return "[redacted]" }

// SAID names a security association for those who receive by it.
type SAID struct {
	Dst netip.Addr
	SPI uint32
}

func (a SAID) compare(b SAID) int { return cmp.Or(a.Dst.Compare(b.Dst), cmp.Compare(a.SPI, b.SPI)) }

// SA is a security association: what Src sends to Dst is encrypted by Key.
type SA struct {
	SAID

	Src netip.Addr
	// Key is zero where the kernel does not show it.
	Key ESPKey
	// Generation grows with each rotation of keys; zero for what the kernel has.
	Generation uint64
	// Node is the other one; empty for what the kernel has.
	Node string
}

// ESPWay says by which association what this node sends to another is encrypted.
type ESPWay struct {
	Src netip.Addr
	SAID
}

// ESP is what the kernel holds, or shall hold, of networks that are encrypted by it.
type ESP struct {
	SAs  map[SAID]SA
	Ways map[netip.Addr]ESPWay // by the other node
	// Untold are the nodes whose keys no manager has said yet: what the kernel has of them
	// stays as it is.
	Untold map[netip.Addr]bool
	// Clashes name what cannot be, since two nodes send, or are sent to, with one index.
	Clashes []string
}

// NewESP returns one without anything.
func NewESP() ESP {
	return ESP{SAs: map[SAID]SA{}, Ways: map[netip.Addr]ESPWay{}, Untold: map[netip.Addr]bool{}}
}

// Do carries an operation out on e.
func (e ESP) Do(op ESPOp) {
	switch {
	case op.Way != nil && op.Put:
		e.Ways[op.Way.Dst] = *op.Way
	case op.Way != nil:
		delete(e.Ways, op.Way.Dst)
	case op.Put:
		e.SAs[op.SA.SAID] = op.SA
	default:
		delete(e.SAs, op.SA.SAID)
	}
}

// ByESP reports whether a network is encrypted by ESP.
func ByESP(n *skepv1.OverlayNetwork) bool { return n.GetEncrypted() && n.GetEncryption() == model.ESP }

// ESP returns what the kernel shall hold for some networks of this node. Two nodes have the
// same associations whatever number of networks they share.
func (s *State) ESP(networks []string) ESP {
	ids := set[string]{}
	for _, network := range networks {
		for id := range s.peers[network] {
			ids[id] = struct{}{}
		}
	}
	return s.ESPOf(networks, slices.Sorted(maps.Keys(ids)))
}

// ESPOf is ESP for some other nodes alone, in the order in which one of two that clash comes first.
func (s *State) ESPOf(networks, nodes []string) ESP {
	out := NewESP()
	local, err := netip.ParseAddr(s.node.GetDataAddr())
	if err != nil {
		return out
	}
	for _, id := range nodes {
		p := s.espPeer(networks, id)
		at, err := netip.ParseAddr(p.GetAddr())
		if err != nil {
			continue
		}
		if len(p.GetEspKeys()) == 0 {
			out.Untold[at] = true
			continue
		}
		delete(out.Untold, at)
		for _, k := range p.GetEspKeys() {
			out.receive(id, at, local, k)
			if k.GetSending() {
				out.send(id, local, at, k)
			}
		}
	}
	return out
}

// espPeer returns what is known of another node: of some networks, the first in which a manager
// has said its keys.
func (s *State) espPeer(networks []string, id string) (found *skepv1.NetworkPeer) {
	for _, network := range networks {
		if p := s.peers[network][id]; found == nil || len(found.GetEspKeys()) == 0 {
			found = p
		}
	}
	return found
}

// receive adds the association by which what a node sends is decrypted.
func (e *ESP) receive(id string, from, local netip.Addr, k *skepv1.EspKey) {
	if len(k.GetInKey()) != model.ESPKeySize {
		return
	}
	sa := SA{SAID: SAID{local, k.GetInSpi()}, Src: from, Key: ESPKey(k.GetInKey()), Generation: k.GetGeneration(), Node: id}
	if other, taken := e.SAs[sa.SAID]; taken {
		e.Clashes = append(e.Clashes, fmt.Sprintf("what node %s sends cannot be told from what node %s sends: both have index %#08x", id, other.Node, sa.SPI))
		return
	}
	e.SAs[sa.SAID] = sa
}

// send adds the association by which what is sent to a node is encrypted, and the way to it.
func (e *ESP) send(id string, local, to netip.Addr, k *skepv1.EspKey) {
	if len(k.GetOutKey()) != model.ESPKeySize {
		return
	}
	sa := SA{SAID: SAID{to, k.GetOutSpi()}, Src: local, Key: ESPKey(k.GetOutKey()), Generation: k.GetGeneration(), Node: id}
	if other, taken := e.SAs[sa.SAID]; taken {
		e.Clashes = append(e.Clashes, fmt.Sprintf("what is sent to node %s at %s cannot be told from what is sent to node %s: both have index %#08x", id, to, other.Node, sa.SPI))
		return
	}
	e.SAs[sa.SAID], e.Ways[to] = sa, ESPWay{Src: local, SAID: sa.SAID}
}

// ESPOp is one change to the kernel: Put or remove an association, or the Way to a node.
type ESPOp struct {
	Put bool
	// SA is meant unless Way is set.
	SA  SA
	Way *ESPWay
}

// Diff returns what makes have match e, in an order in which nobody sends by what is not there:
// what is received by, what is sent by, which of it is sent by, and what is gone. Removals of
// what is in the way of something new come right before it; the others come last.
func (e ESP) Diff(have ESP) []ESPOp {
	var receive, send, ways, gone []ESPOp
	for _, id := range slices.SortedFunc(maps.Keys(e.SAs), SAID.compare) {
		want := e.SAs[id]
		is, there := have.SAs[id]
		if there && is.Src == want.Src && (is.Key == want.Key || is.Key == ESPKey{}) {
			continue
		}
		list := &receive
		if way, ok := e.Ways[id.Dst]; ok && way.SAID == id {
			list = &send
		}
		if there {
			*list = append(*list, ESPOp{SA: is})
		}
		*list = append(*list, ESPOp{Put: true, SA: want})
	}
	for _, at := range slices.SortedFunc(maps.Keys(e.Ways), netip.Addr.Compare) {
		way, is := e.Ways[at], have.Ways[at]
		if is == way {
			continue
		}
		if is.Src.IsValid() && is.Src != way.Src { // another one to the kernel, which would stay
			ways = append(ways, ESPOp{Way: &is})
		}
		ways = append(ways, ESPOp{Put: true, Way: &way})
	}
	for _, at := range slices.SortedFunc(maps.Keys(have.Ways), netip.Addr.Compare) {
		if _, stays := e.Ways[at]; !stays && !e.Untold[at] {
			way := have.Ways[at]
			gone = append(gone, ESPOp{Way: &way})
		}
	}
	for _, id := range slices.SortedFunc(maps.Keys(have.SAs), SAID.compare) {
		is := have.SAs[id]
		if _, stays := e.SAs[id]; !stays && !e.Untold[is.Dst] && !e.Untold[is.Src] {
			gone = append(gone, ESPOp{SA: is})
		}
	}
	return slices.Concat(receive, send, ways, gone)
}

// Additions returns the operations without those that only take away.
func Additions(ops []ESPOp) []ESPOp {
	last := len(ops)
	for last > 0 && !ops[last-1].Put {
		last--
	}
	return ops[:last]
}
