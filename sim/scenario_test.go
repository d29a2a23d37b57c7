package sim

import (
	"crypto/x509"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/keystore"
)

// The scenarios are failures that users of swarms reported, each with its name.

// Tasks hung in New or Pending and nobody said why: a task that fits nowhere says so, and
// starts once it fits.
func TestTasksWaitAndSayWhy(t *testing.T) {
	inWorld(t, 1, 3, func(w *world) {
		w.found(1)
		spec := service("picky", 2)
		spec.TaskTemplate.Placement = &swarm.Placement{Constraints: []string{"node.labels.disk==ssd"}}
		id := w.mustCreate(spec)
		w.await("the tasks say what they wait for", time.Minute, func() error {
			tasks, err := w.tasks(id)
			if err != nil || len(tasks) != 2 {
				return fmt.Errorf("%d tasks, %w", len(tasks), err)
			}
			for _, task := range tasks {
				if task.Status.State != swarm.TaskStatePending || !strings.Contains(task.Status.Err, "constraint") {
					return fmt.Errorf("task is %s: %q", task.Status.State, task.Status.Err)
				}
			}
			return nil
		})
		u := newUser(w, 1)
		if err := u.changeNode(w.machines[2], func(s *swarm.NodeSpec) { s.Labels = map[string]string{"disk": "ssd"} }); err != nil {
			t.Fatal(err)
		}
		w.await("they start", 30*time.Second, w.converged)
		for _, c := range w.containers() {
			if c.on != w.machines[2] {
				t.Errorf("task %s runs on %s", c.task, c.on.name)
			}
		}
	})
}

// Two of three managers were gone and the swarm never came back: requests say what
// is missing, running tasks do not notice, and one manager's return is enough.
func TestLostQuorumAndReturn(t *testing.T) {
	inWorld(t, 2, 5, func(w *world) {
		w.found(3)
		id := w.mustCreate(service("web", 4))
		w.await("it runs", time.Minute, w.converged)
		before := w.containers()
		w.machines[0].kill()
		w.machines[1].kill()
		last := w.machines[2]
		w.sleep(15 * time.Second)
		if err := last.call("GET", "/services/"+id, nil, nil); err == nil || !strings.Contains(err.Error(), "more than half of the managers") {
			t.Errorf("a read without quorum: %v", err)
		}
		err := last.call("POST", "/configs/create", swarm.ConfigSpec{Annotations: swarm.Annotations{Name: "lost"}, Data: []byte("x")}, nil)
		if err == nil || !strings.Contains(err.Error(), "does not have a leader") {
			t.Errorf("a write without quorum: %v", err)
		}
		w.sleep(2 * time.Minute)
		if now := w.containers(); len(now) != len(before) {
			t.Errorf("%d containers run without quorum, want %d", len(now), len(before))
		}
		w.machines[1].start()
		w.await("writes are accepted again", 20*time.Second, func() error {
			return w.update(id, func(s *swarm.ServiceSpec) { n := uint64(6); s.Mode.Replicated.Replicas = &n })
		})
		w.machines[0].start()
		w.await("all is well", 2*time.Minute, w.converged)
	})
}

// A node returned after a long absence and ran what had been removed meanwhile.
func TestReturnAfterLongAbsence(t *testing.T) {
	inWorld(t, 3, 4, func(w *world) {
		w.found(1)
		gone, kept := w.mustCreate(service("gone", 6)), w.mustCreate(service("kept", 6))
		w.await("they run", time.Minute, w.converged)
		away := w.machines[3]
		stale := 0
		for _, c := range w.containers() {
			if c.on == away {
				stale++
			}
		}
		if stale == 0 {
			t.Fatal("nothing runs on the node that goes away")
		}
		away.kill() // its containers go on
		w.await("its tasks are replaced", 30*time.Second, func() error {
			tasks, err := w.tasks(kept)
			running := 0
			for _, task := range tasks {
				if task.DesiredState == swarm.TaskStateRunning && task.Status.State == swarm.TaskStateRunning && task.NodeID != away.id {
					running++
				}
			}
			if running != 6 {
				return errors.Join(err, fmt.Errorf("%d run elsewhere", running))
			}
			return err
		})
		if err := w.any("DELETE", "/services/"+gone, nil, nil); err != nil {
			t.Fatal(err)
		}
		if err := w.update(kept, func(s *swarm.ServiceSpec) { s.TaskTemplate.ContainerSpec.Env = []string{"VERSION=2"} }); err != nil {
			t.Fatal(err)
		}
		w.sleep(20 * time.Minute)
		away.start()
		w.await("what is stale is gone", time.Minute, w.converged)
	})
}

