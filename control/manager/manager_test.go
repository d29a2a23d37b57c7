package manager

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
)

// swarm is a leader over a store in memory, with agents that do as they are told. It
// lives in a synctest bubble.
type swarm struct {
	*testing.T

	ctx   context.Context //nolint:containedctx // the test's
	state *replica.Memory
	stop  func() // ends the term
	// fate says how a task ends: the state it goes to once it would be running, after a
	// while; RUNNING means that it runs until it is told to stop.
	fate func(*api.Task) (api.TaskState, time.Duration)
	// taken waits for nodes to take up keys; nil waits for nobody.
	taken func(context.Context, uint64) error
	// deaf nodes do nothing.
	deaf map[string]bool
}

func run(t *testing.T, nodes int, f func(*swarm)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &swarm{T: t, ctx: t.Context(), state: replica.NewMemory(store.Empty()), deaf: make(map[string]bool)}
		s.fate = func(*api.Task) (api.TaskState, time.Duration) { return api.TaskState_RUNNING, 0 }
		s.update(func(tx *store.Tx) error {
			for i := range nodes {
				if err := tx.Create(readyNode(i)); err != nil {
					return err
				}
			}
			return nil
		})
		s.lead()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); s.agents(ctx) }()
		f(s)
		s.stop()
		cancel()
		<-done
	})
}

func nodeID(i int) string { return fmt.Sprintf("node%02d", i) }

func readyNode(i int) *api.Node {
	return &api.Node{
		Id:     nodeID(i),
		Spec:   &api.NodeSpec{Annotations: &api.Annotations{Labels: map[string]string{"n": fmt.Sprint(i)}}},
		Status: &api.NodeStatus{State: api.NodeStatus_READY, Addr: fmt.Sprintf("10.0.0.%d", i)},
		Description: &api.NodeDescription{
			Hostname: fmt.Sprintf("host%02d", i), Resources: &api.Resources{NanoCpus: 4e9, MemoryBytes: 8 << 30},
		},
	}
}

// lead starts a new term, after ending the old one.
func (s *swarm) lead() {
	if s.stop != nil {
		s.stop()
	}
	m := New(Config{State: s.state, NodeID: "node00", KeysTaken: s.taken, Bootstrap: &Bootstrap{ClusterID: "cluster", RootCA: &api.RootCA{}}})
	ctx, cancel := context.WithCancel(s.ctx)
	done := make(chan error, 1)
	go func() { done <- m.RunTerm(ctx) }()
	s.stop = func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			s.Errorf("term ended: %v", err)
		}
	}
	synctest.Wait()
}

func (s *swarm) update(f func(*store.Tx) error) {
	s.Helper()
	if _, err := s.state.Update(s.ctx, f); err != nil {
		s.Fatal(err)
	}
}

// agents moves assigned tasks on, and stops those that are told to.
func (s *swarm) agents(ctx context.Context) {
	cursor := s.state.Follow()
	ends := newAgenda()
	for {
		var todo []*api.Task
		now := time.Now()
		for t := range cursor.Snapshot().Tasks() {
			if next := s.next(cursor.Snapshot(), t, ends, now); next != nil {
				todo = append(todo, next)
			}
		}
		if len(todo) > 0 {
			_, err := s.state.Update(ctx, func(tx *store.Tx) error {
				for _, t := range todo {
					if same(tx.Snapshot(), t) {
						if err := tx.Update(t); err != nil {
							return err
						}
					}
				}
				return nil
			})
			if err != nil {
				return
			}
		}
		if events, _ := cursor.Drain(); len(todo) > 0 || len(events) > 0 {
			continue // what was looked at is old by now
		}
		if ends.wait(ctx, cursor.Changed()) != nil {
			return
		}
		ends.due(time.Now())
		cursor.Drain()
	}
}

