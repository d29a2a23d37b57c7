package orch

import (
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

const (
	defaultMonitor = 5 * time.Second
	// monitorMargin lengthens a monitor that would end before the next step begins.
	monitorMargin = time.Second
)

// update brings the tasks in slots to the service's current revision, some at a time,
// and keeps the service's update status. Everything it needs to go on is in the store:
// the tasks of the new revision, made since the update began, say how far it has come.
// It reports whether it rolled the service's spec back, so that all is to be decided anew.
func (w *work) update(slots []*slot) (rolledBack bool) {
	var dirty []*slot
	if !w.paused() {
		dirty = w.begin(slots)
	}
	if w.updating() && w.judge(slots, len(dirty)) {
		return true
	}
	if w.paused() {
		w.note(w.ServiceID, "%s", w.service.GetUpdateStatus().GetMessage())
		w.halt(slots)
		return false
	}
	if len(dirty) > 0 {
		w.advance(slots, dirty)
	}
	// What was left to do may have been to stop an old task beside one that runs.
	if w.updating() && !slices.ContainsFunc(dirty, w.slotDirty) {
		w.complete(slots)
	}
	return false
}

// begin returns the slots that have something to replace, and says that an update runs if
// there are some.
func (w *work) begin(slots []*slot) []*slot {
	var dirty []*slot
	for _, s := range slots {
		switch {
		case !w.outdated(s):
		case w.exhausted(s):
			w.note(w.ServiceID, "slot %d keeps its old task: the restart policy allows no further attempt at a new one", s.number)
		default:
			dirty = append(dirty, s)
		}
	}
	if len(dirty) > 0 && w.service.GetUpdateStatus() == nil {
		w.editService().UpdateStatus = &api.UpdateStatus{
			State:     api.UpdateStatus_UPDATING,
			StartedAt: timestamppb.New(w.now),
			Message:   "update in progress",
		}
	}
	return dirty
}

// halt sees to it that a paused update leaves no slot with two tasks: where the new one was
// to start first, the old one goes once it has, as it would have.
func (w *work) halt(slots []*slot) {
	for _, s := range slots {
		if len(s.live()) < 2 {
			continue
		}
		keep := w.keeper(s)
		if keep == nil {
			keep = s.serving()
		}
		if keep != nil {
			w.settle(s, keep)
		}
	}
}

func (w *work) paused() bool {
	state := w.service.GetUpdateStatus().GetState()
	return state == api.UpdateStatus_PAUSED || state == api.UpdateStatus_ROLLBACK_PAUSED
}

// updating reports whether an update or rollback runs.
func (w *work) updating() bool {
	state := w.service.GetUpdateStatus().GetState()
	return state == api.UpdateStatus_UPDATING || state == api.UpdateStatus_ROLLBACK_STARTED
}

// config returns the settings that apply now.
func (w *work) config() *api.UpdateConfig {
	c := w.service.GetSpec().GetUpdate()
	if state := w.service.GetUpdateStatus().GetState(); state == api.UpdateStatus_ROLLBACK_STARTED || state == api.UpdateStatus_ROLLBACK_PAUSED {
		c = w.service.GetSpec().GetRollback()
	}
	if c == nil {
		return &api.UpdateConfig{Parallelism: 1}
	}
	return c
}

// monitor returns how long a task must run to count as a success.
func (w *work) monitor() time.Duration {
	m, delay := defaultMonitor, w.config().GetDelay().AsDuration()
	if d := w.config().GetMonitor(); d != nil {
		m = d.AsDuration()
	}
	if delay >= m {
		return delay + monitorMargin
	}
	return m
}

// startFirst reports whether a slot's new task starts before the old one stops. Where
// two must never run, it does not, whatever the settings say.
func (w *work) startFirst() bool {
	return w.config().GetOrder() == api.UpdateConfig_START_FIRST && !fenced(w.service)
}

// slotDirty reports whether a slot has something to replace, and may.
func (w *work) slotDirty(s *slot) bool { return w.outdated(s) && !w.exhausted(s) }

// outdated reports whether a slot has not just one task of the wanted revision.
func (w *work) outdated(s *slot) bool {
	current := s.current()
	return len(current) > 1 || len(current) == 1 && w.dirty(current[0])
}

// exhausted reports whether a slot's old task stays, as the new one, that was to start
// first, failed as often as the restart policy allows.
func (w *work) exhausted(s *slot) bool {
	newest := s.newest()
	return len(s.live()) > 0 && w.keeper(s) == nil && w.ours(newest) && newest.stopped() &&
		!completedTask(newest) && !w.restartable(s, newest)
}

// current returns the tasks that an update looks at: those meant to run, or the last
// one in a slot that has finished.
func (s *slot) current() []*item {
	if live := s.live(); len(live) > 0 {
		return live
	}
	if newest := s.newest(); newest != nil {
		return []*item{newest}
	}
	return nil
}

// ours reports whether a task was made by the update that runs.
func (w *work) ours(i *item) bool {
	u := w.service.GetUpdateStatus()
	return i.GetSpecVersion().GetIndex() == w.service.GetSpecVersion().GetIndex() &&
		!created(i.Task).Before(u.GetStartedAt().AsTime())
}

// watched reports whether a running update still counts this task's failure.
func (w *work) watched(i *item) bool {
	return w.service != nil && w.updating() && w.ours(i) && w.failed(i) &&
		w.config().GetFailureAction() != api.UpdateConfig_CONTINUE
}

// failed reports whether a task of the update ended before it had run for the monitor.
func (w *work) failed(i *item) bool {
	switch i.GetStatus().GetState() {
	case api.TaskState_FAILED, api.TaskState_REJECTED, api.TaskState_COMPLETE:
	default:
		return false
	}
	end := changed(i.Task)
	if since, ok := w.RanSince[i.GetId()]; ok {
		return end.Sub(since) <= w.monitor()
	}
	// Nobody saw it run. One that was replaced already was judged when that was done.
	handled := i.old != nil && i.old.GetDesiredState() > api.TaskState_RUNNING
	return !handled || end.Sub(created(i.Task)) <= w.monitor()
}

// finished reports whether a slot's new task started first and has completed, and that
// is all the restart policy wants of it.
func (w *work) finished(s *slot) bool {
	newest := s.newest()
	return w.ours(newest) && completedTask(newest) && !w.restartable(s, newest)
}

// judge acts on failures of the update: it may pause it or roll it back. It reports
// whether the service's spec changed.
func (w *work) judge(slots []*slot, dirty int) (rolledBack bool) {
	config := w.config()
	if config.GetFailureAction() == api.UpdateConfig_CONTINUE {
		return false
	}
	var failures int
	var culprit *item
	total := dirty
	for _, s := range slots {
		mine := false
		for _, i := range s.tasks {
			if !w.ours(i) {
				continue
			}
			mine = true
			if w.failed(i) {
				failures++
				culprit = i
			}
		}
		if mine && !w.slotDirty(s) {
			total++
		}
	}
	if failures == 0 || float32(failures)/float32(max(total, 1)) <= config.GetMaxFailureRatio() {
		return false
	}
	rollback := w.service.GetUpdateStatus().GetState() == api.UpdateStatus_ROLLBACK_STARTED
	s := w.editService()
	reason := "due to failure or early termination of task " + culprit.GetId()
	switch {
	case rollback:
		s.UpdateStatus.State = api.UpdateStatus_ROLLBACK_PAUSED
		s.UpdateStatus.Message = "rollback paused " + reason
	case config.GetFailureAction() == api.UpdateConfig_ROLLBACK && s.GetPreviousSpec() != nil:
		s.UpdateStatus.State = api.UpdateStatus_ROLLBACK_STARTED
		s.UpdateStatus.Message = "update rolled back " + reason
		s.Spec, s.SpecVersion = s.PreviousSpec, s.PreviousSpecVersion
		s.PreviousSpec, s.PreviousSpecVersion = nil, nil
		if s.SpecVersion == nil {
			s.SpecVersion = &api.Version{}
		}
		return true
	default:
		s.UpdateStatus.State = api.UpdateStatus_PAUSED
		s.UpdateStatus.Message = "update paused " + reason
	}
	return false
}

// advance works on dirty slots, as many as the parallelism allows.
func (w *work) advance(slots, dirty []*slot) {
	config := w.config()
	free := len(slots)
	if p := config.GetParallelism(); p > 0 && p < uint64(free) {
		free = int(p)
	}
	for _, s := range slots {
		if w.busy(s) {
			free--
		}
	}
	for _, s := range dirty {
		if keep := w.keeper(s); keep != nil {
			w.settle(s, keep)
			continue
		}
		done := w.finished(s)
		// Another attempt, beside an old task that still runs, is part of what is under way.
		again := slices.ContainsFunc(s.tasks, w.ours)
		if free <= 0 && !done && !again {
			continue
		}
		serving := s.serving()
		for _, i := range s.live() {
			if done || !w.startFirst() || i != serving {
				w.desire(i, api.TaskState_SHUTDOWN)
			}
		}
		if !done {
			w.create(s)
		}
		if !done && !again {
			free--
		}
	}
}

// serving returns the live task of a slot that has come furthest. A new one that starts
// first has only that one beside it, and no leftovers of updates that were overtaken.
func (s *slot) serving() *item {
	var best *item
	for _, i := range s.live() {
		if state := i.GetStatus().GetState(); state <= api.TaskState_RUNNING &&
			(best == nil || state > best.GetStatus().GetState()) {
			best = i
		}
	}
	return best
}

// busy reports whether a slot's update is under way: its new task has neither started
// nor failed yet, or did so less than the delay ago.
func (w *work) busy(s *slot) bool {
	var mine, arrived bool
	var at time.Time
	for _, i := range s.tasks {
		if !w.ours(i) {
			continue
		}
		mine = true
		if i.GetStatus().GetState() >= api.TaskState_RUNNING {
			arrived = true
			at = model.Earlier(at, changed(i.Task))
		}
	}
	if !mine {
		return false
	}
	return !arrived || !w.due(at.Add(w.config().GetDelay().AsDuration()))
}

// keeper returns the task of the wanted revision that a slot is to keep, if any.
func (w *work) keeper(s *slot) *item {
	var keep *item
	for _, i := range s.live() {
		if w.dirty(i) {
			continue
		}
		if keep == nil || i.GetDesiredState() >= keep.GetDesiredState() {
			keep = i
		}
	}
	return keep
}

// settle stops the other tasks of a slot. Those of an older revision run on until the
// new one does, if that is the order asked for.
func (w *work) settle(s *slot, keep *item) {
	for _, i := range s.live() {
		if i == keep || w.startFirst() && w.dirty(i) && keep.GetStatus().GetState() != api.TaskState_RUNNING {
			continue
		}
		w.desire(i, api.TaskState_SHUTDOWN)
	}
}

// complete ends an update once its last tasks have started and run for the monitor.
func (w *work) complete(slots []*slot) {
	monitor := w.monitor()
	for _, s := range slots {
		if w.busy(s) {
			return
		}
		for _, i := range s.live() {
			if !w.ours(i) || i.GetStatus().GetState() != api.TaskState_RUNNING {
				continue
			}
			if !w.due(changed(i.Task).Add(monitor)) {
				return
			}
		}
	}
	s := w.editService()
	s.UpdateStatus.CompletedAt = timestamppb.New(w.now)
	if s.UpdateStatus.State == api.UpdateStatus_ROLLBACK_STARTED {
		s.UpdateStatus.State = api.UpdateStatus_ROLLBACK_COMPLETED
		s.UpdateStatus.Message = "rollback completed"
		return
	}
	s.UpdateStatus.State = api.UpdateStatus_COMPLETED
	s.UpdateStatus.Message = "update completed"
}
