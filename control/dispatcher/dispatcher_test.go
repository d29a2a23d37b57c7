package dispatcher

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// rig is a dispatcher over a state in memory, in a bubble.
type rig struct {
	*testing.T

	state *replica.Memory
	d     *Dispatcher
	stop  func() // ends the term

	mu      sync.Mutex
	members []*api.RaftMember // under mu
	pause   time.Duration     // how long the next look for silent nodes takes; under mu
}

func newRig(t *testing.T, objects ...model.Object) *rig {
	t.Helper()
	r := &rig{T: t, state: replica.NewMemory(store.Empty()), members: []*api.RaftMember{{NodeId: "m1", Addr: "10.0.0.1:2377"}}}
	r.update(func(tx *store.Tx) error {
		return errors.Join(tx.Create(cluster()), tx.Create(aNode("n1")), tx.Create(aNode("n2")))
	})
	for _, o := range objects {
		r.update(func(tx *store.Tx) error { return tx.Create(o) })
	}
	r.d = New(Config{
		State: r.state, Members: r.look, NodeID: "m1", Log: slog.New(slog.DiscardHandler),
		Caller: func(ctx context.Context) (string, string, error) {
			id, _ := ctx.Value(callerKey{}).(string)
			return id, "192.0.2.7:4711", nil
		},
	})
	return r
}

func (r *rig) look() []*api.RaftMember {
	r.mu.Lock()
	members, pause := r.members, r.pause
	r.pause = 0
	r.mu.Unlock()
	time.Sleep(pause)
	return members
}

func (r *rig) setMembers(m ...*api.RaftMember) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.members = m
}

// lead runs the dispatcher for a term.
func (r *rig) lead() {
	ctx, cancel := context.WithCancel(r.Context())
	done := make(chan error, 1)
	go func() { done <- r.d.Run(ctx) }()
	r.stop = func() {
		cancel()
		if err := <-done; err != nil {
			r.Errorf("the term ended with %v", err)
		}
	}
	synctest.Wait()
}

func (r *rig) update(f func(*store.Tx) error) {
	r.Helper()
	if _, err := r.state.Update(r.Context(), f); err != nil {
		r.Fatal(err)
	}
}

// inTerm runs a test in a bubble during a term of leadership.
func inTerm(t *testing.T, test func(*rig), objects ...model.Object) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, objects...)
		r.lead()
		defer r.stop()
		test(r)
	})
}

type callerKey struct{}

func (r *rig) as(node string) context.Context {
	return context.WithValue(r.Context(), callerKey{}, node)
}

// stream is the manager's end of a stream whose messages are read from got.
type stream[T any] struct {
	grpc.ServerStream

	ctx context.Context //nolint:containedctx // a stream has one
	got chan *T
}

func (s *stream[T]) Context() context.Context { return s.ctx }

func (s *stream[T]) Send(m *T) error {
	s.got <- m
	return nil
}

// call is one open stream.
type call[T any] struct {
	r   *rig
	got chan *T
	end func()
	err chan error
}

func open[T any](r *rig, node string, serve func(*stream[T]) error) *call[T] {
	ctx, cancel := context.WithCancel(r.as(node))
	c := &call[T]{r: r, got: make(chan *T, 100), end: cancel, err: make(chan error, 1)}
	r.Cleanup(cancel)
	go func() { c.err <- serve(&stream[T]{ctx: ctx, got: c.got}) }()
	return c
}

// next returns a message that must be there by now.
func (c *call[T]) next() *T {
	c.r.Helper()
	synctest.Wait()
	select {
	case m := <-c.got:
		return m
	case err := <-c.err:
		c.r.Fatalf("the stream ended with %v", err)
	default:
		c.r.Fatal("there is no message")
	}
	return nil
}

// latest returns the last of the messages that are there by now.
func (c *call[T]) latest() *T {
	c.r.Helper()
	m := c.next()
	for len(c.got) > 0 {
		m = <-c.got
	}
	return m
}

func (c *call[T]) quiet() {
	c.r.Helper()
	synctest.Wait()
	select {
	case m := <-c.got:
		c.r.Fatalf("got %v, want nothing", m)
	case err := <-c.err:
		c.r.Fatalf("the stream ended with %v", err)
	default:
	}
}

// ended checks how the stream ended.
func (c *call[T]) ended(code codes.Code, text string) {
	c.r.Helper()
	synctest.Wait()
	select {
	case err := <-c.err:
		wantStatus(c.r, err, code, text)
	default:
		c.r.Errorf("the stream is open, want %s %q", code, text)
	}
}

func wantStatus(t testing.TB, err error, code codes.Code, text string) {
	t.Helper()
	if s := status.Convert(err); s.Code() != code || s.Message() != text {
		t.Errorf("got %s %q, want %s %q", s.Code(), s.Message(), code, text)
	}
}

