package ops_test

import (
	"context"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/control/ops"
	"github.com/skep-dev/skep/core/store"
)

func TestExplain(t *testing.T) {
	run := api.TaskState_RUNNING
	waiting := aTask("t2", "s", 2, run, api.TaskState_PENDING)
	waiting.NodeId, waiting.Status.Err = "", "no suitable node (insufficient resources on 1 node)"
	state := fill(t, aNode("n1", api.NodeRole_WORKER, api.NodeStatus_READY),
		service("s", "web", func(s *api.ServiceSpec) { s.GetReplicated().Replicas = 2 }),
		aTask("t1", "s", 1, run, run), waiting, aTask("t0", "s", 1, api.TaskState_SHUTDOWN, api.TaskState_FAILED))
	refusals := []*skepv1.Refusal{{Filter: "resources", Reason: "insufficient resources", NodeIds: []string{"n1"}}}
	asked := 0
	insight := ops.NewInsight(state, members{}, func(*store.Snapshot) func(*api.Task) []*skepv1.Refusal {
		return func(task *api.Task) []*skepv1.Refusal {
			asked++
			if task.GetId() != "t2" {
				t.Errorf("asked about %s", task.GetId())
			}
			return refusals
		}
	})
	resp, err := insight.Explain(t.Context(), &skepv1.ExplainRequest{Target: "WEB"})
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	for _, e := range resp.GetTasks() {
		order = append(order, e.GetTaskId()+" "+e.GetNodeName()+" "+e.GetState())
	}
	if diff := cmp.Diff([]string{"t1 hostn1 running", "t2  pending", "t0 hostn1 failed"}, order); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(refusals, resp.GetTasks()[1].GetRefusals(), protocmp.Transform()); diff != "" || asked != 1 {
		t.Errorf("asked %d times: %s", asked, diff)
	}
	want := []string{"1 of 2 tasks run: no suitable node (insufficient resources on 1 node)"}
	if diff := cmp.Diff(want, resp.GetNotes()); diff != "" {
		t.Error(diff)
	}
	for _, typed := range []string{"t2", "web.2"} {
		one, err := insight.Explain(t.Context(), &skepv1.ExplainRequest{Target: typed})
		if err != nil || len(one.GetTasks()) != 1 || one.GetTasks()[0].GetTaskId() != "t2" || one.GetServiceName() != "web" {
			t.Errorf("%s: %v %v", typed, one, err)
		}
	}
	_, err = insight.Explain(t.Context(), &skepv1.ExplainRequest{Target: "nope"})
	wantStatus(t, err, codes.NotFound, "service or task nope not found")
	_, err = insight.Explain(t.Context(), &skepv1.ExplainRequest{Target: "t"})
	wantStatus(t, err, codes.InvalidArgument, "t is ambiguous (3 matches found)")
}

// TestSchedulerExplains asks the real scheduler about a task that wants too much.
func TestSchedulerExplains(t *testing.T) {
	pending := aTask("t1", "s", 1, api.TaskState_RUNNING, api.TaskState_PENDING)
	pending.NodeId = ""
	pending.Spec.Resources = &api.ResourceRequirements{Reservations: &api.Resources{NanoCpus: 4e9}}
	small := aNode("n1", api.NodeRole_WORKER, api.NodeStatus_READY)
	small.Description.Resources = &api.Resources{NanoCpus: 1e9}
	state := fill(t, small, aNode("n2", api.NodeRole_WORKER, api.NodeStatus_DOWN), service("s", "web"), pending)
	resp, err := ops.NewInsight(state, members{}, nil).Explain(t.Context(), &skepv1.ExplainRequest{Target: "web"})
	if err != nil {
		t.Fatal(err)
	}
	refused := make(map[string]string)
	for _, r := range resp.GetTasks()[0].GetRefusals() {
		for i, id := range r.GetNodeIds() {
			refused[id] = r.GetNodeNames()[i] + ": " + r.GetReason()
		}
	}
	want := map[string]string{"n1": "hostn1: insufficient resources on 1 node", "n2": "hostn2: 1 node not available for new tasks"}
	if diff := cmp.Diff(want, refused); diff != "" {
		t.Error(diff)
	}
}

