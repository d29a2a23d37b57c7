package sched

import (
	"cmp"
	"iter"
	"maps"
	"slices"
	"time"

	"github.com/tidwall/btree"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// State is what scheduling depends on. Make it with New; it belongs to one goroutine.
type State struct {
	nodes map[string]*node
	// order holds the nodes by load, so that the least loaded is found at once.
	order *btree.BTreeG[*node]
	// known holds the tasks that hold resources or wait, as last seen or decided.
	known map[string]*api.Task
	// waiting holds tasks without a node by group; preassigned those with one, by node.
	waiting     map[revision]map[string]*api.Task
	pipes       map[revision]pipeline // of groups that were refused; tasks of a group have one spec
	preassigned map[string]map[string]*api.Task
	// obsolete holds tasks that wait but are no longer wanted.
	obsolete map[string]*api.Task
	// Worth another look: groups; tasks made for a node; everything that waits.
	freshGroups map[revision]bool
	freshNodes  map[string]bool
	freshAll    bool
	// freed nodes have more room than when something was last refused: what waits is
	// worth another look if it fits there.
	freed map[string]bool
	// spread says of each service that has active tasks how many nodes have how many.
	spread map[string]*tally
}

// New makes the State of a cluster with these nodes and tasks.
func New(nodes iter.Seq[*api.Node], tasks iter.Seq[*api.Task]) *State {
	s := &State{
		nodes: make(map[string]*node),
		order: btree.NewBTreeGOptions(func(a, b *node) bool {
			return cmp.Or(cmp.Compare(a.total, b.total), cmp.Compare(a.GetId(), b.GetId())) < 0
		}, btree.Options{NoLocks: true}),
		known:       make(map[string]*api.Task),
		waiting:     make(map[revision]map[string]*api.Task),
		pipes:       make(map[revision]pipeline),
		preassigned: make(map[string]map[string]*api.Task),
		obsolete:    make(map[string]*api.Task),
		freshGroups: make(map[revision]bool),
		freshNodes:  make(map[string]bool),
		freed:       make(map[string]bool),
		spread:      make(map[string]*tally),
	}
	for n := range nodes {
		s.setNode(n)
	}
	for t := range tasks {
		s.setTask(t)
	}
	return s
}

// Apply takes note of a change in the store.
func (s *State) Apply(e model.Event) {
	switch o := cmp.Or[any](objectOf(e.New), objectOf(e.Old)).(type) {
	case *api.Node:
		if e.Kind == model.Remove {
			s.removeNode(o.GetId())
			return
		}
		s.setNode(o)
	case *api.Task:
		if e.Kind == model.Remove {
			s.forget(o.GetId())
			return
		}
		s.setTask(o)
	}
}

// objectOf avoids a typed nil.
func objectOf(o model.Object) any {
	if o == nil {
		return nil
	}
	return o
}

func (s *State) setNode(description *api.Node) {
	n := s.nodes[description.GetId()]
	if n == nil {
		n = newNode(description)
		s.nodes[description.GetId()] = n
		for id, t := range s.known { // tasks that came before their node
			if t.GetNodeId() == description.GetId() && holds(t) {
				n.tasks[id] = t
			}
		}
		n.reset(description)
		for service := range n.byService {
			s.tally(service, 0, n.byService[service])
		}
		s.order.Set(n)
		s.freshAll = true
		s.freshNodes[description.GetId()] = true
		return
	}
	if !sameForScheduling(n.Node, description) {
		s.freshAll = true
		s.freshNodes[description.GetId()] = true
	}
	s.change(n, func() { n.reset(description) })
}

// sameForScheduling reports whether nothing that filters look at has changed.
func sameForScheduling(a, b *api.Node) bool {
	return ready(&node{Node: a}) == ready(&node{Node: b}) && a.GetRole() == b.GetRole() &&
		a.GetStatus().GetAddr() == b.GetStatus().GetAddr() &&
		maps.Equal(a.GetSpec().GetAnnotations().GetLabels(), b.GetSpec().GetAnnotations().GetLabels()) &&
		sameDescription(a.GetDescription(), b.GetDescription())
}

func (s *State) removeNode(id string) {
	n := s.nodes[id]
	if n == nil {
		return
	}
	s.order.Delete(n)
	for service, count := range n.byService {
		s.tally(service, count, 0)
	}
	delete(s.nodes, id)
	s.freshAll = true // the reasons that waiting tasks show count this node
}

// change edits a node and keeps its place in the order.
func (s *State) change(n *node, edit func()) {
	s.order.Delete(n)
	for service, count := range n.byService {
		s.tally(service, count, 0)
	}
	edit()
	for service, count := range n.byService {
		s.tally(service, 0, count)
	}
	s.order.Set(n)
}

// tally is how many nodes have how many active tasks of a service.
type tally struct {
	nodes int         // with at least one
	by    map[int]int // number of tasks, from 1: number of nodes
}

// tally notes that a node has a new number of active tasks of a service.
func (s *State) tally(service string, old, now int) {
	t := s.spread[service]
	if t == nil {
		t = &tally{by: make(map[int]int)}
		s.spread[service] = t
	}
	if old > 0 {
		t.nodes--
		if t.by[old]--; t.by[old] == 0 {
			delete(t.by, old)
		}
	}
	if now > 0 {
		t.nodes++
		t.by[now]++
	}
	if t.nodes == 0 {
		delete(s.spread, service)
	}
}

// fewest returns the smallest number of active tasks of a service that any node has.
func (s *State) fewest(service string) int {
	t := s.spread[service]
	if t == nil || t.nodes < len(s.nodes) {
		return 0
	}
	fewest := 1
	for t.by[fewest] == 0 && fewest < len(s.known) {
		fewest++
	}
	return fewest
}

// count adds or takes away one task of a node.
func (s *State) count(n *node, t *api.Task, sign int) {
	moves := active(t)
	service := t.GetServiceId()
	had := n.byService[service]
	if moves {
		s.order.Delete(n)
	}
	n.count(t, sign)
	if moves {
		s.order.Set(n)
		s.tally(service, had, n.byService[service])
	}
	if sign > 0 {
		n.tasks[t.GetId()] = t
	} else {
		delete(n.tasks, t.GetId())
	}
}

// revisionOf returns the group of a task; one without service is a group of its own.
func revisionOf(t *api.Task) revision {
	if t.GetServiceId() == "" {
		return revision{service: "\x00" + t.GetId()}
	}
	return revision{t.GetServiceId(), t.GetSpecVersion().GetIndex()}
}

func (s *State) setTask(t *api.Task) {
	id := t.GetId()
	old := s.known[id]
	if old != nil && holds(old) && holds(t) && sameHold(old, t) {
		s.known[id] = t
		if n := s.nodes[t.GetNodeId()]; n != nil {
			n.tasks[id] = t
		}
		return
	}
	s.forget(id)
	switch state := t.GetStatus().GetState(); {
	case holds(t):
		s.known[id] = t
		if n := s.nodes[t.GetNodeId()]; n != nil {
			s.count(n, t, 1)
		}
	case state == api.TaskState_PENDING && !active(t):
		if t.GetDesiredState() < api.TaskState_REMOVE { // the others are deleted soon
			s.known[id] = t
			s.obsolete[id] = t
		}
	case state == api.TaskState_PENDING && t.GetNodeId() != "":
		s.known[id] = t
		add(s.preassigned, t.GetNodeId(), t)
		if old == nil || holds(old) || t.GetStatus().GetErr() == "" {
			s.freshNodes[t.GetNodeId()] = true
		}
	case state == api.TaskState_PENDING:
		s.known[id] = t
		add(s.waiting, revisionOf(t), t)
		if old == nil || holds(old) || t.GetStatus().GetErr() == "" {
			s.freshGroups[revisionOf(t)] = true
		}
	case state == api.TaskState_FAILED || state == api.TaskState_REJECTED:
		if n := s.nodes[t.GetNodeId()]; n != nil {
			n.fail(revisionOf(t), id, statusTime(t))
		}
	}
}

func statusTime(t *api.Task) time.Time {
	if at := t.GetStatus().GetAppliedAt(); at != nil {
		return at.AsTime()
	}
	return t.GetStatus().GetTimestamp().AsTime()
}

// sameHold reports whether two versions of a task count the same.
func sameHold(a, b *api.Task) bool {
	return a.GetNodeId() == b.GetNodeId() && active(a) == active(b) && a.GetServiceId() == b.GetServiceId() &&
		sameResources(a, b)
}

func add[K comparable](index map[K]map[string]*api.Task, key K, t *api.Task) {
	if index[key] == nil {
		index[key] = make(map[string]*api.Task)
	}
	index[key][t.GetId()] = t
}

func drop[K comparable](index map[K]map[string]*api.Task, key K, id string) {
	delete(index[key], id)
	if len(index[key]) == 0 {
		delete(index, key)
	}
}

// forget takes a task out of the account.
func (s *State) forget(id string) {
	t := s.known[id]
	if t == nil {
		return
	}
	delete(s.known, id)
	delete(s.obsolete, id)
	drop(s.preassigned, t.GetNodeId(), id)
	drop(s.waiting, revisionOf(t), id)
	if !holds(t) {
		return
	}
	if n := s.nodes[t.GetNodeId()]; n != nil {
		s.count(n, t, -1)
		s.freed[n.GetId()] = true
		if len(s.preassigned[t.GetNodeId()]) > 0 {
			s.freshNodes[t.GetNodeId()] = true
		}
	}
}

// Pending reports whether there is something that Schedule should look at.
func (s *State) Pending() bool {
	return len(s.obsolete) > 0 || len(s.freshNodes) > 0 || len(s.freshGroups) > 0 ||
		len(s.waiting) > 0 && (s.freshAll || len(s.freed) > 0)
}

// groups returns the groups worth a look, in order, and clears the marks.
func (s *State) groups() []revision {
	var list []revision
	for r := range s.waiting {
		if s.freshAll || s.freshGroups[r] || s.fitsFreed(r) {
			list = append(list, r)
		}
	}
	for r := range s.pipes {
		if s.waiting[r] == nil {
			delete(s.pipes, r)
		}
	}
	clear(s.freshGroups)
	clear(s.freed)
	s.freshAll = false
	slices.SortFunc(list, func(a, b revision) int {
		return cmp.Or(cmp.Compare(a.service, b.service), cmp.Compare(a.version, b.version))
	})
	return list
}

// fitsFreed reports whether a node with more room than before takes a task of a group.
func (s *State) fitsFreed(r revision) bool {
	pipe := s.pipes[r]
	for id := range s.freed {
		if n := s.nodes[id]; n != nil && pipe != nil && pipe.refusedBy(n) < 0 {
			return true
		}
	}
	return false
}
