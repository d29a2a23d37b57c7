package dispatcher

import (
	"context"

	"github.com/skep-dev/skep/core/netmap"
)

// uptake is the last change of network keys, and the nodes that have not programmed it.
type uptake struct {
	version uint64
	waiting map[string]bool
}

// KeysTaken returns when the nodes that are there have programmed all network keys of a version
// of the state, or with the error of ctx. It waits as long as this manager does not lead.
func (d *Dispatcher) KeysTaken(ctx context.Context, version uint64) error {
	return d.networks.keysTaken(ctx, version)
}

func (n *networks) keysTaken(ctx context.Context, version uint64) error {
	for {
		n.mu.Lock()
		done := n.table != nil && n.version >= version && len(n.uptake.waiting) == 0
		if n.changed == nil {
			n.changed = make(chan struct{})
		}
		changed := n.changed
		n.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

// wakeTaken has those look again who wait for keys to be programmed. Callers hold mu.
func (n *networks) wakeTaken() {
	if n.changed != nil {
		close(n.changed)
		n.changed = nil
	}
}

// keysChanged begins to wait for the nodes that a change of keys concerns. Callers hold mu.
func (n *networks) keysChanged(notices []netmap.Notice) {
	waiting := map[string]bool{}
	for _, notice := range notices {
		if notice.Key.Kind == netmap.Peer && n.table.Encrypts(notice.NodeID) {
			waiting[notice.NodeID] = true
		}
	}
	if len(waiting) > 0 {
		n.uptake = uptake{n.version, waiting}
	}
}

// keysProgrammed notes that a node has programmed a version. Callers hold mu.
func (n *networks) keysProgrammed(nodeID string, version uint64) {
	if n.uptake.waiting[nodeID] && version >= n.uptake.version {
		delete(n.uptake.waiting, nodeID)
		n.wakeTaken()
	}
}

// nodeChanged stops waiting for a node that is gone. Callers hold mu.
func (n *networks) nodeChanged(nodeID string) {
	if n.uptake.waiting[nodeID] && !n.table.Encrypts(nodeID) {
		delete(n.uptake.waiting, nodeID)
	}
}
