// Package manager is what a leader runs: the objects every swarm has, one controller
// for services and nodes (core/orch and core/alloc), one for placement (core/sched),
// the network keys, and the roles of nodes.
//
// RunTerm is one term of leadership. Each controller is one goroutine that owns its own
// memory, all of which can be rebuilt from the store; it follows the store by a cursor,
// asks a decider about what changed, proposes the answer with State.Update and decides
// again when somebody else was faster. The first controller to fail ends the term.
//
// What tasks do on their nodes is the agents' business, sessions with nodes are
// control/dispatcher's, certificates control/ca's, and requests control/ops'.
package manager

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
)

// Membership is what the manager needs of raft's members. *replica.Replica implements it.
type Membership interface {
	// Members returns the raft members, with their node ids.
	Members() []*api.RaftMember
	// RemoveMember takes a member out of the group. It fails where that would cost the
	// quorum, or when the member is the leader itself.
	RemoveMember(ctx context.Context, raftID uint64) error
	// TransferLeadership hands leadership to another member, which ends this term.
	TransferLeadership(ctx context.Context) error
}

// Config is what a Manager needs. State and NodeID must be set.
type Config struct {
	State replica.State
	// Membership may be nil where there is no raft: then roles change at once.
	Membership Membership
	// NodeID is this manager's own node.
	NodeID string
	// Bootstrap describes the swarm that this manager founds. Nil on every manager but
	// the first; harmless once the objects exist.
	Bootstrap *Bootstrap
	// Log is where changes to the swarm are reported. Nil discards.
	Log *slog.Logger
	// Registerer takes the metrics and may be nil.
	Registerer prometheus.Registerer
	// Random is read for ids and keys; nil means crypto/rand.
	Random io.Reader
	// KeysTaken returns when the nodes that are there have programmed all network keys of a
	// version of the state, or with the error of ctx. Nil means that nobody waits for them.
	KeysTaken func(ctx context.Context, version uint64) error
}

// Manager runs terms of leadership, one at a time.
type Manager struct {
	state   replica.State
	members Membership
	self    string
	boot    *Bootstrap
	log     *slog.Logger
	metrics *metrics
	random  io.Reader
	taken   func(ctx context.Context, version uint64) error // may be nil
}

// New returns a Manager and registers its metrics.
func New(c Config) *Manager {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Random == nil {
		c.Random = rand.Reader
	}
	return &Manager{
		state: c.State, members: c.Membership, self: c.NodeID, boot: c.Bootstrap,
		log: c.Log, metrics: newMetrics(c.Registerer, c.State), random: c.Random, taken: c.KeysTaken,
	}
}

// RunTerm does a leader's work until ctx ends or something fails: it returns ctx's
// error, or the first failure.
func (m *Manager) RunTerm(ctx context.Context) error {
	if err := m.bootstrap(ctx); err != nil {
		return fmt.Errorf("found swarm: %w", err)
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return m.runServices(ctx) })
	group.Go(func() error { return m.runPlacement(ctx) })
	group.Go(func() error { return m.runCluster(ctx) })
	group.Go(func() error { return m.runRoles(ctx) })
	return group.Wait()
}

// newID makes an id. The random source of a process does not fail.
func (m *Manager) newID() string {
	id, err := model.NewID(m.random)
	if err != nil {
		panic(fmt.Sprintf("manager: %v", err))
	}
	return id
}
