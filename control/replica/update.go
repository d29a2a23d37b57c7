package replica

import (
	"context"
	"sync/atomic"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// update is one call of Update on its way through the owner.
type update struct {
	fn    func(*store.Tx) error
	taken atomic.Bool   // by the owner, which then runs fn, or by a caller that gave up
	ran   chan struct{} // closed when fn has returned
	done  chan error    // capacity 1
	start time.Time
}

// pending is an entry that was proposed here and is not applied yet.
type pending struct {
	index, term uint64
	data        []byte
	proposed    time.Time
	conf        bool            // a change of membership
	state       *store.Snapshot // after it
	events      []model.Event
	waiting     []waiter
}

// waiter gets result when the entry is applied, or errLostLeadership.
type waiter struct {
	done   chan<- error
	result error
}

// Update implements State. Updates of several callers are in flight together; each sees
// the changes of those before it, and its answer waits for them, so that no answer rests
// on an entry that was lost.
func (r *Replica) Update(ctx context.Context, fn func(*store.Tx) error) (*store.Snapshot, error) {
	if s := r.status.Load(); !s.leading {
		return nil, noLeader()
	}
	u := &update{fn: fn, ran: make(chan struct{}), done: make(chan error, 1), start: time.Now()}
	select {
	case r.updates <- u:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-r.stopped:
		return nil, errStopped
	}
	select {
	case err := <-u.done:
		return r.answered(u, err)
	case <-ctx.Done():
	case <-r.stopped:
	}
	if u.taken.CompareAndSwap(false, true) {
		return nil, cmpErr(ctx.Err(), errStopped) // fn never ran and never will
	}
	<-u.ran // fn must not run on after Update returned
	select {
	case err := <-u.done:
		return r.answered(u, err)
	default:
		return nil, cmpErr(ctx.Err(), errStopped)
	}
}

func (r *Replica) answered(u *update, err error) (*store.Snapshot, error) {
	if err != nil {
		return nil, err
	}
	r.metrics.write.Observe(time.Since(u.start).Seconds())
	return r.feed.view(), nil
}

func cmpErr(first, second error) error {
	if first != nil {
		return first
	}
	return second
}

// propose runs updates on top of everything in flight and proposes their entries together.
func (m *member) propose(batch []*update) {
	before := m.head
	var entries []*raftpb.Entry
	var proposed []*pending
	for _, u := range batch {
		if !u.taken.CompareAndSwap(false, true) {
			continue // its caller gave up
		}
		if m.head == nil {
			close(u.ran)
			u.done <- noLeader()
			continue
		}
		p, err := m.run(u, m.last+uint64(len(entries))+1)
		if p == nil {
			m.answerAfter(proposed, waiter{done: u.done, result: err})
			continue
		}
		m.head = p.state
		entries = append(entries, &raftpb.Entry{Data: p.data})
		proposed = append(proposed, p)
	}
	if len(entries) == 0 {
		return
	}
	err := m.raw.Step(&raftpb.Message{Type: raftpb.MsgProp.Enum(), From: new(m.id), Entries: entries})
	if st := m.raw.BasicStatus(); err == nil && (st.RaftState != raft.StateLeader || st.GetTerm() != m.term) {
		err = errLostLeadership
	}
	if err != nil {
		m.head = before
		for _, p := range proposed {
			p.answer(model.Wrap(model.Unavailable, err, "raft: failed to process the request"))
		}
		return
	}
	m.last += uint64(len(entries))
	m.pending = append(m.pending, proposed...)
}

// run runs one update for the entry with an index. Without a pending there is nothing to
// propose and the error, which may be nil, is the answer.
func (m *member) run(u *update, index uint64) (*pending, error) {
	tx := store.Begin(m.head, index-1, time.Now())
	err := u.fn(tx)
	close(u.ran)
	if err != nil || tx.Empty() {
		return nil, err
	}
	data, err := proto.Marshal(&api.InternalRaftRequest{Id: m.nextRequestID(), Action: tx.Actions()})
	if err != nil {
		return nil, model.Wrap(model.Internal, err, "encode raft entry")
	}
	if len(data) > maxRequest {
		return nil, model.Errorf(model.Exhausted,
			"raft: raft message is too large and can't be sent: %d bytes, at most %d", len(data), maxRequest)
	}
	return &pending{
		index:    index,
		term:     m.term,
		proposed: time.Now(),
		data:     data,
		events:   tx.Events(),
		state:    tx.Commit(index),
		waiting:  []waiter{{done: u.done}},
	}, nil
}

// answerAfter answers once the newest of what is in flight is applied: what an update read
// and what its error says may rest on it.
func (m *member) answerAfter(proposed []*pending, w waiter) {
	switch {
	case len(proposed) > 0:
		p := proposed[len(proposed)-1]
		p.waiting = append(p.waiting, w)
	case len(m.pending) > 0:
		p := m.pending[len(m.pending)-1]
		p.waiting = append(p.waiting, w)
	default:
		w.done <- w.result
	}
}

// answer tells everybody who waits for the entry.
func (p *pending) answer(err error) {
	for _, w := range p.waiting {
		if err != nil {
			w.done <- err
			continue
		}
		w.done <- w.result
	}
}

// dropPending gives up all entries in flight: they may or may not be written.
func (m *member) dropPending() {
	for _, p := range m.pending {
		p.answer(errLostLeadership)
	}
	m.pending = nil
	m.head = nil
}

// nextRequestID makes the id of a request in etcd's layout: 2 bytes that are 0, 5 bytes of
// milliseconds, 1 byte that counts.
func (m *member) nextRequestID() uint64 {
	now := uint64(time.Now().UnixMilli()) << 8 & (1<<48 - 1)
	m.requestID = max(m.requestID+1, now)
	return m.requestID
}