func (r *rig) session(node, id string) *call[api.SessionMessage] {
	req := &api.SessionRequest{SessionId: id, Description: &api.NodeDescription{Hostname: "host of " + node}}
	return open(r, node, func(s *stream[api.SessionMessage]) error { return r.d.Session(req, s) })
}

// register opens a session and returns its id.
func (r *rig) register(node string) (*call[api.SessionMessage], string) {
	r.Helper()
	c := r.session(node, "")
	return c, c.latest().GetSessionId() // the registration may count as a change
}

func (r *rig) assignments(node, session string) *call[api.AssignmentsMessage] {
	return open(r, node, func(s *stream[api.AssignmentsMessage]) error {
		return r.d.Assignments(&api.AssignmentsRequest{SessionId: session}, s)
	})
}

func (r *rig) heartbeat(node, session string) (time.Duration, error) {
	resp, err := r.d.Heartbeat(r.as(node), &api.HeartbeatRequest{SessionId: session})
	return resp.GetPeriod().AsDuration(), err
}

func (r *rig) report(node, session, task string, state api.TaskState) error {
	_, err := r.d.UpdateTaskStatus(r.as(node), &api.UpdateTaskStatusRequest{
		SessionId: session, Updates: []*api.UpdateTaskStatusRequest_TaskStatusUpdate{{TaskId: task, Status: &api.TaskStatus{State: state}}},
	})
	synctest.Wait()
	return err
}

func (r *rig) nodeStatus(id string) *api.NodeStatus {
	synctest.Wait()
	return r.state.View().Node(id).GetStatus()
}

func cluster() *api.Cluster {
	return &api.Cluster{
		Id: "cluster", Spec: &api.ClusterSpec{
			Annotations: &api.Annotations{Name: "default"}, Dispatcher: &api.DispatcherConfig{HeartbeatPeriod: durationpb.New(5 * time.Second)},
		},
		RootCa:               &api.RootCA{CaCert: []byte("root")},
		NetworkBootstrapKeys: []*api.EncryptionKey{{Subsystem: "networking:gossip", Key: []byte("key")}},
	}
}

func aNode(id string) *api.Node {
	return &api.Node{Id: id, Spec: new(api.NodeSpec), Status: new(api.NodeStatus), Description: &api.NodeDescription{Hostname: id}}
}

func aTask(id, node string, state api.TaskState, edits ...func(*api.ContainerSpec)) *api.Task {
	c := &api.ContainerSpec{Image: "web"}
	for _, e := range edits {
		e(c)
	}
	return &api.Task{
		Id: id, ServiceId: "service", NodeId: node, DesiredState: api.TaskState_RUNNING, Status: &api.TaskStatus{State: state},
		Spec: &api.TaskSpec{Runtime: &api.TaskSpec_Container{Container: c}},
	}
}

func uses(secret, config string) func(*api.ContainerSpec) {
	return func(c *api.ContainerSpec) {
		c.Secrets = []*api.SecretReference{{SecretId: secret, SecretName: secret}}
		c.Configs = []*api.ConfigReference{{ConfigId: config, ConfigName: config}}
	}
}

func aSecret(id string) *api.Secret {
	return &api.Secret{Id: id, Spec: &api.SecretSpec{Annotations: &api.Annotations{Name: id}, Data: []byte("of " + id)}}
}

func aConfig(id string) *api.Config {
	return &api.Config{Id: id, Spec: &api.ConfigSpec{Annotations: &api.Annotations{Name: id}, Data: []byte("of " + id)}}
}

// show lists the changes of an assignments message in a fixed order.
func show(m *api.AssignmentsMessage) string {
	var parts []string
	for _, c := range m.GetChanges() {
		sign := "+"
		if c.GetAction() == api.AssignmentChange_REMOVE {
			sign = "-"
		}
		switch i := c.GetAssignment().GetItem().(type) {
		case *api.Assignment_Task:
			parts = append(parts, sign+i.Task.GetId())
		case *api.Assignment_Secret:
			parts = append(parts, sign+i.Secret.GetId()+strings.Repeat("!", len(i.Secret.GetSpec().GetData())/100))
		case *api.Assignment_Config:
			parts = append(parts, sign+i.Config.GetId())
		}
	}
	slices.Sort(parts)
	return fmt.Sprintf("%s %s>%s %s", m.GetType(), m.GetAppliesTo(), m.GetResultsIn(), strings.Join(parts, " "))
}

func (c *call[T]) want(want string) {
	c.r.Helper()
	m, ok := any(c.next()).(*api.AssignmentsMessage)
	if got := show(m); !ok || got != want {
		c.r.Errorf("got  %s\nwant %s", got, want)
	}
}
