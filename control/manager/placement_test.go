package manager

import (
	"fmt"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/sched"
	"github.com/skep-dev/skep/core/store"
)

// placing is a manager, its store with two nodes and waiting tasks, and the scheduler's
// decisions about them, which were not proposed yet.
type placing struct {
	*testing.T

	m      *Manager
	state  *replica.Memory
	cursor *replica.Cursor
	sched  *sched.State
	plan   model.Plan
	reg    *prometheus.Registry
}

func newPlacing(t *testing.T, tasks int) *placing {
	t.Helper()
	p := &placing{T: t, state: replica.NewMemory(store.Empty()), reg: prometheus.NewRegistry()}
	p.m = New(Config{State: p.state, NodeID: "node00", Registerer: p.reg})
	p.cursor = p.state.Follow()
	p.update(func(tx *store.Tx) error {
		for i := range 2 {
			if err := tx.Create(readyNode(i)); err != nil {
				return err
			}
		}
		for i := range tasks {
			task := &api.Task{
				Id: fmt.Sprintf("task%04d", i), ServiceId: "web", Slot: uint64(i + 1), DesiredState: api.TaskState_RUNNING,
				Status: &api.TaskStatus{State: api.TaskState_PENDING}, Spec: &api.TaskSpec{},
			}
			if err := tx.Create(task); err != nil {
				return err
			}
		}
		return nil
	})
	p.cursor.Drain()
	p.sched = schedulerState(p.cursor.Snapshot())
	p.plan = p.sched.Schedule(time.Now())
	return p
}

func (p *placing) update(f func(*store.Tx) error) {
	p.Helper()
	if _, err := p.state.Update(p.Context(), f); err != nil {
		p.Fatal(err)
	}
}

func (p *placing) place() {
	p.Helper()
	if err := p.m.place(p.Context(), p.sched, p.plan.Changes); err != nil {
		p.Fatal(err)
	}
}

// counted returns the placements that the metric has.
func (p *placing) counted() float64 {
	p.Helper()
	families, err := p.reg.Gather()
	if err != nil {
		p.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "skep_manager_placements_total" {
			return f.GetMetric()[0].GetCounter().GetValue()
		}
	}
	p.Fatal("the metric is missing")
	return 0
}

// again takes note of what happened and places once more.
func (p *placing) again() {
	p.Helper()
	events, reset := p.cursor.Drain()
	p.sched = advance(p.sched, p.cursor.Snapshot(), events, reset)
	p.plan = p.sched.Schedule(time.Now())
	p.place()
	events, reset = p.cursor.Drain()
	p.sched = advance(p.sched, p.cursor.Snapshot(), events, reset)
}

// TestPlaceInManyEntries writes a large plan in entries of a bounded size, all of it.
func TestPlaceInManyEntries(t *testing.T) {
	const tasks = 3*maxObjects + 7
	p := newPlacing(t, tasks)
	p.place()
	perNode := make(map[string]int)
	entries := make(map[uint64]int)
	for task := range p.state.View().Tasks() {
		if task.GetStatus().GetState() != api.TaskState_ASSIGNED {
			t.Errorf("%s is %s", task.GetId(), task.GetStatus().GetState())
		}
		perNode[task.GetNodeId()]++
		entries[task.GetMeta().GetVersion().GetIndex()]++
	}
	if perNode[nodeID(0)] != (tasks+1)/2 || perNode[nodeID(1)] != tasks/2 {
		t.Errorf("per node: %v", perNode)
	}
	for index, n := range entries {
		if n > maxObjects {
			t.Errorf("entry %d has %d records", index, n)
		}
	}
	if len(entries) != 4 {
		t.Errorf("%d entries, want 4", len(entries))
	}
	if got := p.counted(); got != tasks {
		t.Errorf("%v placements counted, want %d", got, tasks)
	}
	p.again()
	if p.sched.Pending() {
		t.Error("there is still something to look at")
	}
}

// TestPlaceOnDrainedNode: the node was drained after the decision. The task must not go
// there, and the scheduler must hear of it.
func TestPlaceOnDrainedNode(t *testing.T) {
	p := newPlacing(t, 2)
	p.update(func(tx *store.Tx) error {
		n := model.Clone(tx.Snapshot().Node(nodeID(1)))
		n.Spec.Availability = api.NodeSpec_DRAIN
		return tx.Update(n)
	})
	p.place()
	where := func() map[string]string {
		out := make(map[string]string)
		for task := range p.state.View().Tasks() {
			out[task.GetId()] = task.GetNodeId()
		}
		return out
	}
	if got := where(); got["task0000"] != nodeID(0) || got["task0001"] != "" {
		t.Fatalf("placed %v, want only task0000", got)
	}
	if !p.sched.Pending() {
		t.Error("the scheduler does not know that its decision was dropped")
	}
	p.again()
	if got := where(); got["task0001"] != nodeID(0) {
		t.Errorf("placed %v in the end", got)
	}
}

// TestPlaceChangedTask: the task was stopped, or removed, after the decision.
func TestPlaceChangedTask(t *testing.T) {
	p := newPlacing(t, 3)
	p.update(func(tx *store.Tx) error {
		stopped := model.Clone(tx.Snapshot().Task("task0000"))
		stopped.DesiredState = api.TaskState_SHUTDOWN
		if err := tx.Update(stopped); err != nil {
			return err
		}
		return tx.Remove(model.Tasks, "task0001")
	})
	p.place()
	s := p.state.View()
	if got := s.Task("task0000"); got.GetNodeId() != "" || got.GetDesiredState() != api.TaskState_SHUTDOWN {
		t.Errorf("the stopped task was placed: %v", got)
	}
	if s.Task("task0001") != nil {
		t.Error("the removed task is back")
	}
	if s.Task("task0002").GetNodeId() == "" {
		t.Error("the third task suffers from it")
	}
	p.again()
	if got := p.state.View().Task("task0000").GetStatus().GetState(); got != api.TaskState_SHUTDOWN {
		t.Errorf("the stopped task is %s", got)
	}
	if got := p.counted(); got != 1 {
		t.Errorf("%v placements counted, want 1", got)
	}
}

// TestRefuse explains with the names that people know.
func TestRefuse(t *testing.T) {
	p := newPlacing(t, 1)
	task := &api.Task{Id: "x", Spec: &api.TaskSpec{Placement: &api.Placement{Constraints: []string{"node.labels.n == 1"}}}}
	got := Refuse(p.state.View(), task, time.Now())
	if len(got) != 1 || got[0].GetFilter() != "Constraint" || got[0].GetReason() != "scheduling constraints not satisfied on 1 node" ||
		len(got[0].GetNodeNames()) != 1 || got[0].GetNodeNames()[0] != "host00" || got[0].GetNodeIds()[0] != nodeID(0) {
		t.Errorf("refused by %v", got)
	}
}
