package orch

import (
	"time"

	"github.com/skep-dev/skep/api"
)

const (
	// defaultRestartDelay is waited before a task that ended is started again.
	defaultRestartDelay = 5 * time.Second
	// stopTimeout is how long a replacement waits for its predecessor to stop.
	stopTimeout = time.Minute
)

// FenceLabel on a service, with the value "true", forbids two running tasks in a slot
// under all circumstances: a replacement waits for as long as its predecessor may run.
const FenceLabel = "skep.fence"

// fenced reports whether a service forbids two running tasks in a slot.
func fenced(s *api.Service) bool {
	return s.GetSpec().GetAnnotations().GetLabels()[FenceLabel] == "true"
}

// nodeLost reports whether what runs on the task's node must be considered dead.
func (w *work) nodeLost(i *item) bool {
	if i.GetNodeId() == "" {
		return false
	}
	n := w.Nodes[i.GetNodeId()]
	return n == nil || n.GetStatus().GetState() == api.NodeStatus_DOWN
}

func (w *work) nodeDrained(i *item) bool {
	n := w.Nodes[i.GetNodeId()]
	return n.GetSpec().GetAvailability() == api.NodeSpec_DRAIN
}

// mustMove reports whether a task that should run cannot go on where it is.
func (w *work) mustMove(i *item) bool {
	return i.stopped() || w.nodeLost(i) || w.nodeDrained(i)
}

func (w *work) restartDelay() time.Duration {
	if d := w.service.GetSpec().GetTask().GetRestart().GetDelay(); d != nil {
		return d.AsDuration()
	}
	return defaultRestartDelay
}

// restartable reports whether the restart policy wants a task replaced after it ended.
func (w *work) restartable(s *slot, i *item) bool {
	policy := i.GetSpec().GetRestart()
	condition := api.RestartPolicy_ANY
	if policy != nil {
		condition = policy.GetCondition()
	}
	complete := i.GetStatus().GetState() == api.TaskState_COMPLETE
	switch condition {
	case api.RestartPolicy_NONE:
		return false
	case api.RestartPolicy_ON_FAILURE:
		if complete {
			return false
		}
	case api.RestartPolicy_ANY:
		if complete && isJob(w.service) {
			return false
		}
	}
	most := policy.GetMaxAttempts()
	return most == 0 || w.attempts(s, i) < most
}

// attempts counts the replacements that a slot has had for the task's revision, within
// the policy's window before the task ended. For one that did not end on its own that is
// when it was made, lest stopping it gives it another attempt. The history limit keeps
// enough of them.
func (w *work) attempts(s *slot, i *item) uint64 {
	var since time.Time
	if window := i.GetSpec().GetRestart().GetWindow(); window != nil && window.AsDuration() > 0 {
		end := created(i.Task)
		if i.endedItself() {
			end = changed(i.Task)
		}
		since = end.Add(-window.AsDuration())
	}
	var count uint64
	first := true
	for _, t := range s.tasks {
		if t.gone || !sameRevision(t, i) {
			continue
		}
		if first { // the first is no replacement
			first = false
			continue
		}
		if !created(t.Task).Before(since) {
			count++
		}
	}
	return count
}

// sameRevision reports whether two tasks were made for the same spec, and run of a job.
func sameRevision(a, b *item) bool {
	return a.GetSpecVersion().GetIndex() == b.GetSpecVersion().GetIndex() &&
		a.GetJobIteration().GetIndex() == b.GetJobIteration().GetIndex()
}

// restart replaces the tasks of a slot that ended or must move.
func (w *work) restart(s *slot) {
	for _, i := range s.live() {
		if !w.mustMove(i) {
			continue
		}
		// A replacement that failed before it was its turn waits for its turn, or a
		// task that cannot be prepared would be replaced without any delay.
		if i.GetDesiredState() == api.TaskState_READY && i.stopped() && !w.startable(s, i) {
			continue
		}
		again := w.replaceable(s, i)
		w.desire(i, api.TaskState_SHUTDOWN)
		if !again || len(s.live()) > 0 {
			continue
		}
		w.create(s)
	}
}

// promote starts the tasks of a slot that were held back, once it is their turn.
func (w *work) promote(s *slot, to api.TaskState) {
	for _, i := range s.live() {
		if i.GetDesiredState() == api.TaskState_READY && !i.stopped() && w.startable(s, i) {
			w.desire(i, to)
		}
	}
}

// startable reports whether a task that is held back may start: its restart delay is
// over, and the slot's earlier tasks have stopped or had a minute to do so.
func (w *work) startable(s *slot, i *item) bool {
	made := created(i.Task)
	if before := s.before(i); before != nil && w.endedBefore(before, i) {
		if !w.due(changed(before.Task).Add(w.restartDelay())) {
			return false
		}
	}
	if fenced(w.service) {
		return w.alone(s, i)
	}
	for _, t := range s.tasks {
		if t == i || t.live() || !t.mayRun() {
			continue
		}
		switch {
		case w.nodeLost(t):
		case !w.due(made.Add(stopTimeout)):
			w.note(i.GetId(), "waits for task %s to stop", t.GetId())
			return false
		}
	}
	return true
}

// alone reports whether no other task of a fenced slot runs or is meant to, not even
// one whose record is to be removed or whose node is lost.
func (w *work) alone(s *slot, i *item) bool {
	for _, list := range [...][]*item{s.tasks, w.leaving[s.key()]} {
		for _, t := range list {
			if t == i || t.gone || t.live() && t.GetDesiredState() == api.TaskState_READY {
				continue
			}
			if t.live() && !t.stopped() || t.mayRun() {
				w.note(i.GetId(), "waits until task %s on node %s is known to have stopped", t.GetId(), t.GetNodeId())
				return false
			}
		}
	}
	return true
}

// before returns the task that had the slot before i.
func (s *slot) before(i *item) *item {
	var last *item
	for _, t := range s.tasks {
		if t == i {
			return last
		}
		if !t.gone {
			last = t
		}
	}
	return last
}

// endedBefore reports whether a task had ended on its own when its successor was made:
// then the restart delay applies. It does not to one that was told to stop, or whose
// node was lost or drained, nor where the successor is what is wanted now and the task was
// not. The state says which it was: the times alone would not, as a task that is told to
// stop may do so at the very instant its successor is made.
func (w *work) endedBefore(i, successor *item) bool {
	return i.endedItself() && !changed(i.Task).After(created(successor.Task)) &&
		!w.nodeDrained(i) && !w.nodeLost(i) && (!w.dirty(i) || w.dirty(successor))
}
