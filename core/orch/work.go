package orch

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// item is one task while a plan is being made: as it is now, and as it was.
type item struct {
	*api.Task
	old *api.Task // nil for a task that the plan creates
	// gone is set when the plan deletes the record.
	gone bool
	// compared is what the task was last compared with, and differs the outcome: a decision
	// asks for it several times.
	compared comparison
	differs  bool
}

// comparison is what the outcome of comparing a task with its service depends on and may
// change in the course of a decision.
type comparison struct {
	spec    *api.ServiceSpec
	desired api.TaskState
}

// live reports whether the task is meant to run, now or soon.
func (i *item) live() bool { return !i.gone && i.GetDesiredState() <= api.TaskState_RUNNING }

// stopped reports whether the task has ended.
func (i *item) stopped() bool { return model.Terminal(i.GetStatus().GetState()) }

// mayRun reports whether a node has the task and has not said that it ended.
func (i *item) mayRun() bool {
	return !i.gone && !i.stopped() && i.GetStatus().GetState() >= api.TaskState_ASSIGNED
}

// endedItself reports whether the task ended without being told to.
func (i *item) endedItself() bool {
	switch i.GetStatus().GetState() {
	case api.TaskState_COMPLETE, api.TaskState_FAILED, api.TaskState_REJECTED:
		return true
	default:
		return false
	}
}

// work is a plan in the making.
type work struct {
	View
	now     time.Time
	service *api.Service // edited copy once touched
	touched bool
	tasks   []*item // oldest first
	// leaving are tasks to be removed that may still run, by the place they had.
	leaving map[place][]*item
	wake    time.Time
	notes   []model.Note
}

func newWork(v View, now time.Time) *work {
	w := &work{View: v, now: now, service: v.Service}
	w.reset()
	return w
}

// reset forgets what was decided about tasks, but not about the service.
func (w *work) reset() {
	w.tasks = make([]*item, 0, len(w.Tasks))
	w.wake, w.notes = time.Time{}, nil
	for _, t := range w.Tasks {
		w.tasks = append(w.tasks, &item{Task: t, old: t})
	}
	slices.SortFunc(w.tasks, func(a, b *item) int {
		return cmp.Or(
			created(a.Task).Compare(created(b.Task)),
			// At one instant: what is to end was there before what takes its place.
			cmp.Compare(b.GetDesiredState(), a.GetDesiredState()),
			cmp.Compare(a.GetId(), b.GetId()),
		)
	})
}

// created returns when the task was made.
func created(t *api.Task) time.Time {
	if at := t.GetMeta().GetCreatedAt(); at != nil {
		return at.AsTime()
	}
	return time.Time{}
}

// changed returns when the task got its observed state, by the leader's clock if known.
func changed(t *api.Task) time.Time {
	if at := t.GetStatus().GetAppliedAt(); at != nil {
		return at.AsTime()
	}
	if at := t.GetStatus().GetTimestamp(); at != nil {
		return at.AsTime()
	}
	return created(t)
}

// due reports whether an instant has come; if not, the plan wakes then.
func (w *work) due(at time.Time) bool {
	if at.After(w.now) {
		w.wake = model.Earlier(w.wake, at)
		return false
	}
	return true
}

func (w *work) note(subject, format string, args ...any) {
	w.notes = append(w.notes, model.Note{Subject: subject, Text: fmt.Sprintf(format, args...)})
}

// desire moves the desired state of a task up; it never goes down.
func (w *work) desire(i *item, to api.TaskState) {
	if i.gone || i.GetDesiredState() >= to {
		return
	}
	w.edit(i).DesiredState = to
}

// edit returns the task of an item for changing.
func (w *work) edit(i *item) *api.Task {
	if i.Task == i.old {
		i.Task = model.Clone(i.old)
	}
	return i.Task
}

// editService returns the service for changing.
func (w *work) editService() *api.Service {
	if !w.touched {
		w.service, w.touched = model.Clone(w.service), true
	}
	return w.service
}

// create adds a task to a slot. It is held back: promote starts it, in the same plan
// unless something has to be waited for.
func (w *work) create(s *slot) {
	i := &item{Task: NewTask(w.service, w.Cluster, s.number, s.node, api.TaskState_READY, w.NewID(), w.now)}
	w.tasks = append(w.tasks, i)
	s.tasks = append(s.tasks, i)
}

// NewTask makes a task of a service as it is now: in a slot, or for the global modes
// on a node.
func NewTask(s *api.Service, c *api.Cluster, slot uint64, nodeID string, desired api.TaskState, id string, now time.Time) *api.Task {
	stamp := timestamppb.New(now)
	t := &api.Task{
		Id:                 id,
		Meta:               &api.Meta{CreatedAt: stamp, UpdatedAt: stamp},
		ServiceAnnotations: model.Clone(s.GetSpec().GetAnnotations()),
		Spec:               model.Clone(s.GetSpec().GetTask()),
		SpecVersion:        model.Clone(s.GetSpecVersion()),
		ServiceId:          s.GetId(),
		Slot:               slot,
		NodeId:             nodeID,
		Status: &api.TaskStatus{
			State:     api.TaskState_NEW,
			Timestamp: stamp,
			Message:   "created",
		},
		Endpoint:     &api.Endpoint{},
		DesiredState: desired,
	}
	if t.Spec == nil {
		t.Spec = &api.TaskSpec{}
	}
	if e := s.GetSpec().GetEndpoint(); e != nil {
		t.Endpoint.Spec = model.Clone(e)
	}
	switch {
	case t.Spec.GetLogDriver() != nil:
		t.LogDriver = model.Clone(t.Spec.GetLogDriver())
	case c.GetSpec().GetTaskDefaults().GetLogDriver() != nil:
		t.LogDriver = model.Clone(c.GetSpec().GetTaskDefaults().GetLogDriver())
	}
	if isJob(s) {
		t.JobIteration = &api.Version{Index: s.GetJobStatus().GetJobIteration().GetIndex()}
	}
	return t
}

func isJob(s *api.Service) bool {
	return s.GetSpec().GetReplicatedJob() != nil || s.GetSpec().GetGlobalJob() != nil
}

// removeAll is for a service that is gone.
func (w *work) removeAll() {
	for _, i := range w.tasks {
		w.desire(i, api.TaskState_REMOVE)
	}
}

// plan lists what differs from the view: the service first, since it says what the
// other changes are for, then tasks, oldest first.
func (w *work) plan() model.Plan {
	p := model.Plan{Wake: w.wake, Notes: w.notes}
	if w.touched {
		p.Changes = append(p.Changes, model.Change{Kind: model.Update, Object: w.service})
	}
	for _, i := range w.tasks {
		if w.Limit > 0 && len(p.Changes) >= w.Limit {
			p.Wake = w.now.Add(1)
			break
		}
		switch {
		case i.gone && i.old == nil:
		case i.gone:
			p.Changes = append(p.Changes, model.Change{Kind: model.Remove, Object: i.old})
		case i.old == nil:
			p.Changes = append(p.Changes, model.Change{Kind: model.Create, Object: i.Task})
		case i.Task != i.old:
			p.Changes = append(p.Changes, model.Change{Kind: model.Update, Object: i.Task})
		}
	}
	return p
}
