package sim

import (
	"errors"
	"testing"
	"time"

	"github.com/moby/moby/api/types/swarm"
)

// Nodes were away while all managers that they knew were demoted, and stayed down for ever:
// the demoted ones tell them where the managers are, a worker and a manager alike.
func TestAwayWhileAllManagersChanged(t *testing.T) {
	inWorld(t, 12, 6, func(w *world) {
		w.found(3)
		u := newUser(w, 12)
		role := func(m *machine, to swarm.NodeRole) {
			t.Helper()
			w.await(m.name+" is a "+string(to), time.Minute, func() error {
				if err := u.changeNode(m, func(s *swarm.NodeSpec) { s.Role = to }); err != nil {
					return err
				}
				var nodes []swarm.Node
				if err := w.any("GET", "/nodes", nil, &nodes); err != nil {
					return err
				}
				for _, n := range nodes {
					if n.ID == m.id && (n.ManagerStatus != nil) != (to == swarm.NodeRoleManager) {
						return errors.New("it is not yet")
					}
				}
				return nil
			})
		}
		old, next := w.machines[:3], w.machines[3:5]
		away := []*machine{w.machines[2], w.machines[5]}
		for _, m := range away {
			m.kill()
		}
		for _, m := range next {
			role(m, swarm.NodeRoleManager)
		}
		for _, m := range old {
			role(m, swarm.NodeRoleWorker)
		}
		old[0].halt() // what it was outlives the daemon
		old[0].start()
		for _, m := range away {
			m.start()
		}
		w.await("all nodes are back", time.Minute, w.nodesReady)
	})
}