// The leader died during an update, and the update stuck or began again.
func TestLeaderChangeDuringUpdate(t *testing.T) {
	inWorld(t, 4, 5, func(w *world) {
		w.found(3)
		spec := service("web", 6)
		spec.UpdateConfig = &swarm.UpdateConfig{Parallelism: 1, Delay: 5 * time.Second, Order: swarm.UpdateOrderStartFirst, FailureAction: swarm.UpdateFailureActionPause}
		id := w.mustCreate(spec)
		w.await("it runs", time.Minute, w.converged)
		if err := w.update(id, func(s *swarm.ServiceSpec) { s.TaskTemplate.ContainerSpec.Env = []string{"VERSION=2"} }); err != nil {
			t.Fatal(err)
		}
		for range 3 { // one leader after the other
			w.sleep(8 * time.Second)
			leader := w.leader()
			leader.kill()
			w.sleep(6 * time.Second)
			leader.start()
			w.await("the managers are whole again", time.Minute, w.nodesReady)
		}
		w.await("the update completes", 5*time.Minute, func() error {
			var s swarm.Service
			if err := w.any("GET", "/services/"+id, nil, &s); err != nil {
				return err
			}
			if s.UpdateStatus == nil || s.UpdateStatus.State != swarm.UpdateStateCompleted {
				return fmt.Errorf("update status %+v", s.UpdateStatus)
			}
			return w.converged()
		})
		tasks, err := w.tasks(id)
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			if task.DesiredState == swarm.TaskStateRunning && !slices.Contains(task.Spec.ContainerSpec.Env, "VERSION=2") {
				t.Errorf("task %s is of the old version", task.ID)
			}
		}
		if len(tasks) > 6*2+3 {
			t.Errorf("the update made %d tasks of 6, it began again", len(tasks)-6)
		}
	})
}

// A worker with a bad cable made the swarm start tasks without end.
func TestFlappingWorker(t *testing.T) {
	inWorld(t, 5, 4, func(w *world) {
		w.found(1)
		id := w.mustCreate(service("web", 6))
		fenced := w.mustCreate(fence(service(fencedName, 2)))
		w.await("they run", time.Minute, w.converged)
		for i := range 12 {
			w.machines[3].isolate()
			w.sleep(time.Duration(1+i) * time.Second) // from unnoticed to lost
			w.net.Heal()
			w.sleep(time.Duration(2+i%4) * time.Second)
		}
		w.await("all is well", 2*time.Minute, w.converged)
		for _, s := range []string{id, fenced} {
			tasks, err := w.tasks(s)
			if err != nil {
				t.Fatal(err)
			}
			if len(tasks) > 6*7 { // history keeps five a slot
				t.Errorf("service %s has %d tasks", s, len(tasks))
			}
		}
	})
}

