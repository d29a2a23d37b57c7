// Package dispatcher is the leader's side of all nodes: it registers their sessions, tells
// them what they shall run, and takes in what they observed.
//
// One goroutine, Run, follows the state and hands changes to the sessions they concern, so
// the cost of a change does not grow with the number of nodes; another writes what nodes
// report, as many reports at once as came in while the last write was in flight. Who runs
// what is decided in control/manager.
package dispatcher

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
)

// Config is what a Dispatcher works with; all fields are required but Secret and Registerer.
type Config struct {
	State replica.State
	// Members returns the managers, for nodes to know whom they can talk to.
	Members func() []*api.RaftMember
	// NodeID is this manager's, noted in what it applies.
	NodeID string
	// Caller says which node makes a call, and from which address.
	Caller func(ctx context.Context) (nodeID, addr string, err error)
	// Secret asks the driver of a secret for what a task gets, and whether the node's other
	// tasks may get the same. Nil means that there are no drivers.
	Secret     func(ctx context.Context, secret *api.Secret, task *api.Task) (data []byte, reuse bool, err error)
	Log        *slog.Logger
	Registerer prometheus.Registerer
}

const (
	// defaultPeriod is the heartbeat period of swarms that do not say otherwise.
	defaultPeriod = 5 * time.Second
	// skepPeriod is what nodes are asked for while the swarm has the default: three missed
	// beats of 2 s replace a lost worker's tasks within 10 s (docs/decisions).
	skepPeriod = 2 * time.Second
	// graceFactor is the number of periods without a heartbeat after which a node is lost.
	graceFactor = 3
	// expireTick is how often the leader looks for silent nodes.
	expireTick = 250 * time.Millisecond
	// unknownGrace is how long a node may take to find a new leader.
	unknownGrace = 15 * time.Second
	// maxPending bounds the reports that wait to be written; beyond it calls wait.
	maxPending = 10000
	// batchSize bounds one write.
	batchSize = 200
	// rateLimit registrations of one node are accepted at once, after its first, and then one
	// every ratePause: a manager that is restarted and unlocked a few times must not wait.
	rateLimit = 3
	ratePause = 3 * time.Second
)

// Dispatcher implements the Dispatcher service while Run runs. Outside of it every call
// is refused with Aborted, and nodes look for the leader.
type Dispatcher struct {
	api.UnimplementedDispatcherServer
	api.UnimplementedResourceAllocatorServer

	cfg      Config
	metrics  *metrics
	networks *networks

	mu sync.Mutex
	// term is nil while not leading.
	term *term
}

// term is one reign of this dispatcher. Its fields are guarded by Dispatcher.mu unless
// they say otherwise.
type term struct {
	ctx     context.Context //nolint:containedctx // ends the streams of the term
	nodes   map[string]*node
	pending *batch
	// wake has a value when pending is not empty.
	wake chan struct{}
	// room is closed and replaced when pending was taken.
	room chan struct{}
}

// node is what the dispatcher knows of one registered node.
type node struct {
	session  string
	deadline time.Time
	paid     time.Time // when the pauses for all registrations will have passed
	// changed is closed and replaced when the session message changed.
	changed chan struct{}
	// ended is closed when the session is over.
	ended chan struct{}
	// feed is set while an assignment stream is open.
	feed *feed
}

// New returns a Dispatcher that refuses calls until Run.
func New(cfg Config) *Dispatcher {
	d := &Dispatcher{cfg: cfg, metrics: newMetrics(cfg.Registerer)}
	d.networks = &networks{d: d}
	return d
}

// Networks is the service that tells nodes about the swarm's networks; it works while Run
// runs.
func (d *Dispatcher) Networks() skepv1.NetworksServer { return d.networks }

