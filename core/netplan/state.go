package netplan

import (
	"cmp"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
)

// Key names one attachment of one task to one network.
type Key struct{ Network, Task string }

func (k Key) compare(o Key) int {
	return cmp.Or(cmp.Compare(k.Network, o.Network), cmp.Compare(k.Task, o.Task))
}

// set is a set of keys of other maps.
type set[K comparable] map[K]struct{}

// State is everything a node knows of the swarm's networks: all its updates merged.
type State struct {
	node      *skepv1.LocalNode
	version   uint64
	networks  map[string]*skepv1.OverlayNetwork
	segments  map[string][]Segment // of networks
	services  map[string]*skepv1.BalancedService
	peers     map[string]map[string]*skepv1.NetworkPeer // by encrypted network and node
	members   map[string]*members                       // by network
	byService map[string]set[*endpoint]
	engines   map[Key]*endpoint // those that lead to published ports
	// named holds the ids of services by name; nil in a State that answers no names, whose
	// members have no names either.
	named map[string]set[string]
}

// members is the index of one network.
type members struct {
	byTask  map[string]*endpoint
	byAddr  map[netip.Addr]few
	byName  map[string]few            // by their name and id
	byAlias map[string]set[*endpoint] // by aliases of their service
	locals  map[netip.Addr]Local
	local   map[string]set[netip.Addr] // addresses of locals by name
}

// endpoint is an OverlayEndpoint with its addresses read. It never changes, so that several
// States may hold the same.
type endpoint struct {
	*skepv1.OverlayEndpoint

	key    Key
	at     netip.Addr // of its node
	v4, v6 netip.Addr // zero without one
}

// few are the endpoints that share an address or a name: mostly one.
type few []*endpoint

func put[K comparable](m map[K]few, k K, e *endpoint) {
	if has := m[k]; !slices.Contains(has, e) {
		m[k] = append(slices.Clip(has), e)
	}
}

func take[K comparable](m map[K]few, k K, e *endpoint) {
	switch has := m[k]; {
	case len(has) == 1 && has[0] == e:
		delete(m, k)
	case len(has) > 1:
		m[k] = slices.DeleteFunc(slices.Clone(has), func(o *endpoint) bool { return o == e })
	}
}

// inOrder returns them in the order of their tasks.
func (f few) inOrder() few {
	if len(f) < 2 {
		return f
	}
	return slices.SortedFunc(slices.Values(f), func(a, b *endpoint) int { return cmp.Compare(a.key.Task, b.key.Task) })
}

// addr returns the address of the same family as a, or zero.
func (e *endpoint) addr(a netip.Addr) netip.Addr {
	if a.Is4() {
		return e.v4
	}
	return e.v6
}

// Local is a sandbox of this node in one network.
type Local struct {
	// Addr and Addr6 are its addresses; Addr6 may be zero.
	Addr, Addr6 netip.Addr
	// Names are further names of the container: its host name, ids and aliases.
	Names []string
}

// NewState returns a State that knows nothing, and will make plans.
func NewState() *State {
	return &State{
		node: &skepv1.LocalNode{}, networks: map[string]*skepv1.OverlayNetwork{}, segments: map[string][]Segment{}, services: map[string]*skepv1.BalancedService{},
		peers: map[string]map[string]*skepv1.NetworkPeer{}, members: map[string]*members{}, byService: map[string]set[*endpoint]{},
		engines: map[Key]*endpoint{},
	}
}

// NewNames returns a State that knows nothing, and will answer names.
func NewNames() *State {
	s := NewState()
	s.named = map[string]set[string]{}
	return s
}

// Node returns what is known of the node itself; never nil.
func (s *State) Node() *skepv1.LocalNode { return s.node }

// Version returns the version of the last update.
func (s *State) Version() uint64 { return s.version }

// Network returns a network, or nil.
func (s *State) Network(id string) *skepv1.OverlayNetwork { return s.networks[id] }

// Networks returns the ids of all networks, sorted.
func (s *State) Networks() []string { return slices.Sorted(maps.Keys(s.networks)) }

// Ingress returns the network of the routing mesh, or nil.
func (s *State) Ingress() *skepv1.OverlayNetwork {
	for _, id := range s.Networks() {
		if s.networks[id].GetIngress() {
			return s.networks[id]
		}
	}
	return nil
}

// Snapshot returns everything as one complete update.
func (s *State) Snapshot() *skepv1.NetworkUpdate {
	u := &skepv1.NetworkUpdate{Complete: true, Version: s.version, Node: s.node}
	for _, id := range s.Networks() {
		u.Networks = append(u.Networks, s.networks[id])
	}
	for e := range s.sorted() {
		u.Endpoints = append(u.Endpoints, e.OverlayEndpoint)
	}
	for _, id := range slices.Sorted(maps.Keys(s.services)) {
		u.Services = append(u.Services, s.services[id])
	}
	for _, id := range slices.Sorted(maps.Keys(s.peers)) {
		for _, node := range slices.Sorted(maps.Keys(s.peers[id])) {
			u.Peers = append(u.Peers, s.peers[id][node])
		}
	}
	return u
}

