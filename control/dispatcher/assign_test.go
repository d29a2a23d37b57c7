package dispatcher

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// edit changes a task in the state.
func (r *rig) edit(id string, change func(*api.Task)) {
	r.Helper()
	r.update(func(tx *store.Tx) error {
		t := model.Clone(tx.Snapshot().Task(id))
		change(t)
		return tx.Update(t)
	})
}

func (r *rig) setState(id string, state api.TaskState) {
	r.Helper()
	r.edit(id, func(t *api.Task) { t.Status.State = state })
}

func TestAssignmentsCompleteThenIncremental(t *testing.T) {
	inTerm(t, func(r *rig) {
		_, id := r.register("n1")
		feed := r.assignments("n1", id)
		feed.want("COMPLETE >1 +done +run")
		feed.quiet()
		r.update(func(tx *store.Tx) error { return tx.Create(aTask("new", "n1", api.TaskState_PENDING)) })
		feed.quiet() // preassigned, but not decided
		r.setState("new", api.TaskState_ASSIGNED)
		feed.want("INCREMENTAL 1>2 +new")
		r.setState("new", api.TaskState_RUNNING)
		feed.quiet() // that is what the node said
		r.edit("new", func(t *api.Task) { t.DesiredState = api.TaskState_SHUTDOWN })
		feed.want("INCREMENTAL 2>3 +new")
		r.update(func(tx *store.Tx) error { return tx.Remove(model.Tasks, "new") })
		feed.want("INCREMENTAL 3>4 -new")
		r.update(func(tx *store.Tx) error { return tx.Create(aTask("other", "n2", api.TaskState_ASSIGNED)) })
		feed.quiet()
		// A second stream begins anew.
		r.assignments("n1", id).want("COMPLETE >1 +done +run")
	}, aTask("run", "n1", api.TaskState_RUNNING), aTask("done", "n1", api.TaskState_COMPLETE),
		aTask("waits", "", api.TaskState_PENDING), aTask("foreign", "n2", api.TaskState_RUNNING))
}

func TestChangesOfATaskAreSentOnce(t *testing.T) {
	inTerm(t, func(r *rig) {
		_, id := r.register("n1")
		feed := r.assignments("n1", id)
		feed.want("COMPLETE >1 ")
		r.update(func(tx *store.Tx) error {
			if err := tx.Create(aTask("a", "n1", api.TaskState_ASSIGNED)); err != nil {
				return err
			}
			return tx.Create(aTask("b", "n1", api.TaskState_ASSIGNED))
		})
		feed.want("INCREMENTAL 1>2 +a +b")
	})
}

func TestSecretsOfAssignedTasksOnly(t *testing.T) {
	inTerm(t, func(r *rig) {
		_, id := r.register("n1")
		feed := r.assignments("n1", id)
		feed.want("COMPLETE >1 +a +done +k1 +s1")
		r.update(func(tx *store.Tx) error { return tx.Create(aTask("b", "n1", api.TaskState_ASSIGNED, uses("s1", "k2"))) })
		feed.want("INCREMENTAL 1>2 +b +k2") // s1 is there
		r.setState("a", api.TaskState_FAILED)
		feed.want("INCREMENTAL 2>3 -k1") // s1 is used by b
		r.update(func(tx *store.Tx) error { return tx.Remove(model.Tasks, "b") })
		feed.want("INCREMENTAL 3>4 -b -k2 -s1")
		r.update(func(tx *store.Tx) error {
			return tx.Create(aTask("c", "n1", api.TaskState_ASSIGNED, uses("absent", "absent")))
		})
		feed.want("INCREMENTAL 4>5 +c") // the node says what is missing
	}, aSecret("s1"), aSecret("s2"), aSecret("s3"), aConfig("k1"), aConfig("k2"), aConfig("k3"),
		aTask("a", "n1", api.TaskState_RUNNING, uses("s1", "k1")),
		aTask("done", "n1", api.TaskState_COMPLETE, uses("s2", "k2")),
		aTask("foreign", "n2", api.TaskState_RUNNING, uses("s3", "k3")))
}

// TestSecretDrivers: a driver is asked for each node, or for each task if it says so; what it
// does not give, the node misses.
func TestSecretDrivers(t *testing.T) {
	driven := func(id string) *api.Secret {
		s := aSecret(id)
		s.Spec.Data, s.Spec.Driver = nil, &api.Driver{Name: "vault"}
		return s
	}
	inTerm(t, func(r *rig) {
		asked := map[string]int{}
		r.d.cfg.Secret = func(_ context.Context, s *api.Secret, task *api.Task) ([]byte, bool, error) {
			asked[s.GetId()+" for "+task.GetId()]++
			if s.GetId() == "fails" {
				return nil, false, errors.New("sealed")
			}
			return make([]byte, 100), s.GetId() == "shared", nil
		}
		_, id := r.register("n1")
		feed := r.assignments("n1", id)
		feed.want("COMPLETE >1 +a +b +c +d +e +own.c! +own.d! +shared!")
		want := map[string]int{"own for c": 1, "own for d": 1, "fails for e": 1}
		for _, user := range []string{"a", "b"} { // the first of the two
			if asked["shared for "+user] > 0 {
				want["shared for "+user] = 1
				break
			}
		}
		if !maps.Equal(asked, want) {
			t.Errorf("asked %v", asked)
		}
		r.setState("c", api.TaskState_FAILED)
		feed.want("INCREMENTAL 1>2 -own.c")
	}, driven("shared"), driven("own"), driven("fails"),
		aTask("a", "n1", api.TaskState_RUNNING, uses("shared", "")), aTask("b", "n1", api.TaskState_RUNNING, uses("shared", "")),
		aTask("c", "n1", api.TaskState_RUNNING, uses("own", "")), aTask("d", "n1", api.TaskState_RUNNING, uses("own", "")),
		aTask("e", "n1", api.TaskState_RUNNING, uses("fails", "")))
}