// next returns what a task is after its agent's next step, or nil.
func (s *swarm) next(snap *store.Snapshot, t *api.Task, ends *agenda, now time.Time) *api.Task {
	state := t.GetStatus().GetState()
	n := snap.Node(t.GetNodeId())
	if state < api.TaskState_ASSIGNED || model.Terminal(state) || n.GetStatus().GetState() != api.NodeStatus_READY || s.deaf[t.GetNodeId()] {
		return nil
	}
	to := func(state api.TaskState) *api.Task {
		t := model.Clone(t)
		t.Status = &api.TaskStatus{State: state, Timestamp: timestamppb.New(now), AppliedAt: timestamppb.New(now)}
		return t
	}
	switch {
	case t.GetDesiredState() >= api.TaskState_SHUTDOWN:
		return to(api.TaskState_SHUTDOWN)
	case state < api.TaskState_READY:
		return to(api.TaskState_READY)
	case state == api.TaskState_READY && t.GetDesiredState() >= api.TaskState_RUNNING:
		return to(api.TaskState_RUNNING)
	case state == api.TaskState_RUNNING:
		end, after := s.fate(t)
		if end == api.TaskState_RUNNING {
			return nil
		}
		if at := statusTime(t).Add(after); at.After(now) {
			ends.set(t.GetId(), at)
			return nil
		}
		return to(end)
	}
	return nil
}

func service(replicas uint64, image string) *api.Service {
	return &api.Service{
		Id: "svc", SpecVersion: &api.Version{},
		Spec: &api.ServiceSpec{
			Annotations: &api.Annotations{Name: "web"},
			Mode:        &api.ServiceSpec_Replicated{Replicated: &api.ReplicatedService{Replicas: replicas}},
			Task:        taskSpec(image),
		},
	}
}

func taskSpec(image string) *api.TaskSpec {
	return &api.TaskSpec{Runtime: &api.TaskSpec_Container{Container: &api.ContainerSpec{Image: image}}}
}

func (s *swarm) create(o model.Object) {
	s.Helper()
	s.update(func(tx *store.Tx) error { return tx.Create(o) })
}

// edit changes the service as an API request would.
func (s *swarm) edit(f func(*api.ServiceSpec)) {
	s.Helper()
	s.update(func(tx *store.Tx) error {
		svc := model.Clone(tx.Snapshot().Service("svc"))
		svc.PreviousSpec, svc.PreviousSpecVersion = model.Clone(svc.Spec), svc.SpecVersion
		svc.SpecVersion = &api.Version{Index: svc.GetMeta().GetVersion().GetIndex()}
		svc.UpdateStatus = nil
		f(svc.Spec)
		return tx.Update(svc)
	})
}

func (s *swarm) editNode(id string, f func(*api.Node)) {
	s.Helper()
	s.update(func(tx *store.Tx) error {
		n := model.Clone(tx.Snapshot().Node(id))
		f(n)
		return tx.Update(n)
	})
}

// running lists "image@node" of the tasks that run and shall.
func (s *swarm) running() []string {
	synctest.Wait()
	var out []string
	for t := range s.state.View().Tasks() {
		if t.GetStatus().GetState() == api.TaskState_RUNNING && t.GetDesiredState() == api.TaskState_RUNNING {
			out = append(out, t.GetSpec().GetContainer().GetImage()+"@"+t.GetNodeId())
		}
	}
	slices.Sort(out)
	return out
}

func (s *swarm) want(n int, image string) {
	s.Helper()
	got := s.running()
	for _, r := range got {
		if !strings.HasPrefix(r, image+"@") {
			s.Fatalf("want %d of %s, running: %v", n, image, got)
		}
	}
	if len(got) != n {
		s.Fatalf("want %d of %s, running %v\n%s", n, image, got, s.dump())
	}
}

func (s *swarm) dump() string {
	var b strings.Builder
	for t := range s.state.View().Tasks() {
		fmt.Fprintf(&b, "%d %s node=%s %s/%s %s %s\n", t.GetSlot(), t.GetSpec().GetContainer().GetImage(), t.GetNodeId(),
			model.StateName(t.GetStatus().GetState()), model.StateName(t.GetDesiredState()), t.GetStatus().GetMessage(), t.GetStatus().GetErr())
	}
	return b.String()
}

