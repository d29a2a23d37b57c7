package replica

import (
	"errors"
	"fmt"
	"log/slog"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/store"
	"github.com/skep-dev/skep/platform/disk"
)

// Copy returns the state and the members as this manager has them, and the index of the
// state in the log. What the leader has beyond that is not in it.
func (r *Replica) Copy() (*api.Snapshot, uint64) {
	state, ros := r.View(), r.members.Load()
	return &api.Snapshot{Version: api.Snapshot_V0, Membership: membershipOf(ros), Store: store.Encode(state)}, state.Index()
}

// Restore makes a log in dir that begins with a state at an index, of a swarm whose only
// member is the given node. All members that the state names count as removed. The next
// Run of a Replica with this dir goes on from there.
func Restore(dir string, keys Keys, nodeID, addr string, state *api.Snapshot, index uint64, log *slog.Logger) (err error) {
	old := newRoster(raft.None)
	for _, m := range state.GetMembership().GetMembers() {
		old.removed[m.GetRaftId()] = true
	}
	for _, id := range state.GetMembership().GetRemoved() {
		old.removed[id] = true
	}
	ros := newRoster(newRaftID(old))
	ros.removed = old.removed
	ros.members[ros.self] = &api.RaftMember{RaftId: ros.self, NodeId: nodeID, Addr: addr}
	self, err := proto.Marshal(ros.members[ros.self])
	if err != nil {
		return fmt.Errorf("restore raft log: %w", err)
	}
	state.Membership = membershipOf(ros)
	data, err := proto.Marshal(state)
	if err != nil {
		return fmt.Errorf("restore raft log: %w", err)
	}
	key, _, err := keys.DEKs()
	if err != nil {
		return fmt.Errorf("get raft log key: %w", err)
	}
	if err := disk.RemoveAll(dir); err != nil {
		return err
	}
	l, err := disk.Create(dir, self, key, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	const term = 1
	meta := &raftpb.SnapshotMetadata{ConfState: &raftpb.ConfState{Voters: []uint64{ros.self}}, Index: new(index), Term: new(uint64(term))}
	if err := l.MarkSnapshot(meta); err != nil {
		return err
	}
	if err := l.SaveSnapshotFile(&raftpb.Snapshot{Data: data, Metadata: meta}); err != nil {
		return err
	}
	return l.Save(&raftpb.HardState{Term: new(uint64(term)), Vote: new(raft.None), Commit: new(index)}, nil)
}
