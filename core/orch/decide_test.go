package orch

import (
	"fmt"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

func TestDirty(t *testing.T) {
	container := func(task *api.TaskSpec) *api.ContainerSpec { return task.GetContainer() }
	tests := []struct {
		name    string
		service func(*api.Service)
		task    func(*api.Task)
		node    *api.Node
		want    bool
	}{
		{name: "the same spec of another revision"},
		{name: "another image", service: func(s *api.Service) { container(s.Spec.Task).Image = "b" }, want: true},
		{name: "another image of the same revision", service: func(s *api.Service) {
			container(s.Spec.Task).Image, s.SpecVersion.Index = "b", 1
		}},
		{name: "forced", service: func(s *api.Service) { s.Spec.Task.ForceUpdate++ }, want: true},
		{name: "another label", service: func(s *api.Service) { container(s.Spec.Task).Labels = map[string]string{"k": "v"} }, want: true},
		{name: "another runtime", service: func(s *api.Service) {
			s.Spec.Task.Runtime = &api.TaskSpec_Attachment{Attachment: &api.NetworkAttachmentSpec{ContainerId: "c"}}
		}, want: true},
		{name: "another port", service: func(s *api.Service) {
			s.Spec.Endpoint = &api.EndpointSpec{Ports: []*api.PortConfig{{TargetPort: 80}}}
		}, want: true},
		{name: "no endpoint and an empty one", service: func(s *api.Service) { s.Spec.Endpoint = &api.EndpointSpec{} }},
		{name: "another name of the service", service: func(s *api.Service) { s.Spec.Annotations.Name = "new" }},
		{name: "other credentials for the image, which is there", service: func(s *api.Service) {
			container(s.Spec.Task).PullOptions = &api.ContainerSpec_PullOptions{RegistryAuth: "x"}
		}},
		{name: "other credentials for the image, which is not there yet", service: func(s *api.Service) {
			container(s.Spec.Task).PullOptions = &api.ContainerSpec_PullOptions{RegistryAuth: "x"}
		}, task: func(t *api.Task) { t.Status.State = api.TaskState_PREPARING }, want: true},
		{name: "other credentials and another image", service: func(s *api.Service) {
			container(s.Spec.Task).PullOptions = &api.ContainerSpec_PullOptions{RegistryAuth: "x"}
			container(s.Spec.Task).Image = "b"
		}, want: true},
		{name: "a constraint that the node meets", service: func(s *api.Service) { constrain(s, "node.labels.x==1") }, node: labelled("x", "1")},
		{name: "a constraint that it does not meet", service: func(s *api.Service) { constrain(s, "node.labels.x==1") }, node: labelled("x", "2"), want: true},
		{name: "a constraint, and no node is known", service: func(s *api.Service) { constrain(s, "node.labels.x==1") }, want: true},
		{name: "a constraint that is none", service: func(s *api.Service) { constrain(s, "nonsense") }, node: labelled("x", "1"), want: true},
		{name: "a constraint that the node meets, and another image", service: func(s *api.Service) {
			constrain(s, "node.labels.x==1")
			container(s.Spec.Task).Image = "b"
		}, node: labelled("x", "1"), want: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s, task := aService(), aTask("t1", api.TaskState_RUNNING)
			s.SpecVersion = &api.Version{Index: 2}
			if tt.service != nil {
				tt.service(s)
			}
			if tt.task != nil {
				tt.task(task)
			}
			if got := Dirty(s, task, tt.node); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

func aService() *api.Service {
	return &api.Service{
		Id: serviceID, SpecVersion: &api.Version{Index: 1},
		Spec: &api.ServiceSpec{
			Annotations: &api.Annotations{Name: serviceID},
			Mode:        &api.ServiceSpec_Replicated{Replicated: &api.ReplicatedService{Replicas: 1}},
			Task: &api.TaskSpec{Runtime: &api.TaskSpec_Container{Container: &api.ContainerSpec{
				Image: "a", Env: []string{"A=1", "B=2"}, Labels: map[string]string{"a": "b"},
				Mounts: []*api.Mount{{Source: "s", Target: "/t"}},
			}}},
		},
	}
}

// start is when the tasks were made.
func start() time.Time { return time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC) }

// aTask is one of aService, on node n1.
func aTask(id string, state api.TaskState) *api.Task {
	t := NewTask(aService(), nil, 1, "n1", api.TaskState_RUNNING, id, start())
	t.Status.State = state
	return t
}

func constrain(s *api.Service, constraint string) {
	s.Spec.Task.Placement = &api.Placement{Constraints: []string{constraint}}
}

func labelled(key, value string) *api.Node {
	return &api.Node{Id: "n1", Spec: &api.NodeSpec{Annotations: &api.Annotations{Labels: map[string]string{key: value}}}}
}

func TestEnforce(t *testing.T) {
	const none, stopped = api.TaskState_RUNNING, api.TaskState_REJECTED
	reserve := func(cpu, memory int64) func(*api.Task) {
		return func(t *api.Task) {
			t.Spec.Resources = &api.ResourceRequirements{Reservations: &api.Resources{NanoCpus: cpu, MemoryBytes: memory}}
		}
	}
	generic := func(t *api.Task) {
		t.Spec.Resources = &api.ResourceRequirements{Reservations: &api.Resources{Generic: []*api.GenericResource{discrete("gpu", 2)}}}
	}
	tests := []struct {
		name    string
		service func(*api.Service)
		task    func(*api.Task)
		node    func(*api.Node)
		want    api.TaskState
		desired api.TaskState // RUNNING unless set
	}{
		{name: "fits", want: none},
		{name: "constraint is met", service: func(s *api.Service) { constrain(s, "node.labels.x==1") }, want: none},
		{name: "constraint is not met", service: func(s *api.Service) { constrain(s, "node.labels.x==2") }, want: stopped},
		{
			name: "constraint of a fenced service is not met", want: none, desired: api.TaskState_SHUTDOWN,
			service: func(s *api.Service) {
				constrain(s, "node.labels.x==2")
				label(s.Spec.Annotations, FenceLabel, "true")
			},
		},
		{
			name: "paused", service: func(s *api.Service) { constrain(s, "node.labels.x==2") },
			node: func(n *api.Node) { n.Spec.Availability = api.NodeSpec_PAUSE }, want: none,
		},
		{
			name: "down", service: func(s *api.Service) { constrain(s, "node.labels.x==2") },
			node: func(n *api.Node) { n.Status = &api.NodeStatus{State: api.NodeStatus_DOWN} }, want: none,
		},
		{
			name: "the task is to stop as it is", service: func(s *api.Service) { constrain(s, "node.labels.x==2") },
			task: func(t *api.Task) { t.DesiredState = api.TaskState_REMOVE }, want: none, desired: api.TaskState_REMOVE,
		},
		{name: "reserves what is there", task: reserve(4, 8), want: none},
		{name: "reserves more processors", task: reserve(5, 8), want: stopped},
		{name: "reserves more memory", task: reserve(4, 9), want: stopped},
		{name: "reserves a generic resource", task: generic, node: func(n *api.Node) {
			n.Description.Resources.Generic = []*api.GenericResource{discrete("gpu", 2)}
		}, want: none},
		{name: "reserves more of a generic resource", task: generic, node: func(n *api.Node) {
			n.Description.Resources.Generic = []*api.GenericResource{discrete("gpu", 1)}
		}, want: stopped},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s, task, n := aService(), aTask("t1", api.TaskState_RUNNING), labelled("x", "1")
			n.Description = &api.NodeDescription{Resources: &api.Resources{NanoCpus: 4, MemoryBytes: 8}}
			if tt.service != nil {
				tt.service(s)
			}
			if tt.task != nil {
				tt.task(task)
			}
			if tt.node != nil {
				tt.node(n)
			}
			if tt.desired == 0 {
				tt.desired = api.TaskState_RUNNING
			}
			v := NodeView{Node: n, Tasks: []*api.Task{task}, Services: map[string]*api.Service{serviceID: s}}
			state, desired := outcome(t, Enforce(v, start().Add(time.Minute)), task)
			if state != tt.want || desired != tt.desired {
				t.Errorf("got %v, desired %v; want %v, desired %v", state, desired, tt.want, tt.desired)
			}
		})
	}
}

func discrete(kind string, value int64) *api.GenericResource {
	return &api.GenericResource{Resource: &api.GenericResource_DiscreteResourceSpec{
		DiscreteResourceSpec: &api.DiscreteGenericResource{Kind: kind, Value: value},
	}}
}

// outcome returns what a plan makes of the only task.
func outcome(t *testing.T, p model.Plan, task *api.Task) (state, desired api.TaskState) {
	t.Helper()
	for _, c := range p.Changes {
		task = c.Object.(*api.Task)
	}
	if len(p.Changes) > 1 {
		t.Fatalf("more than one change: %v", p.Changes)
	}
	return task.GetStatus().GetState(), task.GetDesiredState()
}

func TestEnforceKeepsTheOldest(t *testing.T) {
	n := labelled("x", "1")
	n.Description = &api.NodeDescription{Resources: &api.Resources{MemoryBytes: 8}}
	v := NodeView{Node: n}
	for i, age := range []time.Duration{1, 3, 2} {
		task := aTask(fmt.Sprint("t", i), api.TaskState_RUNNING)
		task.Meta.CreatedAt = timestamppb.New(start().Add(-age))
		task.Spec.Resources = &api.ResourceRequirements{Reservations: &api.Resources{MemoryBytes: 4}}
		v.Tasks = append(v.Tasks, task)
	}
	p := Enforce(v, start())
	if len(p.Changes) != 1 || p.Changes[0].Object.GetId() != "t0" {
		t.Errorf("threw off %v, want the newest only", p.Changes)
	}
}

func TestOrphan(t *testing.T) {
	const running, given = api.TaskState_RUNNING, api.TaskState_ORPHANED
	tests := []struct {
		name   string
		node   api.NodeStatus_State
		state  api.TaskState
		down   time.Duration
		fenced bool
		want   api.TaskState
		wakes  bool
	}{
		{name: "ready", node: api.NodeStatus_READY, state: running, down: 48 * time.Hour, want: running},
		{name: "unknown", node: api.NodeStatus_UNKNOWN, state: running, down: 48 * time.Hour, want: running},
		{name: "down for less than a day", node: api.NodeStatus_DOWN, state: running, down: 24*time.Hour - 1, want: running, wakes: true},
		{name: "down for a day", node: api.NodeStatus_DOWN, state: running, down: 24 * time.Hour, want: given},
		{name: "fenced", node: api.NodeStatus_DOWN, state: running, down: 48 * time.Hour, fenced: true, want: running},
		{name: "assigned", node: api.NodeStatus_DOWN, state: api.TaskState_ASSIGNED, down: 24 * time.Hour, want: given},
		{name: "not assigned", node: api.NodeStatus_DOWN, state: api.TaskState_PENDING, down: 48 * time.Hour, want: api.TaskState_PENDING},
		{name: "ended", node: api.NodeStatus_DOWN, state: api.TaskState_FAILED, down: 48 * time.Hour, want: api.TaskState_FAILED},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s, task, n := aService(), aTask("t1", tt.state), labelled("x", "1")
			n.Status = &api.NodeStatus{State: tt.node}
			n.Meta = &api.Meta{UpdatedAt: timestamppb.New(start())}
			label(s.Spec.Annotations, FenceLabel, fmt.Sprint(tt.fenced))
			v := NodeView{Node: n, Tasks: []*api.Task{task}, Services: map[string]*api.Service{serviceID: s}}
			p := Orphan(v, start().Add(tt.down))
			if state, _ := outcome(t, p, task); state != tt.want {
				t.Errorf("got %v, want %v", state, tt.want)
			}
			if tt.wakes != p.Wake.Equal(start().Add(orphanAfter)) {
				t.Errorf("wakes at %v", p.Wake)
			}
		})
	}
}