func (s *swarm) updateState() string {
	synctest.Wait()
	return s.state.View().Service("svc").GetUpdateStatus().GetState().String()
}

func TestCreateScaleRemove(t *testing.T) {
	run(t, 3, func(s *swarm) {
		start := time.Now()
		s.create(service(6, "a"))
		s.want(6, "a")
		if took := time.Since(start); took != 0 {
			t.Errorf("timers on the way: took %v", took)
		}
		for i := range 3 {
			if n := len(slices.Collect(s.state.View().TasksByNode(nodeID(i)))); n != 2 {
				t.Errorf("%d tasks on node %d, want 2", n, i)
			}
		}
		s.edit(func(spec *api.ServiceSpec) { spec.GetReplicated().Replicas = 450 })
		s.want(450, "a")
		s.edit(func(spec *api.ServiceSpec) { spec.GetReplicated().Replicas = 2 })
		s.want(2, "a")
		if n := s.state.View().Len(model.Tasks); n != 2 {
			t.Errorf("%d tasks kept, want 2", n)
		}
		s.update(func(tx *store.Tx) error { return tx.Remove(model.Services, "svc") })
		s.want(0, "")
		if n := s.state.View().Len(model.Tasks); n != 0 {
			t.Errorf("%d tasks kept of a removed service", n)
		}
	})
}

func TestRestartWaitsForTheDelay(t *testing.T) {
	run(t, 2, func(s *swarm) {
		failed := false
		s.fate = func(*api.Task) (api.TaskState, time.Duration) {
			if failed {
				return api.TaskState_RUNNING, 0
			}
			failed = true
			return api.TaskState_FAILED, 0
		}
		s.create(service(1, "a"))
		s.want(0, "a")
		time.Sleep(4900 * time.Millisecond)
		s.want(0, "a")
		time.Sleep(200 * time.Millisecond)
		s.want(1, "a")
	})
}

