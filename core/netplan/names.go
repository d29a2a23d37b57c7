package netplan

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// Answer is what a name means.
type Answer struct {
	// Known is set when something has the name, even if nothing can be reached by it now.
	Known bool
	// Addrs are of both families, sorted.
	Addrs []netip.Addr
}

// Lookup returns what a name means to a sandbox in networks, in their order: the first in
// which it leads anywhere decides. A name may carry the network's as its last label. The
// ingress network has no names: services that publish ports do not know each other by that.
func (s *State) Lookup(networks []string, name string) Answer {
	name = lower(strings.TrimSuffix(name, "."))
	var answer Answer
	for _, id := range networks {
		if s.networks[id].GetIngress() {
			continue
		}
		a := s.lookup(id, name)
		if short, ok := strings.CutSuffix(name, "."+lower(s.networks[id].GetName())); ok && !a.Known {
			a = s.lookup(id, short)
		}
		answer.Known = answer.Known || a.Known
		if len(a.Addrs) > 0 {
			slices.SortFunc(a.Addrs, netip.Addr.Compare)
			answer.Addrs = slices.Compact(a.Addrs)
			break
		}
	}
	return answer
}

func (s *State) lookup(network, name string) Answer {
	var a Answer
	for id := range s.named[name] {
		a.service(s, network, id)
	}
	rest, tasks := strings.CutPrefix(name, "tasks.")
	if tasks {
		for id := range s.named[rest] {
			a.tasks(s, network, id)
		}
	}
	m := s.members[network]
	if m == nil {
		return a
	}
	services := set[string]{}
	for e := range m.byAlias[name] {
		if id := e.GetServiceId(); id != "" {
			services[id] = struct{}{}
		} else {
			a.endpoint(e)
		}
	}
	for id := range services {
		a.service(s, network, id)
	}
	for _, e := range m.byName[name] {
		a.endpoint(e)
	}
	if tasks {
		for e := range m.byAlias[rest] {
			a.endpoint(e)
		}
	}
	for addr := range m.local[name] {
		for _, e := range m.byAddr[addr] {
			// An alias of a service is no name of the one task that is here.
			if e.GetServiceId() == "" || m.byAlias[name] == nil {
				a.endpoint(e)
			}
		}
	}
	return a
}

// service adds what the name of a service means.
func (a *Answer) service(s *State, network, id string) {
	v := s.services[id]
	if list := vips(v, network); len(list) > 0 {
		a.Known = true
		a.Addrs = append(a.Addrs, list...)
		return
	}
	if !v.GetVirtual() {
		a.tasks(s, network, id)
	}
}

// tasks adds all tasks of a service.
func (a *Answer) tasks(s *State, network, id string) {
	for e := range s.byService[id] {
		if e.key.Network == network {
			a.endpoint(e)
		}
	}
}

func (a *Answer) endpoint(e *endpoint) {
	a.Known = true
	if !e.GetRoutable() {
		return
	}
	for _, addr := range []netip.Addr{e.v4, e.v6} {
		if addr.IsValid() {
			a.Addrs = append(a.Addrs, addr)
		}
	}
}

// Reverse returns the name behind an address, like "web.1.x.net", and whether the address
// belongs to one of the networks at all.
func (s *State) Reverse(networks []string, a netip.Addr) (name string, ours bool) {
	for _, id := range networks {
		n := s.networks[id]
		for _, sub := range n.GetSubnets() {
			p, err := netip.ParsePrefix(sub.GetSubnet())
			ours = ours || err == nil && p.Contains(a)
		}
		m := s.members[id]
		if m == nil {
			continue
		}
		for _, e := range m.byAddr[a].inOrder() {
			if e.GetName() != "" && e.GetRoutable() {
				return e.GetName() + "." + n.GetName(), true
			}
		}
	}
	if !ours {
		return "", false
	}
	for _, sid := range slices.Sorted(maps.Keys(s.services)) {
		for _, id := range networks {
			if slices.Contains(vips(s.services[sid], id), a) {
				return s.services[sid].GetName() + "." + s.networks[id].GetName(), true
			}
		}
	}
	return "", true
}
