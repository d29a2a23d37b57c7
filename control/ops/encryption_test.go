package ops_test

import (
	"bytes"
	"crypto/rand"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/ops"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
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
	o, state := newOps(t, nil, cluster, aNode("1", api.NodeRole_WORKER, api.NodeStatus_DOWN))
	overlay := pki.NewestNetworkKey(cluster, pki.OverlayKeys)
	gossip := pki.NewestNetworkKey(cluster, pki.GossipKeys)
	want := func(what string, rotated bool) {
		t.Helper()
		c := state.View().Cluster()
		now := pki.NewestNetworkKey(c, pki.OverlayKeys)
		if bytes.Equal(now, overlay) == rotated {
			t.Errorf("%s: the key was %x and is %x", what, overlay, now)
		}
		if !bytes.Equal(pki.NewestNetworkKey(c, pki.GossipKeys), gossip) {
			t.Errorf("%s: the gossip's keys changed", what)
		}
		overlay = now
	}
	for _, step := range []struct {
		value   string
		rotated bool
	}{{"1", true}, {"1", false}, {"2", true}} {
		if err := setLabel(t, o, state, model.RotateLabel, step.value); err != nil {
			t.Fatal(err)
		}
		want("label "+step.value, step.rotated)
	}
	if _, err := o.RemoveNode(t.Context(), &api.RemoveNodeRequest{NodeId: "1"}); err != nil {
		t.Fatal(err)
	}
	want("a node is removed", true)
}
