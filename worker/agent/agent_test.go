package agent

import (
	"context"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/registry"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/lifecycle"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/runtime/fake"
)

// manager is what an agent talks to: it assigns what the test says and notes what the
// agent reports.
type manager struct {
	api.UnimplementedDispatcherServer
	api.UnimplementedResourceAllocatorServer

	assign chan *api.AssignmentsMessage // taken by the session of now
	end    chan struct{}                // a value ends a session

	mu       sync.Mutex
	sessions int
	statuses map[string][]api.TaskState // reported in the session of now, in order
	errs     map[string]string          // the newest text of each task
	asked    []*api.AttachNetworkRequest
	detached []string
	// renamed is what the last renaming said, renameErr the answer to it.
	renamed   []*skepv1.AttachmentNames
	renameErr error
}

func (m *manager) Session(_ *api.SessionRequest, stream api.Dispatcher_SessionServer) error {
	m.mu.Lock()
	m.sessions++
	m.statuses = map[string][]api.TaskState{}
	m.mu.Unlock()
	if err := stream.Send(&api.SessionMessage{SessionId: "session"}); err != nil {
		return err
	}
	select {
	case <-m.end:
		return status.Error(codes.Unavailable, "the manager goes away")
	case <-stream.Context().Done():
		return nil
	}
}

func (m *manager) Heartbeat(context.Context, *api.HeartbeatRequest) (*api.HeartbeatResponse, error) {
	return &api.HeartbeatResponse{Period: durationpb.New(5 * time.Second)}, nil
}

func (m *manager) UpdateTaskStatus(_ context.Context, req *api.UpdateTaskStatusRequest) (*api.UpdateTaskStatusResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, u := range req.GetUpdates() {
		m.statuses[u.GetTaskId()] = append(m.statuses[u.GetTaskId()], u.GetStatus().GetState())
		m.errs[u.GetTaskId()] = u.GetStatus().GetErr()
	}
	return new(api.UpdateTaskStatusResponse), nil
}

func (m *manager) Assignments(_ *api.AssignmentsRequest, stream api.Dispatcher_AssignmentsServer) error {
	for {
		select {
		case msg := <-m.assign:
			if err := stream.Send(msg); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return nil
		}
	}
}

// err returns the newest error text that was heard of a task.
func (m *manager) err(id string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.errs[id]
}

// last returns the newest state that the session of now heard of a task.
func (m *manager) last(id string) api.TaskState {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := m.statuses[id]
	if len(list) == 0 {
		return api.TaskState_NEW
	}
	return list[len(list)-1]
}

// rig is a node with one agent and its manager, in a bubble.
type rig struct {
	*testing.T

	m      *manager
	engine *fake.Engine
	runs   Engine // engine, or what stands before it
	nets   Networks
	dir    string
	conn   *grpc.ClientConn
	halt   func() // ends the agent

	attachments *Attachments
}

func inBubble(t *testing.T, test func(*rig)) {
	t.Helper()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		r := &rig{T: t, dir: dir, engine: fake.New(fake.Config{}), m: &manager{
			assign: make(chan *api.AssignmentsMessage), end: make(chan struct{}), errs: map[string]string{},
		}}
		r.runs = r.engine
		server, listen := grpc.NewServer(), bufconn.Listen(1<<16)
		api.RegisterDispatcherServer(server, r.m)
		api.RegisterResourceAllocatorServer(server, r.m)
		skepv1.RegisterNetworksServer(server, overlaysOf{r: r})
		go server.Serve(listen)
		defer server.Stop()
		conn, err := grpc.NewClient("passthrough:///manager", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listen.DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		r.conn = conn
		r.start()
		defer func() { r.halt() }()
		test(r)
	})
}

