// Package alloc gives networks, services, tasks and nodes what they need of the network:
// subnets, network identifiers, gateways, virtual and own addresses, published ports.
//
// A State knows what is taken. It is made from the stored records, kept up to date by
// their changes, and belongs to one goroutine, its controller's. Its deciders return
// edited copies of stored records and hold what they gave out; the controller proposes
// the copies and, when one was refused, says with Set what is stored instead. Nothing
// else is remembered: a State made from the store holds what the former leader's held.
// The cost of a decision does not grow with the number of records.
package alloc

import (
	"crypto/sha256"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// What a BlockedError may wait for besides the addresses of a network.
const (
	// AnyNetwork waits until some network is made, allocated or removed.
	AnyNetwork = ""
	// Ports, Subnets and VNIs wait until one of them is free again.
	Ports   = "published ports"
	Subnets = "subnets"
	VNIs    = "VXLAN network identifiers"
)

// BlockedError says why something cannot be allocated now.
type BlockedError struct {
	// On is the id of a network, or one of the constants above: once Released mentions
	// it, trying again may help.
	On string
	// Text tells people what is missing and what to do. It is empty for what passes by
	// itself.
	Text string
}

// Error returns the text.
func (e *BlockedError) Error() string {
	if e.Text == "" {
		return "waiting for network " + e.On
	}
	return e.Text
}

func blocked(on, format string, args ...any) *BlockedError {
	return &BlockedError{On: on, Text: fmt.Sprintf(format, args...)}
}

const (
	firstVNI, lastVNI       = 4096, 1<<24 - 1
	firstDynamic, lastDynam = 30000, 32767
	// defaultPool and defaultSize are where subnets come from in a swarm that does not
	// say so itself.
	defaultPool = "10.0.0.0/8"
	defaultSize = 24
	// vniOption is the driver option that lists a network's identifiers, by IPv4 subnet.
	vniOption = "com.docker.network.driver.overlay.vxlanid_list"
)

// owner is a stored record.
type owner struct {
	table model.Table
	id    string
}

// claim is a number of a pool that an owner holds.
type claim struct {
	pool  *pool
	value uint64
}

// State is what is taken of everything there is to allocate.
type State struct {
	cluster *api.Cluster
	// auto are the pools of subnets, in the order in which they are used; ula are those
	// of IPv6.
	auto []*subnetPool
	ula  *subnetPool
	// subnets are all networks' subnets.
	subnets  *prefixes
	vnis     *pool
	ports    map[api.PortConfig_Protocol]*pool
	networks map[string]*network
	byName   map[string]string
	// ingress is the id of the ingress network, "" without one.
	ingress  string
	claims   map[owner][]claim
	released map[string]bool
	// present are the nodes that are not lost.
	present map[string]*api.Node
}

// subnetPool is a prefix that is split into subnets.
type subnetPool struct {
	prefix netip.Prefix
	size   int
	*pool
}

// New returns the State that follows from stored records.
func New(cluster *api.Cluster, networks iter.Seq[*api.Network], services iter.Seq[*api.Service], nodes iter.Seq[*api.Node], tasks iter.Seq[*api.Task]) *State {
	s := &State{
		subnets: newPrefixes(), vnis: newPool(VNIs, firstVNI, lastVNI),
		ports:    make(map[api.PortConfig_Protocol]*pool),
		networks: make(map[string]*network), byName: make(map[string]string),
		claims: make(map[owner][]claim), released: make(map[string]bool),
		present: make(map[string]*api.Node),
	}
	for protocol := range api.PortConfig_Protocol_name {
		s.ports[api.PortConfig_Protocol(protocol)] = newPool(Ports, firstDynamic, lastDynam)
	}
	s.setCluster(cluster)
	for n := range networks {
		s.setNetwork(n.GetId(), n)
	}
	for v := range services {
		s.setService(v.GetId(), v)
	}
	for n := range nodes {
		s.setNode(n.GetId(), n)
	}
	greatest := make(map[*pool]uint64)
	for t := range tasks {
		s.setTask(t.GetId(), t)
		s.recall(t, greatest)
	}
	s.resume(greatest)
	clear(s.released)
	return s
}

// recall lets rest what a task had that has ended, and notes for each pool the greatest
// number that was given for networks which are gone, but which a task still has.
func (s *State) recall(t *api.Task, greatest map[*pool]uint64) {
	for _, a := range t.GetNetworks() {
		if n := s.networks[a.GetNetwork().GetId()]; n != nil {
			for _, c := range n.claims(a) {
				c.pool.rest(c.value)
			}
			continue
		}
		for _, v := range vnisOf(a.GetNetwork()) {
			greatest[s.vnis] = max(greatest[s.vnis], v)
		}
		for _, sub := range subnetsOf(a.GetNetwork()) {
			for _, from := range s.auto {
				if v, ok := from.index(sub.prefix); ok {
					greatest[from.pool] = max(greatest[from.pool], v)
				}
			}
		}
	}
}

// resume lets each pool go on after the greatest number that it is known to have given,
// so that what was given back last is not given first.
func (s *State) resume(greatest map[*pool]uint64) {
	pools := []*pool{s.vnis, s.ula.pool}
	for _, a := range s.auto {
		pools = append(pools, a.pool)
	}
	for _, p := range s.ports {
		pools = append(pools, p)
	}
	for _, n := range s.networks {
		for _, sub := range n.subnets {
			pools = append(pools, sub.pool)
		}
	}
	for _, p := range pools {
		most, known := greatest[p]
		for v := range p.held {
			if v >= p.lo && v <= p.hi {
				most, known = max(most, v), true
			}
		}
		for v := range p.resting {
			most, known = max(most, v), true
		}
		if known {
			p.begin(most)
		}
	}
}

// Set notes what is stored under an id; nil when nothing is.
func (s *State) Set(table model.Table, id string, stored model.Object) {
	switch table { //nolint:exhaustive // the others hold nothing
	case model.Clusters:
		c, _ := stored.(*api.Cluster)
		s.setCluster(c)
	case model.Networks:
		n, _ := stored.(*api.Network)
		s.setNetwork(id, n)
		s.released[AnyNetwork], s.released[id] = true, true
	case model.Services:
		v, _ := stored.(*api.Service)
		s.setService(id, v)
	case model.Nodes:
		n, _ := stored.(*api.Node)
		s.setNode(id, n)
	case model.Tasks:
		t, _ := stored.(*api.Task)
		s.setTask(id, t)
	}
}

// Released returns what became free since the last call, as BlockedError.On names it.
// The caller must not keep the map.
func (s *State) Released() map[string]bool {
	if len(s.released) == 0 {
		return nil
	}
	r := s.released
	s.released = make(map[string]bool)
	return r
}

// setClaims replaces what an owner holds.
func (s *State) setClaims(o owner, now []claim) {
	before := s.claims[o]
	for _, c := range now {
		c.pool.hold(c.value)
	}
	for _, c := range before {
		if c.pool.drop(c.value) {
			s.released[c.pool.key] = true
		}
	}
	if len(now) == 0 {
		delete(s.claims, o)
	} else {
		s.claims[o] = now
	}
}

// grant collects what one record is given, until it is complete.
type grant struct {
	*State
	owner owner
	added []claim
	// taken says which of added were chosen, rather than asked for.
	taken []bool
}

// has counts how often the owner holds a number already.
func (g *grant) has(p *pool, v uint64) (n uint32) {
	for _, list := range [][]claim{g.claims[g.owner], g.added} {
		for _, c := range list {
			if c.pool == p && c.value == v {
				n++
			}
		}
	}
	return n
}

// hold gives the owner a number that it may hold already.
func (g *grant) hold(p *pool, v uint64) {
	if g.has(p, v) == 0 {
		p.hold(v)
		g.added, g.taken = append(g.added, claim{p, v}), append(g.taken, false)
	}
}

// want gives the owner a number unless somebody else holds it.
func (g *grant) want(p *pool, v uint64) bool {
	if p.held[v] > g.has(p, v) {
		return false
	}
	g.hold(p, v)
	return true
}

// take gives the owner any number.
func (g *grant) take(p *pool) (uint64, bool) {
	v, ok := p.take(nil)
	if ok {
		g.added, g.taken = append(g.added, claim{p, v}), append(g.taken, true)
	}
	return v, ok
}

// keep ends a grant: the owner holds what it held and what was added, until Set tells
// what it has come to.
func (g *grant) keep() {
	if len(g.added) > 0 {
		g.claims[g.owner] = append(slices.Clip(g.claims[g.owner]), g.added...)
	}
}

// undo takes back all that was added after the first n.
func (g *grant) undo(n int) {
	for i := len(g.added) - 1; i >= n; i-- {
		c := g.added[i]
		if g.taken[i] {
			c.pool.back(c.value)
		} else {
			c.pool.drop(c.value)
		}
	}
	g.added, g.taken = g.added[:n], g.taken[:n]
}

// setCluster takes over the default pools. They only change when a swarm is founded.
func (s *State) setCluster(c *api.Cluster) {
	if s.ula != nil && c.GetId() == s.cluster.GetId() && c.GetSubnetSize() == s.cluster.GetSubnetSize() &&
		strings.Join(c.GetDefaultAddressPool(), ",") == strings.Join(s.cluster.GetDefaultAddressPool(), ",") {
		return
	}
	s.cluster, s.auto = c, nil
	size := int(c.GetSubnetSize())
	if size == 0 {
		size = defaultSize
	}
	pools := c.GetDefaultAddressPool()
	if len(pools) == 0 {
		pools = []string{defaultPool}
	}
	for _, text := range pools {
		if p, err := netip.ParsePrefix(text); err == nil && p.Addr().Is4() && size >= p.Bits() && size <= 32 {
			s.auto = append(s.auto, newSubnetPool(p, size))
		}
	}
	// A swarm's own prefix of unique local addresses (RFC 4193).
	h := sha256.Sum256([]byte("skep ula " + c.GetId()))
	var a [16]byte
	a[0] = 0xfd
	copy(a[1:6], h[:])
	s.ula = newSubnetPool(netip.PrefixFrom(netip.AddrFrom16(a), 48), 64)
	for _, n := range s.networks {
		for _, sub := range n.subnets {
			s.holdSubnet(sub.prefix)
		}
	}
}

func newSubnetPool(p netip.Prefix, size int) *subnetPool {
	return &subnetPool{prefix: p.Masked(), size: size, pool: newPool(Subnets, 0, 1<<(size-p.Bits())-1)}
}

// index returns the number of a subnet in the pool.
func (p *subnetPool) index(sub netip.Prefix) (uint64, bool) {
	if sub.Bits() != p.size {
		return 0, false
	}
	return index(p.prefix, sub)
}

// holdSubnet takes a subnet out of the default pools.
func (s *State) holdSubnet(p netip.Prefix) {
	for _, a := range append(slices.Clip(s.auto), s.ula) {
		if v, ok := a.index(p); ok {
			a.hold(v)
		}
	}
}

// dropSubnet is the reverse.
func (s *State) dropSubnet(p netip.Prefix) {
	for _, a := range append(slices.Clip(s.auto), s.ula) {
		if v, ok := a.index(p); ok {
			a.drop(v)
		}
	}
	s.released[Subnets] = true
}

// vnisOf returns the identifiers of a network.
func vnisOf(n *api.Network) []uint64 {
	return parseVNIs(n.GetDriverState().GetOptions()[vniOption])
}

func parseVNIs(list string) []uint64 {
	var out []uint64
	for text := range strings.SplitSeq(list, ",") {
		if v, err := strconv.ParseUint(strings.TrimSpace(text), 10, 32); err == nil {
			out = append(out, v)
		}
	}
	return out
}
