package replica

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// Replica is one manager's member of the raft group. It implements State. Its methods may
// be called from any goroutine; those that need raft wait until Run has started it.
type Replica struct {
	cfg     Config
	feed    *feed
	metrics *metrics
	peers   *transport

	updates chan *update         // to the owner; unbuffered beyond one batch, blocks
	reads   chan chan<- error    // likewise
	inbox   chan *raftpb.Message // to the owner; blocks
	calls   chan func(*member)   // to the owner; blocks
	ready   chan struct{}        // closed when raft runs
	stopped chan struct{}        // closed when Run has returned

	stopping chan struct{} // closed when the owner stops to listen

	status  atomic.Pointer[term]
	members atomic.Pointer[roster]
}

// term is what the owner says about leadership. A new one replaces the old, whose
// changed is then closed.
type term struct {
	leader  uint64 // 0 when unknown
	term    uint64
	leading bool // this member leads and has applied its whole log
	changed chan struct{}
}

// roster is the membership after some entry.
type roster struct {
	self    uint64
	members map[uint64]*api.RaftMember // without status; never changed
	removed map[uint64]bool
	voters  []uint64 // never changed
}

// votes reports whether the member itself has a vote, alone whether nobody else has one.
func (ros *roster) votes() bool { return slices.Contains(ros.voters, ros.self) }
func (ros *roster) alone() bool { return len(ros.voters) == 1 && ros.votes() }

// New returns a Replica that does nothing before Run.
func New(cfg Config) *Replica {
	if cfg.TickInterval == 0 {
		cfg.TickInterval = 100 * time.Millisecond
	}
	r := &Replica{
		cfg:     cfg,
		feed:    newFeed(store.Empty()),
		metrics: newMetrics(cfg.Registerer),
		updates: make(chan *update, maxBatch),
		reads:   make(chan chan<- error, maxBatch),
		inbox:   make(chan *raftpb.Message, inboxSize),
		calls:   make(chan func(*member)),
		ready:   make(chan struct{}),
		stopped: make(chan struct{}),

		stopping: make(chan struct{}),
	}
	r.status.Store(&term{changed: make(chan struct{})})
	r.members.Store(&roster{})
	r.peers = newTransport(r)
	return r
}

// View returns the newest applied state. It needs no quorum.
func (r *Replica) View() *store.Snapshot { return r.feed.view() }

// Follow returns a cursor at the newest applied state.
func (r *Replica) Follow() *Cursor { return r.feed.follow() }

// Ready is closed when this member has its log and takes part in raft.
func (r *Replica) Ready() <-chan struct{} { return r.ready }

// Votes reports whether this member has a vote. A new one gets it once it has the log.
func (r *Replica) Votes() bool { return r.members.Load().votes() }

// Voters returns those of Members that have a vote: changes need a majority of them.
func (r *Replica) Voters() []*api.RaftMember {
	ros := r.members.Load()
	return slices.DeleteFunc(r.Members(), func(m *api.RaftMember) bool { return !slices.Contains(ros.voters, m.GetRaftId()) })
}

// Leader returns the member that leads, as far as this one knows.
func (r *Replica) Leader() (nodeID, addr string, ok bool) {
	m, ok := r.members.Load().members[r.status.Load().leader]
	return m.GetNodeId(), m.GetAddr(), ok
}

// Leading reports whether this member leads and may write. changed is closed when the
// answer, the leader or the term may have changed.
func (r *Replica) Leading() (leading bool, changed <-chan struct{}) {
	s := r.status.Load()
	return s.leading, s.changed
}

// RunTerms calls lead once for each term in which this member leads, never twice at the
// same time. The context of the call ends with the term. It returns when ctx ends, with
// its error, or with the first error of lead that was not caused by the end of its term.
func (r *Replica) RunTerms(ctx context.Context, lead func(context.Context) error) error {
	for {
		s := r.status.Load()
		if !s.leading {
			select {
			case <-s.changed:
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if err := r.runTerm(ctx, s, lead); err != nil {
			return err
		}
	}
}

func (r *Replica) runTerm(ctx context.Context, s *term, lead func(context.Context) error) error {
	termCtx, cancel := context.WithCancel(ctx)
	var watch sync.WaitGroup
	watch.Go(func() {
		defer cancel()
		for at := s; at.leading && at.term == s.term; at = r.status.Load() {
			select {
			case <-at.changed:
			case <-termCtx.Done():
				return
			}
		}
	})
	err := lead(termCtx)
	ended := termCtx.Err() != nil
	if err == nil && !ended {
		<-termCtx.Done() // nothing left to do in this term
	}
	cancel()
	watch.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if ended {
		return nil //nolint:nilerr // what failed did so because the term ended
	}
	return err
}

// Members returns the members in the order of their raft ids, with their status as this
// member sees it.
func (r *Replica) Members() []*api.RaftMember {
	ros, leader := r.members.Load(), r.status.Load().leader
	out := make([]*api.RaftMember, 0, len(ros.members))
	for _, id := range ros.ids() {
		m := proto.CloneOf(ros.members[id])
		m.Status = &api.RaftMemberStatus{
			Leader:       id == leader,
			Reachability: api.RaftMemberStatus_UNREACHABLE,
		}
		if id == ros.self || r.peers.active(id) {
			m.Status.Reachability = api.RaftMemberStatus_REACHABLE
		}
		out = append(out, m)
	}
	return out
}

// call runs f in the owner goroutine and waits until it ran.
func (r *Replica) call(ctx context.Context, f func(*member)) error {
	ran := make(chan struct{})
	select {
	case r.calls <- func(m *member) { defer close(ran); f(m) }:
	case <-ctx.Done():
		return ctx.Err()
	case <-r.stopped:
		return errStopped
	}
	select {
	case <-ran:
		return nil
	case <-r.stopped:
		return errStopped
	}
}

// publishStatus replaces the status. Only the owner calls it.
func (r *Replica) publishStatus(leader, number uint64, leading bool) {
	old := r.status.Load()
	if old.leader == leader && old.term == number && old.leading == leading {
		return
	}
	r.status.Store(&term{leader: leader, term: number, leading: leading, changed: make(chan struct{})})
	close(old.changed)
	r.metrics.leader(leading)
}

var _ State = (*Replica)(nil)

// noLeader is what an update gets from a member that does not lead.
func noLeader() error { return model.ErrNoLeader }
