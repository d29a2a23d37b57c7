package netplan

import (
	"iter"
	"net/netip"
	"slices"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
)

// Forward is one endpoint on another node, as the kernel must know it.
type Forward struct {
	// Network is the network's id.
	Network string
	// VNI selects the segment, from the subnet that holds Addr.
	VNI uint32
	// Addr is the endpoint's IPv4 address, from which its hardware address follows.
	Addr netip.Addr
	// Addr6 is its IPv6 address, zero without one.
	Addr6 netip.Addr
	// Node is where encapsulated packets go.
	Node netip.Addr
	// NodeID is the node's id.
	NodeID string
}

// MAC returns the hardware address of the endpoint with an IPv4 address: 02:42 and the
// four bytes of the address.
func MAC(a netip.Addr) [6]byte {
	b := a.As4()
	return [6]byte{0x02, 0x42, b[0], b[1], b[2], b[3]}
}

// Segment is one IPv4 subnet of a network, which is one VXLAN.
type Segment struct {
	VNI    uint32
	Subnet netip.Prefix
}

// Segments returns the segments of a network in the order of its subnets.
func Segments(n *skepv1.OverlayNetwork) []Segment {
	var out []Segment
	for _, sub := range n.GetSubnets() {
		p, err := netip.ParsePrefix(sub.GetSubnet())
		if err == nil && p.Addr().Is4() && sub.GetVni() != 0 {
			out = append(out, Segment{VNI: sub.GetVni(), Subnet: p.Masked()})
		}
	}
	return out
}

// VNI returns the segment of an IPv4 address of a network; zero without one.
func VNI(n *skepv1.OverlayNetwork, a netip.Addr) uint32 {
	for _, g := range Segments(n) {
		if g.Subnet.Contains(a) {
			return g.VNI
		}
	}
	return 0
}

// Ways are the ways to one network's endpoints on other nodes, until the State changes.
type Ways struct {
	network  string
	m        *members
	segments []Segment
	node     string     // this one
	own      netip.Addr // this node's address in the ingress network
	tunnel   bool       // nodes are known by their addresses there
}

// InTunnel returns the same ways where nodes are known by TunnelAddr.
func (w Ways) InTunnel() Ways {
	w.tunnel = true
	return w
}

// nodeOf returns where packets for an endpoint go.
func (w Ways) nodeOf(e *endpoint) netip.Addr {
	if w.tunnel {
		return TunnelAddr(e.GetNodeId())
	}
	return e.at
}

// Ways returns those of a network; none if it is not known.
func (s *State) Ways(network string) Ways {
	w := Ways{network: network, segments: s.segments[network], node: s.node.GetId()}
	n := s.networks[network]
	if n != nil {
		w.m = s.members[network]
	}
	if n.GetIngress() {
		w.own = prefixAddr(s.node.GetIngressAddr())
	}
	return w
}

// Network returns the network's id.
func (w Ways) Network() string { return w.network }

// to returns the endpoint behind an IPv4 address, and its segment; nil if it is not on
// another node. Of several endpoints with one address, for a moment, the one that is
// routable counts; what is here goes nowhere.
func (w Ways) to(a netip.Addr) (e *endpoint, vni uint32) {
	if w.m == nil || !a.Is4() {
		return nil, 0
	}
	at := w.m.byAddr[a]
	if len(at) == 0 {
		return nil, 0
	}
	return w.among(a, at)
}

func (w Ways) among(a netip.Addr, at few) (best *endpoint, vni uint32) {
	if len(w.m.locals) > 0 {
		if _, here := w.m.locals[a]; here {
			return nil, 0
		}
	}
	if w.own == a {
		return nil, 0
	}
	for _, e := range at.inOrder() {
		if best == nil || e.GetRoutable() || !best.GetRoutable() {
			best = e
		}
	}
	if best.GetNodeId() == w.node || !best.at.IsValid() {
		return nil, 0
	}
	for _, g := range w.segments {
		if g.Subnet.Contains(a) {
			return best, g.VNI
		}
	}
	return nil, 0
}

func (w Ways) forward(e *endpoint, vni uint32, a netip.Addr) Forward {
	return Forward{Network: w.network, VNI: vni, Addr: a, Addr6: e.v6, Node: w.nodeOf(e), NodeID: e.GetNodeId()}
}

// all yields every address with the endpoint behind it, in no order.
func (w Ways) all() iter.Seq[Forward] {
	return func(yield func(Forward) bool) {
		if w.m == nil {
			return
		}
		for a, at := range w.m.byAddr {
			if !a.Is4() {
				continue
			}
			if e, vni := w.among(a, at); e != nil && !yield(w.forward(e, vni, a)) {
				return
			}
		}
	}
}

// Entries yields what the kernel shall hold, in no order.
func (w Ways) Entries() iter.Seq[Entry] {
	return func(yield func(Entry) bool) {
		for f := range w.all() {
			for e := range f.Entries() {
				if !yield(e) {
					return
				}
			}
		}
	}
}

