package sim

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/swarm"
)

// updateSwarm changes the swarm's spec.
func (w *world) updateSwarm(change func(*swarm.Spec)) {
	w.t.Helper()
	var s swarm.Swarm
	m := w.machines[0]
	m.must("GET", "/swarm", nil, &s)
	change(&s.Spec)
	m.must("POST", "/swarm/update?version="+strconv.FormatUint(s.Version.Index, 10), s.Spec, nil)
}

// A node that was off longer than its certificate lives had to leave the swarm and join it
// again; one that was off when the root certificate changed for good found no manager that
// it trusted.
func TestReturnWithExpiredCertificate(t *testing.T) {
	inWorld(t, 8, 4, func(w *world) {
		w.found(1)
		w.mustCreate(service("web", 4))
		w.await("it runs", time.Minute, w.converged)
		late, away, removed := w.machines[1], w.machines[2], w.machines[3]
		oldRoot, err := os.ReadFile(late.rootFile())
		if err != nil {
			t.Fatal(err)
		}
		w.updateSwarm(func(s *swarm.Spec) {
			s.CAConfig.NodeCertExpiry = time.Hour
			s.CAConfig.ForceRotate++
		})
		w.await("the root is replaced", time.Minute, func() error {
			for _, m := range w.machines {
				if root, err := os.ReadFile(m.rootFile()); err != nil || string(root) == string(oldRoot) {
					return fmt.Errorf("%s has the old root: %w", m.name, err)
				}
			}
			return nil
		})
		for _, m := range []*machine{late, away, removed} {
			m.kill()
		}
		// As if it had been off between its renewal and the end of the rotation.
		if err := os.WriteFile(late.rootFile(), oldRoot, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := w.any("DELETE", "/nodes/"+removed.id+"?force=true", nil, nil); err != nil {
			t.Fatal(err)
		}
		w.watch.stop()
		time.Sleep(40 * time.Minute) // the manager has renewed, and shows the old root no more
		late.start()
		w.await("the node that missed the end of the rotation is back", time.Minute, late.isReady)
		time.Sleep(35 * time.Minute)
		if until := away.certificate().NotAfter; time.Now().Before(until) {
			t.Fatalf("the certificate of %s is good until %v", away.name, until)
		}
		away.start()
		removed.start()
		w.await("the node with the expired certificate is back", time.Minute, away.isReady)
		w.await("the removed one is told to join again", time.Minute, func() error {
			var info struct{ Swarm swarm.Info }
			if err := removed.call("GET", "/info", nil, &info); err != nil {
				return err
			}
			if info.Swarm.LocalNodeState != swarm.LocalNodeStateError || !strings.Contains(info.Swarm.Error, "leave the swarm and join again") {
				return fmt.Errorf("%s: %s", info.Swarm.LocalNodeState, info.Swarm.Error)
			}
			return nil
		})
	})
}

func (m *machine) rootFile() string {
	return filepath.Join(m.dir, "data", "swarm", "certificates", "swarm-root-ca.crt")
}

// isReady reports whether the swarm has the node as ready, with a description of now.
func (m *machine) isReady() error {
	var n swarm.Node
	if err := m.w.machines[0].call("GET", "/nodes/"+m.id, nil, &n); err != nil {
		return err
	}
	if n.Status.State != swarm.NodeStateReady {
		return errors.New(string(n.Status.State))
	}
	return nil
}