func TestManyChangesGoInParts(t *testing.T) {
	inTerm(t, func(r *rig) {
		_, id := r.register("n1")
		feed := r.assignments("n1", id)
		feed.want("COMPLETE >1 ")
		r.update(func(tx *store.Tx) error {
			for i := range maxChanges + 10 {
				if err := tx.Create(aTask(fmt.Sprintf("t%04d", i), "n1", api.TaskState_ASSIGNED)); err != nil {
					return err
				}
			}
			return nil
		})
		for total := 0; total < maxChanges+10; { // how many the first takes along depends on when it was woken
			n := len(feed.next().GetChanges())
			if n == 0 || n > maxChanges {
				t.Fatalf("a message with %d changes after %d", n, total)
			}
			total += n
		}
	})
}

func TestStatusIsWritten(t *testing.T) {
	inTerm(t, func(r *rig) {
		_, id := r.register("n1")
		if err := r.report("n1", id, "a", api.TaskState_RUNNING); err != nil {
			t.Fatal(err)
		}
		s := r.state.View().Task("a").GetStatus()
		if s.GetState() != api.TaskState_RUNNING || s.GetAppliedBy() != "m1" || s.GetAppliedAt() == nil {
			t.Errorf("status %v", s)
		}
		if err := r.report("n1", id, "a", api.TaskState_PREPARING); err != nil {
			t.Error(err)
		}
		if s := r.state.View().Task("a").GetStatus(); s.GetState() != api.TaskState_RUNNING {
			t.Errorf("a lower state was written: %v", s)
		}
		version := r.state.View().Task("a").GetMeta().GetVersion().GetIndex()
		if err := r.report("n1", id, "a", api.TaskState_RUNNING); err != nil {
			t.Error(err)
		}
		if again := r.state.View().Task("a").GetMeta().GetVersion().GetIndex(); again != version {
			t.Error("a report that says nothing new was written")
		}
		if err := r.report("n1", id, "unknown", api.TaskState_RUNNING); err != nil {
			t.Errorf("report on an unknown task: %v", err)
		}
	}, aTask("a", "n1", api.TaskState_ASSIGNED))
}

func TestStatusOfForeignTasksIsRefused(t *testing.T) {
	inTerm(t, func(r *rig) {
		_, id := r.register("n1")
		wantStatus(t, r.report("n1", id, "b", api.TaskState_FAILED), codes.PermissionDenied, "cannot update a task not assigned this node")
		if s := r.state.View().Task("b").GetStatus(); s.GetState() != api.TaskState_RUNNING {
			t.Errorf("status %v", s)
		}
	}, aTask("b", "n2", api.TaskState_RUNNING))
}

func TestStatusesAreWrittenInBatches(t *testing.T) {
	var tasks []model.Object
	for i := range 50 {
		tasks = append(tasks, aTask(fmt.Sprintf("t%02d", i), "n1", api.TaskState_ASSIGNED))
	}
	inTerm(t, func(r *rig) {
		_, id := r.register("n1")
		before := r.state.View().Index()
		req := &api.UpdateTaskStatusRequest{SessionId: id}
		for i := range 50 {
			for _, s := range []api.TaskState{api.TaskState_ACCEPTED, api.TaskState_RUNNING, api.TaskState_PREPARING} {
				req.Updates = append(req.Updates, &api.UpdateTaskStatusRequest_TaskStatusUpdate{
					TaskId: fmt.Sprintf("t%02d", i), Status: &api.TaskStatus{State: s},
				})
			}
		}
		req.Updates = append(req.Updates, &api.UpdateTaskStatusRequest_TaskStatusUpdate{TaskId: "t00"})
		began := time.Now()
		if _, err := r.d.UpdateTaskStatus(r.as("n1"), req); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		for task := range r.state.View().Tasks() {
			if task.GetStatus().GetState() != api.TaskState_RUNNING {
				t.Errorf("task %s is %s", task.GetId(), task.GetStatus().GetState())
			}
		}
		if n := r.state.View().Index() - before; n != 1 {
			t.Errorf("150 reports on 50 tasks were written in %d entries, want 1", n)
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("reports waited %v for a timer", took)
		}
	}, tasks...)
}
