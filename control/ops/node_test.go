package ops_test

import (
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

func TestDemotion(t *testing.T) {
	m, w := api.NodeRole_MANAGER, api.NodeRole_WORKER
	ready := api.NodeStatus_READY
	demoting := aNode("2", w, ready)
	demoting.Role = m
	tests := []struct {
		name    string
		members members
		nodes   []model.Object
		code    codes.Code
		text    string
	}{
		{"unknown to raft", members{member(2, "2", true)}, []model.Object{aNode("1", m, ready), aNode("2", m, ready)}, codes.NotFound, "can't find manager in raft memberlist"},
		{"last", members{member(1, "1", true)}, []model.Object{aNode("1", m, ready)}, codes.FailedPrecondition, "attempting to demote the last manager of the swarm"},
		{"last but one that is being demoted", members{member(1, "1", true), member(2, "2", true)}, []model.Object{aNode("1", m, ready), demoting}, codes.FailedPrecondition, "attempting to demote the last manager of the swarm"},
		{"quorum", members{member(1, "1", true), member(2, "2", true), member(3, "3", false)}, []model.Object{aNode("1", m, ready), aNode("2", m, ready), aNode("3", m, ready)}, codes.FailedPrecondition, "can't remove member from the raft: this would result in a loss of quorum"},
		{"one of two", members{member(1, "1", true), member(2, "2", true)}, []model.Object{aNode("1", m, ready), aNode("2", m, ready)}, codes.OK, ""},
		{"a new one that is lost", members{member(newMember, "1", false), member(2, "2", true)}, []model.Object{aNode("1", m, ready), aNode("2", m, ready)}, codes.OK, ""},
		{"beside a new one that is lost", members{member(1, "1", true), member(2, "2", true), member(newMember, "3", false)}, []model.Object{aNode("1", m, ready), aNode("2", m, ready), aNode("3", m, ready)}, codes.OK, ""},
		{"one of three", members{member(1, "1", true), member(2, "2", true), member(3, "3", true)}, []model.Object{aNode("1", m, ready), aNode("2", m, ready), aNode("3", m, ready)}, codes.OK, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o, state := newOps(t, tt.members, tt.nodes...)
			_, err := o.UpdateNode(t.Context(), &api.UpdateNodeRequest{
				NodeId: "1", NodeVersion: version(t, state, model.Nodes, "1"), Spec: &api.NodeSpec{DesiredRole: w},
			})
			wantStatus(t, err, tt.code, tt.text)
			wantRole := m
			if err == nil {
				wantRole = w
			}
			if got := state.View().Node("1"); got.GetSpec().GetDesiredRole() != wantRole || got.GetRole() != m {
				t.Errorf("role %v, desired %v", got.GetRole(), got.GetSpec().GetDesiredRole())
			}
		})
	}
}

// TestPromotionOfDocker holds that only Skep's nodes become managers.
func TestPromotionOfDocker(t *testing.T) {
	engine := func(plugin string) *api.NodeDescription {
		return &api.NodeDescription{Engine: &api.EngineDescription{
			EngineVersion: "20.10.24", Plugins: []*api.PluginDescription{{Type: "Network", Name: "bridge"}, {Type: "Network", Name: plugin}},
		}}
	}
	for name, tt := range map[string]struct {
		description *api.NodeDescription
		code        codes.Code
		text        string
	}{
		"skep":          {engine(model.SkepOverlay), codes.OK, ""},
		"docker":        {engine("overlay"), codes.FailedPrecondition, "node 1 runs Docker Engine 20.10.24, which can be a worker of a Skep swarm but not a manager: promote a Skep node"},
		"not yet known": {nil, codes.OK, ""},
	} {
		t.Run(name, func(t *testing.T) {
			node := aNode("1", api.NodeRole_WORKER, api.NodeStatus_READY)
			node.Description = tt.description
			o, state := newOps(t, members{member(2, "2", true)}, node)
			update := func(spec *api.NodeSpec) error {
				_, err := o.UpdateNode(t.Context(), &api.UpdateNodeRequest{NodeId: "1", NodeVersion: version(t, state, model.Nodes, "1"), Spec: spec})
				return err
			}
			if err := update(&api.NodeSpec{Availability: api.NodeSpec_DRAIN}); err != nil {
				t.Errorf("drain: %v", err)
			}
			wantStatus(t, update(&api.NodeSpec{DesiredRole: api.NodeRole_MANAGER}), tt.code, tt.text)
		})
	}
}

