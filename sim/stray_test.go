package sim

import (
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
