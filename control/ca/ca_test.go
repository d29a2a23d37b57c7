package ca

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
	"github.com/skep-dev/skep/platform/cfssl"
	"github.com/skep-dev/skep/platform/wire"
)

// rig is a certificate authority over a state in memory, in a bubble.
type rig struct {
	*testing.T

	state *replica.Memory
	s     *Server
	root  *pki.Root
	// managers are the nodes in raft.
	managers []string
	// tokens are the limited ones that were made.
	tokens []string
}

func inRig(t *testing.T, test func(*rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		root, err := pki.NewRoot(rand.Reader, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		r := &rig{T: t, state: replica.NewMemory(store.Empty()), root: root}
		r.s = New(Config{State: r.state, Members: r.members, External: new(cfssl.Client), Log: slog.New(slog.DiscardHandler)})
		if _, err := r.s.GetRootCACertificate(t.Context(), nil); status.Code(err) != codes.Aborted {
			t.Errorf("root certificate of no swarm: %v", err)
		}
		r.update(func(tx *store.Tx) error {
			return tx.Create(&api.Cluster{
				Id: "swarm",
				Spec: &api.ClusterSpec{
					Annotations: &api.Annotations{Name: "default"}, CaConfig: &api.CAConfig{NodeCertExpiry: durationpb.New(90 * 24 * time.Hour)},
				},
				RootCa: &api.RootCA{
					CaCert: root.CertPEM, CaKey: root.KeyPEM, JoinTokens: &api.JoinTokens{Worker: "worker token", Manager: "manager token"},
				},
				UnlockKeys: []*api.EncryptionKey{{Subsystem: pki.ManagerRole, Key: []byte("kek")}},
			})
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.s.Run(ctx) }()
		defer func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("the term ended with %v", err)
			}
		}()
		test(r)
	})
}

func (r *rig) members() []*api.RaftMember {
	var list []*api.RaftMember
	for _, id := range r.managers {
		list = append(list, &api.RaftMember{NodeId: id})
	}
	return list
}

func (r *rig) update(f func(*store.Tx) error) {
	r.Helper()
	if _, err := r.state.Update(r.Context(), f); err != nil {
		r.Fatal(err)
	}
}

