package dispatcher

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/netmap"
)

// networks tells nodes what they must know of the swarm's networks, and keeps account of
// what they have programmed. It implements skepv1.NetworksServer while a term runs.
type networks struct {
	skepv1.UnimplementedNetworksServer

	d *Dispatcher

	mu sync.Mutex
	// table is nil while not leading. The rest belongs to the same term.
	table    *netmap.Map
	version  uint64 // of table
	watchers map[string]*watcher
	leaving  map[string]*leaving // by task
	checks   map[string]*check   // by id
	uptake   uptake
	changed  chan struct{} // closed when uptake or version changed; nil while nobody waits
}

// watcher is one open stream. What waits for it is bounded by the records of its networks.
type watcher struct {
	nodeID    string
	keys      map[netmap.Key]bool
	withdrawn []string
	checks    []string // ids of checks that it was not asked for yet
	acked     uint64
	// dirty is when keys began to fill; marks are the updates sent since and not reported.
	dirty time.Time
	marks []mark
	wake  chan struct{} // has a value when there is something
}

// mark is an update that was sent: its version, and since when it had been due.
type mark struct {
	version uint64
	due     time.Time
}

// leaving is a task that is to stop, and the nodes that may still lead connections to it.
type leaving struct {
	nodeID  string
	version uint64
	waiting map[string]bool
}

func (w *watcher) signal() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// follow keeps the table for one term.
func (n *networks) follow(ctx context.Context, cursor *replica.Cursor) error {
	n.begin(cursor)
	defer n.end()
	for {
		events, reset, err := cursor.Next(ctx)
		if err != nil {
			return nil // the term ended
		}
		if reset {
			n.begin(cursor)
			continue
		}
		n.apply(events, cursor.Snapshot().Index())
	}
}

// begin builds the table anew; open streams, which know what no longer holds, are ended.
func (n *networks) begin(cursor *replica.Cursor) {
	s := cursor.Snapshot()
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, w := range n.watchers {
		w.keys = nil
		w.signal()
	}
	n.table, n.version = netmap.New(s), s.Index()
	// What nodes have programmed, a former leader knew.
	n.uptake = uptake{}
	n.keysChanged(n.table.Rekey())
	n.wakeTaken()
	n.watchers, n.leaving, n.checks = map[string]*watcher{}, map[string]*leaving{}, map[string]*check{}
}

func (n *networks) end() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.table, n.watchers, n.leaving, n.checks = nil, nil, nil, nil
}

// apply takes changes over and wakes the nodes concerned.
func (n *networks) apply(events []model.Event, version uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.version = version
	defer n.wakeTaken()
	for _, e := range events {
		notices := n.table.Apply(e)
		switch e.Table { //nolint:exhaustive // the others have no keys
		case model.Clusters:
			n.keysChanged(notices)
		case model.Nodes:
			n.nodeChanged(e.ID())
		}
		for _, notice := range notices {
			if w := n.watchers[notice.NodeID]; w != nil && w.keys != nil {
				if len(w.keys) == 0 {
					w.dirty = time.Now()
				}
				w.keys[notice.Key] = true
				w.signal()
			}
		}
		if e.Table != model.Tasks {
			continue
		}
		if n.table.ToStop(e.ID()) {
			n.leave(e.ID())
		} else {
			delete(n.leaving, e.ID())
		}
	}
}

// leave begins the withdrawal of a task that is to stop. Callers hold mu.
func (n *networks) leave(taskID string) {
	if n.leaving[taskID] != nil {
		return
	}
	l := &leaving{nodeID: n.table.NodeOf(taskID), version: n.version, waiting: map[string]bool{}}
	for id := range n.table.Audience(taskID) {
		if n.watchers[id] != nil {
			l.waiting[id] = true
		}
	}
	n.leaving[taskID] = l
	n.settle(taskID, l)
}

// settle tells a node that its task was withdrawn everywhere, once that is so. Callers hold mu.
func (n *networks) settle(taskID string, l *leaving) {
	if len(l.waiting) > 0 {
		return
	}
	if w := n.watchers[l.nodeID]; w != nil {
		w.withdrawn = append(w.withdrawn, taskID)
		w.signal()
	}
}

