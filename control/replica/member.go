package replica

import (
	"context"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"

	"github.com/skep-dev/skep/core/store"
	"github.com/skep-dev/skep/platform/disk"
)

// member is what the owner goroutine owns: raft, the log and the state. Nothing else
// touches it.
type member struct {
	r       *Replica
	id      uint64
	raw     *raft.RawNode
	storage *raft.MemoryStorage
	log     *disk.Log

	state   *store.Snapshot // after the entry applied
	applied uint64          // index of the last entry applied
	last    uint64          // index of the last entry of the log, proposals included
	conf    *raftpb.ConfState

	term     uint64
	isLeader bool
	leadFrom uint64          // the no-op of this term; we lead once it is applied
	head     *store.Snapshot // state and everything in flight; nil when not leading
	pending  []*pending      // by index
	reads    reads

	unheard   int // ticks since the leader was heard
	requestID uint64
	snap      snapshots
	removed   bool // by the swarm: stop
	failure   error
}

// Run takes part in raft until ctx ends, which returns nil, or until this member is
// removed, which returns ErrRemoved. Any other error means that the member cannot go on.
// Run may be called once.
func (r *Replica) Run(ctx context.Context) error {
	defer close(r.stopped)
	defer r.peers.close()
	m, err := r.start(ctx)
	if err != nil {
		return err
	}
	defer m.close()
	if err := m.beginRotation(); err != nil { // requested while we were not running
		return err
	}
	close(r.ready)
	return m.loop(ctx)
}

func (m *member) close() {
	close(m.r.stopping)
	m.snap.wait.Wait()
	m.dropPending()
	m.dropReads()
	m.r.publishStatus(0, m.term, false)
	if err := m.log.Close(); err != nil {
		m.r.cfg.Log.Warn("close raft log", slog.Any("error", err))
	}
}

func (m *member) loop(ctx context.Context) error {
	// The first tick comes after a random part of the interval: members whose ticks fall on
	// one instant stand for election at one instant, and split the votes.
	phase := 1 + mathrand.N(m.r.cfg.TickInterval)
	ticker := time.NewTicker(phase)
	defer ticker.Stop()
	quiet := false
	for first := true; ; first = false {
		for m.raw.HasReady() && m.failure == nil {
			m.failure = m.handleReady()
		}
		switch {
		case m.failure != nil:
			return m.failure
		case m.removed:
			return ErrRemoved
		}
		if first && m.alone() { // nobody to wait for
			if err := m.raw.Campaign(); err != nil {
				return fmt.Errorf("start raft: %w", err)
			}
			continue
		}
		if quiet != m.quiet() {
			if quiet = m.quiet(); quiet {
				ticker.Stop()
			} else {
				phase = 0
				ticker.Reset(m.r.cfg.TickInterval)
			}
		}
		updates := m.r.updates
		if len(m.pending) >= maxPending {
			updates = nil // callers wait
		}
		reads := m.r.reads
		if len(m.reads.waiting) >= maxPending {
			reads = nil // likewise
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			if phase != 0 {
				phase = 0
				ticker.Reset(m.r.cfg.TickInterval)
			}
			m.raw.Tick()
			m.tickReads()
			m.askAround()
		case msg := <-m.r.inbox:
			m.step(msg)
			m.stepQueued()
			m.admit() // one of them may say that a new member has the log
		case u := <-updates:
			m.propose(collect(u, updates))
		case done := <-reads:
			m.read(done)
		case f := <-m.r.calls:
			f(m)
		case <-m.r.cfg.Keys.RotationWanted():
			m.failure = m.beginRotation()
		}
	}
}

// quiet reports whether time does not matter: a leader without other members has nobody to
// tell that it lives, and nobody who could be elected.
func (m *member) quiet() bool { return m.isLeader && m.alone() && len(m.conf.GetLearners()) == 0 }