func csr(t *testing.T) []byte {
	t.Helper()
	key, err := pki.NewKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	data, err := pki.NewCSR(rand.Reader, key)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func (r *rig) as(node, role string) context.Context {
	return wire.WithIdentity(r.Context(), wire.Identity{NodeID: node, ClusterID: "swarm", OUs: []string{role}, Skep: true})
}

func (r *rig) stranger() context.Context {
	return wire.WithIdentity(r.Context(), wire.Identity{Skep: true})
}

// issued returns the certificate of a node, once issued.
func (r *rig) issued(node string) *x509.Certificate {
	r.Helper()
	ctx, cancel := context.WithTimeout(r.stranger(), time.Minute)
	defer cancel()
	resp, err := r.s.NodeCertificateStatus(ctx, &api.NodeCertificateStatusRequest{NodeId: node})
	if err != nil {
		r.Fatal(err)
	}
	if resp.GetStatus().GetState() != api.IssuanceStatus_ISSUED {
		r.Fatalf("the certificate is %v", resp.GetStatus())
	}
	leaf, err := r.root.Verify(resp.GetCertificate().GetCertificate(), time.Now())
	if err != nil {
		r.Fatal(err)
	}
	return leaf
}

func (r *rig) join(token string) (string, error) {
	resp, err := r.s.IssueNodeCertificate(r.stranger(), &api.IssueNodeCertificateRequest{
		Csr: csr(r.T), Token: token, Availability: api.NodeSpec_DRAIN,
	})
	return resp.GetNodeId(), err
}

func (r *rig) mustJoin(token string) string {
	r.Helper()
	id, err := r.join(token)
	if err != nil {
		r.Fatal(err)
	}
	return id
}

func TestJoinByToken(t *testing.T) {
	inRig(t, func(r *rig) {
		for token, role := range map[string]string{"worker token": pki.WorkerRole, "manager token": pki.ManagerRole} {
			id := r.mustJoin(token)
			leaf := r.issued(id)
			if s := leaf.Subject; s.CommonName != id || s.Organization[0] != "swarm" || s.OrganizationalUnit[0] != role {
				t.Errorf("%s: subject %v", token, s)
			}
			if life := time.Until(leaf.NotAfter); life < 89*24*time.Hour || life > 91*24*time.Hour {
				t.Errorf("the certificate ends in %v", life)
			}
			node := r.state.View().Node(id)
			if pki.RoleOU(node.GetRole()) != role || node.GetSpec().GetDesiredRole() != node.GetRole() ||
				node.GetSpec().GetMembership() != api.NodeSpec_ACCEPTED || node.GetSpec().GetAvailability() != api.NodeSpec_DRAIN {
				t.Errorf("node %v", node)
			}
		}
	})
}

// TestDockerIsNoManager holds that only Skep's nodes get manager certificates, by a token or
// by a renewal.
func TestDockerIsNoManager(t *testing.T) {
	inRig(t, func(r *rig) {
		const refusal = "a Docker Engine can be a worker of a Skep swarm but not a manager"
		docker := wire.WithIdentity(r.Context(), wire.Identity{})
		req := &api.IssueNodeCertificateRequest{Csr: csr(t), Token: "manager token"}
		if _, err := r.s.IssueNodeCertificate(docker, req); model.KindOf(err) != model.Precondition || !strings.HasPrefix(err.Error(), refusal) {
			t.Errorf("with a manager's token: %v", err)
		}
		for node := range r.state.View().Nodes() {
			t.Errorf("there is node %s", node.GetId())
		}
		req.Token = "worker token"
		joined, err := r.s.IssueNodeCertificate(docker, req)
		if err != nil {
			t.Fatalf("with a worker's token: %v", err)
		}
		id := joined.GetNodeId()
		r.issued(id)
		renew := func(role api.NodeRole) error {
			r.update(func(tx *store.Tx) error {
				n := model.Clone(tx.Snapshot().Node(id))
				n.Role = role
				return tx.Update(n)
			})
			as := wire.WithIdentity(r.Context(), wire.Identity{NodeID: id, ClusterID: "swarm", OUs: []string{pki.WorkerRole}})
			_, err := r.s.IssueNodeCertificate(as, &api.IssueNodeCertificateRequest{Csr: csr(t)})
			return err
		}
		if err := renew(api.NodeRole_MANAGER); model.KindOf(err) != model.Precondition || !strings.HasPrefix(err.Error(), refusal) {
			t.Errorf("renewal as a manager: %v", err)
		}
		if err := renew(api.NodeRole_WORKER); err != nil {
			t.Errorf("renewal as a worker: %v", err)
		}
	})
}

func TestWrongTokenMakesNoNode(t *testing.T) {
	inRig(t, func(r *rig) {
		for _, token := range []string{"", "wrong", "worker token "} {
			_, err := r.join(token)
			if model.KindOf(err) != model.Invalid || err.Error() != "A valid join token is necessary to join this cluster" {
				t.Errorf("token %q: %v", token, err)
			}
		}
		for _, bad := range []string{"", "no request"} {
			if _, err := r.s.IssueNodeCertificate(r.stranger(), &api.IssueNodeCertificateRequest{Csr: []byte(bad), Token: "worker token"}); err == nil {
				t.Errorf("request %q was accepted", bad)
			}
		}
		for node := range r.state.View().Nodes() {
			t.Errorf("there is node %s", node.GetId())
		}
		// A rotated token lets nobody in any more.
		r.update(func(tx *store.Tx) error {
			c := model.Clone(tx.Snapshot().Cluster())
			c.RootCa.JoinTokens.Worker = "new token"
			return tx.Update(c)
		})
		if _, err := r.join("worker token"); model.KindOf(err) != model.Invalid {
			t.Errorf("with the old token: %v", err)
		}
		r.mustJoin("new token")
	})
}

func TestRenewal(t *testing.T) {
	inRig(t, func(r *rig) {
		id := r.mustJoin("worker token")
		old := r.issued(id)
		time.Sleep(50 * 24 * time.Hour)
		// The token of a renewal counts for nothing, nor does what is asked for.
		resp, err := r.s.IssueNodeCertificate(r.as(id, pki.WorkerRole), &api.IssueNodeCertificateRequest{
			Csr: csr(t), Token: "manager token", Availability: api.NodeSpec_PAUSE,
		})
		if err != nil || resp.GetNodeId() != id {
			t.Fatalf("renewal: %v, %v", resp, err)
		}
		now := r.issued(id)
		if !now.NotAfter.After(old.NotAfter) || now.Subject.String() != old.Subject.String() {
			t.Errorf("renewed %v until %v, was %v until %v", now.Subject, now.NotAfter, old.Subject, old.NotAfter)
		}
		if _, err := r.s.IssueNodeCertificate(r.as("gone", pki.WorkerRole), &api.IssueNodeCertificateRequest{Csr: csr(t)}); model.KindOf(err) != model.NotFound {
			t.Errorf("renewal of a removed node: %v", err)
		}
	})
}

func TestRenewalBringsTheNewRole(t *testing.T) {
	inRig(t, func(r *rig) {
		id := r.mustJoin("worker token")
		r.issued(id)
		r.update(func(tx *store.Tx) error {
			n := model.Clone(tx.Snapshot().Node(id))
			n.Spec.DesiredRole = api.NodeRole_MANAGER // wanted, but not given yet
			return tx.Update(n)
		})
		renew := func() string {
			if _, err := r.s.IssueNodeCertificate(r.as(id, pki.WorkerRole), &api.IssueNodeCertificateRequest{Csr: csr(t)}); err != nil {
				t.Fatal(err)
			}
			return r.issued(id).Subject.OrganizationalUnit[0]
		}
		if role := renew(); role != pki.WorkerRole {
			t.Errorf("before the role is given the certificate says %s", role)
		}
		r.update(func(tx *store.Tx) error {
			n := model.Clone(tx.Snapshot().Node(id))
			n.Role = api.NodeRole_MANAGER
			return tx.Update(n)
		})
		if role := renew(); role != pki.ManagerRole {
			t.Errorf("after the role was given the certificate says %s", role)
		}
	})
}

// Requests made under one leader are signed by the next.
func TestNextLeaderSigns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root, err := pki.NewRoot(rand.Reader, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		r := &rig{T: t, state: replica.NewMemory(store.Empty()), root: root}
		r.update(func(tx *store.Tx) error {
			return errors.Join(tx.Create(&api.Cluster{
				Id: "swarm", Spec: &api.ClusterSpec{Annotations: &api.Annotations{Name: "default"}},
				RootCa: &api.RootCA{CaCert: root.CertPEM, CaKey: root.KeyPEM},
			}), tx.Create(&api.Node{
				Id: "n1", Spec: &api.NodeSpec{Membership: api.NodeSpec_ACCEPTED}, Role: api.NodeRole_WORKER,
				Certificate: &api.Certificate{Csr: csr(t), Cn: "n1", Status: &api.IssuanceStatus{State: api.IssuanceStatus_PENDING}},
			}), tx.Create(&api.Node{
				Id: "n2", Spec: &api.NodeSpec{Membership: api.NodeSpec_PENDING}, Role: api.NodeRole_WORKER,
				Certificate: &api.Certificate{Csr: csr(t), Cn: "n2", Status: &api.IssuanceStatus{State: api.IssuanceStatus_PENDING}},
			}), tx.Create(&api.Node{
				Id: "n3", Spec: &api.NodeSpec{Membership: api.NodeSpec_ACCEPTED}, Role: api.NodeRole_WORKER,
				Certificate: &api.Certificate{Csr: []byte("broken"), Cn: "n3", Status: &api.IssuanceStatus{State: api.IssuanceStatus_PENDING}},
			}))
		})
		r.s = New(Config{State: r.state, Members: r.members, External: new(cfssl.Client), Log: slog.New(slog.DiscardHandler)})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.s.Run(ctx) }()
		r.issued("n1")
		synctest.Wait()
		for id, want := range map[string]api.IssuanceStatus_State{"n2": api.IssuanceStatus_PENDING, "n3": api.IssuanceStatus_FAILED} {
			if got := r.state.View().Node(id).GetCertificate().GetStatus(); got.GetState() != want {
				t.Errorf("node %s: %v, want %v", id, got, want)
			}
		}
		r.update(func(tx *store.Tx) error {
			n := model.Clone(tx.Snapshot().Node("n2"))
			n.Spec.Membership = api.NodeSpec_ACCEPTED
			return tx.Update(n)
		})
		r.issued("n2")
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestStatusWaitsNoLongerThanTheCaller(t *testing.T) {
	inRig(t, func(r *rig) {
		r.update(func(tx *store.Tx) error {
			return tx.Create(&api.Node{
				Id: "n", Spec: &api.NodeSpec{Membership: api.NodeSpec_PENDING},
				Certificate: &api.Certificate{Csr: csr(t), Status: &api.IssuanceStatus{State: api.IssuanceStatus_PENDING}},
			})
		})
		ctx, cancel := context.WithTimeout(r.stranger(), 5*time.Second)
		defer cancel()
		began := time.Now()
		_, err := r.s.NodeCertificateStatus(ctx, &api.NodeCertificateStatusRequest{NodeId: "n"})
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != 5*time.Second {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		for id, code := range map[string]codes.Code{"": codes.InvalidArgument, "absent": codes.NotFound} {
			if _, err := r.s.NodeCertificateStatus(r.stranger(), &api.NodeCertificateStatusRequest{NodeId: id}); status.Code(err) != code {
				t.Errorf("status of node %q: %v", id, err)
			}
		}
	})
}

func TestJoinsAreLimited(t *testing.T) {
	inRig(t, func(r *rig) {
		refused := 0
		for range sourceBurst + 10 {
			if _, err := r.join("wrong"); status.Code(err) == codes.ResourceExhausted {
				refused++
			}
		}
		if refused != 10 {
			t.Errorf("%d of %d guesses at once were refused, want 10", refused, sourceBurst+10)
		}
		time.Sleep(time.Second)
		r.mustJoin("worker token")
	})
}

func TestRootAndUnlockKey(t *testing.T) {
	inRig(t, func(r *rig) {
		resp, err := r.s.GetRootCACertificate(r.stranger(), nil)
		if err != nil || string(resp.GetCertificate()) != string(r.root.CertPEM) {
			t.Errorf("root: %v, %v", resp, err)
		}
		key, err := r.s.GetUnlockKey(r.as("m", pki.ManagerRole), nil)
		if err != nil || string(key.GetUnlockKey()) != "kek" || key.GetVersion().GetIndex() == 0 {
			t.Errorf("unlock key: %v, %v", key, err)
		}
	})
}
