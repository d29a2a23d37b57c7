package replica

import (
	"bytes"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// snapshots is where taking snapshots and rotating the key stand.
type snapshots struct {
	last   uint64         // index of the newest one
	busy   bool           // one is being written
	wait   sync.WaitGroup // for the goroutine that writes it
	failed time.Time      // when one last failed
	// rotating is set while the log moves to the pending key; done once a snapshot at or
	// after rotateAt exists.
	rotating bool
	rotateAt uint64
}

const snapshotRetry = 10 * time.Second

// maybeSnapshot begins a snapshot when one is due. It is written in another goroutine.
func (m *member) maybeSnapshot() error {
	cfg := m.state.Cluster().GetSpec().GetRaft()
	interval := cfg.GetSnapshotInterval()
	if m.state.Cluster() == nil {
		interval = defaultSnapshotInterval
	}
	due := interval > 0 && m.applied-m.snap.last >= interval
	due = due || m.snap.rotating && m.applied >= m.snap.rotateAt && m.applied > m.snap.last
	if !due || m.snap.busy || time.Since(m.snap.failed) < snapshotRetry {
		return nil
	}
	term, err := m.storage.Term(m.applied)
	if err != nil {
		return fmt.Errorf("take snapshot at %d: %w", m.applied, err)
	}
	meta := &raftpb.SnapshotMetadata{ConfState: proto.CloneOf(m.conf), Index: new(m.applied), Term: new(term)}
	if err := m.log.MarkSnapshot(meta); err != nil {
		return err
	}
	m.snap.busy = true
	state, ros := m.state, m.r.members.Load()
	m.snap.wait.Go(func() { m.r.writeSnapshot(m.log, meta, state, ros) })
	return nil
}

type snapshotFile interface {
	SaveSnapshotFile(s *raftpb.Snapshot) error
}

func (r *Replica) writeSnapshot(log snapshotFile, meta *raftpb.SnapshotMetadata, state *store.Snapshot, ros *roster) {
	start := time.Now()
	data, err := encodeState(state, ros)
	if err == nil {
		err = log.SaveSnapshotFile(&raftpb.Snapshot{Data: data, Metadata: meta})
	}
	r.metrics.snapshot.Observe(time.Since(start).Seconds())
	select {
	case r.calls <- func(m *member) { m.snapshotWritten(meta, data, err) }:
	case <-r.stopping:
	}
}

// snapshotWritten drops what the snapshot made superfluous.
func (m *member) snapshotWritten(meta *raftpb.SnapshotMetadata, data []byte, err error) {
	m.snap.busy = false
	if err != nil {
		m.snap.failed = time.Now()
		m.r.cfg.Log.Error("take snapshot", slog.Any("error", err))
		return
	}
	if meta.GetIndex() <= m.snap.last {
		return // one received from the leader is newer
	}
	m.snap.last = meta.GetIndex()
	if _, err := m.storage.CreateSnapshot(meta.GetIndex(), meta.GetConfState(), data); err != nil {
		m.failure = fmt.Errorf("take snapshot: %w", err)
		return
	}
	m.failure = m.afterSnapshot()
}

// afterSnapshot compacts the log in memory, ends a rotation of the key and purges files.
func (m *member) afterSnapshot() error {
	kept, keepOld := uint64(defaultEntriesKept), uint64(0)
	if c := m.state.Cluster(); c != nil {
		kept = c.GetSpec().GetRaft().GetLogEntriesForSlowFollowers()
		keepOld = c.GetSpec().GetRaft().GetKeepOldSnapshots()
	}
	first, err := m.storage.FirstIndex()
	if err != nil {
		return fmt.Errorf("compact raft log: %w", err)
	}
	if m.snap.last > kept && m.snap.last-kept >= first {
		if err := m.storage.Compact(m.snap.last - kept); err != nil {
			return fmt.Errorf("compact raft log: %w", err)
		}
	}
	if m.snap.rotating && m.snap.last >= m.snap.rotateAt {
		if err := m.r.cfg.Keys.FinishRotation(); err != nil {
			return fmt.Errorf("rotate raft log key: %w", err)
		}
		m.snap.rotating = false
		keepOld = 0 // older ones are sealed with the old key
		if err := m.log.DropBroken(); err != nil {
			return err
		}
		m.r.cfg.Log.Info("raft log key rotated", slog.Uint64("index", m.snap.last))
	}
	return m.log.Purge(keepOld)
}

// beginRotation makes the log write with the pending key from now on.
func (m *member) beginRotation() error {
	pending, err := m.r.cfg.Keys.BeginRotation()
	if err != nil {
		return fmt.Errorf("rotate raft log key: %w", err)
	}
	if pending == nil || m.snap.rotating {
		return nil
	}
	m.rotateTo(pending)
	return m.maybeSnapshot()
}

func (m *member) rotateTo(pending []byte) {
	m.log.SetKey(bytes.Clone(pending))
	m.snap.rotating = true
	m.snap.rotateAt = max(m.last, m.snap.last+1)
}

// saveReceived makes a snapshot that the leader sent durable.
func (m *member) saveReceived(s *raftpb.Snapshot) error {
	if err := m.log.MarkSnapshot(s.GetMetadata()); err != nil {
		return err
	}
	return m.log.SaveSnapshotFile(s)
}

// restore replaces the state by that of a snapshot.
func (m *member) restore(s *raftpb.Snapshot) error {
	index := s.GetMetadata().GetIndex()
	state, membership, err := decodeState(s.GetData(), index)
	if err != nil {
		return err
	}
	m.state, m.applied, m.snap.last = state, index, index
	m.last = max(m.last, index)
	m.conf = s.GetMetadata().GetConfState()
	ros := rosterOf(m.id, membership)
	m.setRoster(ros)
	if ros.removed[m.id] {
		m.leave()
	}
	m.r.feed.publish(state, nil, true)
	return nil
}

func encodeState(state *store.Snapshot, ros *roster) ([]byte, error) {
	data, err := proto.Marshal(&api.Snapshot{Version: api.Snapshot_V0, Membership: membershipOf(ros), Store: store.Encode(state)})
	if err != nil {
		return nil, fmt.Errorf("encode snapshot: %w", err)
	}
	return data, nil
}

func membershipOf(ros *roster) *api.ClusterSnapshot {
	membership := &api.ClusterSnapshot{Removed: ros.removedIDs()}
	for _, id := range ros.ids() {
		membership.Members = append(membership.Members, ros.members[id])
	}
	return membership
}

func decodeState(data []byte, index uint64) (*store.Snapshot, *api.ClusterSnapshot, error) {
	var s api.Snapshot
	if err := proto.Unmarshal(data, &s); err != nil {
		return nil, nil, fmt.Errorf("decode snapshot: %w", err)
	}
	if s.GetVersion() != api.Snapshot_V0 {
		return nil, nil, model.Errorf(model.Invalid, "decode snapshot: version %d is unknown", s.GetVersion())
	}
	return store.Decode(s.GetStore(), index), s.GetMembership(), nil
}