func TestMaxAttemptsSurviveLeaders(t *testing.T) {
	run(t, 1, func(s *swarm) {
		s.fate = func(*api.Task) (api.TaskState, time.Duration) { return api.TaskState_FAILED, time.Second }
		svc := service(1, "a")
		svc.Spec.Task.Restart = &api.RestartPolicy{
			Condition: api.RestartPolicy_ON_FAILURE, MaxAttempts: 3, Delay: durationpb.New(2 * time.Second),
		}
		s.create(svc)
		for range 10 {
			time.Sleep(1500 * time.Millisecond)
			s.lead()
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := s.state.View().Len(model.Tasks); n != 4 {
			t.Errorf("%d tasks, want the first and 3 attempts\n%s", n, s.dump())
		}
	})
}

func TestDrainMovesAtOnce(t *testing.T) {
	run(t, 3, func(s *swarm) {
		s.create(service(6, "a"))
		s.want(6, "a")
		s.editNode(nodeID(0), func(n *api.Node) { n.Spec.Availability = api.NodeSpec_DRAIN })
		s.want(6, "a")
		for _, r := range s.running() {
			if strings.HasSuffix(r, nodeID(0)) {
				t.Errorf("drained node runs %s", r)
			}
		}
	})
}

func TestNodeDownReplaces(t *testing.T) {
	run(t, 3, func(s *swarm) {
		s.create(service(3, "a"))
		s.want(3, "a")
		s.editNode(nodeID(1), func(n *api.Node) { n.Status.State = api.NodeStatus_DOWN })
		s.want(3, "a")
		// The old one keeps its last status for a day.
		time.Sleep(23 * time.Hour)
		synctest.Wait()
		orphans := func() (n int) {
			for t := range s.state.View().TasksByNode(nodeID(1)) {
				if t.GetStatus().GetState() == api.TaskState_ORPHANED {
					n++
				}
			}
			return n
		}
		if orphans() != 0 {
			t.Errorf("orphaned too early")
		}
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		if orphans() != 1 {
			t.Errorf("not orphaned after a day\n%s", s.dump())
		}
	})
}

func TestRollingUpdateAcrossLeaders(t *testing.T) {
	run(t, 3, func(s *swarm) {
		svc := service(6, "a")
		svc.Spec.Update = &api.UpdateConfig{Parallelism: 2, Delay: durationpb.New(10 * time.Second)}
		s.create(svc)
		s.want(6, "a")
		start := time.Now()
		s.edit(func(spec *api.ServiceSpec) { spec.Task = taskSpec("b") })
		least := 6
		for s.updateState() != "COMPLETED" {
			time.Sleep(time.Second)
			least = min(least, len(s.running()))
			if time.Since(start) == 15*time.Second {
				s.lead()
			}
			if time.Since(start) > 5*time.Minute {
				t.Fatalf("update hangs: %v\n%s", s.state.View().Service("svc").GetUpdateStatus(), s.dump())
			}
		}
		s.want(6, "b")
		if least < 4 {
			t.Errorf("only %d tasks ran, want at least 4", least)
		}
		// Three delays; the new leader begins one delay and one monitor period again.
		if took := time.Since(start); took < 30*time.Second || took > 47*time.Second {
			t.Errorf("update took %v", took)
		}
	})
}

func TestFailingUpdateRollsBack(t *testing.T) {
	for _, order := range []api.UpdateConfig_UpdateOrder{api.UpdateConfig_STOP_FIRST, api.UpdateConfig_START_FIRST} {
		t.Run(order.String(), func(t *testing.T) {
			run(t, 3, func(s *swarm) {
				s.fate = func(t *api.Task) (api.TaskState, time.Duration) {
					if t.GetSpec().GetContainer().GetImage() == "bad" {
						return api.TaskState_FAILED, time.Second
					}
					return api.TaskState_RUNNING, 0
				}
				svc := service(4, "good")
				svc.Spec.Update = &api.UpdateConfig{Parallelism: 1, FailureAction: api.UpdateConfig_ROLLBACK, Order: order}
				s.create(svc)
				s.want(4, "good")
				time.Sleep(time.Second)
				s.edit(func(spec *api.ServiceSpec) { spec.Task = taskSpec("bad") })
				time.Sleep(3 * time.Second)
				if state := s.updateState(); state != "ROLLBACK_STARTED" {
					t.Errorf("update state %s\n%s", state, s.dump())
				}
				time.Sleep(time.Minute)
				s.want(4, "good")
				status := s.state.View().Service("svc").GetUpdateStatus()
				if status.GetState() != api.UpdateStatus_ROLLBACK_COMPLETED || status.GetMessage() != "rollback completed" {
					t.Errorf("update status %v", status)
				}
			})
		})
	}
}

func TestFailingUpdatePauses(t *testing.T) {
	run(t, 3, func(s *swarm) {
		s.fate = func(t *api.Task) (api.TaskState, time.Duration) {
			if t.GetSpec().GetContainer().GetImage() == "bad" {
				return api.TaskState_FAILED, time.Second
			}
			return api.TaskState_RUNNING, 0
		}
		svc := service(4, "good")
		svc.Spec.Update = &api.UpdateConfig{Parallelism: 1, Delay: durationpb.New(2 * time.Second)}
		s.create(svc)
		s.want(4, "good")
		s.edit(func(spec *api.ServiceSpec) { spec.Task = taskSpec("bad") })
		time.Sleep(time.Minute)
		status := s.state.View().Service("svc").GetUpdateStatus()
		if status.GetState() != api.UpdateStatus_PAUSED ||
			!strings.HasPrefix(status.GetMessage(), "update paused due to failure or early termination of task ") {
			t.Errorf("update status %v", status)
		}
		good := 0
		for _, r := range s.running() {
			if strings.HasPrefix(r, "good@") {
				good++
			}
		}
		if good != 3 {
			t.Errorf("%d good tasks run, want 3", good)
		}
	})
}

// A task that was told to stop, and did so at the instant its successor was made, counted
// now and then as one that had ended by itself: its slot then waited for the restart delay.
func TestUpdateNeverWaitsForTheRestartDelay(t *testing.T) {
	for range 20 {
		run(t, 3, func(s *swarm) {
			svc := service(4, "a")
			svc.Spec.Update = &api.UpdateConfig{Parallelism: 1}
			s.create(svc)
			s.want(4, "a")
			s.edit(func(spec *api.ServiceSpec) { spec.Task = taskSpec("b") })
			s.want(4, "b")
		})
	}
}

func TestGlobalFollowsNodes(t *testing.T) {
	run(t, 3, func(s *swarm) {
		svc := service(0, "a")
		svc.Spec.Mode = &api.ServiceSpec_Global{Global: &api.GlobalService{}}
		svc.Spec.Task.Placement = &api.Placement{Constraints: []string{"node.labels.n != 2"}}
		s.create(svc)
		s.want(2, "a")
		s.create(readyNode(3))
		s.want(3, "a")
		s.editNode(nodeID(2), func(n *api.Node) { n.Spec.Annotations.Labels["n"] = "9" })
		s.want(4, "a")
		s.editNode(nodeID(1), func(n *api.Node) { n.Spec.Availability = api.NodeSpec_DRAIN })
		s.want(3, "a")
		s.editNode(nodeID(1), func(n *api.Node) { n.Spec.Availability = api.NodeSpec_ACTIVE })
		s.want(4, "a")
		s.edit(func(spec *api.ServiceSpec) { spec.Task = taskSpec("b") })
		time.Sleep(time.Minute)
		s.want(4, "b")
	})
}

func TestJobs(t *testing.T) {
	run(t, 3, func(s *swarm) {
		s.fate = func(*api.Task) (api.TaskState, time.Duration) { return api.TaskState_COMPLETE, time.Second }
		svc := service(0, "a")
		svc.Spec.Mode = &api.ServiceSpec_ReplicatedJob{ReplicatedJob: &api.ReplicatedJob{MaxConcurrent: 2, TotalCompletions: 5}}
		svc.JobStatus = &api.JobStatus{JobIteration: &api.Version{}}
		s.create(svc)
		time.Sleep(time.Minute)
		synctest.Wait()
		done := 0
		for t := range s.state.View().Tasks() {
			if t.GetStatus().GetState() == api.TaskState_COMPLETE {
				done++
			}
		}
		if done != 5 || s.state.View().Len(model.Tasks) != 5 {
			t.Errorf("%d completed\n%s", done, s.dump())
		}
	})
}

func TestUnplaceableSaysWhyAndIsPlacedLater(t *testing.T) {
	run(t, 2, func(s *swarm) {
		svc := service(1, "a")
		svc.Spec.Task.Placement = &api.Placement{Constraints: []string{"node.labels.disk == ssd"}}
		s.create(svc)
		s.want(0, "a")
		for task := range s.state.View().Tasks() {
			if got := task.GetStatus().GetErr(); got != "no suitable node (scheduling constraints not satisfied on 2 nodes)" {
				t.Errorf("err %q", got)
			}
			refusals := Refuse(s.state.View(), task, time.Now())
			if len(refusals) != 1 || refusals[0].GetFilter() != "Constraint" || len(refusals[0].GetNodeIds()) != 2 {
				t.Errorf("refusals %v", refusals)
			}
		}
		s.editNode(nodeID(1), func(n *api.Node) { n.Spec.Annotations.Labels["disk"] = "ssd" })
		s.want(1, "a")
		// And thrown out again, with nowhere to go.
		s.editNode(nodeID(1), func(n *api.Node) { delete(n.Spec.Annotations.Labels, "disk") })
		s.want(0, "a")
	})
}

// TestKeysRotateByTheirAge: whoever leads, however often that changes.
func TestKeysRotateByTheirAge(t *testing.T) {
	run(t, 0, func(s *swarm) {
		clock := s.state.View().Cluster().GetEncryptionKeyLamportClock()
		for range 13 {
			time.Sleep(time.Hour)
			s.lead()
		}
		if now := s.state.View().Cluster().GetEncryptionKeyLamportClock(); now != clock+2 {
			t.Errorf("clock %d after 13 hours of changing leaders, was %d", now, clock)
		}
	})
}

// TestForeignRotation: a resource that somebody else has made where the leader keeps the
// rotation of keys, before Skep refused that or on a Docker Engine, does not end its terms.
func TestForeignRotation(t *testing.T) {
	run(t, 0, func(s *swarm) {
		s.update(func(tx *store.Tx) error {
			r, _ := tx.Snapshot().OnlyOf(pki.RotationKind)
			if r == nil {
				return errors.New("there is no rotation to replace")
			}
			return errors.Join(
				tx.Remove(model.Resources, r.GetId()),
				tx.Create(&api.Extension{Id: "kind", Annotations: &api.Annotations{Name: "kind"}}),
				tx.Create(&api.Resource{Id: "foreign", Annotations: &api.Annotations{Name: "Skep.Key-Rotation"}, Kind: "kind"}))
		})
		s.lead()
		time.Sleep(time.Second)
		synctest.Wait()
		if r, foreign := s.state.View().OnlyOf(pki.RotationKind); r == nil || foreign != nil {
			t.Errorf("the rotation is %v, and the foreign resource %v", r, foreign)
		}
	})
}

// TestRotationsWait: one rotation waits until nodes have taken up the one before, but not for
// ever, and what is asked for meanwhile is met by the same ones.
func TestRotationsWait(t *testing.T) {
	run(t, 0, func(s *swarm) {
		release := make(chan struct{})
		s.taken = func(ctx context.Context, version uint64) error {
			select {
			case <-release:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		s.lead()
		time.Sleep(time.Hour)
		clock := s.state.View().Cluster().GetEncryptionKeyLamportClock()
		want := func(what string, rotations uint64) {
			t.Helper()
			synctest.Wait()
			if now := s.state.View().Cluster().GetEncryptionKeyLamportClock(); now != clock+2*rotations {
				t.Errorf("%s: the keys' clock went on by %d, want %d", what, now-clock, 2*rotations)
			}
		}
		ask := func() { s.update(func(tx *store.Tx) error { return pki.AskRotation(tx, rand.Reader, pki.RotateAll) }) }
		ask()
		want("asked", 1)
		ask()
		want("asked again", 1)
		close(release)
		want("nodes are there", 3)
		release = make(chan struct{})
		s.update(func(tx *store.Tx) error { return pki.AskRotation(tx, rand.Reader, pki.RotateOne) })
		want("asked while nodes are busy", 3)
		time.Sleep(3 * time.Minute)
		want("nodes do not come", 4)
	})
}

func TestKeysRotate(t *testing.T) {
	run(t, 0, func(s *swarm) {
		before := s.state.View().Cluster()
		time.Sleep(13 * time.Hour)
		synctest.Wait()
		after := s.state.View().Cluster()
		if len(before.GetNetworkBootstrapKeys()) != 6 || len(after.GetNetworkBootstrapKeys()) != 6 {
			t.Fatalf("keys before %v after %v", before.GetNetworkBootstrapKeys(), after.GetNetworkBootstrapKeys())
		}
		if after.GetEncryptionKeyLamportClock() != before.GetEncryptionKeyLamportClock()+2 {
			t.Errorf("clock %d, was %d", after.GetEncryptionKeyLamportClock(), before.GetEncryptionKeyLamportClock())
		}
		seen := make(map[uint64]bool)
		for _, k := range after.GetNetworkBootstrapKeys() {
			if seen[k.GetLamportTime()] {
				t.Errorf("time %d twice", k.GetLamportTime())
			}
			seen[k.GetLamportTime()] = true
		}
	})
}
