package sched

import (
	"maps"
	"slices"
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// node is one node and what its tasks hold of it.
type node struct {
	*api.Node
	tasks     map[string]*api.Task // those that hold resources
	cpu       int64                // free nano-CPUs, negative when overcommitted
	memory    int64                // free bytes, likewise
	generic   map[string]*pool     // free generic resources by kind
	ports     map[hostPort]int     // host-mode ports and how many tasks hold each
	total     int                  // active tasks
	byService map[string]int       // active tasks of each service
	failures  map[revision][]failure
}

// hostPort is a port of the node itself.
type hostPort struct {
	protocol api.PortConfig_Protocol
	port     uint32
}

// revision is one version of a service's spec.
type revision struct {
	service string
	version uint64
}

// failure is one task that failed on the node.
type failure struct {
	task string
	at   time.Time
}

// pool is what is left of one kind of generic resource: an amount or named pieces.
type pool struct {
	amount int64
	names  []string // sorted
}

func newNode(n *api.Node) *node {
	return &node{
		Node:      n,
		tasks:     make(map[string]*api.Task),
		byService: make(map[string]int),
		ports:     make(map[hostPort]int),
		failures:  make(map[revision][]failure),
	}
}

// reset computes everything from the node's description and tasks.
func (n *node) reset(description *api.Node) {
	n.Node = description
	have := description.GetDescription().GetResources()
	n.cpu, n.memory, n.total = have.GetNanoCpus(), have.GetMemoryBytes(), 0
	n.generic = make(map[string]*pool)
	for _, g := range have.GetGeneric() {
		if d := g.GetDiscreteResourceSpec(); d != nil {
			n.pool(d.GetKind()).amount += d.GetValue()
		}
		if d := g.GetNamedResourceSpec(); d != nil {
			n.pool(d.GetKind()).put(d.GetValue())
		}
	}
	clear(n.ports)
	clear(n.byService)
	for _, id := range slices.Sorted(maps.Keys(n.tasks)) {
		n.count(n.tasks[id], 1)
	}
}

func (n *node) pool(kind string) *pool {
	p := n.generic[kind]
	if p == nil {
		p = new(pool)
		n.generic[kind] = p
	}
	return p
}

func (p *pool) put(name string) {
	if at, found := slices.BinarySearch(p.names, name); !found {
		p.names = slices.Insert(p.names, at, name)
	}
}

func (p *pool) take(name string) {
	if at, found := slices.BinarySearch(p.names, name); found {
		p.names = slices.Delete(p.names, at, at+1)
	}
}

// free returns how many units are left.
func (p *pool) free() int64 {
	if p == nil {
		return 0
	}
	return p.amount + int64(len(p.names))
}

// holds reports whether a task occupies resources of its node.
func holds(t *api.Task) bool {
	state := t.GetStatus().GetState()
	return t.GetNodeId() != "" && state >= api.TaskState_ASSIGNED && !model.Terminal(state)
}

// active reports whether a task that holds resources counts for ranking.
func active(t *api.Task) bool { return t.GetDesiredState() <= api.TaskState_COMPLETE }

// count adds (sign 1) or takes away (sign -1) what a task holds.
func (n *node) count(t *api.Task, sign int) {
	want := t.GetSpec().GetResources().GetReservations()
	n.cpu -= int64(sign) * want.GetNanoCpus()
	n.memory -= int64(sign) * want.GetMemoryBytes()
	for _, g := range t.GetAssignedGenericResources() {
		if d := g.GetDiscreteResourceSpec(); d != nil {
			n.pool(d.GetKind()).amount -= int64(sign) * d.GetValue()
		}
		if d := g.GetNamedResourceSpec(); d != nil {
			if sign > 0 {
				n.pool(d.GetKind()).take(d.GetValue())
			} else if n.described(d) {
				n.pool(d.GetKind()).put(d.GetValue())
			}
		}
	}
	for _, p := range hostPorts(t) {
		n.ports[p] += sign
		if n.ports[p] <= 0 {
			delete(n.ports, p)
		}
	}
	if active(t) {
		n.total += sign
		n.byService[t.GetServiceId()] += sign
		if n.byService[t.GetServiceId()] <= 0 {
			delete(n.byService, t.GetServiceId())
		}
	}
}

// described reports whether the node still has a named resource.
func (n *node) described(want *api.NamedGenericResource) bool {
	for _, g := range n.GetDescription().GetResources().GetGeneric() {
		d := g.GetNamedResourceSpec()
		if d != nil && d.GetKind() == want.GetKind() && d.GetValue() == want.GetValue() {
			return true
		}
	}
	return false
}

// hostPorts lists the fixed ports that a task publishes on its node.
func hostPorts(t *api.Task) []hostPort {
	var out []hostPort
	for _, p := range t.GetEndpoint().GetPorts() {
		if p.GetPublishMode() == api.PortConfig_HOST && p.GetPublishedPort() != 0 {
			out = append(out, hostPort{p.GetProtocol(), p.GetPublishedPort()})
		}
	}
	return out
}

// claim chooses generic resources for a task that fits: named pieces as long as there are
// any, in order, then an amount.
func (n *node) claim(t *api.Task) []*api.GenericResource {
	var out []*api.GenericResource
	for _, want := range amounts(t.GetSpec().GetResources().GetReservations().GetGeneric()) {
		var names []string
		if p := n.generic[want.kind]; p != nil {
			names = p.names[:min(want.value, int64(len(p.names)))]
		}
		for _, name := range names {
			out = append(out, &api.GenericResource{Resource: &api.GenericResource_NamedResourceSpec{
				NamedResourceSpec: &api.NamedGenericResource{Kind: want.kind, Value: name},
			}})
		}
		if rest := want.value - int64(len(names)); rest > 0 {
			out = append(out, &api.GenericResource{Resource: &api.GenericResource_DiscreteResourceSpec{
				DiscreteResourceSpec: &api.DiscreteGenericResource{Kind: want.kind, Value: rest},
			}})
		}
	}
	return out
}

const (
	// failureWindow is how long a failure counts against a node.
	failureWindow = 5 * time.Minute
	// failureLimit is how many failures of a revision make a node less wanted.
	failureLimit = 5
)

// penalty returns the recent failures of a revision, 0 below the limit.
func (n *node) penalty(r revision, now time.Time) int {
	count := 0
	for _, f := range n.failures[r] {
		if now.Sub(f.at) < failureWindow {
			count++
		}
	}
	if count < failureLimit {
		return 0
	}
	return count
}

// fail records a failure and forgets those that no longer count.
func (n *node) fail(r revision, task string, at time.Time) {
	if slices.ContainsFunc(n.failures[r], func(f failure) bool { return f.task == task }) {
		return
	}
	for other, list := range n.failures {
		list = slices.DeleteFunc(list, func(f failure) bool { return at.Sub(f.at) >= failureWindow })
		if n.failures[other] = list; len(list) == 0 {
			delete(n.failures, other)
		}
	}
	n.failures[r] = append(n.failures[r], failure{task, at})
}