// Run dispatches for one term of leadership, until ctx ends.
func (d *Dispatcher) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	t := &term{
		ctx:     ctx,
		nodes:   map[string]*node{},
		pending: newBatch(),
		wake:    make(chan struct{}, 1),
		room:    make(chan struct{}),
	}
	cursor, forNetworks := d.cfg.State.Follow(), d.cfg.State.Follow()
	if err := d.markUnknown(ctx); err != nil {
		return endOf(ctx, err)
	}
	d.mu.Lock()
	d.term = t
	d.mu.Unlock()
	defer d.close(t)
	var group sync.WaitGroup
	errs := make(chan error, 4)
	for _, loop := range []func(context.Context, *term) error{
		func(ctx context.Context, t *term) error { return d.follow(ctx, t, cursor) },
		func(ctx context.Context, _ *term) error { return d.networks.follow(ctx, forNetworks) },
		d.write,
		d.expire,
	} {
		group.Go(func() {
			errs <- loop(ctx, t)
			cancel()
		})
	}
	group.Wait()
	var first error
	for range cap(errs) {
		if err := <-errs; err != nil && first == nil {
			first = err
		}
	}
	return endOf(ctx, first)
}

// endOf turns the errors of a term that was ended into success.
func endOf(ctx context.Context, err error) error {
	if ctx.Err() != nil && (err == nil || model.KindOf(err) == model.Unavailable || err == ctx.Err()) { //nolint:errorlint // compared with this very context's
		return nil
	}
	return err
}

// close ends all sessions of a term.
func (d *Dispatcher) close(t *term) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.term = nil
	for _, n := range t.nodes {
		n.end()
	}
	d.metrics.sessions.Set(0)
}

func (n *node) end() {
	select {
	case <-n.ended:
	default:
		close(n.ended)
	}
}

// changedNow wakes the session stream.
func (n *node) changedNow() {
	close(n.changed)
	n.changed = make(chan struct{})
}

// follow hands the changes of the state to those they concern.
func (d *Dispatcher) follow(ctx context.Context, t *term, cursor *replica.Cursor) error {
	for {
		events, reset, err := cursor.Next(ctx)
		if err != nil {
			return nil //nolint:nilerr // the term ended
		}
		d.mu.Lock()
		if reset {
			for _, n := range t.nodes {
				n.changedNow()
				if n.feed != nil {
					n.feed.restart()
				}
			}
		}
		for _, e := range events {
			t.deliver(e)
		}
		d.mu.Unlock()
	}
}

// deliver routes one change. Callers hold mu.
func (t *term) deliver(e model.Event) {
	switch e.Table {
	case model.Clusters:
		for _, n := range t.nodes {
			n.changedNow()
		}
	case model.Nodes:
		n := t.nodes[e.ID()]
		switch {
		case n == nil:
		case e.Kind == model.Remove:
			n.end()
			delete(t.nodes, e.ID())
		default:
			n.changedNow()
			if updated, ok := e.New.(*api.Node); ok && updated.GetManagerStatus() != nil {
				return
			}
		}
	case model.Tasks:
		for _, o := range []model.Object{e.New, e.Old} {
			task, ok := o.(*api.Task)
			if !ok || task == nil || task.GetNodeId() == "" {
				continue
			}
			if n := t.nodes[task.GetNodeId()]; n != nil && n.feed != nil {
				n.feed.task(e)
			}
			return // a task never changes its node
		}
	case model.Services, model.Networks, model.Secrets, model.Resources, model.Extensions, model.Configs, model.Volumes:
	}
}

// membersChanged tells all nodes of the term if the managers are not those of last, and
// returns those of now.
func (d *Dispatcher) membersChanged(t *term, last []*api.WeightedPeer) []*api.WeightedPeer {
	now := d.managers()
	if slices.EqualFunc(last, now, func(a, b *api.WeightedPeer) bool {
		return a.GetPeer().GetNodeId() == b.GetPeer().GetNodeId() && a.GetPeer().GetAddr() == b.GetPeer().GetAddr()
	}) {
		return last
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, n := range t.nodes {
		n.changedNow()
	}
	return now
}

// managers lists the managers as nodes hear of them.
func (d *Dispatcher) managers() []*api.WeightedPeer {
	members := d.cfg.Members()
	out := make([]*api.WeightedPeer, 0, len(members))
	for _, m := range members {
		out = append(out, &api.WeightedPeer{Peer: &api.Peer{NodeId: m.GetNodeId(), Addr: m.GetAddr()}, Weight: 10})
	}
	return out
}
