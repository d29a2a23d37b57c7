package replica

import (
	"fmt"
	"log/slog"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/platform/disk"
)

// Peeked is what the log of a manager that need not run says.
type Peeked struct {
	// Self is the member that the log belongs to.
	Self *api.RaftMember
	// Members are the managers by what is committed, Snapshot's state that of the newest
	// snapshot; both are nil where no key opens the log.
	Members []*api.RaftMember
	State   *api.StoreSnapshot
	Disk    *disk.Peeked
}

// Peek reads the log in dir without changing anything, as far as keys open it.
func Peek(dir string, log *slog.Logger, keys ...[]byte) (*Peeked, error) {
	raw, err := disk.Peek(dir, log, keys...)
	if err != nil {
		return nil, err
	}
	p := &Peeked{Self: new(api.RaftMember), Disk: raw}
	if err := proto.Unmarshal(raw.Metadata, p.Self); err != nil {
		return nil, fmt.Errorf("decode raft metadata: %w", err)
	}
	if raw.Sealed {
		return p, nil
	}
	ros := newRoster(p.Self.GetRaftId())
	if raw.Snapshot != nil {
		var s api.Snapshot
		if err := proto.Unmarshal(raw.Snapshot.GetData(), &s); err != nil {
			return nil, fmt.Errorf("decode snapshot: %w", err)
		}
		p.State, ros = s.GetStore(), rosterOf(p.Self.GetRaftId(), s.GetMembership())
	}
	for _, e := range raw.Entries {
		var cc raftpb.ConfChange
		var member api.RaftMember
		if e.GetType() != raftpb.EntryConfChange || e.GetIndex() > raw.HardState.GetCommit() || proto.Unmarshal(e.GetData(), &cc) != nil {
			continue
		}
		if cc.GetType() == raftpb.ConfChangeRemoveNode {
			delete(ros.members, cc.GetNodeId())
		} else if proto.Unmarshal(cc.GetContext(), &member) == nil {
			ros.members[cc.GetNodeId()] = &member
		}
	}
	for _, id := range ros.ids() {
		p.Members = append(p.Members, ros.members[id])
	}
	return p, nil
}
