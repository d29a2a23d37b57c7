package replica

import (
	"fmt"
	"log/slog"
	"maps"
	"slices"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/platform/disk"
)

// forceAlone makes this member the only one: what is not known to be committed is given
// up, and entries that remove all others are taken as committed. loaded and hard are
// changed accordingly.
func (m *member) forceAlone(loaded *disk.Loaded, hard *raftpb.HardState) error {
	commit := hard.GetCommit()
	loaded.Entries = slices.DeleteFunc(loaded.Entries, func(e *raftpb.Entry) bool { return e.GetIndex() > commit })
	ids, err := everMembers(loaded)
	if err != nil {
		return err
	}
	self, err := proto.Marshal(&api.RaftMember{RaftId: m.id, NodeId: m.r.cfg.NodeID, Addr: m.r.cfg.Addr})
	if err != nil {
		return fmt.Errorf("force new cluster: %w", err)
	}
	kind := raftpb.ConfChangeAddNode
	if ids[m.id] { // it votes
		kind = raftpb.ConfChangeUpdateNode // the address may be another than before
	}
	// It votes before the others go: a group without a vote is none.
	changes := []*raftpb.ConfChange{{Type: kind.Enum(), NodeId: new(m.id), Context: self}}
	for _, id := range slices.Sorted(maps.Keys(ids)) {
		if id != m.id {
			changes = append(changes, &raftpb.ConfChange{
				Type: raftpb.ConfChangeRemoveNode.Enum(), NodeId: new(id), Context: []byte{},
			})
		}
	}
	var added []*raftpb.Entry
	for _, cc := range changes {
		commit++
		cc.Id = new(commit)
		data, err := proto.Marshal(cc)
		if err != nil {
			return fmt.Errorf("force new cluster: %w", err)
		}
		added = append(added, &raftpb.Entry{
			Type: raftpb.EntryConfChange.Enum(), Term: new(hard.GetTerm()), Index: new(commit), Data: data,
		})
	}
	hard.Commit = new(commit)
	if err := m.log.Save(hard, added); err != nil {
		return fmt.Errorf("force new cluster: %w", err)
	}
	loaded.Entries = append(loaded.Entries, added...)
	m.r.cfg.Log.Warn("forced a new cluster of this manager only", slog.Int("removed_members", len(changes)-1))
	return nil
}

// everMembers returns the ids in the snapshot's membership and in changes of it since that
// were not removed again, and whether they vote.
func everMembers(loaded *disk.Loaded) (map[uint64]bool, error) {
	ids := make(map[uint64]bool)
	for _, id := range loaded.Snapshot.GetMetadata().GetConfState().GetVoters() {
		ids[id] = true
	}
	for _, id := range loaded.Snapshot.GetMetadata().GetConfState().GetLearners() {
		ids[id] = false
	}
	for _, e := range loaded.Entries {
		if e.GetType() != raftpb.EntryConfChange {
			continue
		}
		var cc raftpb.ConfChange
		if err := proto.Unmarshal(e.GetData(), &cc); err != nil {
			return nil, fmt.Errorf("force new cluster: change of membership %d: %w", e.GetIndex(), err)
		}
		switch cc.GetType() {
		case raftpb.ConfChangeRemoveNode:
			delete(ids, cc.GetNodeId())
		case raftpb.ConfChangeAddLearnerNode:
			ids[cc.GetNodeId()] = false
		case raftpb.ConfChangeAddNode:
			ids[cc.GetNodeId()] = true
		case raftpb.ConfChangeUpdateNode: // of its address
		}
	}
	return ids, nil
}

// alone returns the roster with every other member removed.
func alone(ros *roster) *roster {
	out := ros.clone()
	for id := range ros.members {
		if id != ros.self {
			delete(out.members, id)
			out.removed[id] = true
		}
	}
	delete(out.removed, ros.self)
	return out
}