// large is a view of a service of n tasks that ran, was scaled by one since, and whose
// tasks are therefore of another revision, with the same task spec.
func large(n int) View {
	s := aService()
	v := View{ServiceID: serviceID, Service: s, Nodes: map[string]*api.Node{"n1": labelled("x", "1")}}
	for i := range n {
		t := aTask(fmt.Sprintf("t%05d", i), api.TaskState_RUNNING)
		t.Slot = uint64(i + 1)
		v.Tasks = append(v.Tasks, t)
	}
	s.SpecVersion = &api.Version{Index: 2}
	s.Spec.GetReplicated().Replicas = uint64(n + 1)
	v.NewID = func() string { return "new" }
	return v
}

// A task of another revision costs no copy of its spec, at each of many decisions.
func TestDirtyAllocatesLittle(t *testing.T) {
	s, task := aService(), aTask("t1", api.TaskState_RUNNING)
	s.SpecVersion = &api.Version{Index: 2}
	if n := testing.AllocsPerRun(100, func() { Dirty(s, task, nil) }); n > 30 {
		t.Errorf("%v allocations to see that a task has the same spec", n)
	}
}

func TestScalingAllocatesLittle(t *testing.T) {
	const tasks = 1000
	v := large(tasks)
	if p := Decide(v, start().Add(time.Hour)); len(p.Changes) != 1 || p.Changes[0].Kind != model.Create {
		t.Fatalf("scaling by one: %v", p.Changes)
	}
	if n := testing.AllocsPerRun(5, func() { Decide(v, start().Add(time.Hour)) }); n > 40*tasks {
		t.Errorf("%v allocations for a decision about %d tasks", n, tasks)
	}
}

func BenchmarkScaleByOne(b *testing.B) {
	v := large(1000)
	b.ReportAllocs()
	for b.Loop() {
		Decide(v, start().Add(time.Hour))
	}
}
