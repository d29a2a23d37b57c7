package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/moby/moby/api/types/container"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/lifecycle"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

// retryAfter is the pause after an error that may pass.
const retryAfter = time.Second

// managed is one task of this node. Its loop, run, steps it; others may only update or
// remove it.
type managed struct {
	w    *worker
	id   string
	log  *slog.Logger
	wake chan struct{} // has a value when task or removed changed

	mu      sync.Mutex
	task    *api.Task // replaced, never changed, but for Status which run replaces
	removed bool
	// cancel ends the running operation.
	cancel context.CancelFunc
}

func stamp(t time.Time) *timestamppb.Timestamp { return timestamppb.New(t) }

func (m *managed) status() *api.TaskStatus {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.task.GetStatus()
}

func (m *managed) current() (task *api.Task, removed bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.task, m.removed
}

// update takes a newer assignment over. Only the desired state can change a task that
// exists; a container is never changed.
func (m *managed) update(task *api.Task) {
	m.mu.Lock()
	known := m.task
	if !lifecycle.Replaces(known, task) || task.GetDesiredState() == known.GetDesiredState() {
		m.mu.Unlock()
		return
	}
	next := shallowTask(known)
	next.DesiredState = task.GetDesiredState()
	m.task = next
	cancel := m.cancel
	m.mu.Unlock()
	if err := m.w.db.put(next); err != nil {
		m.log.Error("task not stored", slog.Any("error", err))
	}
	m.interrupt(cancel)
}

// remove has the container removed and the task forgotten.
func (m *managed) remove() {
	m.mu.Lock()
	m.removed = true
	cancel := m.cancel
	m.mu.Unlock()
	m.interrupt(cancel)
}

func (m *managed) interrupt(cancel context.CancelFunc) {
	select {
	case m.wake <- struct{}{}:
	default:
	}
	if cancel != nil {
		cancel()
	}
}

func shallowTask(t *api.Task) *api.Task {
	c := new(api.Task)
	proto.Merge(c, t)
	return c
}

// run steps the task until ctx ends or the task is removed.
func (m *managed) run(ctx context.Context) {
	for ctx.Err() == nil {
		task, removed := m.current()
		if removed {
			if m.dispose(ctx) {
				return
			}
			continue
		}
		action := lifecycle.Next(task.GetDesiredState(), task.GetStatus().GetState())
		if action == lifecycle.Rest {
			select {
			case <-ctx.Done():
				return
			case <-m.wake:
			}
			continue
		}
		op, cancel := context.WithCancel(ctx)
		m.mu.Lock()
		m.cancel = cancel
		stale := m.task != task || m.removed
		m.mu.Unlock()
		if stale {
			cancel()
			continue
		}
		status, err := m.do(op, task, action)
		cancelled := op.Err() != nil
		cancel()
		m.apply(ctx, task, status, err, cancelled)
	}
}

// apply makes the outcome of an action the task's status.
func (m *managed) apply(ctx context.Context, task *api.Task, status *api.TaskStatus, err error, cancelled bool) {
	switch {
	case err == nil && status == nil:
		return
	case err != nil && (cancelled || ctx.Err() != nil):
		return // what is wanted has changed: decide anew
	case err != nil && temporary(err):
		m.log.Warn("task action failed, trying again", slog.Any("error", err))
		if now := task.GetStatus(); now.GetState() < api.TaskState_RUNNING && now.GetErr() != err.Error() {
			status = newStatus(now, now.GetState(), time.Now())
			status.Err = err.Error()
			m.record(status)
		}
		select {
		case <-ctx.Done():
		case <-m.wake:
		case <-time.After(retryAfter):
		}
		return
	case err != nil:
		now := task.GetStatus()
		status = newStatus(now, lifecycle.Failed(now.GetState()), time.Now())
		status.Message, status.Err = lifecycle.Message(now.GetState()), err.Error()
		m.log.Warn("task failed", slog.String("state", model.StateName(status.GetState())), slog.Any("error", err))
	}
	m.record(status)
}

// record makes status the task's and reports it.
func (m *managed) record(status *api.TaskStatus) {
	m.mu.Lock()
	next := shallowTask(m.task)
	next.Status = status
	m.task = next
	m.mu.Unlock()
	m.w.report(m.id, status)
}

// temporary reports whether an error may pass by itself.
func temporary(err error) bool {
	return model.KindOf(err) == model.Unavailable || errors.Is(err, context.DeadlineExceeded)
}