func TestOverview(t *testing.T) {
	run := api.TaskState_RUNNING
	down := aNode("n2", api.NodeRole_WORKER, api.NodeStatus_DOWN)
	down.Status.Message = "heartbeat failure"
	state := fill(t, aCluster(), aNode("n1", api.NodeRole_MANAGER, api.NodeStatus_READY), down,
		service("s", "web", func(s *api.ServiceSpec) { s.GetReplicated().Replicas = 2 }), aTask("t1", "s", 1, run, run))
	insight := ops.NewInsight(state, members{member(1, "n1", true), member(2, "n3", true), member(3, "n4", false)}, nil)
	resp, err := insight.Overview(t.Context(), new(skepv1.OverviewRequest))
	if err != nil {
		t.Fatal(err)
	}
	want := &skepv1.OverviewResponse{
		ClusterId: "cluster", LeaderId: "n1", RaftIndex: state.View().Index(),
		Nodes: []*skepv1.NodeOverview{
			{Id: "n1", Hostname: "hostn1", Role: "manager", State: "ready", Availability: "active", Leader: true, Reachability: "reachable", RunningTasks: 1},
			{Id: "n2", Hostname: "hostn2", Role: "worker", State: "down", Availability: "active", Message: "heartbeat failure"},
		},
		Services: []*skepv1.ServiceOverview{{Id: "s", Name: "web", Mode: "replicated", Desired: 2, Running: 1, Reason: "tasks are being created"}},
		Problems: []string{
			"2 of 3 managers are reachable: losing one more stops all changes; bring managers back or demote the lost ones",
			"node hostn2 (n2) is down: heartbeat failure",
			"service web runs 1 of 2 tasks: tasks are being created",
		},
	}
	if diff := cmp.Diff(want, resp, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

// watchStream collects what a Watcher sends.
type watchStream struct {
	api.Watch_WatchServer

	ctx  context.Context //nolint:containedctx // a gRPC stream has one
	sent chan *api.WatchMessage
}

func (w watchStream) Context() context.Context { return w.ctx }

func (w watchStream) Send(m *api.WatchMessage) error {
	select {
	case w.sent <- m:
		return nil
	case <-w.ctx.Done():
		return w.ctx.Err()
	}
}

func TestWatch(t *testing.T) {
	state := fill(t, aCluster())
	o := ops.New(ops.Config{State: state, Membership: members{}})
	ctx, cancel := context.WithCancel(t.Context())
	stream := watchStream{ctx: ctx, sent: make(chan *api.WatchMessage)}
	ended := make(chan error, 1)
	go func() {
		ended <- ops.NewWatcher(state).Watch(&api.WatchRequest{Entries: []*api.WatchRequest_WatchEntry{
			{Kind: "secret", Action: api.WatchActionKind_WATCH_ACTION_CREATE | api.WatchActionKind_WATCH_ACTION_REMOVE},
			{Kind: "service", Filters: []*api.SelectBy{{By: &api.SelectBy_NamePrefix{NamePrefix: "WE"}}}},
		}}, stream)
	}()
	if first := <-stream.sent; len(first.GetEvents()) != 0 || first.GetVersion().GetIndex() != state.View().Index() {
		t.Errorf("first message: %v", first)
	}
	if _, err := o.CreateService(ctx, &api.CreateServiceRequest{Spec: spec("other")}); err != nil {
		t.Fatal(err)
	}
	if _, err := o.CreateService(ctx, &api.CreateServiceRequest{Spec: spec("web")}); err != nil {
		t.Fatal(err)
	}
	m := <-stream.sent
	if len(m.GetEvents()) != 1 || m.GetEvents()[0].GetObject().GetService().GetSpec().GetAnnotations().GetName() != "web" {
		t.Errorf("service: %v", m)
	}
	if _, err := o.CreateSecret(ctx, &api.CreateSecretRequest{Spec: &api.SecretSpec{Annotations: &api.Annotations{Name: "s"}, Data: []byte("hidden")}}); err != nil {
		t.Fatal(err)
	}
	m = <-stream.sent
	if len(m.GetEvents()) != 1 || m.GetEvents()[0].GetObject().GetSecret().GetSpec().GetData() != nil {
		t.Errorf("secret: %v", m)
	}
	cancel()
	wantStatus(t, <-ended, codes.Canceled, "context canceled")
	err := ops.NewWatcher(state).Watch(&api.WatchRequest{ResumeFrom: &api.Version{Index: 1}}, stream)
	wantStatus(t, err, codes.Unimplemented, "watch: resuming from version 1 is not implemented by skep…")
	err = ops.NewWatcher(state).Watch(&api.WatchRequest{Entries: []*api.WatchRequest_WatchEntry{{Kind: "bogus"}}}, stream)
	wantStatus(t, err, codes.InvalidArgument, `watch: unknown kind "bogus"`)
}
