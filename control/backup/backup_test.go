package backup

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func aNode(id string, role, desired api.NodeRole) *api.Node {
	return &api.Node{Id: id, Role: role, Spec: &api.NodeSpec{DesiredRole: desired}}
}

func aTask(id, node string, state api.TaskState) *api.Task {
	return &api.Task{Id: id, NodeId: node, Status: &api.TaskStatus{State: state}}
}

// aState is a swarm of two managers, one that is being promoted, and a worker.
func aState() *api.Snapshot {
	const m, w = api.NodeRole_MANAGER, api.NodeRole_WORKER
	return &api.Snapshot{
		Membership: &api.ClusterSnapshot{Members: []*api.RaftMember{{RaftId: 1, NodeId: "m1"}, {RaftId: 2, NodeId: "m2"}}},
		Store: &api.StoreSnapshot{
			Clusters: []*api.Cluster{{Id: "c"}},
			Nodes:    []*api.Node{aNode("m1", m, m), aNode("m2", m, w), aNode("p", w, m), aNode("w", w, w)},
			Tasks: []*api.Task{
				aTask("on-m1", "m1", api.TaskState_RUNNING), aTask("done-m1", "m1", api.TaskState_COMPLETE),
				aTask("on-w", "w", api.TaskState_RUNNING), aTask("nowhere", "", api.TaskState_PENDING),
			},
		},
	}
}

func TestRoundTrip(t *testing.T) {
	info := Info{ClusterID: "c", NodeID: "m1", Index: 7, CreatedAt: now, Version: "v1"}
	data, err := Encode(info, aState())
	if err != nil {
		t.Fatal(err)
	}
	got, state, err := Parse(data)
	if err != nil || got != info || !proto.Equal(state, aState()) {
		t.Errorf("parsed %v, %v, %v", got, state, err)
	}
}

func TestRefusals(t *testing.T) {
	encode := func(info Info, edit func(*api.Snapshot)) []byte {
		s := aState()
		edit(s)
		data, err := Encode(info, s)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	good := Info{ClusterID: "c", Index: 1}
	whole := encode(good, func(*api.Snapshot) {})
	for name, tt := range map[string]struct {
		data []byte
		want string
	}{
		"empty":         {nil, "not a backup"},
		"another file":  {[]byte("PK\x03\x04"), "not a backup"},
		"cut":           {whole[:len(whole)-3], "damaged"},
		"no state":      {[]byte(magic), "format 0"},
		"no cluster":    {encode(good, func(s *api.Snapshot) { s.Store.Clusters = nil }), "0 clusters"},
		"other cluster": {encode(Info{ClusterID: "d", Index: 1}, func(*api.Snapshot) {}), "damaged"},
		"no index":      {encode(Info{ClusterID: "c"}, func(*api.Snapshot) {}), "damaged"},
	} {
		if _, _, err := Parse(tt.data); model.KindOf(err) != model.Invalid || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
}

func TestAdapt(t *testing.T) {
	for _, tt := range []struct {
		name             string
		alone            bool
		want             Removed
		nodes, blacklist string
		orphaned         string
	}{
		{"managers lost", false, Removed{Managers: 3, Tasks: 1}, "w", "m1 m2 p", "on-m1"},
		{"alone", true, Removed{Managers: 3, Workers: 1, Tasks: 2}, "", "m1 m2 p w", "on-m1 on-w"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := aState()
			if got := Adapt(s, tt.alone, now); got != tt.want {
				t.Errorf("removed %+v, want %+v", got, tt.want)
			}
			var nodes, blacklist, orphaned []string
			for _, n := range s.GetStore().GetNodes() {
				nodes = append(nodes, n.GetId())
			}
			for id := range strings.FieldsSeq("m1 m2 p w") {
				if _, ok := s.GetStore().GetClusters()[0].GetBlacklistedCertificates()[id]; ok {
					blacklist = append(blacklist, id)
				}
			}
			for _, task := range s.GetStore().GetTasks() {
				if task.GetStatus().GetState() == api.TaskState_ORPHANED {
					orphaned = append(orphaned, task.GetId())
				}
			}
			for what, pair := range map[string][2]string{
				"nodes": {strings.Join(nodes, " "), tt.nodes}, "blacklist": {strings.Join(blacklist, " "), tt.blacklist},
				"orphaned": {strings.Join(orphaned, " "), tt.orphaned},
			} {
				if pair[0] != pair[1] {
					t.Errorf("%s: %q, want %q", what, pair[0], pair[1])
				}
			}
			if got := Adapt(s, tt.alone, now); got != (Removed{}) {
				t.Errorf("a second time removed %+v", got)
			}
		})
	}
}

// FuzzParse reads anything: it fails, or gives a state that can be adapted and written again.
func FuzzParse(f *testing.F) {
	data, err := Encode(Info{ClusterID: "c", NodeID: "m1", Index: 7, CreatedAt: now}, aState())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(magic))
	f.Add([]byte(nil))
	f.Fuzz(func(t *testing.T, data []byte) {
		info, state, err := Parse(data)
		if err != nil {
			return
		}
		Adapt(state, true, now)
		again, err := Encode(info, state)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := Parse(again); err != nil {
			t.Errorf("what was written is not read: %v", err)
		}
	})
}
