package netplan

import (
	"maps"
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

// Forwards returns what the kernel shall know of a network's endpoints on other nodes,
// in the order of their addresses.
func (s *State) Forwards(network string) []Forward {
	m := s.members[network]
	if m == nil {
		return nil
	}
	var out []Forward
	for a := range m.byAddr {
		if f, ok := s.forward(network, a); ok {
			out = append(out, f)
		}
	}
	slices.SortFunc(out, func(a, b Forward) int { return a.Addr.Compare(b.Addr) })
	return out
}

// forward returns where the packets for an IPv4 address go. Of several endpoints with one
// address, for a moment, the one that is routable counts; what is here goes nowhere.
func (s *State) forward(network string, a netip.Addr) (Forward, bool) {
	m, n := s.members[network], s.networks[network]
	if m == nil || n == nil || !a.Is4() {
		return Forward{}, false
	}
	if _, here := m.locals[a]; here {
		return Forward{}, false
	}
	if n.GetIngress() && prefixAddr(s.node.GetIngressAddr()) == a {
		return Forward{}, false
	}
	var best *endpoint
	for _, task := range slices.Sorted(maps.Keys(m.byAddr[a])) {
		if e := m.byTask[task]; best == nil || e.GetRoutable() || !best.GetRoutable() {
			best = e
		}
	}
	if best == nil || best.GetNodeId() == s.node.GetId() || !best.at.IsValid() {
		return Forward{}, false
	}
	vni := uint32(0)
	for _, g := range s.segments[network] {
		if g.Subnet.Contains(a) {
			vni = g.VNI
			break
		}
	}
	return Forward{Network: network, VNI: vni, Addr: a, Addr6: best.v6, Node: best.at, NodeID: best.GetNodeId()}, vni != 0
}

// SetLocal records a sandbox of this node in a network and returns what must no longer be
// forwarded. UnsetLocal is its reverse and returns what may have to be.
func (s *State) SetLocal(network string, l Local) []Forward {
	f, away := s.forward(network, l.Addr)
	s.UnsetLocal(network, l.Addr)
	m := s.network(network)
	m.locals[l.Addr] = l
	for _, name := range l.Names {
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

// Entries returns what a Forward becomes in the kernel.
func (f Forward) Entries() []Entry {
	mac := MAC(f.Addr)
	out := []Entry{{VNI: f.VNI, MAC: mac, Node: f.Node}, {VNI: f.VNI, Addr: f.Addr, MAC: mac}}
	if f.Addr6.IsValid() {
		out = append(out, Entry{VNI: f.VNI, Addr: f.Addr6, MAC: mac})
	}
	return out
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
	now, still := s.forward(f.Network, f.Addr)
	for _, e := range f.Entries() {
		kept := still && slices.ContainsFunc(now.Entries(), func(n Entry) bool { return n.place() == e.place() })
		kept = kept || e.Addr.Is6() && s.forwardsTo(f.Network, e.Addr)
		if !kept {
			out = append(out, e)
		}
	}
	return out
}

// forwardsTo reports whether an IPv6 address belongs to an endpoint that is forwarded.
func (s *State) forwardsTo(network string, a netip.Addr) bool {
	m := s.members[network]
	if m == nil {
		return false
	}
	for task := range m.byAddr[a] {
		if f, ok := s.forward(network, m.byTask[task].v4); ok && f.Addr6 == a {
			return true
		}
	}
	return false
}
