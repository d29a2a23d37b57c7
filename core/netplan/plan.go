package netplan

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
)

// Plan is what one update asks of a node. Its fields are in the order of execution, so
// that nobody is ever led to where packets do not go yet, or no longer go. All of it may
// be done twice.
type Plan struct {
	// Leaving goes to the names first: what it takes away is answered no more.
	Leaving *skepv1.NetworkUpdate
	// Route lists endpoints on other nodes that appeared or moved.
	Route []Forward
	// Balance lists service addresses whose backends changed, Publish ports of the mesh.
	Balance []Balance
	Publish []Published
	// Keep lists addresses that became, or no longer are, those of tasks that see clients'.
	Keep []Keeper
	// Update goes to the names now: what it brings is answered from here on.
	Update *skepv1.NetworkUpdate
	// End lists endpoints whose connections must end, since nothing is there any more.
	End []End
	// Unroute lists endpoints that are no longer on other nodes.
	Unroute []Forward
	// Node is set when something about the node itself changed.
	Node bool
	// Networks lists networks that changed or are gone.
	Networks []string
	// Encrypted lists encrypted networks whose nodes, or what is on them, changed. What is
	// new there is due before Balance, what is gone goes with Unroute.
	Encrypted []string
}

// End is one address in one network that nothing has any more.
type End struct {
	Network string
	Addr    netip.Addr
}

// Merge takes over an update and returns what must be done about it. It costs as much as
// the update is large, whatever the state holds, except for a complete one and when the
// node itself or a network changed.
func (s *State) Merge(u *skepv1.NetworkUpdate) Plan {
	inc := s.Increment(u)
	p := Plan{Update: inc, Leaving: s.leaving(inc), Node: inc.GetNode() != nil}
	t := s.touched(inc)
	before := s.collect(t)
	s.merge(inc)
	t.add(s.touched(inc))
	after := s.collect(t)
	p.compare(before, after, t)
	for _, n := range inc.GetNetworks() {
		p.Networks = append(p.Networks, n.GetId())
	}
	p.Networks = append(p.Networks, inc.GetRemovedNetworks()...)
	p.Encrypted = s.encrypted(inc)
	return p
}

// MergeNames takes over Plan.Leaving or Plan.Update in a State that only answers names.
func (s *State) MergeNames(u *skepv1.NetworkUpdate) { s.merge(u) }

// leaving returns the part of an increment that takes away.
func (s *State) leaving(inc *skepv1.NetworkUpdate) *skepv1.NetworkUpdate {
	out := &skepv1.NetworkUpdate{RemovedEndpoints: slices.Clone(inc.GetRemovedEndpoints()), RemovedServices: inc.GetRemovedServices()}
	for _, e := range inc.GetEndpoints() {
		had := s.endpoints[keyOf(e.GetKey())]
		switch now := readEndpoint(e); {
		case had == nil:
		case had.v4 != now.v4 || had.v6 != now.v6:
			out.RemovedEndpoints = append(out.RemovedEndpoints, e.GetKey())
		case !e.GetRoutable():
			out.Endpoints = append(out.Endpoints, e)
		}
	}
	for _, v := range inc.GetServices() {
		if had := s.services[v.GetId()]; had != nil && !sameAddresses(had, v) {
			out.RemovedServices = append(slices.Clone(out.GetRemovedServices()), v.GetId())
		}
	}
	return out
}

func sameAddresses(a, b *skepv1.BalancedService) bool {
	return a.GetName() == b.GetName() && a.GetVirtual() == b.GetVirtual() &&
		slices.EqualFunc(a.GetVips(), b.GetVips(), func(x, y *skepv1.VirtualAddress) bool {
			return x.GetNetworkId() == y.GetNetworkId() && x.GetAddr() == y.GetAddr()
		})
}

// vipKey names a service address.
type vipKey struct {
	network string
	addr    netip.Addr
}

// touched is what an increment may have changed.
type touched struct {
	addrs set[End]
	vips  map[vipKey]string // services
	ports map[portKey]string
	kept  set[netip.Addr] // in the ingress network
}

func (t *touched) add(o touched) {
	maps.Copy(t.addrs, o.addrs)
	maps.Copy(t.vips, o.vips)
	maps.Copy(t.ports, o.ports)
	maps.Copy(t.kept, o.kept)
}

