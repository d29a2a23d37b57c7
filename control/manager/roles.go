package manager

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

const (
	roleRetry     = 5 * time.Second
	removeTimeout = 5 * time.Second
)

// runRoles gives nodes the roles they are meant to have. A manager becomes a worker only
// once it has left the raft group.
func (m *Manager) runRoles(ctx context.Context) error {
	cursor := m.state.Follow()
	pending := make(map[string]bool)
	all := func() {
		for n := range cursor.Snapshot().Nodes() {
			if n.GetSpec().GetDesiredRole() != n.GetRole() {
				pending[n.GetId()] = true
			}
		}
	}
	all()
	m.removeStrangers(ctx, cursor.Snapshot())
	timer := time.NewTimer(roleRetry)
	defer timer.Stop()
	for {
		for id := range pending {
			done, err := m.reconcileRole(ctx, id)
			if err != nil {
				return fmt.Errorf("change role of node %s: %w", id, err)
			}
			if done {
				delete(pending, id)
			}
		}
		var retry <-chan time.Time
		if len(pending) > 0 {
			timer.Reset(roleRetry)
			retry = timer.C
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-retry:
		case <-cursor.Changed():
			events, reset := cursor.Drain()
			for _, e := range events {
				if n, ok := e.New.(*api.Node); ok && n.GetSpec().GetDesiredRole() != n.GetRole() {
					pending[n.GetId()] = true
				}
			}
			if reset {
				all()
			}
		}
	}
}

// member returns the raft member on a node.
func (m *Manager) member(nodeID string) *api.RaftMember {
	if m.members == nil {
		return nil
	}
	for _, r := range m.members.Members() {
		if r.GetNodeId() == nodeID {
			return r
		}
	}
	return nil
}

// reconcileRole brings one node a step nearer to its role and reports whether it is there.
func (m *Manager) reconcileRole(ctx context.Context, id string) (done bool, err error) {
	n := m.state.View().Node(id)
	if n == nil || n.GetRole() == n.GetSpec().GetDesiredRole() {
		return true, nil
	}
	if n.GetSpec().GetDesiredRole() == api.NodeRole_WORKER {
		if gone := m.leaveRaft(ctx, id); !gone {
			return false, nil
		}
	}
	_, err = m.state.Update(ctx, func(tx *store.Tx) error {
		n := model.Clone(tx.Snapshot().Node(id))
		if n == nil || n.GetRole() == n.GetSpec().GetDesiredRole() {
			return nil
		}
		n.Role = n.GetSpec().GetDesiredRole()
		return tx.Update(n)
	})
	if err == nil {
		m.log.LogAttrs(ctx, slog.LevelInfo, "node has a new role", slog.String("node_id", id),
			slog.String("role", n.GetSpec().GetDesiredRole().String()))
	}
	return err == nil, err
}

// leaveRaft takes a node's member out of the raft group and reports whether it is out.
func (m *Manager) leaveRaft(ctx context.Context, nodeID string) bool {
	member := m.member(nodeID)
	if member == nil {
		return true
	}
	ctx, cancel := context.WithTimeout(ctx, removeTimeout)
	defer cancel()
	var err error
	if nodeID == m.self {
		err = m.members.TransferLeadership(ctx) // the next leader goes on
	} else {
		err = m.members.RemoveMember(ctx, member.GetRaftId())
	}
	if err != nil {
		m.log.LogAttrs(ctx, slog.LevelWarn, "manager cannot leave raft yet", slog.String("node_id", nodeID), slog.Any("error", err))
	}
	return m.member(nodeID) == nil
}

// removeStrangers takes members out of raft whose node does not exist any more, or is a
// worker.
func (m *Manager) removeStrangers(ctx context.Context, s *store.Snapshot) {
	if m.members == nil {
		return
	}
	for _, r := range m.members.Members() {
		n := s.Node(r.GetNodeId())
		worker := n != nil && n.GetRole() == api.NodeRole_WORKER && n.GetSpec().GetDesiredRole() == api.NodeRole_WORKER
		if r.GetNodeId() != m.self && (n == nil || worker) {
			m.leaveRaft(ctx, r.GetNodeId())
		}
	}
}
