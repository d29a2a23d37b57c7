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
		w.restartJob(s, "")
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
	for number := uint64(0); n > 0 && number < spec.GetTotalCompletions(); number++ {
		if used[number] {
			continue
		}
		w.create(number, "", api.TaskState_COMPLETE)
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
		case n.GetStatus().GetState() == api.NodeStatus_READY:
			w.restartJob(s, s.node)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(w.Nodes)) {
		n := w.Nodes[id]
		if !has[id] && n.GetStatus().GetState() == api.NodeStatus_READY &&
			n.GetSpec().GetAvailability() == api.NodeSpec_ACTIVE && model.MatchAll(constraints, n) {
			w.create(0, id, api.TaskState_COMPLETE)
		}
	}
}

func completedTask(i *item) bool { return i.GetStatus().GetState() == api.TaskState_COMPLETE }

func wantedJobTask(i *item) bool {
	return i.GetDesiredState() <= api.TaskState_COMPLETE && !completedTask(i)
}

// restartJob replaces the tasks of a slot that failed, and starts those held back.
func (w *work) restartJob(s *slot, nodeID string) {
	if slices.ContainsFunc(s.tasks, completedTask) {
		return
	}
	for _, i := range slices.Clone(s.tasks) {
		if !wantedJobTask(i) || !w.mustMove(i) && i.GetStatus().GetState() <= api.TaskState_COMPLETE {
			continue
		}
		if i.GetDesiredState() == api.TaskState_READY && i.stopped() && !w.startable(s, i) {
			continue
		}
		again := w.restartable(s, i)
		w.desire(i, api.TaskState_SHUTDOWN)
		if again && !slices.ContainsFunc(s.tasks, wantedJobTask) {
			s.tasks = append(s.tasks, w.create(s.number, nodeID, api.TaskState_READY))
		}
	}
	w.promote(s, api.TaskState_COMPLETE)
}
