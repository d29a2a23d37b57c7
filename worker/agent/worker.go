package agent

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/lifecycle"
	"github.com/skep-dev/skep/core/model"
)

const (
	// startsAtOnce bounds the tasks that are prepared or started at one time; others wait.
	startsAtOnce = 8
	// stopsAtOnce bounds the removals at one time.
	stopsAtOnce = 16
)

// worker holds the tasks of this node.
type worker struct {
	cfg      *Config
	db       *database
	starting chan struct{}
	removing chan struct{}
	// dirty has a value when there are statuses to report.
	dirty chan struct{}
	group sync.WaitGroup
	// start runs a task's loop for as long as the agent runs: tasks outlive sessions.
	start func(*managed)
	// detach gives an attachment back to the managers.
	detach func(context.Context, *api.Task) error

	mu      sync.Mutex
	tasks   map[string]*managed
	secrets map[string]*api.Secret
	configs map[string]*api.Config
	// complete is set once this process knows all secrets and configs of its tasks.
	complete bool
	reports  map[string]*api.TaskStatus // not yet sent, the latest of each task
	// withdrawn says since when no node of Skep's leads connections to a task any longer.
	withdrawn map[string]time.Time
	engines   bool // whether the swarm has Docker Engines
	overlays  overlays
	changed   chan struct{} // closed and replaced when a task came, went, started or was withdrawn, and with overlays
}

// newWorker returns a worker whose tasks' loops end with ctx.
func newWorker(ctx context.Context, cfg *Config, db *database) *worker {
	w := &worker{
		cfg: cfg, db: db,
		starting: make(chan struct{}, startsAtOnce),
		removing: make(chan struct{}, stopsAtOnce),
		dirty:    make(chan struct{}, 1),
		tasks:    map[string]*managed{},
		secrets:  map[string]*api.Secret{},
		configs:  map[string]*api.Config{},
		reports:  map[string]*api.TaskStatus{},
		changed:  make(chan struct{}),

		withdrawn: map[string]time.Time{},
	}
	w.start = func(m *managed) { w.group.Go(func() { m.run(ctx) }) }
	return w
}

// wait returns when all loops have ended.
func (w *worker) wait() { w.group.Wait() }

