package orch

import (
	"github.com/skep-dev/skep/api"
)

// defaultHistory is the number of tasks kept in each slot when the cluster does not say.
const defaultHistory = 5

// historyLimit returns how many tasks a slot keeps; negative means all.
func (w *work) historyLimit() int64 {
	if most := w.service.GetSpec().GetTask().GetRestart().GetMaxAttempts(); most > 0 {
		return int64(min(most, 1<<31)) + 1
	}
	if w.Cluster.GetSpec().GetOrchestration() == nil {
		return defaultHistory
	}
	return w.Cluster.GetSpec().GetOrchestration().GetTaskHistoryRetentionLimit()
}

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

// trim deletes the oldest tasks of a slot that have ended, down to the limit. The
// newest task says whether the slot is in use and stays; so do the one whose restart
// delay a task that is held back waits for, the failures that an update in progress
// counts, and the task that completed a job. What has not ended but
// the newest does not count, or attempts that failed beside an old task that still runs
// would be forgotten before they are as many as the restart policy allows.
func (w *work) trim(s *slot, limit int64) {
	newest, awaited := s.newest(), (*item)(nil)
	if newest != nil && newest.live() && newest.GetDesiredState() == api.TaskState_READY {
		awaited = s.before(newest)
	}
	excess := 1 - limit
	for _, i := range s.tasks {
		if i != newest && i.over() {
			excess++
		}
	}
	for _, i := range s.tasks {
		if excess <= 0 {
			return
		}
		if i == newest || i == awaited || !i.over() || w.watched(i) || isJob(w.service) && completedTask(i) {
			continue
		}
		i.gone = true
		excess--
	}
}

// over reports whether a task has ended, or is to end and has not reached a node.
func (i *item) over() bool {
	unborn := i.GetStatus().GetState() < api.TaskState_ASSIGNED && i.GetDesiredState() > api.TaskState_COMPLETE
	return !i.gone && !i.live() && (i.stopped() || unborn)
}
