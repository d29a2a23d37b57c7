package netplan

import (
	"cmp"
	"net/netip"
	"slices"

	"google.golang.org/protobuf/proto"

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
	// Engines is set when Docker Engines came to the ingress network or left it.
	Engines bool
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

	read []*endpoint // of Update
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
	read := readEndpoints(inc.GetEndpoints())
	p := Plan{Update: inc, read: read, Leaving: s.leaving(inc, read), Node: s.nodeChanges(inc)}
	t, services := s.touched(inc, read)
	s.serve(&t, services, inc)
	before, engines := s.collect(t), s.Engines()
	s.merge(inc, read)
	s.serve(&t, services, inc) // there are no addresses more
	after := s.collect(t)
	p.compare(before, after, t)
	p.Engines = !slices.Equal(engines, s.Engines())
	for _, n := range inc.GetNetworks() {
		p.Networks = append(p.Networks, n.GetId())
	}
	p.Networks = append(p.Networks, inc.GetRemovedNetworks()...)
	p.Encrypted = s.encrypted(inc)
	return p
}

// MergeLeaving takes over Plan.Leaving in a State that answers names, MergeUpdate then
// Plan.Update.
func (s *State) MergeLeaving(p Plan) { s.merge(p.Leaving, readEndpoints(p.Leaving.GetEndpoints())) }

// MergeUpdate takes over Plan.Update.
func (s *State) MergeUpdate(p Plan) { s.merge(p.Update, p.read) }

