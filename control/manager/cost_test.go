package manager

import (
	"fmt"
	"testing"
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/orch"
	"github.com/skep-dev/skep/core/store"
)

// beside returns a controller over a store with a service "web" that lacks one of 10
// tasks, beside some tasks of other services on the same nodes.
func beside(tb testing.TB, others int) *services {
	tb.Helper()
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	tx := store.Begin(store.Empty(), 1, now)
	create := func(o model.Object) {
		if err := tx.Create(o); err != nil {
			tb.Fatal(err)
		}
	}
	for i := range 10 {
		create(readyNode(i))
	}
	add := func(id string, replicas, have int) {
		s := &api.Service{Id: id, SpecVersion: &api.Version{}, Spec: &api.ServiceSpec{
			Annotations: &api.Annotations{Name: id},
			Mode:        &api.ServiceSpec_Replicated{Replicated: &api.ReplicatedService{Replicas: uint64(replicas)}},
			Task:        &api.TaskSpec{Runtime: &api.TaskSpec_Container{Container: &api.ContainerSpec{Image: "a"}}},
		}, Endpoint: &api.Endpoint{Spec: &api.EndpointSpec{}}}
		create(s)
		for i := range have {
			t := orch.NewTask(s, nil, uint64(i+1), nodeID(i%10), api.TaskState_RUNNING, fmt.Sprintf("%s-%d", id, i), now)
			t.Status.State = api.TaskState_RUNNING
			create(t)
		}
	}
	add("web", 10, 9)
	for i := range others / 100 {
		add(fmt.Sprintf("other%d", i), 100, 100)
	}
	m := New(Config{State: replica.NewMemory(tx.Commit(1)), NodeID: nodeID(0)})
	c := &services{Manager: m, cursor: m.state.Follow()}
	c.restart()
	return c
}

// decide decides about "web" once and returns what is to be proposed.
func (c *services) decide(tb testing.TB) model.Change {
	tb.Helper()
	b := new(batch)
	c.decideService(tb.Context(), c.cursor.Snapshot(), "web", time.Date(2026, 1, 1, 1, 0, 0, 0, time.UTC), b)
	if b.objects != 1 {
		tb.Fatalf("decided %v, want one new task", b.units)
	}
	return b.units[0].changes[0]
}

// A decision costs what the service has, not what the swarm has, and comes out the same.
func TestDecisionDoesNotDependOnOthers(t *testing.T) {
	few, many := beside(t, 1000), beside(t, 100_000)
	for _, c := range []*services{few, many} {
		if task, ok := c.decide(t).Object.(*api.Task); !ok || task.GetSlot() != 10 {
			t.Errorf("decided %v, want a task in slot 10", task)
		}
	}
	least := testing.AllocsPerRun(50, func() { few.decide(t) })
	most := testing.AllocsPerRun(50, func() { many.decide(t) })
	if most > least+least/10 {
		t.Errorf("%v allocations beside 100,000 tasks, %v beside 1,000", most, least)
	}
}

func BenchmarkDecideBeside(b *testing.B) {
	for _, others := range []int{1000, 100_000} {
		b.Run(fmt.Sprint(others), func(b *testing.B) {
			c := beside(b, others)
			b.ReportAllocs()
			for b.Loop() {
				c.decide(b)
			}
		})
	}
}