// The machines slept past the time at which certificates are renewed, and the swarm
// stayed dead or fell apart when they expired.
func TestSleepPastRenewal(t *testing.T) {
	inWorld(t, 6, 4, func(w *world) {
		w.found(3)
		w.mustCreate(service("web", 4))
		w.await("it runs", time.Minute, w.converged)
		old := map[*machine]*x509.Certificate{}
		for _, m := range w.machines {
			old[m] = m.certificate()
			m.kill()
		}
		w.watch.stop()                  // it looks every few seconds
		time.Sleep(80 * 24 * time.Hour) // of 90 days
		w.watch.start()
		for _, m := range w.machines {
			m.start()
		}
		w.await("all is well", 2*time.Minute, w.converged)
		w.await("all certificates are new", 10*time.Minute, func() error {
			for _, m := range w.machines {
				if c := m.certificate(); !c.NotAfter.After(old[m].NotAfter) || c.Subject.CommonName != old[m].Subject.CommonName {
					return fmt.Errorf("the certificate of %s ends %v", m.name, c.NotAfter)
				}
			}
			return nil
		})
		w.await("all is still well", 2*time.Minute, w.converged)
	})
}

// certificate returns the machine's certificate on disk.
func (m *machine) certificate() *x509.Certificate {
	p, err := keystore.Peek(filepath.Join(m.dir, "data", "swarm", "certificates"), nil)
	if err != nil {
		m.w.t.Fatal(err)
	}
	chain, err := pki.ParseCerts(p.ChainPEM)
	if err != nil {
		m.w.t.Fatal(err)
	}
	return chain[0]
}

// A leader cut off from the others went on to answer, and what it had said was lost.
func TestIsolatedLeader(t *testing.T) {
	inWorld(t, 7, 5, func(w *world) {
		w.found(3)
		w.mustCreate(service("web", 4))
		w.await("it runs", time.Minute, w.converged)
		old := w.leader()
		old.isolate()
		write := func(m *machine, name string) error {
			return m.call("POST", "/configs/create", swarm.ConfigSpec{Annotations: swarm.Annotations{Name: name}, Data: []byte(name)}, nil)
		}
		early := write(old, "early") // it may not know yet that it is alone
		var elsewhere error
		w.await("the others accept writes", 20*time.Second, func() error {
			for _, m := range w.machines[:3] {
				if m != old {
					if elsewhere = write(m, "elsewhere"); elsewhere == nil {
						return nil
					}
				}
			}
			return elsewhere
		})
		if err := write(old, "late"); err == nil {
			t.Error("the isolated leader accepted a write")
		}
		w.net.Heal()
		w.await("all is well", 2*time.Minute, w.converged)
		var configs []swarm.Config
		old.must("GET", "/configs", nil, &configs)
		have := map[string]bool{}
		for _, c := range configs {
			have[c.Spec.Name] = true
		}
		if !have["elsewhere"] || have["late"] || early == nil && !have["early"] {
			t.Errorf("there is %v, want what was acknowledged (early: %v)", have, early)
		}
	})
}

// All machines lost power at once, and came back in the worst order.
func TestPowerCut(t *testing.T) {
	inWorld(t, 8, 5, func(w *world) {
		w.found(3)
		w.mustCreate(service("web", 6))
		w.mustCreate(fence(service(fencedName, 1)))
		w.await("they run", time.Minute, w.converged)
		for _, m := range w.machines {
			m.powerOff()
		}
		time.Sleep(time.Hour)
		for _, i := range []int{4, 3, 2, 0, 1} {
			w.machines[i].start()
			w.sleep(5 * time.Second)
		}
		w.await("all is well", 2*time.Minute, w.converged)
	})
}

// Managers on different continents fell behind: one message at a time was on its way, and
// there were more heartbeats than answers.
func TestManagersFarApart(t *testing.T) {
	inWorld(t, 14, 4, func(w *world) {
		w.found(3)
		w.net.SetDelay(150*time.Millisecond, 160*time.Millisecond)
		w.sleep(time.Minute)
		for i := range 20 {
			began := time.Now()
			err := w.leader().call("POST", "/configs/create", swarm.ConfigSpec{Annotations: swarm.Annotations{Name: fmt.Sprint("far", i)}, Data: []byte("x")}, nil)
			if took := time.Since(began); err != nil || took > time.Second {
				t.Errorf("a write took %v: %v", took, err)
			}
		}
		w.mustCreate(service("web", 4))
		w.await("it runs", time.Minute, w.converged)
	})
}