// start runs a new agent on the node's database and containers.
func (r *rig) start() {
	a := New(Config{
		NodeID: "n1", Hostname: "host", Dir: r.dir, Engine: r.runs, Attachments: r.attachments, Log: slog.New(slog.DiscardHandler),
		Connect: func(context.Context) (grpc.ClientConnInterface, func(bool), error) {
			return r.conn, func(bool) {}, nil
		},
		Describe:  func(context.Context) (*api.NodeDescription, error) { return new(api.NodeDescription), nil },
		OnSession: func(*api.SessionMessage) {},
		Networks:  r.nets,
	})
	ctx, cancel := context.WithCancel(r.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	r.halt = func() {
		cancel()
		if err := <-done; err != nil {
			r.Errorf("the agent ended with %v", err)
		}
	}
	r.settle()
}

// settle lets everything happen that is due.
func (r *rig) settle() {
	time.Sleep(2 * time.Second)
	synctest.Wait()
}

func change(action api.AssignmentChange_AssignmentAction, item any) *api.AssignmentChange {
	a := new(api.Assignment)
	switch item := item.(type) {
	case *api.Task:
		a.Item = &api.Assignment_Task{Task: item}
	case *api.Secret:
		a.Item = &api.Assignment_Secret{Secret: item}
	}
	return &api.AssignmentChange{Assignment: a, Action: action}
}

// assign gives the agent everything it shall have.
func (r *rig) assign(items ...any) {
	msg := &api.AssignmentsMessage{Type: api.AssignmentsMessage_COMPLETE, ResultsIn: "1"}
	for _, item := range items {
		msg.Changes = append(msg.Changes, change(api.AssignmentChange_UPDATE, item))
	}
	r.m.assign <- msg
	r.settle()
}

// lose ends the session; the agent opens another one.
func (r *rig) lose() {
	r.m.end <- struct{}{}
	r.settle()
}

func task(id string, desired api.TaskState) *api.Task {
	return &api.Task{
		Id: id, ServiceId: "s", NodeId: "n1", Slot: 1, DesiredState: desired,
		ServiceAnnotations: &api.Annotations{Name: "web"},
		Spec:               &api.TaskSpec{Runtime: &api.TaskSpec_Container{Container: &api.ContainerSpec{Image: "web:1"}}},
		Status:             &api.TaskStatus{State: api.TaskState_ASSIGNED},
	}
}

// containers counts those that run, and all there are.
func (r *rig) containers() (running, all int) {
	r.Helper()
	list, err := r.engine.List(r.Context())
	if err != nil {
		r.Fatal(err)
	}
	for _, c := range list {
		if c.State.Running {
			running++
		}
	}
	return running, len(list)
}

func (r *rig) want(id string, state api.TaskState, running, all int) {
	r.Helper()
	if got := r.m.last(id); got != state {
		r.Errorf("task %s was reported %s, want %s", id, got, state)
	}
	if gotRunning, gotAll := r.containers(); gotRunning != running || gotAll != all {
		r.Errorf("%d of %d containers run, want %d of %d", gotRunning, gotAll, running, all)
	}
}

// Loops of tasks ended with the session that assigned them: nobody stopped such tasks.
func TestTasksOutliveTheirSession(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.assign(task("t1", api.TaskState_RUNNING))
		r.want("t1", api.TaskState_RUNNING, 1, 1)
		r.lose()
		r.want("t1", api.TaskState_RUNNING, 1, 1) // the new session hears of it again
		r.assign(task("t1", api.TaskState_SHUTDOWN))
		r.want("t1", api.TaskState_SHUTDOWN, 0, 1)
		r.lose()
		r.assign()
		if _, all := r.containers(); all != 0 {
			t.Errorf("%d containers are left of a task that is gone", all)
		}
	})
}

func TestRestartFindsItsTasks(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.assign(task("t1", api.TaskState_RUNNING), task("t2", api.TaskState_RUNNING))
		r.want("t2", api.TaskState_RUNNING, 2, 2)
		r.halt() // its containers go on
		r.want("t2", api.TaskState_RUNNING, 2, 2)
		list, err := r.engine.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ended := list[0].Config.Labels[labelTaskID]
		if err := r.engine.Exit(list[0].ID, 3); err != nil {
			t.Fatal(err)
		}
		r.start() // hears nothing from its manager, and looks after its tasks
		r.want(ended, api.TaskState_FAILED, 1, 2)
		r.assign(task("t1", api.TaskState_SHUTDOWN), task("t2", api.TaskState_SHUTDOWN))
		r.want(ended, api.TaskState_FAILED, 0, 2)
	})
}

func TestUnknownContainersOfThisNodeAreRemoved(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.assign(task("t1", api.TaskState_RUNNING))
		r.halt()
		r.dir = t.TempDir() // the database is lost
		r.start()
		r.assign(task("t2", api.TaskState_RUNNING))
		r.want("t2", api.TaskState_RUNNING, 1, 1)
	})
}

