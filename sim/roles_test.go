package sim

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"github.com/skep-dev/skep/core/pki"
)

// A manager was made a worker and a worker a manager, until nobody knew who was what.
func TestRolesChange(t *testing.T) {
	inWorld(t, 9, 5, func(w *world) {
		w.found(3)
		w.mustCreate(service("web", 6))
		w.await("it runs", time.Minute, w.converged)
		u := newUser(w, 9)
		for i, to := range []swarm.NodeRole{3: swarm.NodeRoleManager, 0: swarm.NodeRoleWorker, 4: swarm.NodeRoleManager, 1: swarm.NodeRoleWorker} {
			if to == "" {
				continue
			}
			w.await("the role can be given", time.Minute, func() error {
				return u.changeNode(w.machines[i], func(s *swarm.NodeSpec) { s.Role = to })
			})
			w.await("it has the role", 2*time.Minute, w.converged)
		}
		w.leader().kill() // the workers must know who else is a manager by now
		w.await("there is a new leader", 20*time.Second, func() error {
			_, err := w.create(service("late", 2))
			return err
		})
	})
}

// setRole gives a machine a role, and waits until the managers count it or do not. One that
// does not run cannot join them.
func (w *world) setRole(m *machine, to swarm.NodeRole) {
	w.t.Helper()
	u := newUser(w, 0)
	w.await("the role can be given", time.Minute, func() error {
		return u.changeNode(m, func(s *swarm.NodeSpec) { s.Role = to })
	})
	w.await("the managers know it", time.Minute, func() error {
		var n swarm.Node
		err := w.any("GET", "/nodes/"+m.id, nil, &n)
		if err == nil && (n.ManagerStatus != nil) != (to == swarm.NodeRoleManager && m.running()) {
			err = fmt.Errorf("%s is no %s yet", m.name, to)
		}
		return err
	})
}

// role is the role in the machine's certificate on disk.
func (m *machine) role() string { return m.certificate().Subject.OrganizationalUnit[0] }

// A manager that was demoted, and whose daemon died after it had left the others and before
// it had its new certificate, joined them again as a manager: it counted for the quorum,
// and was never reachable.
func TestDemotedManagerDiesBeforeItsCertificate(t *testing.T) {
	inWorld(t, 10, 4, func(w *world) {
		w.found(3)
		w.mustCreate(service("web", 4))
		w.await("it runs", time.Minute, w.converged)
		m := w.machines[2]
		m.kill()
		w.setRole(m, swarm.NodeRoleWorker)
		m.start()
		raft := filepath.Join(m.dir, "data", "swarm", "raft")
		for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			if _, err := os.Stat(raft); errors.Is(err, fs.ErrNotExist) {
				break
			}
			if time.Now().After(end) {
				t.Fatal("it does not notice that it was demoted")
			}
		}
		if m.role() != pki.ManagerRole {
			t.Fatalf("it is a %s already", m.role())
		}
		m.kill()
		m.start()
		w.await("all is well", time.Minute, w.converged)
		w.sleep(5 * time.Second)
		w.await("all stays well", time.Millisecond, w.converged)
		if m.role() != pki.WorkerRole {
			t.Errorf("it is a %s", m.role())
		}
	})
}

// A manager that was away while it was demoted and promoted again was taken out for good:
// it asked for the certificate of a worker, and got that of a manager, for ever.
func TestManagerAwayWhileDemotedAndPromoted(t *testing.T) {
	inWorld(t, 11, 4, func(w *world) {
		w.found(3)
		w.mustCreate(service("web", 4))
		w.await("it runs", time.Minute, w.converged)
		m := w.machines[2]
		m.kill()
		w.setRole(m, swarm.NodeRoleWorker)
		w.setRole(m, swarm.NodeRoleManager)
		m.start()
		w.await("all is well", time.Minute, w.converged)
		if m.role() != pki.ManagerRole {
			t.Errorf("it is a %s", m.role())
		}
	})
}

// A worker was made a manager, and the managers were gone by the time that it was to join
// them: it gave up its part in the swarm for good, its agent with it.
func TestPromotedNodeReachesNoManager(t *testing.T) {
	inWorld(t, 12, 4, func(w *world) {
		w.found(3)
		w.mustCreate(service("web", 4))
		w.await("it runs", time.Minute, w.converged)
		w.net.SetDelay(100*time.Millisecond, 101*time.Millisecond) // the certificate comes well before the answer to the next call
		u, m := newUser(w, 12), w.machines[3]
		if err := u.changeNode(m, func(s *swarm.NodeSpec) { s.Role = swarm.NodeRoleManager }); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(time.Minute); m.role() != pki.ManagerRole; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("it does not become a manager")
			}
		}
		// One is left: it answers that there is no leader, the others do not answer.
		w.leader().kill()
		for _, other := range w.machines[:3] {
			if other.running() {
				other.kill()
				break
			}
		}
		w.sleep(time.Minute)
		w.net.SetDelay(100*time.Microsecond, time.Millisecond)
		for _, other := range w.machines[:3] {
			if !other.running() {
				other.start()
			}
		}
		w.await("all is well", 2*time.Minute, w.converged)
	})
}

// Whoever joins as a manager and cannot be reached is told so.
func TestJoinAsUnreachableManager(t *testing.T) {
	inWorld(t, 13, 2, func(w *world) {
		first, m := w.machines[0], w.machines[1]
		first.must("POST", "/swarm/init", swarm.InitRequest{ListenAddr: first.ip + ":2377", AdvertiseAddr: first.ip}, &first.id)
		var cluster swarm.Swarm
		first.must("GET", "/swarm", nil, &cluster)
		join := swarm.JoinRequest{
			ListenAddr: m.ip + ":2377", AdvertiseAddr: "10.0.0.99", RemoteAddrs: []string{first.ip + ":2377"}, JoinToken: cluster.JoinTokens.Manager,
		}
		if err := m.call("POST", "/swarm/join", join, nil); err == nil || !strings.Contains(err.Error(), "the manager cannot be reached at its address") {
			t.Errorf("joined with an address that leads nowhere: %v", err)
		}
		var info struct{ Swarm swarm.Info }
		m.must("GET", "/info", nil, &info)
		if info.Swarm.LocalNodeState != swarm.LocalNodeStateInactive {
			t.Errorf("it is %s now", info.Swarm.LocalNodeState)
		}
		join.AdvertiseAddr = m.ip
		m.must("POST", "/swarm/join", join, nil)
	})
}
