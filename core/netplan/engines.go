package netplan

import (
	"net/netip"
	"slices"
)

// Engines returns the addresses in the ingress network from which Docker Engines lead
// connections to tasks, sorted. What comes from there still has the published port.
func (s *State) Engines() []netip.Addr {
	var out []netip.Addr
	for _, e := range s.engines {
		if e.v4.IsValid() {
			out = append(out, e.v4)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// Shared reports whether Docker Engines may be in a network.
func (s *State) Shared(network string) bool { return s.node.GetGossip() && s.gossiped(network) }

// Arrivals returns the published ports of the service whose task here has an address in the
// ingress network, except those that the task has under the same number. They name no backends.
func (s *State) Arrivals(a netip.Addr) []Published {
	ingress := s.Ingress().GetId()
	m := s.members[ingress]
	if m == nil {
		return nil
	}
	for _, e := range m.byAddr[a].inOrder() {
		if e.GetNodeId() != s.node.GetId() {
			continue
		}
		var out []Published
		for _, p := range s.services[e.GetServiceId()].GetPorts() {
			if p.GetPublished() != p.GetTarget() && isPort(p) {
				out = append(out, Published{Protocol: uint8(p.GetProtocol()), Published: uint16(p.GetPublished()), Target: uint16(p.GetTarget())})
			}
		}
		slices.SortFunc(out, comparePublished)
		return out
	}
	return nil
}