// Count returns how many entries the kernel shall hold of one segment.
func (w Ways) Count(vni uint32) int {
	n := 0
	if w.m == nil {
		return n
	}
	for a, at := range w.m.byAddr {
		if !a.Is4() {
			continue
		}
		if e, in := w.among(a, at); e == nil || in != vni {
			continue
		} else if n += 2; e.v6.IsValid() {
			n++
		}
	}
	return n
}

// Wants reports whether the kernel shall hold an entry as it is.
func (w Ways) Wants(e Entry) bool {
	a := e.Addr
	if !a.Is4() { // which follows from the hardware address
		a = netip.AddrFrom4([4]byte(e.MAC[2:]))
	}
	to, vni := w.to(a)
	if to == nil || vni != e.VNI || MAC(a) != e.MAC {
		return false
	}
	return e.Node.IsValid() && e.Node == w.nodeOf(to) && !e.Addr.IsValid() || e.Addr.IsValid() && !e.Node.IsValid() && (e.Addr == a || e.Addr == to.v6)
}

// Forwards returns what the kernel shall know of a network's endpoints on other nodes,
// in the order of their addresses.
func (s *State) Forwards(network string) []Forward {
	return slices.SortedFunc(s.Ways(network).all(), func(a, b Forward) int { return a.Addr.Compare(b.Addr) })
}

// forward returns where the packets for an IPv4 address go.
func (s *State) forward(network string, a netip.Addr) (Forward, bool) {
	w := s.Ways(network)
	e, vni := w.to(a)
	if e == nil {
		return Forward{}, false
	}
	return w.forward(e, vni, a), true
}

// SetLocal records a sandbox of this node in a network and returns what must no longer be
// forwarded. UnsetLocal is its reverse and returns what may have to be.
func (s *State) SetLocal(network string, l Local) []Forward {
	f, away := s.forward(network, l.Addr)
	s.UnsetLocal(network, l.Addr)
	m := s.network(network)
	m.locals[l.Addr] = l
	for _, name := range l.Names {
		if s.named == nil {
			break
		}
		link(m.local, lower(name), l.Addr)
	}
	if !away {
		return nil
	}
	return []Forward{f}
}

// UnsetLocal forgets a sandbox.
func (s *State) UnsetLocal(network string, a netip.Addr) []Forward {
	m := s.members[network]
	if m == nil {
		return nil
	}
	for _, name := range m.locals[a].Names {
		if s.named == nil {
			break
		}
		unlink(m.local, lower(name), a)
	}
	delete(m.locals, a)
	if len(m.byTask)+len(m.locals) == 0 {
		delete(s.members, network)
	}
	if f, away := s.forward(network, a); away {
		return []Forward{f}
	}
	return nil
}

// Entry is one thing of the kernel's forwarding: a hardware address and the node behind
// it, or an address and the hardware address of its holder.
type Entry struct {
	VNI uint32
	// Addr is the neighbour's address; zero for an entry of the forwarding table.
	Addr netip.Addr
	MAC  [6]byte
	// Node is zero for a neighbour.
	Node netip.Addr
}

// Entries yields what a Forward becomes in the kernel.
func (f Forward) Entries() iter.Seq[Entry] {
	return func(yield func(Entry) bool) {
		mac := MAC(f.Addr)
		if yield(Entry{VNI: f.VNI, MAC: mac, Node: f.Node}) && yield(Entry{VNI: f.VNI, Addr: f.Addr, MAC: mac}) && f.Addr6.IsValid() {
			yield(Entry{VNI: f.VNI, Addr: f.Addr6, MAC: mac})
		}
	}
}

// place is what two entries cannot share.
type place struct {
	vni  uint32
	addr netip.Addr
	mac  [6]byte
}

func (e Entry) place() place {
	if e.Addr.IsValid() {
		return place{vni: e.VNI, addr: e.Addr}
	}
	return place{vni: e.VNI, mac: e.MAC}
}

// Diff returns what must be set, and what must be removed, so that have becomes want.
// Setting replaces what is in the same place.
func Diff(want, have []Entry) (put, remove []Entry) {
	had := make(map[place]Entry, len(have))
	for _, e := range have {
		had[e.place()] = e
	}
	for _, e := range want {
		at := e.place()
		if h, ok := had[at]; !ok || h != e {
			put = append(put, e)
		}
		delete(had, at)
	}
	for _, e := range have {
		if _, ok := had[e.place()]; ok {
			remove = append(remove, e)
			delete(had, e.place())
		}
	}
	return put, remove
}

// Stale returns the entries of a former Forward in whose place nothing is wanted now.
func (s *State) Stale(f Forward) []Entry {
	var out []Entry
	w := s.Ways(f.Network)
	now, vni := w.to(f.Addr)
	still := now != nil && vni == f.VNI
	for e := range f.Entries() {
		switch {
		case still && !e.Addr.Is6():
		case still && e.Addr == now.v6, e.Addr.Is6() && w.leadTo(e.Addr):
		default:
			out = append(out, e)
		}
	}
	return out
}

// leadTo reports whether an IPv6 address belongs to an endpoint that is forwarded.
func (w Ways) leadTo(a netip.Addr) bool {
	if w.m == nil {
		return false
	}
	for _, e := range w.m.byAddr[a] {
		if to, _ := w.to(e.v4); to != nil && to.v6 == a {
			return true
		}
	}
	return false
}
