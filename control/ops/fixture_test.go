package ops_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/ops"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// members is a fixed list of raft's members.
type members []*api.RaftMember

func (m members) Members() []*api.RaftMember { return m }

// Voters are those whose id is not that of a new one.
func (m members) Voters() []*api.RaftMember {
	return slices.DeleteFunc(slices.Clone(m), func(m *api.RaftMember) bool { return m.GetRaftId() >= newMember })
}

// newMember is the raft id from which on members have no vote yet.
const newMember = 100

func member(id uint64, nodeID string, reachable bool) *api.RaftMember {
	s := &api.RaftMemberStatus{Leader: id == 1, Reachability: api.RaftMemberStatus_UNREACHABLE}
	if reachable {
		s.Reachability = api.RaftMemberStatus_REACHABLE
	}
	return &api.RaftMember{RaftId: id, NodeId: nodeID, Addr: "192.0.2." + nodeID + ":2377", Status: s}
}

// zeros makes every id and token the same but for a counter.
type zeros struct{ n byte }

func (z *zeros) Read(b []byte) (int, error) {
	clear(b)
	z.n++
	b[len(b)-1] = z.n
	return len(b), nil
}

func fill(t *testing.T, objects ...model.Object) *replica.Memory {
	t.Helper()
	state := replica.NewMemory(store.Empty())
	_, err := state.Update(t.Context(), func(tx *store.Tx) error {
		for _, o := range objects {
			if err := tx.Create(o); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return state
}

func newOps(t *testing.T, m members, objects ...model.Object) (*ops.Ops, *replica.Memory) {
	t.Helper()
	state := fill(t, objects...)
	return ops.New(ops.Config{State: state, Membership: m, Random: new(zeros)}), state
}

// spec returns a valid service spec with changes.
func spec(name string, edits ...func(*api.ServiceSpec)) *api.ServiceSpec {
	s := &api.ServiceSpec{
		Annotations: &api.Annotations{Name: name},
		Task:        &api.TaskSpec{Runtime: &api.TaskSpec_Container{Container: &api.ContainerSpec{Image: "busybox:1"}}},
		Mode:        &api.ServiceSpec_Replicated{Replicated: &api.ReplicatedService{Replicas: 1}},
	}
	for _, edit := range edits {
		edit(s)
	}
	return s
}

// in edits the container of a spec.
func in(edit func(*api.ContainerSpec)) func(*api.ServiceSpec) {
	return func(s *api.ServiceSpec) { edit(s.GetTask().GetContainer()) }
}

func port(mode api.PortConfig_PublishMode, published, target uint32) *api.PortConfig {
	return &api.PortConfig{PublishMode: mode, PublishedPort: published, TargetPort: target}
}

func publish(ports ...*api.PortConfig) func(*api.ServiceSpec) {
	return func(s *api.ServiceSpec) { s.Endpoint = &api.EndpointSpec{Ports: ports} }
}

func service(id, name string, edits ...func(*api.ServiceSpec)) *api.Service {
	return &api.Service{Id: id, Spec: spec(name, edits...), SpecVersion: new(api.Version)}
}

func aNode(id string, role api.NodeRole, state api.NodeStatus_State) *api.Node {
	return &api.Node{
		Id: id, Spec: &api.NodeSpec{DesiredRole: role}, Role: role, Status: &api.NodeStatus{State: state},
		Description: &api.NodeDescription{Hostname: "host" + id},
	}
}

func aCluster() *api.Cluster {
	return &api.Cluster{
		Id: "cluster", Spec: &api.ClusterSpec{
			Annotations: &api.Annotations{Name: "default"}, CaConfig: &api.CAConfig{NodeCertExpiry: durationpb.New(3600e9), SigningCaKey: []byte("key")},
			EncryptionConfig: new(api.EncryptionConfig),
		},
		RootCa:                  &api.RootCA{CaKey: []byte("key"), CaCert: []byte("cert"), JoinTokens: &api.JoinTokens{Worker: "w", Manager: "m"}},
		UnlockKeys:              []*api.EncryptionKey{{Key: []byte("key")}},
		NetworkBootstrapKeys:    []*api.EncryptionKey{{Key: []byte("key")}},
		BlacklistedCertificates: map[string]*api.BlacklistedCertificate{},
	}
}

// wantStatus checks code and text of an error; text may be the beginning, ending in "…".
func wantStatus(t *testing.T, err error, code codes.Code, text string) {
	t.Helper()
	if code == codes.OK {
		if err != nil {
			t.Errorf("got %v", err)
		}
		return
	}
	s, ok := status.FromError(err)
	if err == nil || !ok {
		t.Errorf("got %v, want %s %q", err, code, text)
		return
	}
	prefix, cut := strings.CutSuffix(text, "…")
	if s.Code() != code || (s.Message() != text && (!cut || !strings.HasPrefix(s.Message(), prefix))) {
		t.Errorf("got %s %q\nwant %s %q", s.Code(), s.Message(), code, text)
	}
}

func version(t *testing.T, state *replica.Memory, table model.Table, id string) *api.Version {
	t.Helper()
	o := state.View().Get(table, id)
	if o == nil {
		t.Fatal(errors.New(table.String() + " " + id + " is not there"))
	}
	return o.GetMeta().GetVersion()
}
