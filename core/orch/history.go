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
	}
	if w.service == nil || isJob(w.service) {
		return
	}
	limit := w.historyLimit()
	if limit < 0 {
		return
	}
	for _, s := range w.slots(w.service.GetSpec().GetGlobal() != nil) {
		w.trim(s, limit)
	}
}

// trim deletes the oldest tasks of a slot that have ended, down to the limit. The
// newest task says whether the slot is in use and stays; so do the failures that an
// update in progress counts.
func (w *work) trim(s *slot, limit int64) {
	excess := int64(len(s.tasks)) - limit
	newest := s.newest()
	for _, i := range s.tasks {
		if excess <= 0 {
			return
		}
		unborn := i.GetStatus().GetState() < api.TaskState_ASSIGNED && i.GetDesiredState() > api.TaskState_RUNNING
		if i.gone || i == newest || i.live() || !i.stopped() && !unborn || w.watched(i) {
			continue
		}
		i.gone = true
		excess--
	}
}
