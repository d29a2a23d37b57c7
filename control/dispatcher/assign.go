package dispatcher

import (
	"context"
	"log/slog"
	"strconv"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// maxChanges bounds the changes in one message; further ones go into the next.
const maxChanges = 500

// feed is what waits for one assignment stream: the newest change of each task. It is
// bounded by the tasks of the node.
type feed struct {
	mu      sync.Mutex
	changed map[string]model.Event
	order   []string
	again   bool          // everything must be sent anew
	wake    chan struct{} // has a value when there is something
}

func newFeed() *feed {
	return &feed{changed: map[string]model.Event{}, wake: make(chan struct{}, 1)}
}

func (f *feed) signal() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// task notes a change; of several to one task the last counts, seen from before the first.
func (f *feed) task(e model.Event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if first, ok := f.changed[e.ID()]; ok {
		e.Old = first.Old
	} else {
		f.order = append(f.order, e.ID())
	}
	f.changed[e.ID()] = e
	f.signal()
}

// restart has everything sent anew.
func (f *feed) restart() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.again = true
	f.signal()
}

// take returns up to maxChanges changes, or again.
func (f *feed) take() (events []model.Event, again bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.again {
		f.again, f.changed, f.order = false, map[string]model.Event{}, nil
		return nil, true
	}
	n := min(len(f.order), maxChanges)
	for _, id := range f.order[:n] {
		events = append(events, f.changed[id])
		delete(f.changed, id)
	}
	f.order = f.order[n:]
	if len(f.order) > 0 {
		f.signal()
	}
	return events, false
}

// assigned is what one stream has sent: tasks, and secrets and configs by their users.
type assigned struct {
	// ask returns a driver's value of a secret for a task, as the node shall know it; nil
	// when there is none.
	ask     func(*api.Secret, *api.Task) *api.Secret
	tasks   map[string]bool
	secrets map[string]map[string]bool // secret id, task ids
	configs map[string]map[string]bool
}

// Assignments streams what the calling node shall run: first everything, then changes.
func (d *Dispatcher) Assignments(req *api.AssignmentsRequest, stream api.Dispatcher_AssignmentsServer) error {
	ctx := stream.Context()
	nodeID, _, err := d.cfg.Caller(ctx)
	if err != nil {
		return err
	}
	t, n, err := d.check(nodeID, req.GetSessionId())
	if err != nil {
		return err
	}
	f := newFeed()
	d.mu.Lock()
	n.feed = f
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		if n.feed == f {
			n.feed = nil
		}
		d.mu.Unlock()
	}()
	f.restart()
	version := 0
	var sent *assigned
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.ctx.Done():
			return errStopped()
		case <-n.ended:
			return d.whyEnded(t, n, nodeID)
		case <-f.wake:
		}
		events, again := f.take()
		msg := &api.AssignmentsMessage{Type: api.AssignmentsMessage_INCREMENTAL, AppliesTo: strconv.Itoa(version)}
		if again {
			sent = &assigned{ask: d.asker(ctx), tasks: map[string]bool{}, secrets: map[string]map[string]bool{}, configs: map[string]map[string]bool{}}
			msg = &api.AssignmentsMessage{Type: api.AssignmentsMessage_COMPLETE, Changes: sent.complete(d.cfg.State.View(), nodeID)}
		} else {
			msg.Changes = sent.apply(d.cfg.State.View(), events)
			if len(msg.GetChanges()) == 0 {
				continue
			}
		}
		version++
		msg.ResultsIn = strconv.Itoa(version)
		if err := stream.Send(msg); err != nil {
			return err
		}
	}
}

// Tasks is the forerunner of Assignments; no agent of the last ten years needs it.
func (d *Dispatcher) Tasks(*api.TasksRequest, api.Dispatcher_TasksServer) error {
	return status.Error(codes.Unimplemented, "use Assignments")
}

// complete returns everything that a node shall have.
func (a *assigned) complete(view *store.Snapshot, nodeID string) []*api.AssignmentChange {
	var changes []*api.AssignmentChange
	for task := range view.TasksByNode(nodeID) {
		if task.GetStatus().GetState() >= api.TaskState_ASSIGNED {
			changes = append(changes, a.add(view, task)...)
		}
	}
	return changes
}

// apply returns what changes for the node because of events.
func (a *assigned) apply(view *store.Snapshot, events []model.Event) []*api.AssignmentChange {
	var changes []*api.AssignmentChange
	for _, e := range events {
		old, _ := e.Old.(*api.Task)
		task, _ := e.New.(*api.Task)
		switch {
		case task == nil:
			if a.tasks[e.ID()] {
				delete(a.tasks, e.ID())
				changes = append(changes, removeTask(e.ID()))
				changes = append(changes, a.release(e.ID())...)
			}
		case task.GetStatus().GetState() < api.TaskState_ASSIGNED:
		case !a.tasks[task.GetId()]:
			changes = append(changes, a.add(view, task)...)
		default:
			if task.GetStatus().GetState() > api.TaskState_RUNNING {
				changes = append(changes, a.release(task.GetId())...)
			}
			if old == nil || !sameButStatus(old, task) || task.GetStatus().GetState() == api.TaskState_ASSIGNED {
				changes = append(changes, updateTask(task))
			}
		}
	}
	return changes
}

