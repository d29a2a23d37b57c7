package netplan

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
)

// Balance is one service address in one network and the addresses that serve it.
type Balance struct {
	Network string
	VIP     netip.Addr
	// Backends are sorted. Without any, connections are refused.
	Backends []netip.Addr
	// Gone is set in a Plan when nothing has the address any longer.
	Gone bool
}

// Published is one port of the routing mesh.
type Published struct {
	Protocol  uint8
	Published uint16
	Target    uint16
	// Backends are sorted addresses in the ingress network, Backends6 those of IPv6.
	Backends, Backends6 []netip.Addr
	// Gone is set in a Plan when the port is no longer published.
	Gone bool
}

// Balances returns all service addresses of a network, in their order.
func (s *State) Balances(network string) []Balance {
	found := map[netip.Addr]Balance{}
	for _, v := range s.services {
		for _, vip := range vips(v, network) {
			if b := s.balance(network, vip, v.GetId()); found[vip].Backends == nil {
				found[vip] = b
			}
		}
	}
	out := slices.Collect(maps.Values(found))
	slices.SortFunc(out, func(a, b Balance) int { return a.VIP.Compare(b.VIP) })
	return out
}

// vips returns a service's addresses in a network.
func vips(v *skepv1.BalancedService, network string) []netip.Addr {
	if !v.GetVirtual() {
		return nil
	}
	var out []netip.Addr
	for _, vip := range v.GetVips() {
		if a := prefixAddr(vip.GetAddr()); a.IsValid() && vip.GetNetworkId() == network {
			out = append(out, a)
		}
	}
	return out
}

func (s *State) balance(network string, vip netip.Addr, service string) Balance {
	return Balance{Network: network, VIP: vip, Backends: s.routable(network, service, vip)}
}

// routable returns the addresses, of the family of like, of a service's tasks in a network
// that may get new connections.
func (s *State) routable(network, service string, like netip.Addr) []netip.Addr {
	var out []netip.Addr
	for e := range s.byService[service] {
		if a := e.addr(like); e.key.Network == network && e.GetRoutable() && a.IsValid() {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// portKey names a published port.
type portKey struct {
	protocol  uint8
	published uint16
}

// Mesh returns all published ports, in their order.
func (s *State) Mesh() []Published {
	owners := map[portKey]Published{}
	ingress := s.Ingress()
	if ingress == nil {
		return nil
	}
	for _, id := range slices.Sorted(maps.Keys(s.services)) {
		for _, p := range s.published(ingress.GetId(), s.services[id]) {
			k := portKey{p.Protocol, p.Published}
			if _, taken := owners[k]; !taken {
				owners[k] = p
			}
		}
	}
	out := slices.Collect(maps.Values(owners))
	slices.SortFunc(out, comparePublished)
	return out
}

func comparePublished(a, b Published) int {
	return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Published, b.Published))
}

func (s *State) published(ingress string, v *skepv1.BalancedService) []Published {
	var out []Published
	for _, p := range v.GetPorts() {
		if !isPort(p) {
			continue
		}
		out = append(out, Published{
			Protocol: uint8(p.GetProtocol()), Published: uint16(p.GetPublished()), Target: uint16(p.GetTarget()),
			Backends:  s.routable(ingress, v.GetId(), netip.IPv4Unspecified()),
			Backends6: s.routable(ingress, v.GetId(), netip.IPv6Unspecified()),
		})
	}
	return out
}

// isPort reports whether a port is one at all.
func isPort(p *skepv1.MeshPort) bool {
	return p.GetPublished() != 0 && p.GetPublished() <= 65535 && p.GetTarget() <= 65535 && p.GetProtocol() <= 255
}

// Keeper is a task's address in the ingress network. While it is there, the entry node
// keeps the addresses of clients that it leads to it.
type Keeper struct {
	Addr netip.Addr
	// Gone is set in a Plan when the address no longer is one.
	Gone bool
}

// Keepers returns all addresses that are, in their order.
func (s *State) Keepers() []netip.Addr {
	m := s.members[s.Ingress().GetId()]
	if m == nil {
		return nil
	}
	var out []netip.Addr
	for a := range m.byAddr {
		if s.keeper(a) {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

// keeper reports whether an address in the ingress network is a Keeper: its service wants
// clients' addresses, and every task that has it now is where they can be answered.
func (s *State) keeper(a netip.Addr) bool {
	ingress := s.Ingress()
	m := s.members[ingress.GetId()]
	if m == nil || len(m.byAddr[a]) == 0 {
		return false
	}
	for _, e := range m.byAddr[a] {
		v := s.services[e.GetServiceId()]
		source := v.GetMeshSource()
		if source == skepv1.MeshSource_MESH_SOURCE_UNSPECIFIED {
			source = ingress.GetMeshSource()
		}
		if v == nil || !e.GetKeepsSource() || source == skepv1.MeshSource_MESH_SOURCE_MASQUERADE {
			return false
		}
	}
	return true
}
