package replica

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
	"github.com/skep-dev/skep/platform/disk"
)

// start makes this member ready to take part: from disk, by joining, or as the first.
func (r *Replica) start(ctx context.Context) (*member, error) {
	if disk.Exists(r.cfg.Dir) {
		return r.restart(ctx)
	}
	if r.cfg.JoinAddr != "" {
		return r.join(ctx)
	}
	return r.bootstrap()
}

// bootstrap starts a new swarm of this member.
func (r *Replica) bootstrap() (*member, error) {
	m := r.newMember(newRaftID(newRoster(0)))
	self, err := r.createLog(m)
	if err != nil {
		return nil, err
	}
	if err := m.startRaft(); err != nil {
		return nil, err
	}
	if err := m.raw.Bootstrap([]raft.Peer{{ID: m.id, Context: self}}); err != nil {
		return nil, fmt.Errorf("start raft: %w", err)
	}
	m.setRoster(newRoster(m.id))
	return m, nil
}

// join starts a member of the swarm that cfg.JoinAddr manages.
func (r *Replica) join(ctx context.Context) (*member, error) {
	res, err := r.askToJoin(ctx)
	if err != nil {
		return nil, err
	}
	joined := &api.ClusterSnapshot{Members: res.GetMembers(), Removed: res.GetRemovedMembers()}
	if err := saveJoined(r.cfg.Dir, joined); err != nil {
		return nil, err
	}
	m := r.newMember(res.GetRaftId())
	if _, err := r.createLog(m); err != nil {
		return nil, err
	}
	if err := m.startRaft(); err != nil {
		return nil, err
	}
	m.setRoster(rosterOf(m.id, joined))
	return m, nil
}

// joinedFile holds the members as they were when this one joined, a ClusterSnapshot. They
// need this member's vote from then on, so it must know them when it starts again with a
// log that does not reach that far.
const joinedFile = "joined"