// leaving returns the part of an increment that takes away.
func (s *State) leaving(inc *skepv1.NetworkUpdate, read []*endpoint) *skepv1.NetworkUpdate {
	out := &skepv1.NetworkUpdate{RemovedEndpoints: slices.Clone(inc.GetRemovedEndpoints()), RemovedServices: inc.GetRemovedServices()}
	for _, now := range read {
		had := s.endpoint(now.key)
		switch {
		case had == nil:
		case had.v4 != now.v4 || had.v6 != now.v6:
			out.RemovedEndpoints = append(out.RemovedEndpoints, now.GetKey())
		case !now.GetRoutable():
			out.Endpoints = append(out.Endpoints, now.OverlayEndpoint)
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
	addrs []End              // sorted, each once
	vips  map[vipKey]string  // services
	ports map[portKey]string // services
	kept  set[netip.Addr]    // in the ingress network
}

func compareEnds(a, b End) int {
	return cmp.Or(cmp.Compare(a.Network, b.Network), a.Addr.Compare(b.Addr))
}

// touched returns the addresses and services of s that an increment is about.
func (s *State) touched(inc *skepv1.NetworkUpdate, read []*endpoint) (touched, set[string]) {
	t := touched{addrs: make([]End, 0, len(read)), vips: map[vipKey]string{}, ports: map[portKey]string{}, kept: set[netip.Addr]{}}
	services := set[string]{}
	last := "" // a service that was noted
	note := func(e *endpoint) {
		for _, a := range [...]netip.Addr{e.v4, e.v6} {
			if a.IsValid() {
				t.addrs = append(t.addrs, End{e.key.Network, a})
			}
		}
		if id := e.GetServiceId(); id != last {
			services[id] = struct{}{}
			last = id
		}
	}
	for _, k := range inc.GetRemovedEndpoints() {
		if e := s.endpoint(keyOf(k)); e != nil {
			note(e)
		}
	}
	for _, e := range read {
		if had := s.endpoint(e.key); had != nil && had != e {
			note(had)
		}
		note(e) // others may have its addresses
	}
	for _, id := range inc.GetRemovedServices() {
		services[id] = struct{}{}
	}
	for _, v := range inc.GetServices() {
		services[v.GetId()] = struct{}{}
	}
	for _, id := range changedNetworks(inc) {
		if m := s.members[id]; m != nil {
			for _, e := range m.byTask {
				note(e)
			}
		}
	}
	if s.nodeChanges(inc) {
		for _, m := range s.members {
			for _, e := range m.byTask {
				note(e)
			}
		}
	}
	slices.SortFunc(t.addrs, compareEnds)
	t.addrs = slices.Compact(t.addrs)
	return t, services
}

// nodeChanges reports whether an increment changes anything about the node itself but whom it
// gossips with.
func (s *State) nodeChanges(inc *skepv1.NetworkUpdate) bool {
	if inc.GetNode() == nil {
		return false
	}
	was, is := proto.CloneOf(s.node), proto.CloneOf(inc.GetNode())
	was.GossipPeers, is.GossipPeers = nil, nil
	return !proto.Equal(was, is)
}

func changedNetworks(inc *skepv1.NetworkUpdate) []string {
	out := slices.Clone(inc.GetRemovedNetworks())
	for _, n := range inc.GetNetworks() {
		out = append(out, n.GetId())
	}
	return out
}

// serve adds to what was touched what some services have, and all if the ingress network
// changed: with it every published port comes or goes. Before and after merging it differs.
func (s *State) serve(t *touched, services set[string], inc *skepv1.NetworkUpdate) {
	for _, id := range changedNetworks(inc) {
		if s.networks[id].GetIngress() {
			for v := range s.services {
				services[v] = struct{}{}
			}
		}
	}
	ingress := s.Ingress().GetId()
	for _, a := range t.addrs {
		if a.Network == ingress {
			t.kept[a.Addr] = struct{}{}
		}
	}
	for id := range services {
		v := s.services[id]
		if ingress != "" {
			for e := range s.byService[id] {
				if e.key.Network == ingress {
					t.kept[e.v4] = struct{}{}
					t.kept[e.v6] = struct{}{}
				}
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
}

// view is what s wants about what was touched.
type view struct {
	ends     []endView // of touched.addrs
	balances map[vipKey]Balance
	ports    map[portKey]Published
	kept     set[netip.Addr]
}

// endView is what is behind one address.
type endView struct {
	to      *endpoint // if it is on another node
	vni     uint32
	present bool // anywhere
}

func (s *State) collect(t touched) view {
	v := view{make([]endView, len(t.addrs)), map[vipKey]Balance{}, map[portKey]Published{}, set[netip.Addr]{}}
	for a := range t.kept {
		if s.keeper(a) {
			v.kept[a] = struct{}{}
		}
	}
	var w Ways
	var m *members
	for i, a := range t.addrs {
		if i == 0 || a.Network != w.network {
			w, m = s.Ways(a.Network), s.members[a.Network]
		}
		if m == nil {
			continue
		}
		if e := &v.ends[i]; len(m.byAddr[a.Addr]) > 0 {
			e.present = true
			e.to, e.vni = w.to(a.Addr)
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

// compareEnds fills the plan with the differences of two views of addresses.
func (p *Plan) compareEnds(before, after []endView, addrs []End) {
	for i, a := range addrs {
		was, is := before[i], after[i]
		forward := func(v endView) Forward { return Ways{network: a.Network}.forward(v.to, v.vni, a.Addr) }
		switch {
		case was.to == nil && is.to == nil:
		case was.to == nil:
			p.Route = append(p.Route, forward(is))
		case is.to == nil:
			p.Unroute = append(p.Unroute, forward(was))
		default:
			if old, now := forward(was), forward(is); old != now {
				p.Route = append(p.Route, now)
				if old.VNI != now.VNI || old.Addr6 != now.Addr6 && old.Addr6.IsValid() {
					p.Unroute = append(p.Unroute, old)
				}
			}
		}
		if was.present && !is.present {
			p.End = append(p.End, a)
		}
	}
}

// compare fills the plan with the differences of two views.
func (p *Plan) compare(before, after view, t touched) {
	p.compareEnds(before.ends, after.ends, t.addrs)
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
	slices.SortFunc(p.Balance, func(a, b Balance) int {
		return cmp.Or(cmp.Compare(a.Network, b.Network), a.VIP.Compare(b.VIP))
	})
	slices.SortFunc(p.Publish, comparePublished)
}
