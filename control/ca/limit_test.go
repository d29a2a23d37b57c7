package ca

import (
	"crypto"
	"crypto/rand"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
)

// limited makes a token that ends by itself.
func (r *rig) limited(role string, ttl time.Duration, uses uint32) (token, id string) {
	r.Helper()
	id, err := model.NewID(rand.Reader)
	if err != nil {
		r.Fatal(err)
	}
	r.kind(pki.TokenKind)
	r.update(func(tx *store.Tx) error {
		token, resource, err := pki.NewLimited(rand.Reader, tx.Snapshot().Cluster().GetRootCa(), false, role, tx.Now().Add(ttl), uses, nil)
		if err != nil {
			return err
		}
		resource.Id = id
		r.tokens = append(r.tokens, token)
		return tx.Create(resource)
	})
	return r.tokens[len(r.tokens)-1], id
}

// kind makes a kind of resources, unless it is there.
func (r *rig) kind(name string) {
	r.Helper()
	r.update(func(tx *store.Tx) error {
		if tx.Snapshot().IDByName(model.Extensions, name) != "" {
			return nil
		}
		return tx.Create(&api.Extension{Id: name, Annotations: &api.Annotations{Name: name}})
	})
}

func TestLimitedTokens(t *testing.T) {
	inRig(t, func(r *rig) {
		refused := func(token, why string) {
			t.Helper()
			if _, err := r.join(token); model.KindOf(err) != model.Invalid || !strings.Contains(fmt.Sprint(err), "A valid join token is necessary to join this cluster"+why) {
				t.Errorf("got %v, want %q", err, why)
			}
		}
		twice, id := r.limited(pki.ManagerRole, time.Hour, 2)
		for range 2 {
			if leaf := r.issued(r.mustJoin(twice)); leaf.Subject.OrganizationalUnit[0] != pki.ManagerRole {
				t.Errorf("joined as %v", leaf.Subject)
			}
		}
		refused(twice, ": this one admits nobody any more, it has been used up")
		if kept, err := pki.Limited(r.state.View().Get(model.Resources, id).(*api.Resource)); err != nil || kept.GetUsed() != 2 {
			t.Errorf("kept %v, %v", kept, err)
		}
		brief, _ := r.limited(pki.WorkerRole, time.Hour, 0)
		for range 5 {
			r.mustJoin(brief)
		}
		time.Sleep(time.Hour)
		refused(brief, ": this one admits nobody any more, it expired 2000-01-01T")
		revoked, id := r.limited(pki.WorkerRole, time.Hour, 0)
		r.mustJoin(revoked)
		r.update(func(tx *store.Tx) error { return tx.Remove(model.Resources, id) })
		refused(revoked, "")
		// A resource of another kind admits nobody, whatever its name.
		r.kind("other")
		r.update(func(tx *store.Tx) error {
			return tx.Create(&api.Resource{Id: "x", Kind: "other", Annotations: &api.Annotations{Name: pki.TokenName("guess")}})
		})
		refused("guess", "")
		// With the root go the tokens that pin it.
		pinned, id := r.limited(pki.WorkerRole, time.Hour, 0)
		nodes := 0
		for n := range r.state.View().Nodes() {
			r.issued(n.GetId())
			nodes++
		}
		r.rotate()
		time.Sleep(time.Second)
		for n := range r.state.View().Nodes() {
			r.renewed(n.GetId())
		}
		time.Sleep(time.Second)
		if nodes == 0 || r.state.View().Cluster().GetRootCa().GetRootRotation() != nil {
			t.Fatal("the rotation did not end")
		}
		refused(pinned, "")
		if r.state.View().Get(model.Resources, id) != nil {
			t.Error("the token of the old root is still there")
		}
	})
}

