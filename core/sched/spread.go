package sched

import (
	"container/heap"
	"strings"
	"time"

	"github.com/skep-dev/skep/api"
)

// branch is the set of nodes that share label values, down to one preference.
type branch struct {
	total    int // active tasks of the service, and those placed since
	children []*branch
	byValue  map[string]*branch
	leaf     ranked
}

// ranked is a heap of nodes, the best first.
type ranked struct {
	nodes []*node
	less  func(a, b *node) bool
}

func (h *ranked) Len() int           { return len(h.nodes) }
func (h *ranked) Less(i, j int) bool { return h.less(h.nodes[i], h.nodes[j]) }
func (h *ranked) Swap(i, j int)      { h.nodes[i], h.nodes[j] = h.nodes[j], h.nodes[i] }
func (h *ranked) Push(x any)         { h.nodes = append(h.nodes, x.(*node)) }
func (h *ranked) Pop() any {
	last := h.nodes[len(h.nodes)-1]
	h.nodes = h.nodes[:len(h.nodes)-1]
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
	less := func(a, b *node) bool { return better(a, b, r, now) }
	labels := spreads(t)
	root := new(branch)
	s.order.Scan(func(n *node) bool {
		if pipe.refusedBy(n) >= 0 {
			return true
		}
		b := root
		b.total += n.byService[r.service]
		for _, l := range labels {
			b = b.child(l.value(n))
			b.total += n.byService[r.service]
		}
		b.leaf.nodes = append(b.leaf.nodes, n)
		return true
	})
	root.init(less)
	var path []*branch // to the leaf whose best node was handed out last
	return func() *node {
		if len(path) > 0 {
			h := &path[len(path)-1].leaf
			if pipe.refusedBy(h.nodes[0]) >= 0 {
				heap.Pop(h)
			} else {
				heap.Fix(h, 0)
			}
		}
		path = root.best(path[:0])
		if len(path) == 0 {
			return nil
		}
		for _, b := range path {
			b.total++
		}
		return path[len(path)-1].leaf.nodes[0]
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
	b.children = append(b.children, c)
	return c
}

func (b *branch) init(less func(x, y *node) bool) {
	b.leaf.less = less
	heap.Init(&b.leaf)
	for _, c := range b.children {
		c.init(less)
	}
}

// best appends the way from b to the leaf that the next task goes to: at each fork the
// branch with the fewest tasks that still has room. Without room it returns nil.
func (b *branch) best(path []*branch) []*branch {
	path = append(path, b)
	if len(b.children) == 0 {
		if len(b.leaf.nodes) == 0 {
			return nil
		}
		return path
	}
	for len(b.children) > 0 {
		fewest := 0
		for i, c := range b.children {
			if c.total < b.children[fewest].total {
				fewest = i
			}
		}
		if way := b.children[fewest].best(path); way != nil {
			return way
		}
		// Full: leave it out from now on.
		b.children = append(b.children[:fewest], b.children[fewest+1:]...)
	}
	return nil
}