func saveJoined(dir string, joined *api.ClusterSnapshot) error {
	data, err := proto.Marshal(joined)
	if err != nil {
		return fmt.Errorf("encode members: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("create raft log: %w", err)
	}
	return disk.WriteFile(filepath.Join(dir, joinedFile), data, 0o600)
}

// loadJoined returns what saveJoined saved, nothing for a member that did not join.
func loadJoined(dir string) (*api.ClusterSnapshot, error) {
	data, err := os.ReadFile(filepath.Join(dir, joinedFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read members: %w", err)
	}
	joined := new(api.ClusterSnapshot)
	if err := proto.Unmarshal(data, joined); err != nil {
		return nil, fmt.Errorf("decode members: %w", err)
	}
	return joined, nil
}

// restart continues what is on disk.
func (r *Replica) restart(ctx context.Context) (*member, error) {
	log, loaded, rotating, err := r.load()
	if err != nil {
		return nil, err
	}
	self := new(api.RaftMember)
	if err := proto.Unmarshal(loaded.Metadata, self); err != nil {
		return nil, fmt.Errorf("decode raft metadata: %w", err)
	}
	m := r.newMember(self.GetRaftId())
	m.log = log
	if err := m.continueFrom(ctx, loaded); err != nil {
		return nil, errors.Join(err, log.Close())
	}
	if rotating != nil {
		m.rotateTo(rotating)
	}
	return m, nil
}

func (m *member) continueFrom(ctx context.Context, loaded *disk.Loaded) error {
	joined, err := loadJoined(m.r.cfg.Dir)
	if err != nil {
		return err
	}
	ros := rosterOf(m.id, joined)
	if loaded.Snapshot != nil {
		if err := m.storage.ApplySnapshot(loaded.Snapshot); err != nil {
			return fmt.Errorf("restore snapshot: %w", err)
		}
		if err := m.restore(loaded.Snapshot); err != nil {
			return err
		}
		ros = m.r.members.Load().clone()
	}
	hard := raiseState(loaded.HardState, loaded.Snapshot)
	if m.r.cfg.ForceNewCluster {
		if err := m.forceAlone(loaded, hard); err != nil {
			return err
		}
		ros = alone(ros)
	}
	if err := m.storage.SetHardState(hard); err != nil {
		return fmt.Errorf("restore raft state: %w", err)
	}
	if err := m.storage.Append(loaded.Entries); err != nil {
		return fmt.Errorf("restore raft log: %w", err)
	}
	if n := len(loaded.Entries); n > 0 {
		m.last = loaded.Entries[n-1].GetIndex()
	}
	noteRemoved(ros, loaded.Entries, hard.GetCommit())
	if m.r.cfg.JoinAddr != "" { // tells the leader our address, which may have changed
		if _, err := m.r.askToJoin(ctx); err != nil {
			return err
		}
	}
	m.setRoster(ros)
	return m.startRaft()
}

// noteRemoved notes the members that committed entries remove, so that their messages are
// refused before those entries are applied.
func noteRemoved(ros *roster, entries []*raftpb.Entry, commit uint64) {
	for _, e := range entries {
		var cc raftpb.ConfChange
		if e.GetIndex() > commit || e.GetType() != raftpb.EntryConfChange || proto.Unmarshal(e.GetData(), &cc) != nil {
			continue
		}
		if cc.GetType() == raftpb.ConfChangeRemoveNode {
			delete(ros.members, cc.GetNodeId())
			ros.removed[cc.GetNodeId()] = true
		}
	}
}

// raiseState mends what a crash between a snapshot and its hard state leaves.
func raiseState(hard *raftpb.HardState, snap *raftpb.Snapshot) *raftpb.HardState {
	meta := snap.GetMetadata()
	if hard.GetTerm() < meta.GetTerm() {
		return &raftpb.HardState{Term: new(meta.GetTerm()), Vote: new(raft.None), Commit: new(meta.GetIndex())}
	}
	return &raftpb.HardState{
		Term:   new(hard.GetTerm()),
		Vote:   new(hard.GetVote()),
		Commit: new(max(hard.GetCommit(), meta.GetIndex())),
	}
}

// load opens the log with the keys there are. rotating is the pending key if the log is
// not yet wholly sealed with it.
func (r *Replica) load() (log *disk.Log, loaded *disk.Loaded, rotating []byte, err error) {
	current, pending, err := r.cfg.Keys.DEKs()
	if err != nil {
		return nil, nil, nil, fmt.Errorf("get raft log key: %w", err)
	}
	if pending == nil {
		log, loaded, err = disk.Load(r.cfg.Dir, r.cfg.Log, current)
		return log, loaded, nil, err
	}
	log, loaded, err = disk.Load(r.cfg.Dir, r.cfg.Log, pending)
	if err == nil { // the rotation was complete
		if err := r.cfg.Keys.FinishRotation(); err != nil {
			return nil, nil, nil, errors.Join(fmt.Errorf("rotate raft log key: %w", err), log.Close())
		}
		return log, loaded, nil, nil
	}
	if !errors.Is(err, disk.ErrDecrypt) {
		return nil, nil, nil, err
	}
	log, loaded, err = disk.Load(r.cfg.Dir, r.cfg.Log, pending, current)
	return log, loaded, bytes.Clone(pending), err
}

func (r *Replica) newMember(id uint64) *member {
	return &member{r: r, id: id, storage: raft.NewMemoryStorage(), state: store.Empty()}
}

// createLog makes an empty log for the member and returns its description of itself.
func (r *Replica) createLog(m *member) ([]byte, error) {
	key, _, err := r.cfg.Keys.DEKs()
	if err != nil {
		return nil, fmt.Errorf("get raft log key: %w", err)
	}
	self, err := proto.Marshal(&api.RaftMember{RaftId: m.id, NodeId: r.cfg.NodeID, Addr: r.cfg.Addr})
	if err != nil {
		return nil, fmt.Errorf("encode member: %w", err)
	}
	m.log, err = disk.Create(r.cfg.Dir, self, key, r.cfg.Log)
	return self, err
}

func (m *member) startRaft() error {
	raw, err := raft.NewRawNode(&raft.Config{
		ID:                        m.id,
		ElectionTick:              electionTick,
		HeartbeatTick:             heartbeatTick,
		Storage:                   m.storage,
		Applied:                   m.applied,
		MaxSizePerMsg:             maxAppend,
		MaxCommittedSizePerReady:  math.MaxUint64,
		MaxUncommittedEntriesSize: maxUncommitted,
		MaxInflightMsgs:           maxInflight,
		CheckQuorum:               true,
		PreVote:                   true,
		DisableProposalForwarding: true,
		StepDownOnRemoval:         true,
		Logger:                    raftLogger{log: m.r.cfg.Log},
	})
	if err != nil {
		return fmt.Errorf("start raft: %w", err)
	}
	m.raw = raw
	return nil
}

// askToJoin asks the manager at cfg.JoinAddr to make this node a member.
func (r *Replica) askToJoin(ctx context.Context) (*api.JoinResponse, error) {
	conn, err := r.cfg.Dial(ctx, r.cfg.JoinAddr)
	if err != nil {
		return nil, fmt.Errorf("join raft: %w", err)
	}
	defer conn.Close() //nolint:errcheck // nothing is lost
	ctx, cancel := context.WithTimeout(ctx, joinTimeout+2*electionTick*r.cfg.TickInterval)
	defer cancel()
	res, err := api.NewRaftMembershipClient(conn).Join(ctx, &api.JoinRequest{Addr: r.cfg.Addr})
	if err != nil {
		return nil, fmt.Errorf("join raft: %w", err)
	}
	if res.GetRaftId() == raft.None {
		return nil, model.Errorf(model.Internal, "join raft: the answer has no raft id")
	}
	return res, nil
}
