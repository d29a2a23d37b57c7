package sim

import (
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/moby/moby/api/types/swarm"
)

// Nodes were away while all managers that they knew were demoted, and stayed down for ever:
// the demoted ones tell them where the managers are, a worker and a manager alike.
func TestAwayWhileAllManagersChanged(t *testing.T) {
	inWorld(t, 12, 6, func(w *world) {
		w.found(3)
		old, next := w.machines[:3], w.machines[3:5]
		away := []*machine{w.machines[2], w.machines[5]}
		for _, m := range away {
			m.kill()
		}
		for _, m := range next {
			w.setRole(m, swarm.NodeRoleManager)
		}
		for _, m := range old {
			w.setRole(m, swarm.NodeRoleWorker)
		}
		old[0].halt() // what it was outlives the daemon
		old[0].start()
		for _, m := range away {
			m.start()
		}
		w.await("all nodes are back", time.Minute, w.nodesReady)
	})
}

// One of them missed the end of a rotation besides: it trusted nobody who could tell it.
func TestAwayWhileRootAndManagersChanged(t *testing.T) {
	inWorld(t, 13, 3, func(w *world) {
		w.found(1)
		old, next, late := w.machines[0], w.machines[1], w.machines[2]
		oldRoot, err := os.ReadFile(late.rootFile())
		if err != nil {
			t.Fatal(err)
		}
		w.updateSwarm(func(s *swarm.Spec) { s.CAConfig.ForceRotate++ })
		w.await("the root is replaced", time.Minute, func() error {
			for _, m := range w.machines {
				if root, err := os.ReadFile(m.rootFile()); err != nil || string(root) == string(oldRoot) {
					return fmt.Errorf("%s has the old root: %w", m.name, err)
				}
			}
			return nil
		})
		late.kill()
		// As if it had been off between its renewal and the end of the rotation.
		if err := os.WriteFile(late.rootFile(), oldRoot, 0o600); err != nil {
			t.Fatal(err)
		}
		w.setRole(next, swarm.NodeRoleManager)
		w.setRole(old, swarm.NodeRoleWorker)
		late.start()
		w.await("all nodes are back", 2*time.Minute, w.nodesReady)
	})
}