// sorted yields all endpoints in the order of their keys.
func (s *State) sorted() iter.Seq[*endpoint] {
	return func(yield func(*endpoint) bool) {
		for _, id := range slices.Sorted(maps.Keys(s.members)) {
			m := s.members[id]
			for _, task := range slices.Sorted(maps.Keys(m.byTask)) {
				if !yield(m.byTask[task]) {
					return
				}
			}
		}
	}
}

// endpoint returns what has a key, or nil.
func (s *State) endpoint(k Key) *endpoint {
	if m := s.members[k.Network]; m != nil {
		return m.byTask[k.Task]
	}
	return nil
}

// Increment returns u without what s holds already. What is both removed and set is set. A complete update becomes the
// difference: what it does not list is removed.
func (s *State) Increment(u *skepv1.NetworkUpdate) *skepv1.NetworkUpdate {
	out := &skepv1.NetworkUpdate{
		Version: u.GetVersion(), Withdrawn: u.GetWithdrawn(),
	}
	if u.GetNode() != nil && !proto.Equal(u.GetNode(), s.node) {
		out.Node = u.GetNode()
	}
	listed := set[string]{}
	for _, n := range u.GetNetworks() {
		listed[n.GetId()] = struct{}{}
		if !proto.Equal(n, s.networks[n.GetId()]) {
			out.Networks = append(out.Networks, n)
		}
	}
	out.RemovedNetworks = removed(s.networks, listed, u.GetRemovedNetworks(), u.GetComplete())
	clear(listed)
	for _, v := range u.GetServices() {
		listed[v.GetId()] = struct{}{}
		if !proto.Equal(v, s.services[v.GetId()]) {
			out.Services = append(out.Services, v)
		}
	}
	out.RemovedServices = removed(s.services, listed, u.GetRemovedServices(), u.GetComplete())
	s.incrementEndpoints(out, u)
	s.incrementPeers(out, u)
	return out
}

// removed returns which ids of m an update removes: those named, or, if it is complete,
// all that it does not list. What it lists stays.
func removed[V any](m map[string]V, listed set[string], ids []string, complete bool) []string {
	if complete {
		ids = slices.Sorted(maps.Keys(m))
	}
	var out []string
	for _, id := range ids {
		_, here := m[id]
		if _, stays := listed[id]; here && !stays {
			out = append(out, id)
		}
	}
	return out
}

// incrementEndpoints does so for endpoints; those of a removed network go with it.
func (s *State) incrementEndpoints(out, u *skepv1.NetworkUpdate) {
	going := set[Key]{}
	remove := func(k Key) {
		if _, twice := going[k]; !twice && s.endpoint(k) != nil {
			going[k] = struct{}{}
			out.RemovedEndpoints = append(out.RemovedEndpoints, &skepv1.EndpointKey{NetworkId: k.Network, TaskId: k.Task})
		}
	}
	out.Endpoints = make([]*skepv1.OverlayEndpoint, 0, len(u.GetEndpoints()))
	for _, e := range u.GetEndpoints() {
		if had := s.endpoint(keyOf(e.GetKey())); had == nil || !proto.Equal(had.OverlayEndpoint, e) {
			out.Endpoints = append(out.Endpoints, e)
		}
	}
	if !u.GetComplete() && len(u.GetRemovedEndpoints())+len(out.GetRemovedNetworks()) == 0 || len(s.members) == 0 {
		return
	}
	listed := make(set[Key], len(u.GetEndpoints()))
	for _, e := range u.GetEndpoints() {
		listed[keyOf(e.GetKey())] = struct{}{}
	}
	unlisted := func(k Key) {
		if _, stays := listed[k]; !stays {
			remove(k)
		}
	}
	if u.GetComplete() {
		for e := range s.sorted() {
			unlisted(e.key)
		}
		return
	}
	for _, k := range u.GetRemovedEndpoints() {
		unlisted(keyOf(k))
	}
	for _, id := range out.GetRemovedNetworks() {
		if m := s.members[id]; m != nil {
			for _, task := range slices.Sorted(maps.Keys(m.byTask)) {
				unlisted(Key{id, task})
			}
		}
	}
}

func keyOf(k *skepv1.EndpointKey) Key { return Key{k.GetNetworkId(), k.GetTaskId()} }

// merge takes over an increment. Removals come first: an endpoint that moves is removed
// and set at once in what is leaving. The endpoints were read from it.
func (s *State) merge(u *skepv1.NetworkUpdate, read []*endpoint) {
	s.version = max(s.version, u.GetVersion())
	if u.GetNode() != nil {
		s.node = u.GetNode()
	}
	for _, k := range u.GetRemovedEndpoints() {
		s.dropEndpoint(keyOf(k))
	}
	for _, id := range u.GetRemovedServices() {
		s.dropService(id)
	}
	for _, id := range u.GetRemovedNetworks() {
		delete(s.networks, id)
		delete(s.segments, id)
	}
	for _, n := range u.GetNetworks() {
		s.networks[n.GetId()], s.segments[n.GetId()] = n, Segments(n)
	}
	for _, v := range u.GetServices() {
		s.dropService(v.GetId())
		s.services[v.GetId()] = v
		if s.named != nil {
			link(s.named, lower(v.GetName()), v.GetId())
		}
	}
	s.makeRoom(read)
	for _, e := range read {
		s.putEndpoint(e)
	}
	s.mergePeers(u)
}

