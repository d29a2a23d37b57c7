package sched

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// Messages of a scheduled task, which people and tests of other programs look for.
const (
	assignedMessage  = "scheduler assigned task to node"
	confirmedMessage = "scheduler confirmed task can run on preassigned node"
	obsoleteMessage  = "shutdown requested before the task was scheduled"
)

// smallGroup is the size up to which tasks are placed one by one, by a walk over the
// nodes in order of load, rather than with an index of all nodes made for the group.
const smallGroup = 4

// Schedule decides about the tasks that came, or may fit by now, since the last call.
// The decisions count at once, as if they were in the store already: if one does not
// get there, the event that says what happened to the task instead, or Refuse, undoes it.
func (s *State) Schedule(now time.Time) model.Plan {
	var p model.Plan
	for _, id := range slices.Sorted(maps.Keys(s.obsolete)) {
		t := model.Clone(s.obsolete[id])
		t.Status = status(t, api.TaskState_SHUTDOWN, obsoleteMessage, "", now)
		s.forget(id)
		p.Changes = append(p.Changes, model.Change{Kind: model.Update, Object: t})
	}
	fresh := slices.Sorted(maps.Keys(s.freshNodes))
	clear(s.freshNodes)
	for _, id := range fresh {
		s.confirm(&p, id, now)
	}
	for _, r := range s.groups() {
		s.group(&p, r, now)
	}
	return p
}

// Refuse puts back a task whose decision did not reach the store.
func (s *State) Refuse(stored *api.Task) { s.setTask(stored) }

// confirm checks the tasks that were made for one node.
func (s *State) confirm(p *model.Plan, nodeID string, now time.Time) {
	n := s.nodes[nodeID]
	for _, id := range slices.Sorted(maps.Keys(s.preassigned[nodeID])) {
		t := s.preassigned[nodeID][id]
		if n == nil {
			continue // its service's orchestrator removes it
		}
		if pipe := newPipeline(t); pipe.refusedBy(n) >= 0 {
			counts := make([]int, len(pipe))
			counts[pipe.refusedBy(n)] = 1
			s.refuse(p, t, pipe.explain(counts), now)
			continue
		}
		s.assign(p, t, n, confirmedMessage, now)
	}
}

// group places the tasks of one revision.
func (s *State) group(p *model.Plan, r revision, now time.Time) {
	tasks := slices.SortedFunc(maps.Values(s.waiting[r]), func(a, b *api.Task) int {
		return cmp.Or(cmp.Compare(a.GetSlot(), b.GetSlot()), cmp.Compare(a.GetId(), b.GetId()))
	})
	pipe := newPipeline(tasks[0])
	next := s.walk(pipe, r, now)
	if len(tasks) > smallGroup || len(spreads(tasks[0])) > 0 {
		next = s.tree(pipe, tasks[0], r, now)
	}
	for k, t := range tasks {
		n := next()
		if n == nil {
			why := s.why(pipe)
			for _, t := range tasks[k:] {
				s.refuse(p, t, why, now)
			}
			s.pipes[r] = pipe
			return
		}
		s.assign(p, t, n, assignedMessage, now)
	}
}

// walk returns a function that finds the best node for one more task of a revision by
// going through the nodes in order of load.
func (s *State) walk(pipe pipeline, r revision, now time.Time) func() *node {
	return func() *node {
		var best *node
		fewest := s.fewest(r.service) // no node can be better than one with so few
		s.order.Scan(func(n *node) bool {
			if best != nil && !better(n, best, r, now) || pipe.refusedBy(n) >= 0 {
				return true
			}
			best = n
			return n.byService[r.service] > fewest || n.penalty(r, now) > 0
		})
		return best
	}
}

// better reports whether a is to be preferred to b for a task of a revision.
func better(a, b *node, r revision, now time.Time) bool {
	return cmp.Or(
		cmp.Compare(a.penalty(r, now), b.penalty(r, now)),
		cmp.Compare(a.byService[r.service], b.byService[r.service]),
		cmp.Compare(a.total, b.total),
		cmp.Compare(a.GetId(), b.GetId()),
	) < 0
}

// assign puts a task on a node.
func (s *State) assign(p *model.Plan, old *api.Task, n *node, message string, now time.Time) {
	t := model.Clone(old)
	t.NodeId = n.GetId()
	t.AssignedGenericResources = n.claim(t)
	t.Status = status(t, api.TaskState_ASSIGNED, message, "", now)
	s.setTask(t)
	p.Changes = append(p.Changes, model.Change{Kind: model.Update, Object: t})
}

// refuse writes on a task why it has no node, unless that is known.
func (s *State) refuse(p *model.Plan, old *api.Task, why string, now time.Time) {
	p.Notes = append(p.Notes, model.Note{Subject: old.GetId(), Text: why})
	if old.GetStatus().GetErr() == why {
		return
	}
	t := model.Clone(old)
	t.Status = status(t, api.TaskState_PENDING, t.GetStatus().GetMessage(), why, now)
	s.setTask(t)
	p.Changes = append(p.Changes, model.Change{Kind: model.Update, Object: t})
}

func status(t *api.Task, state api.TaskState, message, why string, now time.Time) *api.TaskStatus {
	st := model.Clone(t.GetStatus())
	st.State, st.Message, st.Err = state, message, why
	st.Timestamp = timestamppb.New(now)
	return st
}

// why says what keeps a task from every node.
func (s *State) why(pipe pipeline) string {
	counts := make([]int, len(pipe))
	for _, n := range s.nodes {
		if f := pipe.refusedBy(n); f >= 0 {
			counts[f]++
		}
	}
	return pipe.explain(counts)
}

// Refusal is one filter and the nodes that it refused.
type Refusal struct {
	Filter string
	Reason string
	Nodes  []string // ids, sorted
}

// Explain says for each filter which nodes it keeps a task from, and which nodes would
// take it now.
func (s *State) Explain(t *api.Task) (refusals []Refusal, suitable []string) {
	pipe := newPipeline(t)
	refused := make([][]string, len(pipe))
	for _, id := range slices.Sorted(maps.Keys(s.nodes)) {
		n := s.nodes[id]
		if t.GetNodeId() != "" && t.GetNodeId() != id {
			continue
		}
		if f := pipe.refusedBy(n); f >= 0 {
			refused[f] = append(refused[f], id)
		} else {
			suitable = append(suitable, id)
		}
	}
	for f, ids := range refused {
		if len(ids) > 0 {
			refusals = append(refusals, Refusal{pipe[f].name, pipe[f].reason(len(ids)), ids})
		}
	}
	return refusals, suitable
}

func sameResources(a, b *api.Task) bool {
	return a.GetSpec().GetResources().GetReservations() == b.GetSpec().GetResources().GetReservations() ||
		proto.Equal(a.GetSpec().GetResources().GetReservations(), b.GetSpec().GetResources().GetReservations())
}

func sameDescription(a, b *api.NodeDescription) bool {
	return a == b || proto.Equal(a, b)
}