// touched returns what of s an increment is about; before and after merging it differs.
func (s *State) touched(inc *skepv1.NetworkUpdate) touched {
	t := touched{addrs: set[End]{}, vips: map[vipKey]string{}, ports: map[portKey]string{}, kept: set[netip.Addr]{}}
	services := set[string]{}
	note := func(k Key, e *endpoint) {
		for _, a := range []netip.Addr{e.v4, e.v6} {
			if a.IsValid() {
				t.addrs[End{k.Network, a}] = struct{}{}
			}
		}
		services[e.GetServiceId()] = struct{}{}
	}
	about := func(k Key) {
		if e := s.endpoints[k]; e != nil {
			note(k, e)
		}
	}
	for _, k := range inc.GetRemovedEndpoints() {
		about(keyOf(k))
	}
	for _, e := range inc.GetEndpoints() {
		about(keyOf(e.GetKey()))
		note(keyOf(e.GetKey()), readEndpoint(e)) // others may have its addresses
	}
	for _, id := range inc.GetRemovedServices() {
		services[id] = struct{}{}
	}
	for _, v := range inc.GetServices() {
		services[v.GetId()] = struct{}{}
	}
	changed := slices.Clone(inc.GetRemovedNetworks())
	for _, n := range inc.GetNetworks() {
		changed = append(changed, n.GetId())
	}
	for _, id := range changed {
		if s.networks[id].GetIngress() { // with it every published port comes or goes
			for v := range s.services {
				services[v] = struct{}{}
			}
		}
		if m := s.members[id]; m != nil {
			for task := range m.byTask {
				about(Key{id, task})
			}
		}
	}
	if inc.GetNode() != nil {
		for k := range s.endpoints {
			about(k)
		}
	}
	ingress := s.Ingress().GetId()
	for a := range t.addrs {
		if a.Network == ingress {
			t.kept[a.Addr] = struct{}{}
		}
	}
	for id := range services {
		v := s.services[id]
		for k := range s.byService[id] {
			if k.Network == ingress {
				t.kept[s.endpoints[k].v4] = struct{}{}
				t.kept[s.endpoints[k].v6] = struct{}{}
			}
		}
		for _, vip := range v.GetVips() {
			for _, a := range vips(v, vip.GetNetworkId()) {
				t.vips[vipKey{vip.GetNetworkId(), a}] = id
			}
		}
		for _, p := range s.published("", v) {
			t.ports[portKey{p.Protocol, p.Published}] = id
		}
	}
	return t
}

// view is what s wants about what was touched.
type view struct {
	forwards map[End]Forward
	balances map[vipKey]Balance
	ports    map[portKey]Published
	present  set[End]
	kept     set[netip.Addr]
}

func (s *State) collect(t touched) view {
	v := view{map[End]Forward{}, map[vipKey]Balance{}, map[portKey]Published{}, set[End]{}, set[netip.Addr]{}}
	for a := range t.kept {
		if s.keeper(a) {
			v.kept[a] = struct{}{}
		}
	}
	for a := range t.addrs {
		if f, ok := s.forward(a.Network, a.Addr); ok {
			v.forwards[a] = f
		}
		if m := s.members[a.Network]; m != nil && len(m.byAddr[a.Addr]) > 0 {
			v.present[a] = struct{}{}
		}
	}
	for k, id := range t.vips {
		if slices.Contains(vips(s.services[id], k.network), k.addr) {
			v.balances[k] = s.balance(k.network, k.addr, id)
		}
	}
	ingress := s.Ingress()
	for k, id := range t.ports {
		for _, p := range s.published(ingress.GetId(), s.services[id]) {
			if (portKey{p.Protocol, p.Published}) == k && ingress != nil {
				v.ports[k] = p
			}
		}
	}
	return v
}

// compare fills the plan with the differences of two views.
func (p *Plan) compare(before, after view, t touched) {
	for a := range t.addrs {
		was, had := before.forwards[a]
		is, has := after.forwards[a]
		if has && (!had || was != is) {
			p.Route = append(p.Route, is)
		}
		if had && (!has || was.VNI != is.VNI || was.Addr6 != is.Addr6 && was.Addr6.IsValid()) {
			p.Unroute = append(p.Unroute, was)
		}
		_, there := before.present[a]
		if _, still := after.present[a]; there && !still {
			p.End = append(p.End, a)
		}
	}
	for k := range t.vips {
		is, has := after.balances[k]
		if _, had := before.balances[k]; !has && had {
			p.Balance = append(p.Balance, Balance{Network: k.network, VIP: k.addr, Gone: true})
		} else if has && (!had || !slices.Equal(before.balances[k].Backends, is.Backends)) {
			p.Balance = append(p.Balance, is)
		}
	}
	for k := range t.ports {
		was, had := before.ports[k]
		is, has := after.ports[k]
		if !has && had {
			p.Publish = append(p.Publish, Published{Protocol: k.protocol, Published: k.published, Gone: true})
		} else if has && (!had || was.Target != is.Target || !slices.Equal(was.Backends, is.Backends) || !slices.Equal(was.Backends6, is.Backends6)) {
			p.Publish = append(p.Publish, is)
		}
	}
	for a := range t.kept {
		_, was := before.kept[a]
		if _, is := after.kept[a]; is != was {
			p.Keep = append(p.Keep, Keeper{Addr: a, Gone: was})
		}
	}
	slices.SortFunc(p.Keep, func(a, b Keeper) int { return a.Addr.Compare(b.Addr) })
	byAddr := func(a, b Forward) int {
		return cmp.Or(cmp.Compare(a.Network, b.Network), a.Addr.Compare(b.Addr))
	}
	slices.SortFunc(p.Route, byAddr)
	slices.SortFunc(p.Unroute, byAddr)
	slices.SortFunc(p.End, func(a, b End) int { return cmp.Or(cmp.Compare(a.Network, b.Network), a.Addr.Compare(b.Addr)) })
	slices.SortFunc(p.Balance, func(a, b Balance) int {
		return cmp.Or(cmp.Compare(a.Network, b.Network), a.VIP.Compare(b.VIP))
	})
	slices.SortFunc(p.Publish, comparePublished)
}
