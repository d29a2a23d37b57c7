package ops_test

import (
	"crypto/rand"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/ops"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
)

// setLabel changes a label of the swarm's spec.
func setLabel(t *testing.T, o *ops.Ops, state *replica.Memory, key, value string) error {
	t.Helper()
	spec := model.Clone(state.View().Cluster().GetSpec())
	spec.Annotations.Labels, spec.CaConfig = map[string]string{key: value}, nil
	_, err := o.UpdateCluster(t.Context(), &api.UpdateClusterRequest{
		ClusterId: "cluster", ClusterVersion: version(t, state, model.Clusters, "cluster"), Spec: spec,
	})
	return err
}

func TestEncryptAll(t *testing.T) {
	state := fill(t, aCluster())
	o := ops.New(ops.Config{State: state, Random: rand.Reader}) // ids of several networks
	made := func(spec *api.NetworkSpec) *api.Network {
		t.Helper()
		resp, err := o.CreateNetwork(t.Context(), &api.CreateNetworkRequest{Spec: spec})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetNetwork()
	}
	if model.Encrypted(made(&api.NetworkSpec{Annotations: &api.Annotations{Name: "before"}})) {
		t.Error("a network is encrypted that did not ask for it")
	}
	wantStatus(t, setLabel(t, o, state, model.EncryptLabel, "some"), codes.InvalidArgument, "label skep.encrypt=some of the swarm: it is all, or the swarm does not have it")
	if err := setLabel(t, o, state, model.EncryptLabel, model.EncryptAll); err != nil {
		t.Fatal(err)
	}
	if !model.Encrypted(made(&api.NetworkSpec{Annotations: &api.Annotations{Name: "after"}})) {
		t.Error("a network is not encrypted in a swarm that encrypts all")
	}
	if !model.Encrypted(made(&api.NetworkSpec{Annotations: &api.Annotations{Name: "ingress"}, Ingress: true})) {
		t.Error("the ingress network is not encrypted in a swarm that encrypts all")
	}
}

func TestKeysOfEncryptedNetworksRotate(t *testing.T) {
	cluster := aCluster()
	if err := pki.FirstNetworkKeys(cluster, new(zeros)); err != nil {
		t.Fatal(err)
	}
	o, state := newOps(t, nil, cluster, aNode("1", api.NodeRole_WORKER, api.NodeStatus_DOWN), aNode("2", api.NodeRole_WORKER, api.NodeStatus_DOWN))
	want := func(what string, rotations uint32) {
		t.Helper()
		if got := pki.Rotation(state.View()).GetWanted(); got != rotations {
			t.Errorf("%s: the leader is to rotate %d times, want %d", what, got, rotations)
		}
	}
	remove := func(id string) {
		t.Helper()
		if _, err := o.RemoveNode(t.Context(), &api.RemoveNodeRequest{NodeId: id}); err != nil {
			t.Fatal(err)
		}
	}
	label := func(value string) {
		t.Helper()
		if err := setLabel(t, o, state, model.RotateLabel, value); err != nil {
			t.Fatal(err)
		}
	}
	rotate := func() {
		t.Helper()
		if _, err := state.Update(t.Context(), func(tx *store.Tx) error { return pki.Rotated(tx, new(zeros), tx.Now()) }); err != nil {
			t.Fatal(err)
		}
	}
	want("at first", 0)
	remove("1")
	want("a node is removed", 1)
	label("1")
	want("people ask", 2)
	remove("2")
	label("2")
	want("much is asked at once", 2)
	rotate()
	label("2")
	want("nothing new is asked", 1)
	rotate()
	want("all is done", 0)
}