// Watch streams what concerns the calling node.
func (n *networks) Watch(req *skepv1.WatchNetworksRequest, stream skepv1.Networks_WatchServer) error {
	ctx := stream.Context()
	nodeID, _, err := n.d.cfg.Caller(ctx)
	if err != nil {
		return err
	}
	t, session, err := n.d.check(nodeID, req.GetSessionId())
	if err != nil {
		return err
	}
	w, u, told := n.open(nodeID)
	if w == nil {
		return errStopped()
	}
	defer n.close(w)
	for {
		if err := stream.Send(u); err != nil {
			return err
		}
		for u = nil; u == nil; {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-t.ctx.Done():
				return errStopped()
			case <-session.ended:
				return status.Error(codes.Aborted, "node must disconnect")
			case <-w.wake:
			}
			var open bool
			if u, open = n.take(w, told); !open {
				return status.Error(codes.Aborted, "the node's networks must be told anew")
			}
		}
	}
}

// open registers a watcher and returns its first update; nil while not leading.
func (n *networks) open(nodeID string) (*watcher, *skepv1.NetworkUpdate, *netmap.Told) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.table == nil {
		return nil, nil, nil
	}
	w := &watcher{nodeID: nodeID, keys: map[netmap.Key]bool{}, wake: make(chan struct{}, 1)}
	u, told := n.table.Complete(nodeID)
	u.Version = n.version
	for _, id := range n.table.LeavingOn(nodeID) {
		if l := n.leaving[id]; l == nil || len(l.waiting) == 0 {
			u.Withdrawn = append(u.Withdrawn, id)
		}
	}
	if old := n.watchers[nodeID]; old != nil {
		old.keys = nil
		old.signal()
	}
	n.watchers[nodeID] = w
	return w, u, told
}

// take returns what waits for a watcher, nil for nothing; open is false once it is void.
func (n *networks) take(w *watcher, told *netmap.Told) (u *skepv1.NetworkUpdate, open bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if w.keys == nil || n.watchers[w.nodeID] != w {
		return nil, false
	}
	if len(w.keys) == 0 && len(w.withdrawn) == 0 && len(w.checks) == 0 {
		return nil, true
	}
	if len(w.keys) > 0 {
		w.marks = append(w.marks, mark{n.version, w.dirty})
	}
	keys := make([]netmap.Key, 0, len(w.keys))
	for k := range w.keys {
		keys = append(keys, k)
	}
	u = n.table.Update(w.nodeID, told, keys)
	u.Version, u.Withdrawn = n.version, w.withdrawn
	w.keys, w.withdrawn = map[netmap.Key]bool{}, nil
	u.Check = n.order(w)
	return u, true
}

// close forgets a watcher: nobody waits for it any longer.
func (n *networks) close(w *watcher) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.watchers[w.nodeID] != w {
		return
	}
	delete(n.watchers, w.nodeID)
	n.acked(w.nodeID, n.version)
	n.abandon(w.nodeID)
}

// acked notes what a node has programmed. Callers hold mu.
func (n *networks) acked(nodeID string, version uint64) {
	if n.watchers[nodeID] != nil {
		n.keysProgrammed(nodeID, version)
	}
	for id, l := range n.leaving {
		if l.waiting[nodeID] && version >= l.version {
			delete(l.waiting, nodeID)
			n.settle(id, l)
		}
	}
}

// Programmed notes what a node has programmed.
func (n *networks) Programmed(ctx context.Context, req *skepv1.ProgrammedRequest) (*skepv1.ProgrammedResponse, error) {
	nodeID, _, err := n.d.cfg.Caller(ctx)
	if err != nil {
		return nil, err
	}
	if _, _, err := n.d.check(nodeID, req.GetSessionId()); err != nil {
		return nil, err
	}
	if req.GetError() != "" {
		n.d.cfg.Log.Warn("node could not program its networks", slog.String("node_id", nodeID), slog.Any("error", errors.New(req.GetError())))
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.d.metrics.repairs.Add(float64(req.GetRepaired()))
	if w := n.watchers[nodeID]; w != nil && req.GetVersion() > w.acked {
		w.acked = req.GetVersion()
		for len(w.marks) > 0 && w.marks[0].version <= w.acked {
			n.d.metrics.convergence.Observe(time.Since(w.marks[0].due).Seconds())
			w.marks = w.marks[1:]
		}
		n.acked(nodeID, w.acked)
	}
	return new(skepv1.ProgrammedResponse), nil
}