// resume goes on with the tasks of the database.
func (w *worker) resume() {
	tasks, broken := w.db.load()
	for _, err := range broken {
		w.cfg.Log.Error("task not resumed", slog.Any("error", err))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, t := range tasks {
		w.begin(t)
	}
}

// begin starts the loop of a task. Callers hold mu.
func (w *worker) begin(task *api.Task) {
	m := &managed{w: w, id: task.GetId(), task: task, wake: make(chan struct{}, 1), log: w.cfg.Log.With(
		slog.String("task_id", task.GetId()), slog.String("service_id", task.GetServiceId()))}
	w.tasks[task.GetId()] = m
	w.notify()
	w.start(m)
}

// notify wakes those who wait for a change of the tasks. Callers hold mu.
func (w *worker) notify() {
	close(w.changed)
	w.changed = make(chan struct{})
}

// assignAll makes the node's tasks, secrets and configs exactly those listed.
func (w *worker) assignAll(ctx context.Context, changes []*api.AssignmentChange) {
	keep := map[string]bool{}
	w.mu.Lock()
	// In one step: a task that starts meanwhile must not miss what it had.
	w.secrets, w.configs = map[string]*api.Secret{}, map[string]*api.Config{}
	w.take(changes)
	w.complete = true
	for _, c := range changes {
		if t := c.GetAssignment().GetTask(); t != nil && c.GetAction() == api.AssignmentChange_UPDATE {
			keep[t.GetId()] = true
		}
	}
	var gone []*managed
	for id, m := range w.tasks {
		if !keep[id] {
			gone = append(gone, m)
		}
	}
	w.mu.Unlock()
	w.assign(changes)
	for _, m := range gone {
		m.remove()
	}
	w.sweep(ctx, keep)
}

// assign applies changes: secrets and configs first, so that tasks find them. Only the
// session's goroutine calls it.
func (w *worker) assign(changes []*api.AssignmentChange) {
	w.mu.Lock()
	w.take(changes)
	w.mu.Unlock()
	var fresh []*api.Task
	for _, c := range changes {
		item, ok := c.GetAssignment().GetItem().(*api.Assignment_Task)
		if !ok {
			continue
		}
		w.mu.Lock()
		m := w.tasks[item.Task.GetId()]
		w.mu.Unlock()
		remove := c.GetAction() == api.AssignmentChange_REMOVE
		switch {
		case m != nil && remove:
			m.remove()
		case m != nil:
			m.update(proto.CloneOf(item.Task))
		case !remove:
			fresh = append(fresh, proto.CloneOf(item.Task))
		}
	}
	w.beginAll(fresh)
}

// beginAll starts new tasks, once the database has them.
func (w *worker) beginAll(tasks []*api.Task) {
	if len(tasks) == 0 {
		return
	}
	if err := w.db.put(tasks...); err != nil {
		w.cfg.Log.Error("tasks not stored", slog.Int("tasks", len(tasks)), slog.Any("error", err))
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, t := range tasks {
		if w.tasks[t.GetId()] == nil {
			w.begin(t)
		}
	}
}

// take notes secrets and configs, and forgets those removed. Callers hold mu.
func (w *worker) take(changes []*api.AssignmentChange) {
	for _, c := range changes {
		remove := c.GetAction() == api.AssignmentChange_REMOVE
		switch item := c.GetAssignment().GetItem().(type) {
		case *api.Assignment_Secret:
			if remove {
				delete(w.secrets, item.Secret.GetId())
			} else {
				w.secrets[item.Secret.GetId()] = item.Secret
			}
		case *api.Assignment_Config:
			if remove {
				delete(w.configs, item.Config.GetId())
			} else {
				w.configs[item.Config.GetId()] = item.Config
			}
		}
	}
}

// finished forgets a task whose container was removed.
func (w *worker) finished(id string) {
	if err := w.db.remove(id); err != nil {
		w.cfg.Log.Error("task not removed from database", slog.String("task_id", id), slog.Any("error", err))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.tasks, id)
	delete(w.reports, id)
	delete(w.withdrawn, id)
	w.notify()
}

// report stores a status and queues it for the manager.
func (w *worker) report(id string, s *api.TaskStatus) {
	if err := w.db.putStatus(id, s); err != nil {
		w.cfg.Log.Error("task status not stored", slog.String("task_id", id), slog.Any("error", err))
	}
	w.mu.Lock()
	w.reports[id] = s
	w.notify()
	w.mu.Unlock()
	w.wakeReporter()
}

func (w *worker) wakeReporter() {
	select {
	case w.dirty <- struct{}{}:
	default:
	}
}

// reportAll queues the statuses of all tasks, for a manager that may not know them.
func (w *worker) reportAll() {
	w.mu.Lock()
	for id, m := range w.tasks {
		if s := m.status(); s.GetState() > api.TaskState_ASSIGNED {
			w.reports[id] = s
		}
	}
	w.mu.Unlock()
	w.wakeReporter()
}

func (w *worker) takeReports() []*api.UpdateTaskStatusRequest_TaskStatusUpdate {
	w.mu.Lock()
	defer w.mu.Unlock()
	var updates []*api.UpdateTaskStatusRequest_TaskStatusUpdate
	for id, s := range w.reports {
		updates = append(updates, &api.UpdateTaskStatusRequest_TaskStatusUpdate{TaskId: id, Status: s})
	}
	w.reports = map[string]*api.TaskStatus{}
	return updates
}

// sweep removes containers that say they are tasks of this node but are not.
func (w *worker) sweep(ctx context.Context, keep map[string]bool) {
	containers, err := w.cfg.Engine.List(ctx)
	if err != nil {
		w.cfg.Log.Warn("list containers", slog.Any("error", err))
		return
	}
	for _, c := range containers {
		if c.Config == nil {
			continue
		}
		id, ok := c.Config.Labels[labelTaskID]
		if !ok || c.Config.Labels[labelNodeID] != w.cfg.NodeID || keep[id] {
			continue
		}
		w.mu.Lock()
		known := w.tasks[id] != nil
		w.mu.Unlock()
		if known {
			continue
		}
		w.cfg.Log.Info("container of an unknown task removed", slog.String("task_id", id), slog.String("container_id", c.ID))
		if err := w.cfg.Engine.Remove(ctx, c.ID, true, true); err != nil {
			w.cfg.Log.Warn("container not removed", slog.String("container_id", c.ID), slog.Any("error", err))
		}
	}
}

// payload is a secret or config of a task, under the id that the task knows.
type payload struct {
	kind, name, id string
	data           []byte
	templating     *api.Driver
	limit          int // of the data after expansion
}

// gather returns the secrets and configs of a task, or an error that names the one that is
// not here.
func (w *worker) gather(task *api.Task, spec *api.ContainerSpec) ([]payload, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var all []payload
	for _, ref := range spec.GetSecrets() {
		// A secret driver may have given this task a value of its own.
		s := w.secrets[model.TaskSecretID(ref.GetSecretId(), task.GetId())]
		if s == nil {
			s = w.secrets[ref.GetSecretId()]
		}
		if s == nil {
			return nil, w.missing("secret", ref.GetSecretName())
		}
		all = append(all, payload{"secret", ref.GetSecretName(), ref.GetSecretId(), s.GetSpec().GetData(), s.GetSpec().GetTemplating(), model.MaxSecret})
	}
	for _, ref := range spec.GetConfigs() {
		c := w.configs[ref.GetConfigId()]
		if c == nil {
			return nil, w.missing("config", ref.GetConfigName())
		}
		all = append(all, payload{"config", ref.GetConfigName(), ref.GetConfigId(), c.GetSpec().GetData(), c.GetSpec().GetTemplating(), model.MaxConfig})
	}
	return all, nil
}

// dependencies returns the data of a task's secrets and configs by their ids, with the
// templates among them expanded.
func (w *worker) dependencies(task *api.Task, spec *api.ContainerSpec, node lifecycle.TemplateNode) (secrets, configs map[string][]byte, err error) {
	all, err := w.gather(task, spec)
	if err != nil {
		return nil, nil, err
	}
	byKind := func() map[string]map[string][]byte {
		return map[string]map[string][]byte{"secret": {}, "config": {}}
	}
	stored, expanded := byKind(), byKind()
	for _, p := range all {
		stored[p.kind][p.id] = p.data
	}
	templates := lifecycle.NewPayloads(task, spec, node, stored["secret"], stored["config"])
	for _, p := range all {
		data, err := templates.Expand(p.templating, p.data)
		if err == nil && len(data) > p.limit {
			err = model.Errorf(model.Invalid, "it expands to %d bytes, more than the %d of a %s", len(data), p.limit, p.kind)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("expand %s %s: %w", p.kind, p.name, err)
		}
		expanded[p.kind][p.id] = data
	}
	return expanded["secret"], expanded["config"], nil
}

// missing is the error of a task that refers to something that is not here. It may pass
// while a restarted agent has not heard from a manager. Callers hold mu.
func (w *worker) missing(kind, name string) error {
	reason := model.Internal
	if !w.complete {
		reason = model.Unavailable
	}
	return model.Errorf(reason, "%s %s is not available on this node", kind, name)
}

// newStatus returns the status of a task that enters a state now.
func newStatus(old *api.TaskStatus, state api.TaskState, now time.Time) *api.TaskStatus {
	s := proto.CloneOf(old)
	if s == nil {
		s = new(api.TaskStatus)
	}
	s.AppliedAt, s.AppliedBy = nil, ""
	s.State, s.Message, s.Err = state, lifecycle.Message(state), ""
	s.Timestamp = stamp(now)
	return s
}
