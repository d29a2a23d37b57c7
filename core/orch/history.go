package orch

import (
	"slices"

	"github.com/skep-dev/skep/api"
)

// defaultHistory is the number of tasks kept in each slot when the cluster does not say.
const defaultHistory = 5

// historyLimit returns how many tasks a slot keeps; negative means all.
func (w *work) historyLimit() int64 {
	if most := w.service.GetSpec().GetTask().GetRestart().GetMaxAttempts(); most > 0 {
		return keepFor(most)
	}
	if w.Cluster.GetSpec().GetOrchestration() == nil {
		return defaultHistory
	}
	return w.Cluster.GetSpec().GetOrchestration().GetTaskHistoryRetentionLimit()
}

// keepFor returns how many tasks tell whether a slot has had so many attempts.
func keepFor(attempts uint64) int64 { return int64(min(attempts, 1<<31)) + 1 }

// reap deletes the records that nobody needs: tasks to be removed that no node has or
// that have ended, and history beyond the limit.
func (w *work) reap() {
	for _, i := range w.tasks {
		state := i.GetStatus().GetState()
		nowhere := state < api.TaskState_ASSIGNED || state >= api.TaskState_COMPLETE ||
			i.GetNodeId() != "" && w.Nodes[i.GetNodeId()] == nil
		if i.GetDesiredState() == api.TaskState_REMOVE && nowhere {
			i.gone = true
		}
		if w.service == nil && state == api.TaskState_ORPHANED {
			i.gone = true
		}
		if i.old == nil && i.GetDesiredState() > api.TaskState_COMPLETE { // made and dropped by this plan
			i.gone = true
		}
	}
	if w.service == nil {
		return
	}
	limit := w.historyLimit()
	if limit < 0 {
		return
	}
	for _, s := range w.slots(w.service.GetSpec().GetGlobal() != nil || w.service.GetSpec().GetGlobalJob() != nil) {
		w.trim(s, limit)
	}
}

// trim deletes the oldest tasks of a slot that have ended, down to the limit. The tasks that
// something hangs on stay (needed). What has not ended but the newest does not count, or
// attempts that failed beside an old task that still runs would be forgotten before they are
// as many as the restart policy allows.
func (w *work) trim(s *slot, limit int64) {
	newest := s.newest()
	if newest == nil {
		return
	}
	// A service's new restart policy is not that of the tasks it had, whose attempts count on.
	if most := newest.GetSpec().GetRestart().GetMaxAttempts(); most > 0 {
		limit = max(limit, keepFor(most))
	}
	excess := 1 - limit
	for _, i := range s.tasks {
		if i != newest && i.over() {
			excess++
		}
	}
	if excess <= 0 {
		return
	}
	needed := w.needed(s, newest)
	for _, i := range s.tasks {
		if excess <= 0 {
			return
		}
		if i.over() && !slices.Contains(needed, i) && !w.watched(i) {
			i.gone = true
			excess--
		}
	}
}

// needed returns tasks of a slot whose records decide about others: the newest, which says
// whether the slot is in use; those whose restart delay a task that is held back waits for;
// the attempts that the newest's restart policy counts; what completed a job.
func (w *work) needed(s *slot, newest *item) []*item {
	needed := []*item{newest}
	attempts := uint64(0)
	for _, i := range slices.Backward(s.tasks) {
		if i.live() && i.GetDesiredState() == api.TaskState_READY {
			needed = append(needed, s.before(i))
		}
		if sameRevision(i, newest) && attempts <= newest.GetSpec().GetRestart().GetMaxAttempts() {
			needed = append(needed, i)
			attempts++
		}
		if isJob(w.service) && completedTask(i) {
			needed = append(needed, i)
		}
	}
	return needed
}

// over reports whether a task has ended, or is to end and has not reached a node.
func (i *item) over() bool {
	unborn := i.GetStatus().GetState() < api.TaskState_ASSIGNED && i.GetDesiredState() > api.TaskState_COMPLETE
	return !i.gone && !i.live() && (i.stopped() || unborn)
}
