package orch

import (
	"cmp"
	"slices"

	"github.com/skep-dev/skep/api"
)

// replicated decides for a service that wants a number of tasks.
func (w *work) replicated() {
	occupied, dead := w.occupancy(w.slots(false))
	for _, s := range occupied {
		w.restart(s)
	}
	want := w.service.GetSpec().GetReplicated().GetReplicas()
	switch have := uint64(len(occupied)); {
	case have < want:
		occupied = append(occupied, w.grow(occupied, dead, want-have)...)
	case have > want:
		occupied = w.shrink(occupied, want)
	}
	for _, s := range dead {
		if len(s.live()) == 0 { // nobody filled it again
			w.drop(s)
		}
	}
	if w.update(occupied) { // what was decided was for a spec that is none any more
		w.reset()
		w.replicated()
		return
	}
	for _, s := range occupied {
		w.promote(s, api.TaskState_RUNNING)
	}
}

// occupancy parts the slots in those that are in use and those that are not. A slot
// whose last task is not to be restarted stays in use.
func (w *work) occupancy(all []*slot) (occupied, dead []*slot) {
	for _, s := range all {
		newest := s.newest()
		switch {
		case len(s.live()) > 0:
			occupied = append(occupied, s)
		case !w.replaceable(s, newest):
			occupied = append(occupied, s)
		default:
			dead = append(dead, s)
		}
	}
	return occupied, dead
}

// replaceable reports whether a slot's last task has a successor: because of the restart
// policy, or since somebody asked for the previous spec back after it was given up.
func (w *work) replaceable(s *slot, i *item) bool {
	return w.restartable(s, i) || w.manualRollback() && !w.ours(i)
}

const manualRollback = "manually requested rollback"

func (w *work) manualRollback() bool {
	u := w.service.GetUpdateStatus()
	return u.GetState() == api.UpdateStatus_ROLLBACK_STARTED && u.GetMessage() == manualRollback
}

// grow fills n slots more, the lowest free numbers first, and returns them.
func (w *work) grow(occupied, dead []*slot, n uint64) []*slot {
	used := make(map[uint64]bool, len(occupied))
	for _, s := range occupied {
		used[s.number] = true
	}
	old := make(map[uint64]*slot, len(dead))
	for _, s := range dead {
		old[s.number] = s
	}
	var out []*slot
	for number := uint64(1); n > 0; number++ {
		if used[number] {
			continue
		}
		if w.Limit > 0 && len(out) >= w.Limit {
			w.due(w.now.Add(1))
			break
		}
		s := old[number]
		if s == nil {
			s = &slot{number: number}
		}
		w.create(s)
		out = append(out, s)
		n--
	}
	return out
}

// shrink keeps the n best slots and removes the others. Slots that run come first, and
// of these the ones that leave the tasks most evenly spread over the nodes.
func (w *work) shrink(occupied []*slot, n uint64) []*slot {
	slices.SortStableFunc(occupied, func(a, b *slot) int {
		if a.running() != b.running() {
			if a.running() {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.number, b.number)
	})
	type ranked struct {
		*slot
		rank int // 1 for the first slot on its node, and so on
	}
	perNode := make(map[string]int)
	list := make([]ranked, 0, len(occupied))
	for _, s := range occupied {
		r := ranked{s, len(occupied) + 1}
		if live := s.live(); len(live) == 1 && live[0].GetNodeId() != "" {
			perNode[live[0].GetNodeId()]++
			r.rank = perNode[live[0].GetNodeId()]
		}
		list = append(list, r)
	}
	slices.SortStableFunc(list, func(a, b ranked) int { return cmp.Compare(a.rank, b.rank) })
	for _, r := range list[n:] {
		w.drop(r.slot)
	}
	kept := make([]*slot, 0, n)
	for _, r := range list[:n] {
		kept = append(kept, r.slot)
	}
	slices.SortFunc(kept, func(a, b *slot) int { return cmp.Compare(a.number, b.number) })
	return kept
}

// drop removes all tasks of a slot.
func (w *work) drop(s *slot) {
	for _, i := range s.tasks {
		w.desire(i, api.TaskState_REMOVE)
	}
}