// do performs one action and returns the new status; nil for none.
func (m *managed) do(ctx context.Context, task *api.Task, action lifecycle.Action) (*api.TaskStatus, error) {
	now := task.GetStatus()
	switch action { //nolint:exhaustive // the rest follows
	case lifecycle.Accept:
		return newStatus(now, api.TaskState_ACCEPTED, time.Now()), nil
	case lifecycle.BeginPrepare:
		return newStatus(now, api.TaskState_PREPARING, time.Now()), nil
	case lifecycle.BeginStart:
		return newStatus(now, api.TaskState_STARTING, time.Now()), nil
	case lifecycle.Rest:
		return nil, nil //nolint:nilnil // nothing to do
	}
	if task.GetSpec().GetAttachment() != nil {
		return m.doAttachment(ctx, task, action)
	}
	switch action {
	case lifecycle.Prepare:
		return m.prepare(ctx, task)
	case lifecycle.Start:
		return m.start(ctx, task)
	case lifecycle.Observe:
		return m.observe(ctx, task)
	case lifecycle.Stop:
		return m.stop(ctx, task)
	default:
		return nil, fmt.Errorf("unknown action %d", action)
	}
}

// slot waits for one of the places for starting tasks.
func (m *managed) slot(ctx context.Context, slots chan struct{}) (release func(), err error) {
	select {
	case slots <- struct{}{}:
		return func() { <-slots }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// find returns the task's container, nil if there is none.
func (m *managed) find(ctx context.Context, task *api.Task) (*container.InspectResponse, error) {
	id := task.GetStatus().GetContainer().GetContainerId()
	if id == "" {
		id = model.TaskName(task)
	}
	c, err := m.w.cfg.Engine.Inspect(ctx, id)
	if model.KindOf(err) == model.NotFound {
		return nil, nil //nolint:nilnil // nil is the answer "none"
	}
	return c, err
}

func (m *managed) prepare(ctx context.Context, task *api.Task) (*api.TaskStatus, error) {
	if err := m.w.checkOverlays(ctx, task); err != nil {
		return nil, err
	}
	release, err := m.slot(ctx, m.w.starting)
	if err != nil {
		return nil, err
	}
	defer release()
	c, err := m.find(ctx, task)
	if err != nil {
		return nil, err
	}
	var id string
	if c != nil {
		id = c.ID
	} else {
		opts, err := m.w.convert(task)
		if err != nil {
			return nil, err
		}
		if err := pull(ctx, m.w.cfg.Engine, task.GetSpec().GetContainer(), m.log); err != nil {
			return nil, err
		}
		var warnings []string
		if id, warnings, err = m.w.cfg.Engine.Create(ctx, *opts); err != nil {
			return nil, err
		}
		for _, w := range warnings {
			m.log.Warn("container created with a warning", slog.String("warning", w))
		}
	}
	s := newStatus(task.GetStatus(), api.TaskState_READY, time.Now())
	s.RuntimeStatus = &api.TaskStatus_Container{Container: &api.ContainerStatus{ContainerId: id}}
	return s, nil
}

func (m *managed) start(ctx context.Context, task *api.Task) (*api.TaskStatus, error) {
	c, err := m.find(ctx, task)
	if err != nil {
		return nil, err
	}
	if c == nil {
		return nil, errors.New("the task's container is gone")
	}
	if c.State.Status == container.StateCreated {
		release, err := m.slot(ctx, m.w.starting)
		if err != nil {
			return nil, err
		}
		err = m.w.cfg.Engine.Start(ctx, c.ID)
		release()
		if err != nil && !errors.Is(err, runtime.ErrNotModified) {
			return nil, fmt.Errorf("starting container failed: %w", err)
		}
	}
	if c, err = m.up(ctx, task, c.ID); err != nil {
		return nil, err
	}
	if !c.State.Running {
		return m.ended(task, c)
	}
	s := newStatus(task.GetStatus(), api.TaskState_RUNNING, time.Now())
	s.RuntimeStatus = containerStatus(c)
	s.PortStatus = portStatus(task, c)
	return s, nil
}

// up waits until a container is healthy, if it can tell, else until it listens where others
// are led to it, or has ended.
func (m *managed) up(ctx context.Context, task *api.Task, id string) (*container.InspectResponse, error) {
	exit, err := m.w.cfg.Engine.Wait(ctx, id, container.WaitConditionNotRunning)
	if err != nil {
		return nil, err
	}
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		c, err := m.w.cfg.Engine.Inspect(ctx, id)
		if err != nil {
			return nil, err
		}
		switch {
		case c.State.Running && (c.State.Health == nil || c.State.Health.Status == container.NoHealthcheck):
			return m.listening(ctx, task, c, exit)
		case !c.State.Running, c.State.Health.Status == container.Healthy:
			return c, nil
		case c.State.Health.Status == container.Unhealthy:
			return m.killUnhealthy(ctx, id)
		}
		select {
		case <-exit:
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(wait):
		}
	}
}

// killUnhealthy ends a container that failed its health check.
func (m *managed) killUnhealthy(ctx context.Context, id string) (*container.InspectResponse, error) {
	if err := m.w.cfg.Engine.Stop(ctx, id, "", nil); err != nil && !errors.Is(err, runtime.ErrNotModified) {
		return nil, err
	}
	return m.w.cfg.Engine.Inspect(ctx, id)
}

// observe waits for the end of the container.
func (m *managed) observe(ctx context.Context, task *api.Task) (*api.TaskStatus, error) {
	c, err := m.find(ctx, task)
	if err != nil {
		return nil, err
	}
	if c == nil {
		return nil, errors.New("the task's container is gone")
	}
	if c.State.Running {
		exit, err := m.w.cfg.Engine.Wait(ctx, c.ID, container.WaitConditionNotRunning)
		if err != nil {
			return nil, err
		}
		if err := m.watch(ctx, c, exit); err != nil {
			return nil, err
		}
		if c, err = m.w.cfg.Engine.Inspect(ctx, c.ID); err != nil {
			return nil, err
		}
		if c.State.Running {
			return nil, model.Errorf(model.Unavailable, "container %s was waited for but runs", c.ID)
		}
	}
	return m.ended(task, c)
}

// watch returns when the container has ended; an unhealthy one is stopped.
func (m *managed) watch(ctx context.Context, c *container.InspectResponse, exit <-chan runtime.WaitResult) error {
	if c.State.Health == nil {
		select {
		case <-exit:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-exit:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
			now, err := m.w.cfg.Engine.Inspect(ctx, c.ID)
			if err != nil {
				return err
			}
			if now.State.Health != nil && now.State.Health.Status == container.Unhealthy {
				_, err := m.killUnhealthy(ctx, c.ID)
				return err
			}
		}
	}
}

// ended returns the status of a task whose container ended by itself.
func (m *managed) ended(task *api.Task, c *container.InspectResponse) (*api.TaskStatus, error) {
	unhealthy := c.State.Health != nil && c.State.Health.Status == container.Unhealthy
	state, text := lifecycle.Ended(c.State.ExitCode, unhealthy)
	if c.State.Error != "" && c.State.ExitCode != 0 && !unhealthy {
		text = "starting container failed: " + c.State.Error
	}
	s := newStatus(task.GetStatus(), state, time.Now())
	s.Err = text
	s.RuntimeStatus = containerStatus(c)
	return s, nil
}

// stop ends the container by its signal and grace period.
func (m *managed) stop(ctx context.Context, task *api.Task) (*api.TaskStatus, error) {
	c, err := m.find(ctx, task)
	if err != nil {
		return nil, err
	}
	s := newStatus(task.GetStatus(), api.TaskState_SHUTDOWN, time.Now())
	if c == nil {
		return s, nil
	}
	if c.State.Running {
		m.w.awaitWithdrawal(ctx, task)
		if err := m.w.cfg.Engine.Stop(ctx, c.ID, "", nil); err != nil && !errors.Is(err, runtime.ErrNotModified) {
			return nil, model.Wrap(model.Unavailable, err, "stop container")
		}
		if c, err = m.w.cfg.Engine.Inspect(ctx, c.ID); err != nil {
			return nil, err
		}
	}
	s.RuntimeStatus = containerStatus(c)
	return s, nil
}

// dispose removes the container and forgets the task. It reports whether that is done.
func (m *managed) dispose(ctx context.Context) bool {
	release, err := m.slot(ctx, m.w.removing)
	if err != nil {
		return false
	}
	defer release()
	task, _ := m.current()
	if task.GetSpec().GetAttachment() != nil {
		m.lose(ctx, task)
		m.w.finished(m.id)
		return true
	}
	c, err := m.find(ctx, task)
	if err == nil && c != nil {
		if c.State.Running {
			if err = m.w.cfg.Engine.Stop(ctx, c.ID, "", nil); errors.Is(err, runtime.ErrNotModified) {
				err = nil
			}
		}
		if err == nil {
			err = m.w.cfg.Engine.Remove(ctx, c.ID, true, true)
		}
	}
	if err != nil && model.KindOf(err) != model.NotFound {
		if ctx.Err() == nil {
			m.log.Warn("container not removed, trying again", slog.Any("error", err))
			select {
			case <-ctx.Done():
			case <-time.After(retryAfter):
			}
		}
		return false
	}
	m.w.finished(m.id)
	return true
}

func containerStatus(c *container.InspectResponse) *api.TaskStatus_Container {
	return &api.TaskStatus_Container{Container: &api.ContainerStatus{
		ContainerId: c.ID, Pid: int32(c.State.Pid), ExitCode: int32(c.State.ExitCode),
	}}
}
