package sched

import (
	"cmp"
	"container/heap"
	"strings"
	"time"

	"github.com/skep-dev/skep/api"
)

// branch is the set of nodes that share label values, down to one preference.
type branch struct {
	total   int // active tasks of the service on any of its nodes, and those placed since
	rank    int // of its first suitable node, the least loaded one first; 0 without any
	byValue map[string]*branch
	all     []*branch       // the values of byValue, as they came
	open    ranked[*branch] // those below it that have room, the emptiest first
	leaf    ranked[*node]   // suitable nodes, the best first
}

// ranked is a heap, the best first.
type ranked[T any] struct {
	items []T
	less  func(a, b T) bool
}

func (h *ranked[T]) Len() int           { return len(h.items) }
func (h *ranked[T]) Less(i, j int) bool { return h.less(h.items[i], h.items[j]) }
func (h *ranked[T]) Swap(i, j int)      { h.items[i], h.items[j] = h.items[j], h.items[i] }
func (h *ranked[T]) Push(x any)         { h.items = append(h.items, x.(T)) }
func (h *ranked[T]) Pop() any {
	last := h.items[len(h.items)-1]
	h.items = h.items[:len(h.items)-1]
	return last
}

// label is what one placement preference spreads over.
type label struct {
	engine bool
	key    string
}

func (l label) value(n *node) string {
	if l.engine {
		return n.GetDescription().GetEngine().GetLabels()[l.key]
	}
	return n.GetSpec().GetAnnotations().GetLabels()[l.key]
}

// spreads returns the preferences of a task that can be followed.
func spreads(t *api.Task) []label {
	const nodeLabels, engineLabels = "node.labels.", "engine.labels."
	var out []label
	for _, p := range t.GetSpec().GetPlacement().GetPreferences() {
		d := p.GetSpread().GetSpreadDescriptor()
		switch lower := strings.ToLower(d); {
		case strings.HasPrefix(lower, nodeLabels) && len(d) > len(nodeLabels):
			out = append(out, label{false, d[len(nodeLabels):]})
		case strings.HasPrefix(lower, engineLabels) && len(d) > len(engineLabels):
			out = append(out, label{true, d[len(engineLabels):]})
		}
	}
	return out
}

// tree returns a function that finds the best node for one more task of a revision,
// from an index of all suitable nodes made once. The caller must place the task there
// before it asks again.
func (s *State) tree(pipe pipeline, t *api.Task, r revision, now time.Time) func() *node {
	root := s.branches(pipe, spreads(t), r.service)
	root.init(func(a, b *node) bool { return better(a, b, r, now) })
	var path []*branch // to the leaf whose best node was handed out last
	return func() *node {
		settle(path, pipe)
		path = root.best(path[:0])
		if len(path) == 0 {
			return nil
		}
		for _, b := range path {
			b.total++
		}
		return path[len(path)-1].leaf.items[0]
	}
}

// branches sorts the nodes into branches. Nodes that refuse the task count too: what runs
// there already is where it is.
func (s *State) branches(pipe pipeline, labels []label, service string) *branch {
	root := new(branch)
	suitable := 0
	s.order.Scan(func(n *node) bool {
		fits := pipe.refusedBy(n) < 0
		if fits {
			suitable++
		}
		b := root
		for _, l := range labels {
			b = b.child(l.value(n))
			b.total += n.byService[service]
			if fits && b.rank == 0 {
				b.rank = suitable
			}
		}
		if fits {
			b.leaf.items = append(b.leaf.items, n)
		}
		return true
	})
	return root
}

// settle gives what changed with the last placement its new place.
func settle(path []*branch, pipe pipeline) {
	if len(path) == 0 {
		return
	}
	last := len(path) - 1
	if h := &path[last].leaf; pipe.refusedBy(h.items[0]) >= 0 {
		heap.Pop(h)
	} else {
		heap.Fix(h, 0)
	}
	for _, b := range path[:last] {
		heap.Fix(&b.open, 0)
	}
}

func (b *branch) child(value string) *branch {
	if c := b.byValue[value]; c != nil {
		return c
	}
	if b.byValue == nil {
		b.byValue = make(map[string]*branch)
	}
	c := new(branch)
	b.byValue[value] = c
	b.all = append(b.all, c)
	return c
}

func (b *branch) init(less func(x, y *node) bool) {
	b.leaf.less = less
	heap.Init(&b.leaf)
	b.open.less = func(x, y *branch) bool {
		return cmp.Or(cmp.Compare(x.total, y.total), cmp.Compare(x.rank, y.rank)) < 0
	}
	for _, c := range b.all {
		if c.rank > 0 {
			c.init(less)
			b.open.items = append(b.open.items, c)
		}
	}
	heap.Init(&b.open)
}

// best appends the way from b to the leaf that the next task goes to: at each fork the
// branch with the fewest tasks that still has room. Without room it returns nil.
func (b *branch) best(path []*branch) []*branch {
	path = append(path, b)
	if len(b.leaf.items) > 0 {
		return path
	}
	for b.open.Len() > 0 {
		if way := b.open.items[0].best(path); way != nil {
			return way
		}
		heap.Pop(&b.open) // full: leave it out from now on
	}
	return nil
}
