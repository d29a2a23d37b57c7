package replica

import (
	"context"
	"encoding/binary"

	"go.etcd.io/raft/v3"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// readTicks is after how many ticks a round that nobody answered is given up. A leader that
// has lost its majority stops to lead within two election timeouts, and answers then.
const readTicks = 2*electionTick + 1

// reads are the calls of Read on their way through the owner. One round of heartbeats, to
// which a majority must answer, serves all that came before it; those that come meanwhile
// share the next one.
type reads struct {
	waiting []chan<- error // for the next round; from maxPending on callers wait
	round   []chan<- error // for the round under way
	number  uint64         // of the newest round
	ticks   int            // since the round began
	heard   bool           // a majority has answered
	index   uint64         // what must be applied before the round's reads are answered
}

// Read implements State.
func (r *Replica) Read(ctx context.Context) (*store.Snapshot, error) {
	if s := r.status.Load(); !s.leading {
		return nil, model.ErrUnconfirmed
	}
	if r.members.Load().alone() {
		return r.feed.view(), nil // nobody else can have been elected
	}
	done := make(chan error, 1)
	select {
	case r.reads <- done:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-r.stopped:
		return nil, errStopped
	}
	select {
	case err := <-done:
		if err != nil {
			return nil, err
		}
		return r.feed.view(), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-r.stopped:
		return nil, errStopped
	}
}

// read takes a read, and what else is queued.
func (m *member) read(first chan<- error) {
	m.reads.waiting = append(m.reads.waiting, first)
	for range len(m.r.reads) {
		m.reads.waiting = append(m.reads.waiting, <-m.r.reads) // nobody else receives
	}
	if m.head == nil {
		m.dropReads()
		return
	}
	m.beginRound()
}

// beginRound asks all members whether this one still leads, for the reads that wait.
func (m *member) beginRound() {
	if len(m.reads.round) > 0 || len(m.reads.waiting) == 0 {
		return
	}
	m.reads.round, m.reads.waiting = m.reads.waiting, m.reads.round[:0]
	m.reads.number++
	m.reads.ticks, m.reads.heard = 0, false
	m.raw.ReadIndex(binary.BigEndian.AppendUint64(nil, m.reads.number))
}

// noteReads answers the round's reads when a majority has confirmed that this member led
// after it began, and what was committed by then is applied.
func (m *member) noteReads(states []raft.ReadState) {
	for _, s := range states {
		if binary.BigEndian.Uint64(s.RequestCtx) == m.reads.number {
			m.reads.heard, m.reads.index = true, s.Index
		}
	}
	if len(m.reads.round) == 0 {
		return
	}
	// Raft waits for the answers of others even when they have lost their votes meanwhile.
	if m.isLeader && m.alone() || m.reads.heard && m.applied >= m.reads.index {
		m.answerRound(nil)
		m.beginRound()
	}
}

// tickReads gives a round up for which time has run out.
func (m *member) tickReads() {
	if len(m.reads.round) == 0 {
		return
	}
	if m.reads.ticks++; m.reads.ticks > readTicks {
		m.answerRound(model.ErrUnconfirmed)
		m.beginRound()
	}
}

func (m *member) answerRound(err error) {
	for _, done := range m.reads.round {
		done <- err
	}
	clear(m.reads.round)
	m.reads.round = m.reads.round[:0]
}

// dropReads refuses all reads, for this member does not lead.
func (m *member) dropReads() {
	m.answerRound(model.ErrUnconfirmed)
	m.reads.round, m.reads.waiting = m.reads.waiting, m.reads.round
	m.answerRound(model.ErrUnconfirmed)
}
