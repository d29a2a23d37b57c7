package manager

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/store"
)

// raftGroup is the members of a swarm of managers in memory.
type raftGroup struct {
	mu      sync.Mutex
	members []string // node ids; a member's raft id is its index and 1
	stuck   bool     // nobody can be removed: the quorum is in danger
}

func (g *raftGroup) Members() []*api.RaftMember {
	g.mu.Lock()
	defer g.mu.Unlock()
	var list []*api.RaftMember
	for i, node := range g.members {
		if node != "" {
			list = append(list, &api.RaftMember{RaftId: uint64(i + 1), NodeId: node})
		}
	}
	return list
}

func (g *raftGroup) RemoveMember(_ context.Context, raftID uint64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.stuck {
		return errors.New("may result in loss of quorum")
	}
	g.members[raftID-1] = ""
	return nil
}

func (g *raftGroup) TransferLeadership(context.Context) error { return errors.New("nobody else") }

func (g *raftGroup) setStuck(stuck bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stuck = stuck
}

func (g *raftGroup) nodes() []string {
	var list []string
	for _, m := range g.Members() {
		list = append(list, m.GetNodeId())
	}
	return list
}

// runRolesOf runs the controller of roles over nodes, the first of which leads, and those
// with a number in managers are managers.
func runRolesOf(t *testing.T, g *raftGroup, nodes int, managers []int, f func(*replica.Memory)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		tx := store.Begin(store.Empty(), 1, time.Now())
		for i := range nodes {
			n := readyNode(i)
			if slices.Contains(managers, i) {
				n.Role, n.Spec.DesiredRole = api.NodeRole_MANAGER, api.NodeRole_MANAGER
			}
			if err := tx.Create(n); err != nil {
				t.Fatal(err)
			}
		}
		state := replica.NewMemory(tx.Commit(1))
		m := New(Config{State: state, Membership: g, NodeID: nodeID(0)})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- m.runRoles(ctx) }()
		synctest.Wait()
		f(state)
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("ended with %v", err)
		}
	})
}

func wantRole(t *testing.T, state *replica.Memory, node int, role api.NodeRole) {
	t.Helper()
	_, err := state.Update(t.Context(), func(tx *store.Tx) error {
		n := tx.Snapshot().Node(nodeID(node))
		n = &api.Node{Id: n.GetId(), Meta: n.GetMeta(), Spec: &api.NodeSpec{DesiredRole: role}, Role: n.GetRole(), Status: n.GetStatus()}
		return tx.Update(n)
	})
	if err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
}

// A demoted manager is one until it has left raft, which the quorum may forbid for a while.
func TestDemotedManagerLeavesRaftFirst(t *testing.T) {
	g := &raftGroup{members: []string{nodeID(0), nodeID(1)}, stuck: true}
	runRolesOf(t, g, 3, []int{0, 1}, func(state *replica.Memory) {
		wantRole(t, state, 1, api.NodeRole_WORKER)
		if got := state.View().Node(nodeID(1)).GetRole(); got != api.NodeRole_MANAGER || len(g.nodes()) != 2 {
			t.Errorf("it is a %v, members are %v", got, g.nodes())
		}
		g.setStuck(false)
		time.Sleep(roleRetry)
		synctest.Wait()
		if got := state.View().Node(nodeID(1)).GetRole(); got != api.NodeRole_WORKER || len(g.nodes()) != 1 {
			t.Errorf("it is a %v, members are %v", got, g.nodes())
		}
		wantRole(t, state, 2, api.NodeRole_MANAGER)
		if got := state.View().Node(nodeID(2)).GetRole(); got != api.NodeRole_MANAGER {
			t.Errorf("a promoted node is a %v", got)
		}
	})
}

// A term begins with taking out of raft who has no business there: nodes that were removed
// and workers, whatever made them members.
func TestStrangersLeaveRaft(t *testing.T) {
	g := &raftGroup{members: []string{nodeID(0), nodeID(1), nodeID(2), "gone"}}
	runRolesOf(t, g, 3, []int{0, 1}, func(*replica.Memory) {
		if got, want := g.nodes(), []string{nodeID(0), nodeID(1)}; !slices.Equal(got, want) {
			t.Errorf("members are %v, want %v", got, want)
		}
	})
}