// askAround has a member without a vote, when it hears of no leader, say something to the
// others: it hears then if it was removed. Those with a vote ask for votes.
func (m *member) askAround() {
	ros := m.r.members.Load()
	if m.unheard++; ros.votes() || m.unheard%electionTick != 0 {
		return
	}
	var msgs []*raftpb.Message
	for _, id := range ros.ids() {
		msgs = append(msgs, &raftpb.Message{
			Type: raftpb.MsgHeartbeatResp.Enum(), From: new(m.id), To: new(id), Term: new(m.raw.BasicStatus().GetTerm()),
		})
	}
	m.send(msgs)
}

// alone reports whether this member has the only vote.
func (m *member) alone() bool { return m.r.members.Load().alone() }

// collect takes what else is queued, so that one write to disk serves many updates.
func collect(first *update, queue <-chan *update) []*update {
	batch := []*update{first}
	for len(batch) < maxBatch {
		select {
		case u := <-queue:
			batch = append(batch, u)
		default:
			return batch
		}
	}
	return batch
}

// stepQueued steps what else was received, so that one write to disk serves many messages.
func (m *member) stepQueued() {
	for range inboxSize {
		select {
		case msg := <-m.r.inbox:
			m.step(msg)
		default:
			return
		}
	}
}

func (m *member) step(msg *raftpb.Message) {
	switch msg.GetType() {
	case raftpb.MsgApp, raftpb.MsgHeartbeat, raftpb.MsgSnap:
		m.unheard = 0
	default:
	}
	if err := m.raw.Step(msg); err != nil {
		m.r.cfg.Log.Debug("step raft message", slog.String("type", msg.GetType().String()), slog.Any("error", err))
	}
}

// handleReady does what raft asks for: make durable, send, apply.
func (m *member) handleReady() error {
	rd := m.raw.Ready()
	m.noteRole(rd)
	if m.isLeader {
		m.send(rd.Messages) // beside our own write: followers write at the same time
	}
	if !raft.IsEmptySnap(rd.Snapshot) {
		if err := m.saveReceived(rd.Snapshot); err != nil {
			return err
		}
	}
	if err := m.log.Save(rd.HardState, rd.Entries); err != nil {
		return err
	}
	if err := m.remember(rd); err != nil {
		return err
	}
	if !m.isLeader {
		m.send(rd.Messages)
	}
	if !raft.IsEmptySnap(rd.Snapshot) {
		if err := m.restore(rd.Snapshot); err != nil {
			return err
		}
	}
	if err := m.apply(rd.CommittedEntries); err != nil {
		return err
	}
	m.raw.Advance(rd)
	m.noteReads(rd.ReadStates)
	m.notePublished()
	return m.maybeSnapshot()
}

// noteRole gives up what is in flight, and what waits to be read, when the term or the role changed.
func (m *member) noteRole(rd raft.Ready) {
	st := m.raw.BasicStatus()
	leads := st.RaftState == raft.StateLeader
	if leads && m.isLeader && st.GetTerm() == m.term {
		return
	}
	if m.isLeader {
		m.dropPending()
		m.dropReads()
	}
	if leads {
		// The entries of this Ready end with the no-op of the new term.
		m.leadFrom = rd.Entries[len(rd.Entries)-1].GetIndex()
		m.head = nil
	}
	m.isLeader, m.term = leads, st.GetTerm()
}

// remember puts into memory what was made durable.
func (m *member) remember(rd raft.Ready) error {
	if !raft.IsEmptySnap(rd.Snapshot) {
		if err := m.storage.ApplySnapshot(rd.Snapshot); err != nil {
			return err
		}
		m.last = rd.Snapshot.GetMetadata().GetIndex()
	}
	if rd.HardState != nil {
		if err := m.storage.SetHardState(rd.HardState); err != nil {
			return err
		}
	}
	if n := len(rd.Entries); n > 0 {
		m.last = rd.Entries[n-1].GetIndex()
	}
	return m.storage.Append(rd.Entries)
}

// notePublished tells others who leads; they may write once the no-op of the term, and so
// everything before it, is applied.
func (m *member) notePublished() {
	st := m.raw.BasicStatus()
	if m.isLeader && m.head == nil && m.applied >= m.leadFrom {
		m.head = m.state
	}
	m.r.publishStatus(st.Lead, m.term, m.isLeader && m.head != nil)
}
