package replica

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"log/slog"
	"maps"
	"slices"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// errQuorum is what a removal that would endanger the quorum gets.
var errQuorum = &model.Error{
	Kind: model.Precondition,
	Text: "raft: member cannot be removed, because removing it may result in loss of quorum",
}

func (ros *roster) ids() []uint64 { return slices.Sorted(maps.Keys(ros.members)) }

func (ros *roster) removedIDs() []uint64 { return slices.Sorted(maps.Keys(ros.removed)) }

func (ros *roster) byNode(nodeID string) *api.RaftMember {
	for _, id := range ros.ids() {
		if ros.members[id].GetNodeId() == nodeID {
			return ros.members[id]
		}
	}
	return nil
}

func (ros *roster) clone() *roster {
	return &roster{self: ros.self, members: maps.Clone(ros.members), removed: maps.Clone(ros.removed)}
}

func newRoster(self uint64) *roster {
	return &roster{self: self, members: make(map[uint64]*api.RaftMember), removed: make(map[uint64]bool)}
}

func rosterOf(self uint64, membership *api.ClusterSnapshot) *roster {
	ros := newRoster(self)
	for _, id := range membership.GetRemoved() {
		ros.removed[id] = true
	}
	for _, m := range membership.GetMembers() {
		if !ros.removed[m.GetRaftId()] {
			ros.members[m.GetRaftId()] = m
		}
	}
	return ros
}

// leave ends a member that was removed, but for the second of two: if the first one was
// killed before it had noted that this is agreed, it needs the second's vote once more. So
// the second goes on until the first one tells it.
func (m *member) leave() {
	m.removed = m.removed || len(m.conf.GetVoters()) > 1
	m.unheard = electionTick - 1 // ask at once
}

// setRoster publishes the membership and connects to the peers in it.
func (m *member) setRoster(ros *roster) {
	ros.voters = slices.Clone(m.conf.GetVoters())
	m.r.members.Store(ros)
	m.r.peers.set(ros)
}

// applyConfChange makes one change of membership.
func (m *member) applyConfChange(e *raftpb.Entry) error {
	var cc raftpb.ConfChange
	if err := proto.Unmarshal(e.GetData(), &cc); err != nil {
		return fmt.Errorf("decode change of membership %d: %w", e.GetIndex(), err)
	}
	leader := m.raw.BasicStatus().Lead
	ros := m.r.members.Load().clone()
	id := cc.GetNodeId()
	switch cc.GetType() {
	case raftpb.ConfChangeAddNode, raftpb.ConfChangeAddLearnerNode, raftpb.ConfChangeUpdateNode:
		rm := new(api.RaftMember)
		if err := proto.Unmarshal(cc.GetContext(), rm); err != nil {
			return fmt.Errorf("decode change of membership %d: %w", e.GetIndex(), err)
		}
		rm.Status = nil
		rm.RaftId = id
		ros.members[id] = rm
		delete(ros.removed, id) // one that was, and is alone by force
	case raftpb.ConfChangeRemoveNode:
		delete(ros.members, id)
		ros.removed[id] = true
	}
	m.conf = m.raw.ApplyConfChange(&cc)
	m.setRoster(ros)
	if cc.GetType() == raftpb.ConfChangeRemoveNode && id == m.id {
		m.leave()
	}
	m.r.cfg.Log.Info("raft membership changed",
		slog.String("change", cc.GetType().String()),
		slog.String("raft_id", fmt.Sprintf("%x", id)),
		slog.Int("members", len(ros.members)))
	if cc.GetType() == raftpb.ConfChangeRemoveNode && id == leader && id != m.id {
		if err := m.raw.Campaign(); err != nil {
			m.r.cfg.Log.Warn("campaign after the leader was removed", slog.Any("error", err))
		}
	}
	return nil
}

// canRemove reports whether a quorum of those left would be reachable.
func (m *member) canRemove(id uint64) bool {
	left := slices.DeleteFunc(slices.Clone(m.conf.GetVoters()), func(voter uint64) bool { return voter == id })
	reachable := 0
	for _, other := range left {
		if other == m.id || m.r.peers.active(other) {
			reachable++
		}
	}
	return reachable >= len(left)/2+1
}

// changing returns the change of membership that is under way, nil if there is none.
func (m *member) changing() *pending {
	if i := slices.IndexFunc(m.pending, func(p *pending) bool { return p.conf }); i >= 0 {
		return m.pending[i]
	}
	return nil
}

// maxBehind is how many entries a new member may still miss when it begins to vote.
const maxBehind = 256

// admit gives new members their vote once they have the log. Until then nothing waits for
// them: one that never comes back from joining does not take the quorum away.
func (m *member) admit() {
	if m.head == nil || len(m.conf.GetLearners()) == 0 || m.changing() != nil {
		return
	}
	progress, ros := m.raw.Status().Progress, m.r.members.Load()
	for _, id := range m.conf.GetLearners() {
		if p := progress[id]; p.Match == 0 || p.Match+maxBehind < m.applied || ros.members[id] == nil {
			continue
		}
		about, err := proto.Marshal(ros.members[id])
		if err == nil {
			_, err = m.proposeConf(&raftpb.ConfChange{Type: raftpb.ConfChangeAddNode.Enum(), NodeId: new(id), Context: about})
		}
		if err != nil {
			m.r.cfg.Log.Warn("new manager does not vote yet", slog.String("raft_id", fmt.Sprintf("%x", id)), slog.Any("error", err))
		}
		return // one change at a time
	}
}

