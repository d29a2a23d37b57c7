package ca

import (
	"crypto/rand"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
)

// rotate begins a rotation to a new root and returns that.
func (r *rig) rotate() *pki.Root {
	r.Helper()
	to, err := pki.NewRoot(rand.Reader, time.Now())
	if err != nil {
		r.Fatal(err)
	}
	cross, err := r.root.CrossSign(rand.Reader, to.Certs[0])
	if err != nil {
		r.Fatal(err)
	}
	r.update(func(tx *store.Tx) error {
		c := model.Clone(tx.Snapshot().Cluster())
		c.RootCa.RootRotation = &api.RootRotation{CaCert: to.CertPEM, CaKey: to.KeyPEM, CrossSignedCaCert: cross}
		return tx.Update(c)
	})
	return to
}

func (r *rig) addNodes(prefix string, n int, state api.NodeStatus_State) (ids []string) {
	r.Helper()
	for i := range n {
		id := fmt.Sprintf("%s%d", prefix, i)
		ids = append(ids, id)
		r.update(func(tx *store.Tx) error {
			return tx.Create(&api.Node{
				Id: id, Spec: &api.NodeSpec{Membership: api.NodeSpec_ACCEPTED}, Role: api.NodeRole_WORKER,
				Status:      &api.NodeStatus{State: state},
				Certificate: &api.Certificate{Cn: id, Status: &api.IssuanceStatus{State: api.IssuanceStatus_ISSUED}},
				Description: describedBy(r.root.Certs[0].RawSubject, r.root.Certs[0].RawSubjectPublicKeyInfo),
			})
		})
	}
	return ids
}

func describedBy(subject, key []byte) *api.NodeDescription {
	return &api.NodeDescription{TlsInfo: &api.NodeTLSInfo{CertIssuerSubject: subject, CertIssuerPublicKey: key}}
}

func (r *rig) stateOf(id string) api.IssuanceStatus_State {
	return r.state.View().Node(id).GetCertificate().GetStatus().GetState()
}

// renewed does what a node does that was asked to renew: it gets a certificate and says so.
func (r *rig) renewed(id string) {
	r.Helper()
	if _, err := r.s.IssueNodeCertificate(r.as(id, pki.WorkerRole), &api.IssueNodeCertificateRequest{Csr: csr(r.T)}); err != nil {
		r.Fatal(err)
	}
	r.issued(id) // by the old root's trust
	r.report(id)
}

func (r *rig) report(id string) {
	r.Helper()
	r.update(func(tx *store.Tx) error {
		n := model.Clone(tx.Snapshot().Node(id))
		chain, err := pki.ParseCerts(n.GetCertificate().GetCertificate())
		if err != nil {
			return err
		}
		issuer := r.root.SelfIssuer(chain)
		n.Description = describedBy(issuer.Subject, issuer.PublicKey)
		return tx.Update(n)
	})
}

func TestRotation(t *testing.T) {
	inRig(t, func(r *rig) {
		up, down := r.addNodes("up", 3, api.NodeStatus_READY), r.addNodes("down", 2, api.NodeStatus_DOWN)
		before := r.state.View().Cluster().GetRootCa().GetJoinTokens()
		to := r.rotate()
		time.Sleep(time.Second)
		for _, id := range append(up, down...) {
			if r.stateOf(id) != api.IssuanceStatus_ROTATE {
				t.Errorf("node %s was not asked: %v", id, r.stateOf(id))
			}
		}
		for _, id := range up {
			r.renewed(id)
		}
		// One that joins meanwhile gets its certificate from the new root.
		joined := r.mustJoin("worker token")
		r.issued(joined)
		r.report(joined)
		time.Sleep(time.Hour)
		ca := r.state.View().Cluster().GetRootCa()
		if ca.GetRootRotation() == nil || string(ca.GetCaCert()) != string(r.root.CertPEM) {
			t.Fatal("the rotation ended without the nodes that are down")
		}
		// One returns and one is removed.
		r.renewed(down[0])
		r.update(func(tx *store.Tx) error { return tx.Remove(model.Nodes, down[1]) })
		time.Sleep(time.Second)
		ca = r.state.View().Cluster().GetRootCa()
		if ca.GetRootRotation() != nil || string(ca.GetCaCert()) != string(to.CertPEM) || string(ca.GetCaKey()) != string(to.KeyPEM) {
			t.Fatalf("the rotation did not end: %v", ca)
		}
		for _, pair := range [][2]string{{before.GetWorker(), ca.GetJoinTokens().GetWorker()}, {before.GetManager(), ca.GetJoinTokens().GetManager()}} {
			if pair[0] == pair[1] {
				t.Error("a token did not change")
			}
			if _, err := r.join(pair[0]); model.KindOf(err) != model.Invalid {
				t.Errorf("with the old token: %v", err)
			}
			r.mustJoin(pair[1])
		}
	})
}

// Nodes renew a bounded number at a time, and those that do not answer are not waited for.
func TestRotationIsPaced(t *testing.T) {
	inRig(t, func(r *rig) {
		ids := r.addNodes("n", rotateWindow+50, api.NodeStatus_READY)
		r.rotate()
		time.Sleep(time.Second)
		asked := func() (n int) {
			for _, id := range ids {
				if r.stateOf(id) == api.IssuanceStatus_ROTATE {
					n++
				}
			}
			return n
		}
		if n := asked(); n != rotateWindow {
			t.Errorf("%d nodes renew at one time, want %d", n, rotateWindow)
		}
		time.Sleep(rotatePatience + 2*time.Second)
		if n := asked(); n != len(ids) {
			t.Errorf("%d of %d were asked while the first do not answer", n, len(ids))
		}
		for _, id := range ids {
			r.renewed(id)
		}
		time.Sleep(time.Second)
		if r.state.View().Cluster().GetRootCa().GetRootRotation() != nil {
			t.Error("the rotation goes on")
		}
	})
}

// A rotation that another one replaces asks those again that have the first one's
// certificate; one that is called off changes nothing.
func TestRotationIsReplaced(t *testing.T) {
	inRig(t, func(r *rig) {
		ids := r.addNodes("n", 2, api.NodeStatus_READY)
		r.rotate()
		time.Sleep(time.Second)
		r.renewed(ids[0])
		to := r.rotate()
		time.Sleep(time.Second)
		if r.stateOf(ids[0]) != api.IssuanceStatus_ROTATE {
			t.Errorf("the node that had renewed is in state %v", r.stateOf(ids[0]))
		}
		for _, id := range ids {
			r.renewed(id)
		}
		time.Sleep(time.Second)
		if ca := r.state.View().Cluster().GetRootCa(); ca.GetRootRotation() != nil || string(ca.GetCaCert()) != string(to.CertPEM) {
			t.Errorf("the root is %v", ca)
		}
		r.root = to
		tokens := r.state.View().Cluster().GetRootCa().GetJoinTokens()
		r.rotate()
		r.update(func(tx *store.Tx) error {
			c := model.Clone(tx.Snapshot().Cluster())
			c.RootCa.RootRotation = nil
			return tx.Update(c)
		})
		time.Sleep(time.Minute)
		synctest.Wait()
		if now := r.state.View().Cluster().GetRootCa(); string(now.GetCaCert()) != string(to.CertPEM) || now.GetJoinTokens().GetWorker() != tokens.GetWorker() {
			t.Error("a rotation that was called off changed the root")
		}
	})
}
