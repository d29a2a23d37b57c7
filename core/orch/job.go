package orch

import (
	"maps"
	"slices"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// iteration parts the job's tasks: those of the current run stay, others are removed.
func (w *work) iteration(byNode bool) []*slot {
	want := w.service.GetJobStatus().GetJobIteration().GetIndex()
	for _, i := range w.tasks {
		if i.GetJobIteration().GetIndex() != want {
			w.desire(i, api.TaskState_REMOVE)
		}
	}
	return w.slots(byNode)
}

// replicatedJob decides for a service whose tasks are to complete a number of times.
func (w *work) replicatedJob() {
	spec := w.service.GetSpec().GetReplicatedJob()
	slots := w.iteration(false)
	var completed, running uint64
	used := make(map[uint64]bool, len(slots))
	for _, s := range slots {
		used[s.number] = true
		w.restartJob(s)
		switch {
		case slices.ContainsFunc(s.tasks, completedTask):
			completed++
		case slices.ContainsFunc(s.tasks, wantedJobTask):
			running++
		default:
			// The restart policy gave it up. It keeps its slot.
			w.note(w.ServiceID, "slot %d failed for good", s.number)
		}
	}
	most := spec.GetMaxConcurrent()
	if most == 0 {
		most = 1
	}
	if running >= most || completed+running >= spec.GetTotalCompletions() {
		return
	}
	n := min(most-running, spec.GetTotalCompletions()-completed-running)
	made := 0
	for number := uint64(0); n > 0 && number < spec.GetTotalCompletions(); number++ {
		if used[number] {
			continue
		}
		if w.Limit > 0 && made >= w.Limit {
			w.due(w.now.Add(1))
			return
		}
		w.startJob(&slot{number: number})
		made++
		n--
	}
}

// globalJob decides for a service that is to complete once on every node.
func (w *work) globalJob() {
	constraints, err := model.ParseConstraints(w.service.GetSpec().GetTask().GetPlacement().GetConstraints())
	if err != nil {
		w.note(w.ServiceID, "%v", err)
		return
	}
	has := make(map[string]bool)
	for _, s := range w.iteration(true) {
		has[s.node] = true
		n := w.Nodes[s.node]
		switch {
		case n == nil:
			w.drop(s)
		case n.GetSpec().GetAvailability() == api.NodeSpec_DRAIN || !model.MatchAll(constraints, n):
			for _, i := range s.tasks {
				if !i.stopped() {
					w.desire(i, api.TaskState_SHUTDOWN)
				}
			}
		case takesJobs(n):
			w.restartJob(s)
			// Told to stop (the node was drained, say) is no reason to stay away.
			if !slices.ContainsFunc(s.tasks, wantedJobTask) && !s.newest().endedItself() {
				w.startJob(s)
			}
		}
	}
	for _, id := range slices.Sorted(maps.Keys(w.Nodes)) {
		if n := w.Nodes[id]; !has[id] && takesJobs(n) && model.MatchAll(constraints, n) {
			w.startJob(&slot{node: id})
		}
	}
}

func takesJobs(n *api.Node) bool {
	return n.GetStatus().GetState() == api.NodeStatus_READY && n.GetSpec().GetAvailability() == api.NodeSpec_ACTIVE
}

// startJob adds a task to a slot and starts it when nothing has to be waited for.
func (w *work) startJob(s *slot) {
	w.create(s)
	w.promote(s, api.TaskState_COMPLETE)
}

func completedTask(i *item) bool { return i.GetStatus().GetState() == api.TaskState_COMPLETE }

func wantedJobTask(i *item) bool {
	return i.GetDesiredState() <= api.TaskState_COMPLETE && !completedTask(i)
}

// restartJob replaces the tasks of a slot that failed, and starts those held back. Once
// one has completed, others that are at the same work (their node was lost, say, and came
// back) may stop.
func (w *work) restartJob(s *slot) {
	if slices.ContainsFunc(s.tasks, completedTask) {
		for _, i := range s.tasks {
			if !i.stopped() {
				w.desire(i, api.TaskState_SHUTDOWN)
			}
		}
		return
	}
	for _, i := range s.tasks {
		if !wantedJobTask(i) || !w.mustMove(i) {
			continue
		}
		if i.GetDesiredState() == api.TaskState_READY && i.stopped() && !w.startable(s, i) {
			continue
		}
		w.desire(i, api.TaskState_SHUTDOWN)
	}
	// Also when an earlier plan told the last one to stop, and was cut short after that.
	if newest := s.newest(); !slices.ContainsFunc(s.tasks, wantedJobTask) && w.restartable(s, newest) {
		w.create(s)
	}
	w.promote(s, api.TaskState_COMPLETE)
}