func TestFloodFromOneAddress(t *testing.T) {
	l, now := newLimiter(), time.Now()
	l.all.at = now
	refused := 0
	for i := range 1000 {
		if err := l.admit(fmt.Sprintf("10.0.0.1:%d", i), now); status.Code(err) == codes.ResourceExhausted {
			refused++
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if refused != 1000-sourceBurst {
		t.Errorf("%d of 1000 calls from one address were refused", refused)
	}
	if err := l.admit("10.0.0.2:1", now); err != nil {
		t.Errorf("another address: %v", err)
	}
	if err := l.admit("10.0.0.1:1", now.Add(time.Second)); err != nil {
		t.Errorf("after a second: %v", err)
	}
	// Many addresses are bounded together, and forgotten when they are quiet.
	refused = 0
	for i := range joinBurst * 2 {
		if l.admit(fmt.Sprintf("10.1.%d.%d:1", i/250, i%250), now.Add(time.Second)) != nil {
			refused++
		}
	}
	if refused < joinBurst {
		t.Errorf("only %d of %d calls from as many addresses were refused", refused, joinBurst*2)
	}
	for i := range maxSources * 2 {
		_ = l.admit(fmt.Sprintf("[fd00::%x]:1", i), now.Add(2*time.Second))
	}
	if len(l.sources) > maxSources {
		t.Errorf("%d addresses are remembered", len(l.sources))
	}
	later := now.Add(time.Hour)
	if err := l.admit("10.9.9.9:1", later); err != nil || len(l.sources) > 10 {
		t.Errorf("an hour later %d addresses are remembered: %v", len(l.sources), err)
	}
}

// enrolled is a node with the key of its certificate.
type enrolled struct {
	id    string
	key   crypto.Signer
	chain []byte
}

func (r *rig) enroll(token string) enrolled {
	r.Helper()
	key, err := pki.NewKey(rand.Reader)
	if err != nil {
		r.Fatal(err)
	}
	request, err := pki.NewCSR(rand.Reader, key)
	if err != nil {
		r.Fatal(err)
	}
	resp, err := r.s.IssueNodeCertificate(r.stranger(), &api.IssueNodeCertificateRequest{Csr: request, Token: token})
	if err != nil {
		r.Fatal(err)
	}
	r.issued(resp.GetNodeId())
	return enrolled{id: resp.GetNodeId(), key: key, chain: r.state.View().Node(resp.GetNodeId()).GetCertificate().GetCertificate()}
}

func (r *rig) comeBack(n enrolled, request []byte) error {
	r.Helper()
	signature, err := pki.SignReturn(rand.Reader, n.key, request)
	if err != nil {
		r.Fatal(err)
	}
	_, err = r.s.Return(r.stranger(), &skepv1.ReturnRequest{Certificate: n.chain, Csr: request, Signature: signature})
	return err
}

func TestReturn(t *testing.T) {
	inRig(t, func(r *rig) {
		n, other, gone := r.enroll("worker token"), r.enroll("worker token"), r.enroll("worker token")
		time.Sleep(100 * 24 * time.Hour)
		again := csr(t)
		for what, n := range map[string]enrolled{
			"another's key":         {key: other.key, chain: n.chain},
			"another's certificate": {key: n.key, chain: other.chain},
			"no certificate":        {key: n.key},
		} {
			if err := r.comeBack(n, again); err == nil {
				t.Errorf("a node returned with %s", what)
			}
		}
		stranger, err := pki.NewRoot(rand.Reader, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		forged, err := stranger.Issue(rand.Reader, time.Now(), again, pki.Leaf{NodeID: n.id, ClusterID: "swarm", OU: pki.ManagerRole})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.comeBack(enrolled{key: n.key, chain: forged}, again); model.KindOf(err) != model.Denied {
			t.Errorf("with a certificate that the swarm did not issue: %v", err)
		}
		r.update(func(tx *store.Tx) error {
			c := model.Clone(tx.Snapshot().Cluster())
			c.BlacklistedCertificates = map[string]*api.BlacklistedCertificate{gone.id: {Expiry: timestamppb.New(tx.Now())}}
			if err := tx.Update(c); err != nil {
				return err
			}
			return tx.Remove(model.Nodes, gone.id)
		})
		if err := r.comeBack(gone, again); model.KindOf(err) != model.Denied {
			t.Errorf("a node that was removed: %v", err)
		}
		if got := r.state.View().Node(n.id).GetCertificate().GetCertificate(); string(got) != string(n.chain) {
			t.Error("a refused request changed the node")
		}
		if err := r.comeBack(n, again); err != nil {
			t.Fatal(err)
		}
		if leaf := r.issued(n.id); leaf.Subject.OrganizationalUnit[0] != pki.WorkerRole || time.Until(leaf.NotAfter) < 89*24*time.Hour {
			t.Errorf("it returned as %v until %v", leaf.Subject, leaf.NotAfter)
		}
		// The old certificate has done its service.
		if err := r.comeBack(n, csr(t)); model.KindOf(err) != model.Denied {
			t.Errorf("with a certificate that was replaced: %v", err)
		}
	})
}

// Managers of before --force-new-cluster came back as such, met, and went on with the old
// swarm beside the new one.
func TestLostManagerReturnsAsWorker(t *testing.T) {
	inRig(t, func(r *rig) {
		kept, lost := r.enroll("manager token"), r.enroll("manager token")
		r.managers = []string{kept.id}
		time.Sleep(100 * 24 * time.Hour)
		for n, want := range map[*enrolled]string{&kept: pki.ManagerRole, &lost: pki.WorkerRole} {
			if err := r.comeBack(*n, csr(t)); err != nil {
				t.Fatal(err)
			}
			if leaf := r.issued(n.id); leaf.Subject.OrganizationalUnit[0] != want {
				t.Errorf("it returned as %v, want %s", leaf.Subject, want)
			}
			node := r.state.View().Node(n.id)
			if pki.RoleOU(node.GetRole()) != want || node.GetSpec().GetDesiredRole() != api.NodeRole_MANAGER {
				t.Errorf("it is a %v that shall be a %v", node.GetRole(), node.GetSpec().GetDesiredRole())
			}
		}
	})
}