// proposeConf proposes a change of membership and returns where its result will come.
func (m *member) proposeConf(cc *raftpb.ConfChange) (<-chan error, error) {
	if m.head == nil {
		return nil, noLeader()
	}
	cc.Id = new(m.nextRequestID())
	if err := m.raw.ProposeConfChange(cc); err != nil {
		return nil, model.Wrap(model.Unavailable, err, "raft: failed to process the request")
	}
	m.last++
	done := make(chan error, 1)
	m.pending = append(m.pending, &pending{
		index: m.last, term: m.term, conf: true, state: m.head, waiting: []waiter{{done: done}},
	})
	return done, nil
}

// changeMembership has the owner make a change, which it may refuse, and waits until it is
// applied. A nil change is none. One change is in flight at a time; the next one is decided
// about when it is applied.
func (r *Replica) changeMembership(ctx context.Context, decide func(*member) (*raftpb.ConfChange, error)) error {
	for {
		var done <-chan error
		var other *pending
		var err error
		if callErr := r.call(ctx, func(m *member) {
			if other = m.changing(); other != nil {
				ended := make(chan error, 1)
				other.waiting, done = append(other.waiting, waiter{done: ended}), ended
				return
			}
			var cc *raftpb.ConfChange
			if cc, err = decide(m); err == nil && cc != nil {
				done, err = m.proposeConf(cc)
			}
		}); callErr != nil {
			return callErr
		}
		if err != nil || done == nil {
			return err
		}
		select {
		case err := <-done:
			if other == nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		case <-r.stopped:
			return errStopped
		}
	}
}

// AddMember makes a node a member, or changes its address, and returns its raft id. It votes
// once it has the log. Only the leader can. Denied when the node is to be a worker.
func (r *Replica) AddMember(ctx context.Context, nodeID, addr string) (uint64, error) {
	var id uint64
	err := r.changeMembership(ctx, func(m *member) (*raftpb.ConfChange, error) {
		if m.head == nil {
			return nil, noLeader()
		}
		ros := m.r.members.Load()
		kind := raftpb.ConfChangeAddLearnerNode
		if known := ros.byNode(nodeID); known != nil {
			id = known.GetRaftId()
			if known.GetAddr() == addr {
				return nil, nil
			}
			kind = raftpb.ConfChangeUpdateNode
		} else {
			// A node that was demoted and has its old certificate still may ask as well.
			if n := m.head.Node(nodeID); n != nil && n.GetSpec().GetDesiredRole() != api.NodeRole_MANAGER {
				return nil, model.Errorf(model.Denied, "raft: node %s is not to be a manager: promote it first", nodeID)
			}
			id = newRaftID(ros)
		}
		about, err := proto.Marshal(&api.RaftMember{RaftId: id, NodeId: nodeID, Addr: addr})
		if err != nil {
			return nil, fmt.Errorf("encode member: %w", err)
		}
		return &raftpb.ConfChange{Type: kind.Enum(), NodeId: new(id), Context: about}, nil
	})
	return id, err
}

// RemoveMember removes a member. Only the leader can. Precondition when too few of the
// others would be reachable; nil when it is no member.
func (r *Replica) RemoveMember(ctx context.Context, raftID uint64) error {
	return r.changeMembership(ctx, func(m *member) (*raftpb.ConfChange, error) {
		if m.head == nil {
			return nil, noLeader()
		}
		if m.r.members.Load().members[raftID] == nil {
			return nil, nil
		}
		if !m.canRemove(raftID) {
			return nil, errQuorum
		}
		return &raftpb.ConfChange{
			Type: raftpb.ConfChangeRemoveNode.Enum(), NodeId: new(raftID), Context: []byte{},
		}, nil
	})
}

// TransferLeadership hands leadership to the reachable member whose log is longest and
// returns when this member has stopped leading. Precondition when there is no such member.
func (r *Replica) TransferLeadership(ctx context.Context) error {
	var err error
	if callErr := r.call(ctx, func(m *member) { err = m.transfer() }); callErr != nil {
		return callErr
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*electionTick*r.cfg.TickInterval)
	defer cancel()
	for {
		leading, changed := r.Leading()
		if !leading {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return model.Errorf(model.Unavailable, "raft: transfer leadership: timed out")
		}
	}
}

func (m *member) transfer() error {
	if !m.isLeader {
		return noLeader()
	}
	var best, match uint64
	for id, p := range m.raw.Status().Progress {
		if id != m.id && !p.IsLearner && m.r.peers.active(id) && (best == raft.None || p.Match > match) {
			best, match = id, p.Match
		}
	}
	if best == raft.None {
		return model.Errorf(model.Precondition, "raft: transfer leadership: no other manager is reachable")
	}
	m.raw.TransferLeader(best)
	return nil
}

// newRaftID returns an id that was never a member's.
func newRaftID(ros *roster) uint64 {
	for {
		var b [8]byte
		rand.Read(b[:])
		id := binary.BigEndian.Uint64(b[:])
		// The highest ids are raft's own.
		if id != raft.None && id < 1<<63 && ros.members[id] == nil && !ros.removed[id] {
			return id
		}
	}
}