// add returns the changes that give a node a task with its secrets and configs.
func (a *assigned) add(view *store.Snapshot, task *api.Task) []*api.AssignmentChange {
	var changes []*api.AssignmentChange
	if task.GetStatus().GetState() <= api.TaskState_RUNNING {
		for _, ref := range task.GetSpec().GetContainer().GetSecrets() {
			if secret := a.secret(view, ref, task); secret != nil && hold(a.secrets, secret.GetId(), task.GetId()) {
				changes = append(changes, &api.AssignmentChange{Assignment: &api.Assignment{Item: &api.Assignment_Secret{Secret: secret}}})
			}
		}
		for _, ref := range task.GetSpec().GetContainer().GetConfigs() {
			if config := view.Config(ref.GetConfigId()); config != nil && hold(a.configs, config.GetId(), task.GetId()) {
				changes = append(changes, &api.AssignmentChange{Assignment: &api.Assignment{Item: &api.Assignment_Config{Config: config}}})
			}
		}
	}
	a.tasks[task.GetId()] = true
	return append(changes, updateTask(task))
}

// secret returns what a task gets for a reference, nil when there is nothing: then the node
// says what is missing.
func (a *assigned) secret(view *store.Snapshot, ref *api.SecretReference, task *api.Task) *api.Secret {
	secret := view.Secret(ref.GetSecretId())
	if secret.GetSpec().GetDriver() == nil || a.secrets[secret.GetId()] != nil {
		return secret // stored, or given to another task of the node for all
	}
	return a.ask(secret, task)
}

// asker returns the function that asks secret drivers for one stream.
func (d *Dispatcher) asker(ctx context.Context) func(*api.Secret, *api.Task) *api.Secret {
	return func(secret *api.Secret, task *api.Task) *api.Secret {
		if d.cfg.Secret == nil {
			return nil
		}
		data, reuse, err := d.cfg.Secret(ctx, secret, task)
		if err != nil {
			d.cfg.Log.Warn("secret driver gave no value, so the task will fail", slog.String("secret_id", secret.GetId()),
				slog.String("task_id", task.GetId()), slog.String("service_id", task.GetServiceId()), slog.Any("error", err))
			return nil
		}
		given := model.Clone(secret)
		given.Spec.Data = data
		if !reuse {
			given.Id, given.Internal = model.TaskSecretID(secret.GetId(), task.GetId()), true
		}
		return given
	}
}

// hold notes a user and reports whether it is the first.
func hold(users map[string]map[string]bool, id, taskID string) bool {
	first := users[id] == nil
	if first {
		users[id] = map[string]bool{}
	}
	users[id][taskID] = true
	return first
}

// release returns the removals of what nobody but the task used.
func (a *assigned) release(taskID string) []*api.AssignmentChange {
	var changes []*api.AssignmentChange
	for id, users := range a.secrets {
		if users[taskID] {
			if delete(users, taskID); len(users) == 0 {
				delete(a.secrets, id)
				changes = append(changes, &api.AssignmentChange{
					Action:     api.AssignmentChange_REMOVE,
					Assignment: &api.Assignment{Item: &api.Assignment_Secret{Secret: &api.Secret{Id: id}}},
				})
			}
		}
	}
	for id, users := range a.configs {
		if users[taskID] {
			if delete(users, taskID); len(users) == 0 {
				delete(a.configs, id)
				changes = append(changes, &api.AssignmentChange{
					Action:     api.AssignmentChange_REMOVE,
					Assignment: &api.Assignment{Item: &api.Assignment_Config{Config: &api.Config{Id: id}}},
				})
			}
		}
	}
	return changes
}

func updateTask(task *api.Task) *api.AssignmentChange {
	return &api.AssignmentChange{Assignment: &api.Assignment{Item: &api.Assignment_Task{Task: task}}}
}

func removeTask(id string) *api.AssignmentChange {
	return &api.AssignmentChange{
		Action:     api.AssignmentChange_REMOVE,
		Assignment: &api.Assignment{Item: &api.Assignment_Task{Task: &api.Task{Id: id}}},
	}
}

// sameButStatus reports whether two versions of a task differ in status and meta at most.
func sameButStatus(a, b *api.Task) bool {
	a, b = shallow(a), shallow(b)
	return proto.Equal(a, b)
}

// shallow copies the fields of a task that concern its node.
func shallow(t *api.Task) *api.Task {
	return &api.Task{
		Id: t.GetId(), Spec: t.GetSpec(), SpecVersion: t.GetSpecVersion(), ServiceId: t.GetServiceId(), Slot: t.GetSlot(),
		NodeId: t.GetNodeId(), Annotations: t.GetAnnotations(), ServiceAnnotations: t.GetServiceAnnotations(),
		DesiredState: t.GetDesiredState(), Networks: t.GetNetworks(), Endpoint: t.GetEndpoint(), LogDriver: t.GetLogDriver(),
		AssignedGenericResources: t.GetAssignedGenericResources(), JobIteration: t.GetJobIteration(), Volumes: t.GetVolumes(),
	}
}