func TestNodeStatusComesFromRaft(t *testing.T) {
	stale := aNode("1", api.NodeRole_MANAGER, api.NodeStatus_READY)
	stale.ManagerStatus = &api.ManagerStatus{RaftId: 9, Leader: false}
	worker := aNode("2", api.NodeRole_WORKER, api.NodeStatus_READY)
	worker.ManagerStatus = &api.ManagerStatus{RaftId: 8}
	o, _ := newOps(t, members{member(1, "1", true)}, stale, worker)
	resp, err := o.ListNodes(t.Context(), new(api.ListNodesRequest))
	if err != nil {
		t.Fatal(err)
	}
	if s := resp.GetNodes()[0].GetManagerStatus(); s.GetRaftId() != 1 || !s.GetLeader() || s.GetReachability() != api.RaftMemberStatus_REACHABLE {
		t.Errorf("manager: %v", s)
	}
	if s := resp.GetNodes()[1].GetManagerStatus(); s != nil {
		t.Errorf("worker: %v", s)
	}
	roles, err := o.ListNodes(t.Context(), &api.ListNodesRequest{Filters: &api.ListNodesRequest_Filters{Roles: []api.NodeRole{api.NodeRole_WORKER}, NamePrefixes: []string{"host"}}})
	if err != nil || len(roles.GetNodes()) != 1 || roles.GetNodes()[0].GetId() != "2" {
		t.Errorf("workers: %v %v", roles, err)
	}
}

func TestRemoveNode(t *testing.T) {
	o, state := newOps(t, members{member(1, "m", true)}, aCluster(),
		aNode("m", api.NodeRole_MANAGER, api.NodeStatus_READY), aNode("n1", api.NodeRole_WORKER, api.NodeStatus_READY),
		aNode("d", api.NodeRole_WORKER, api.NodeStatus_DOWN), aNode("never", api.NodeRole_MANAGER, api.NodeStatus_UNKNOWN), service("s", "web"),
		aTask("t1", "s", 1, api.TaskState_RUNNING, api.TaskState_RUNNING), aTask("t2", "s", 1, api.TaskState_SHUTDOWN, api.TaskState_FAILED))
	remove := func(id string, force bool) error {
		_, err := o.RemoveNode(t.Context(), &api.RemoveNodeRequest{NodeId: id, Force: force})
		return err
	}
	wantStatus(t, remove("nope", true), codes.NotFound, "node nope not found")
	wantStatus(t, remove("m", true), codes.FailedPrecondition, "node m is a cluster manager and is a member of the raft cluster. It must be demoted to worker before removal")
	// One that was to be a manager and never joined raft could not be demoted either.
	wantStatus(t, remove("never", false), codes.OK, "")
	wantStatus(t, remove("n1", false), codes.FailedPrecondition, "node n1 is not down and can't be removed")
	wantStatus(t, remove("d", false), codes.OK, "")
	wantStatus(t, remove("n1", true), codes.OK, "")
	s := state.View()
	if s.Node("n1") != nil || s.Node("d") != nil {
		t.Error("nodes are left")
	}
	if got := s.Task("t1").GetStatus(); got.GetState() != api.TaskState_ORPHANED || got.GetMessage() != "Task belonged to a node that has been deleted" {
		t.Errorf("task: %v", got)
	}
	if got := s.Task("t2").GetStatus().GetState(); got != api.TaskState_FAILED {
		t.Errorf("finished task: %v", got)
	}
	for _, id := range []string{"n1", "d"} {
		if _, ok := s.Cluster().GetBlacklistedCertificates()[id]; !ok {
			t.Errorf("%s may come back", id)
		}
	}
}