func (s *State) dropService(id string) {
	if v := s.services[id]; v != nil {
		if s.named != nil {
			unlink(s.named, lower(v.GetName()), id)
		}
		delete(s.services, id)
	}
}

func (s *State) network(id string) *members {
	m := s.members[id]
	if m == nil {
		m = &members{byTask: map[string]*endpoint{}, byAddr: map[netip.Addr]few{}, locals: map[netip.Addr]Local{}}
		if s.named != nil {
			m.byName, m.byAlias, m.local = map[string]few{}, map[string]set[*endpoint]{}, map[string]set[netip.Addr]{}
		}
		s.members[id] = m
	}
	return m
}

// makeRoom grows the indexes of networks at once that many endpoints come to.
func (s *State) makeRoom(read []*endpoint) {
	const many = 1000
	if len(read) < many {
		return
	}
	coming := map[string]int{}
	for _, e := range read {
		coming[e.key.Network]++
	}
	for id, n := range coming {
		m := s.network(id)
		if n < many || n < len(m.byTask) {
			continue
		}
		m.byTask, m.byAddr = grown(m.byTask, n), grown(m.byAddr, n)
		if s.named != nil {
			m.byName = grown(m.byName, 2*n)
		}
	}
}

func grown[K comparable, V any](m map[K]V, by int) map[K]V {
	out := make(map[K]V, len(m)+by)
	maps.Copy(out, m)
	return out
}

func (s *State) putEndpoint(e *endpoint) {
	s.dropEndpoint(e.key)
	m := s.network(e.key.Network)
	m.byTask[e.key.Task] = e
	for _, a := range [...]netip.Addr{e.v4, e.v6} {
		if a.IsValid() {
			put(m.byAddr, a, e)
		}
	}
	if id := e.GetServiceId(); id != "" {
		link(s.byService, id, e)
	}
	if e.GetLeadsToPublished() {
		s.engines[e.key] = e
	}
	if s.named == nil {
		return
	}
	for _, name := range endpointNames(e.OverlayEndpoint) {
		put(m.byName, name, e)
	}
	for _, alias := range e.GetAliases() {
		link(m.byAlias, lower(alias), e)
	}
}

func (s *State) dropEndpoint(k Key) {
	e := s.endpoint(k)
	if e == nil {
		return
	}
	m := s.members[k.Network]
	delete(m.byTask, k.Task)
	delete(s.engines, k)
	for _, a := range [...]netip.Addr{e.v4, e.v6} {
		take(m.byAddr, a, e)
	}
	unlink(s.byService, e.GetServiceId(), e)
	if s.named != nil {
		for _, name := range endpointNames(e.OverlayEndpoint) {
			take(m.byName, name, e)
		}
		for _, alias := range e.GetAliases() {
			unlink(m.byAlias, lower(alias), e)
		}
	}
	if len(m.byTask)+len(m.locals) == 0 {
		delete(s.members, k.Network)
	}
}

// endpointNames returns the names of the endpoint itself. A node's own attachment has none.
func endpointNames(e *skepv1.OverlayEndpoint) []string {
	if e.GetName() == "" {
		return nil
	}
	names := []string{lower(e.GetName())}
	if id := lower(e.GetKey().GetTaskId()); id != names[0] && id != "" {
		names = append(names, id)
	}
	return names
}

func readEndpoint(msg *skepv1.OverlayEndpoint) *endpoint {
	e := &endpoint{OverlayEndpoint: msg, key: keyOf(msg.GetKey())}
	e.at, _ = netip.ParseAddr(msg.GetNodeAddr())
	for _, text := range msg.GetAddresses() {
		switch a := prefixAddr(text); {
		case a.Is4():
			e.v4 = a
		case a.Is6():
			e.v6 = a
		}
	}
	return e
}

func readEndpoints(list []*skepv1.OverlayEndpoint) []*endpoint {
	out := make([]*endpoint, len(list))
	for i, msg := range list {
		out[i] = readEndpoint(msg)
	}
	return out
}

// prefixAddr reads an address with or without its prefix length; zero when it is none.
func prefixAddr(text string) netip.Addr {
	text, _, _ = strings.Cut(text, "/")
	a, _ := netip.ParseAddr(text)
	return a.Unmap()
}

func lower(name string) string { return strings.ToLower(name) }

func link[K, V comparable](m map[K]set[V], k K, v V) {
	if m[k] == nil {
		m[k] = set[V]{}
	}
	m[k][v] = struct{}{}
}

func unlink[K, V comparable](m map[K]set[V], k K, v V) {
	delete(m[k], v)
	if len(m[k]) == 0 {
		delete(m, k)
	}
}