// A restarted agent has its tasks from the database but no secrets, which are never
// written: a task that was about to start waits for them instead of failing.
func TestSecretsArriveLate(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.halt()
		needy := task("t1", api.TaskState_RUNNING)
		needy.GetSpec().GetContainer().Secrets = []*api.SecretReference{{
			SecretId: "secret", SecretName: "key",
			Target: &api.SecretReference_File{File: &api.FileTarget{Name: "key", Uid: "0", Gid: "0", Mode: 0o400}},
		}}
		db, err := openDatabase(r.dir, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := db.put(needy); err != nil {
			t.Fatal(err)
		}
		if err := db.close(); err != nil {
			t.Fatal(err)
		}
		r.start()
		r.want("t1", api.TaskState_PREPARING, 0, 0)
		if err := r.m.err("t1"); !strings.Contains(err, "secret") {
			t.Errorf("a task that waits for its secret says %q", err)
		}
		r.assign(needy, &api.Secret{Id: "secret", Spec: &api.SecretSpec{Data: []byte("x")}})
		r.want("t1", api.TaskState_RUNNING, 1, 1)
		if err := r.m.err("t1"); err != "" {
			t.Errorf("a task that waited and runs says %q", err)
		}
	})
}

// offline is an engine that reaches no registry.
type offline struct{ Engine }

func (offline) InspectImage(context.Context, string) (*image.InspectResponse, error) {
	return nil, model.Errorf(model.NotFound, "No such image")
}

func (offline) Pull(context.Context, string, string, *registry.AuthConfig, func(runtime.Progress)) error {
	return model.Wrap(model.Unavailable, context.DeadlineExceeded, "reach registry")
}

// A task whose image cannot be had tried for ever, and updates to it neither failed nor
// went on.
func TestUnreachableRegistryFailsTheTask(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.halt()
		r.runs = offline{r.engine}
		r.start()
		r.assign(task("t1", api.TaskState_RUNNING))
		r.want("t1", api.TaskState_REJECTED, 0, 0)
		if err := r.m.err("t1"); !strings.Contains(err, "reach registry") {
			t.Errorf("the task says %q", err)
		}
	})
}

// noNetworks fails the test when it is asked for anything.
type noNetworks struct{ *testing.T }

func (n noNetworks) Apply(context.Context, *skepv1.NetworkUpdate) error {
	n.Error("networks were programmed without a manager that knows them")
	return nil
}

func (n noNetworks) Examine(context.Context) ([]*skepv1.NetworkDifference, error) {
	n.Error("networks were examined without a manager that knows them")
	return nil, nil
}

func (n noNetworks) Listening(string) ([]lifecycle.Socket, error) {
	n.Error("a task was waited for that nobody is led to")
	return nil, nil
}

func (n noNetworks) Digest() []byte  { return nil }
func (n noNetworks) Repairs() uint64 { return 0 }

// The managers of this rig know nothing of Skep's networks, as Docker's: a task of an overlay
// must be rejected, not wait for ever, and the session must stay.
func TestOverlayOfDockerIsRefused(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.halt()
		r.nets = noNetworks{t}
		r.start()
		overlay := task("t1", api.TaskState_RUNNING)
		overlay.Networks = []*api.NetworkAttachment{{Network: &api.Network{Id: "net", DriverState: &api.Driver{Name: "overlay"}}}}
		r.m.mu.Lock()
		before := r.m.sessions
		r.m.mu.Unlock()
		r.assign(overlay, task("t2", api.TaskState_RUNNING))
		r.want("t2", api.TaskState_RUNNING, 1, 1)
		r.want("t1", api.TaskState_REJECTED, 1, 1)
		r.m.mu.Lock()
		defer r.m.mu.Unlock()
		if r.m.sessions != before {
			t.Errorf("%d sessions more", r.m.sessions-before)
		}
	})
}

func TestMissingSecretFailsTheTask(t *testing.T) {
	inBubble(t, func(r *rig) {
		needy := task("t1", api.TaskState_RUNNING)
		needy.GetSpec().GetContainer().Secrets = []*api.SecretReference{{SecretId: "secret", SecretName: "key"}}
		r.assign(needy)
		r.want("t1", api.TaskState_REJECTED, 0, 0)
	})
}

// An agent that is halted while a task is within its grace period leaves the container
// as it is, and goes on stopping it once it is back.
func TestHaltWhileStopping(t *testing.T) {
	inBubble(t, func(r *rig) {
		deaf := task("t1", api.TaskState_RUNNING)
		deaf.GetSpec().GetContainer().Args = []string{"ignore"}
		r.assign(deaf)
		stop := task("t1", api.TaskState_SHUTDOWN)
		r.assign(stop)
		r.want("t1", api.TaskState_RUNNING, 1, 1) // within its grace period
		r.halt()
		r.want("t1", api.TaskState_RUNNING, 1, 1)
		r.start()
		time.Sleep(15 * time.Second)
		r.want("t1", api.TaskState_SHUTDOWN, 0, 1)
	})
}
