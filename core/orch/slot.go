package orch

import (
	"cmp"
	"slices"

	"github.com/skep-dev/skep/api"
)

// slot is a place for one running task: a slot number, or a node in the global modes.
// It keeps the tasks that had the place before.
type slot struct {
	number uint64
	node   string
	tasks  []*item // oldest first
}

// place is what tells slots apart.
type place struct {
	number uint64
	node   string
}

func (s *slot) key() place { return place{s.number, s.node} }

// slots groups the tasks that are not on their way out by their place, in order, and
// notes those that are.
func (w *work) slots(byNode bool) []*slot {
	index := make(map[place]*slot)
	w.leaving = make(map[place][]*item)
	var list []*slot
	for _, i := range w.tasks {
		k := place{number: i.GetSlot()}
		if byNode {
			k = place{node: i.GetNodeId()}
		}
		if i.GetDesiredState() >= api.TaskState_REMOVE && i.mayRun() {
			w.leaving[k] = append(w.leaving[k], i)
		}
		if i.gone || i.GetDesiredState() >= api.TaskState_REMOVE {
			continue
		}
		s := index[k]
		if s == nil {
			s = &slot{number: k.number, node: k.node}
			index[k] = s
			list = append(list, s)
		}
		s.tasks = append(s.tasks, i)
	}
	slices.SortFunc(list, func(a, b *slot) int {
		return cmp.Or(cmp.Compare(a.number, b.number), cmp.Compare(a.node, b.node))
	})
	return list
}

// live returns the tasks that are meant to run, oldest first.
func (s *slot) live() []*item {
	var out []*item
	for _, i := range s.tasks {
		if i.live() {
			out = append(out, i)
		}
	}
	return out
}

// newest returns the task made last, nil in an empty slot.
func (s *slot) newest() *item {
	for _, v := range slices.Backward(s.tasks) {
		if !v.gone {
			return v
		}
	}
	return nil
}

// running reports whether a task of the slot runs and is meant to.
func (s *slot) running() bool {
	return slices.ContainsFunc(s.tasks, func(i *item) bool {
		return i.live() && i.GetStatus().GetState() == api.TaskState_RUNNING
	})
}
