package ops_test

import (
	"crypto/rand"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/ops"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
)

func newRoot(t *testing.T) *pki.Root {
	t.Helper()
	root, err := pki.NewRoot(rand.Reader, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func withRoot(root *pki.Root) *api.Cluster {
	c := aCluster()
	c.RootCa = &api.RootCA{CaCert: root.CertPEM, CaKey: root.KeyPEM, JoinTokens: &api.JoinTokens{Worker: "w", Manager: "m"}}
	return c
}

// setCA updates the CA configuration as a client does that has read it.
func setCA(t *testing.T, o *ops.Ops, state *replica.Memory, edit func(*api.CAConfig)) (*api.Cluster, error) {
	t.Helper()
	read, err := o.GetCluster(t.Context(), &api.GetClusterRequest{ClusterId: "cluster"})
	if err != nil {
		t.Fatal(err)
	}
	s := read.GetCluster().GetSpec()
	edit(s.GetCaConfig())
	resp, err := o.UpdateCluster(t.Context(), &api.UpdateClusterRequest{
		ClusterId: "cluster", ClusterVersion: version(t, state, model.Clusters, "cluster"), Spec: s,
	})
	return resp.GetCluster(), err
}

func TestRotationBegins(t *testing.T) {
	old, given := newRoot(t), newRoot(t)
	o, state := newOps(t, nil, withRoot(old))
	shown, err := setCA(t, o, state, func(c *api.CAConfig) { c.ForceRotate++ })
	if err != nil {
		t.Fatal(err)
	}
	if shown.GetRootCa().GetRootRotation() == nil || shown.GetRootCa().GetRootRotation().GetCaKey() != nil {
		t.Errorf("the answer shows %v", shown.GetRootCa())
	}
	ca := state.View().Cluster().GetRootCa()
	first, err := pki.Signer(ca)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := old.Verify(first.Intermediates, time.Now()); err != nil || first.Key == nil || string(ca.GetCaCert()) != string(old.CertPEM) {
		t.Errorf("the rotation is %v: %v", ca, err)
	}
	if ca.GetJoinTokens().GetWorker() != "w" {
		t.Error("the tokens changed before the root did")
	}
	// An update that says nothing new lets the rotation go on; another root replaces it.
	if _, err := setCA(t, o, state, func(*api.CAConfig) {}); err != nil {
		t.Fatal(err)
	}
	if now := state.View().Cluster().GetRootCa(); string(now.GetRootRotation().GetCaCert()) != string(first.CertPEM) {
		t.Error("an update without a word on the root replaced the rotation")
	}
	if _, err := setCA(t, o, state, func(c *api.CAConfig) { c.SigningCaCert, c.SigningCaKey = given.CertPEM, given.KeyPEM }); err != nil {
		t.Fatal(err)
	}
	ca = state.View().Cluster().GetRootCa()
	second, err := pki.Signer(ca)
	if err != nil || string(second.CertPEM) != string(given.CertPEM) {
		t.Fatalf("the rotation is to %s: %v", second.CertPEM, err)
	}
	if _, err := old.Verify(second.Intermediates, time.Now()); err != nil {
		t.Errorf("the second root is not signed by the original one: %v", err)
	}
	// The present root ends the rotation.
	if _, err := setCA(t, o, state, func(c *api.CAConfig) { c.SigningCaCert, c.SigningCaKey = old.CertPEM, old.KeyPEM }); err != nil {
		t.Fatal(err)
	}
	if ca := state.View().Cluster().GetRootCa(); ca.GetRootRotation() != nil || string(ca.GetCaKey()) != string(old.KeyPEM) {
		t.Errorf("the rotation was not ended: %v", ca)
	}
	if spec := state.View().Cluster().GetSpec().GetCaConfig(); spec.GetSigningCaKey() != nil || spec.GetSigningCaCert() != nil {
		t.Error("the spec keeps what was given to sign with")
	}
}

func TestRootWithoutItsKeyNeedsAnExternalCA(t *testing.T) {
	o, state := newOps(t, nil, withRoot(newRoot(t)))
	_, err := setCA(t, o, state, func(c *api.CAConfig) { c.SigningCaCert = newRoot(t).CertPEM })
	wantStatus(t, err, codes.InvalidArgument, "there must be an external CA for a root whose key the swarm does not have: give one with --external-ca")
	if state.View().Cluster().GetRootCa().GetRootRotation() != nil {
		t.Error("a rotation began all the same")
	}
}
