package enroll

import (
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	mathrand "math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/keystore"
	"github.com/skep-dev/skep/platform/wire"
	"github.com/skep-dev/skep/sim/memnet"
)

const addr = "10.0.0.1:2377"

// authority is a manager that issues certificates, on a network in memory.
type authority struct {
	api.UnimplementedCAServer
	api.UnimplementedNodeCAServer

	t     *testing.T
	net   *memnet.Network
	root  *pki.Root
	token string

	mu     sync.Mutex
	nodes  map[string]*api.Certificate
	role   string // of what is issued
	delay  time.Duration
	failed error // of every request, while set
	asked  int
}

func (a *authority) GetRootCACertificate(context.Context, *api.GetRootCACertificateRequest) (*api.GetRootCACertificateResponse, error) {
	return &api.GetRootCACertificateResponse{Certificate: a.root.CertPEM}, nil
}

func (a *authority) IssueNodeCertificate(ctx context.Context, req *api.IssueNodeCertificateRequest) (*api.IssueNodeCertificateResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.asked++
	if a.failed != nil {
		return nil, a.failed
	}
	caller, _ := wire.Caller(ctx)
	id := caller.NodeID
	if id == "" {
		if id = "new"; req.GetToken() != a.token {
			return nil, model.Errorf(model.Invalid, "A valid join token is necessary to join this cluster")
		}
	}
	chain, err := a.root.Issue(rand.Reader, time.Now(), req.GetCsr(), pki.Leaf{NodeID: id, ClusterID: "swarm", OU: a.role, Expiry: 90 * 24 * time.Hour})
	if err != nil {
		return nil, err
	}
	a.nodes[id] = &api.Certificate{Csr: req.GetCsr(), Certificate: chain}
	return &api.IssueNodeCertificateResponse{NodeId: id}, nil
}

func (a *authority) NodeCertificateStatus(ctx context.Context, req *api.NodeCertificateStatusRequest) (*api.NodeCertificateStatusResponse, error) {
	if err := sleep(ctx, a.delay); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return &api.NodeCertificateStatusResponse{
		Status: &api.IssuanceStatus{State: api.IssuanceStatus_ISSUED}, Certificate: a.nodes[req.GetNodeId()],
	}, nil
}

func (a *authority) set(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
}

// askedFor is how many certificates it was asked for until now.
func (a *authority) askedFor() (n int) {
	a.set(func() { n = a.asked })
	return n
}

// withAuthority runs a test in a bubble beside an authority.
func withAuthority(t *testing.T, test func(*testing.T, *authority)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		root, err := pki.NewRoot(rand.Reader, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		a := &authority{
			t: t, net: memnet.New(mathrand.New(mathrand.NewPCG(1, 1))), root: root, nodes: map[string]*api.Certificate{}, role: pki.WorkerRole,
		}
		if a.token, err = pki.NewToken(rand.Reader, root.CertPEM, false); err != nil {
			t.Fatal(err)
		}
		creds := &wire.Credentials{Network: a.net.Host("10.0.0.1")}
		refresh := func() { creds.Set(material(t, root, "manager", pki.ManagerRole)) }
		refresh()
		server := wire.NewServer(&wire.Guard{
			Credentials: creds, Leading: func() bool { return true }, Removed: func(string) bool { return false },
		})
		api.RegisterCAServer(server, a)
		api.RegisterNodeCAServer(server, a)
		l, err := wire.Listen(t.Context(), creds.Network, addr)
		if err != nil {
			t.Fatal(err)
		}
		stop := make(chan struct{})
		var group sync.WaitGroup
		group.Go(func() { _ = server.Serve(l) })
		group.Go(func() { // the manager renews its own certificate
			for {
				select {
				case <-stop:
					return
				case <-time.After(24 * time.Hour):
					refresh()
				}
			}
		})
		test(t, a)
		close(stop)
		server.Stop()
		group.Wait()
	})
}

func material(t *testing.T, root *pki.Root, id, role string) *wire.Material {
	t.Helper()
	key, err := pki.NewKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.NewCSR(rand.Reader, key)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := root.Issue(rand.Reader, time.Now(), csr, pki.Leaf{NodeID: id, ClusterID: "swarm", OU: role, Expiry: 90 * 24 * time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	m, err := wire.NewMaterial(root, chain, key)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func (a *authority) join(token string) (keystore.Identity, error) {
	return Join(a.t.Context(), a.net.Host("10.0.0.2"), addr, token, api.NodeSpec_ACTIVE)
}

func TestJoin(t *testing.T) {
	withAuthority(t, func(t *testing.T, a *authority) {
		id, err := a.join(a.token)
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := a.root.Verify(id.ChainPEM, time.Now())
		if err != nil || leaf.Subject.CommonName != "new" || leaf.Subject.OrganizationalUnit[0] != pki.WorkerRole {
			t.Errorf("certificate of %v, %v", leaf.Subject, err)
		}
		if string(id.RootPEM) != string(a.root.CertPEM) {
			t.Error("another root came")
		}
		a.delay = 4 * time.Second
		if _, err := a.join(a.token); err != nil {
			t.Errorf("from a slow authority: %v", err)
		}
		a.delay = 12 * time.Second // longer than one call waits
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if _, err := Join(ctx, a.net.Host("10.0.0.2"), addr, a.token, 0); err == nil || ctx.Err() == nil {
			t.Errorf("join while nothing is issued ended with %v", err)
		}
	})
}

func TestJoinRefused(t *testing.T) {
	withAuthority(t, func(t *testing.T, a *authority) {
		other, err := pki.NewRoot(rand.Reader, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		foreign, err := pki.NewToken(rand.Reader, other.CertPEM, false)
		if err != nil {
			t.Fatal(err)
		}
		guess, err := pki.NewToken(rand.Reader, a.root.CertPEM, false)
		if err != nil {
			t.Fatal(err)
		}
		for name, c := range map[string]struct{ token, text string }{
			"no token of a swarm":    {"SWMTKN-1-x", "invalid join token"},
			"token of another swarm": {foreign, "remote CA does not match fingerprint"},
			"wrong secret":           {guess, "A valid join token is necessary"},
		} {
			before := a.askedFor()
			if _, err := a.join(c.token); err == nil || !strings.Contains(err.Error(), c.text) {
				t.Errorf("%s: %v, want %q", name, err, c.text)
			}
			if sent := a.askedFor() > before; sent != (name == "wrong secret") {
				t.Errorf("%s: the token was sent: %v", name, sent)
			}
		}
		if _, err := Join(t.Context(), a.net.Host("10.0.0.2"), "10.0.0.3:2377", a.token, 0); status.Code(err) != codes.Unavailable {
			t.Errorf("join where nobody listens: %v", err)
		}
	})
}

// A leader that is busy or changing is asked again.
func TestJoinWhileTheLeaderChanges(t *testing.T) {
	withAuthority(t, func(t *testing.T, a *authority) {
		for _, busy := range []error{
			status.Error(codes.ResourceExhausted, "too many nodes are joining at once; try again"),
			status.Error(codes.Aborted, "CA signer is still starting"),
			model.ErrNoLeader,
		} {
			a.set(func() { a.failed = busy })
			time.AfterFunc(5*time.Second, func() { a.set(func() { a.failed = nil }) })
			if _, err := a.join(a.token); err != nil {
				t.Errorf("after %v: %v", busy, err)
			}
		}
		a.set(func() { a.failed = model.ErrNoLeader })
		if _, err := a.join(a.token); !errors.Is(wire.FromStatus(err), model.ErrNoLeader) {
			t.Errorf("without a leader for ever: %v", err)
		}
	})
}

// renewing runs a renewer of a worker until stop.
func (a *authority) renewing() (r *Renewer, creds *wire.Credentials, stop func()) {
	creds = &wire.Credentials{Network: a.net.Host("10.0.0.2")}
	creds.Set(material(a.t, a.root, "w", pki.WorkerRole))
	r = NewRenewer(Renewer{
		Credentials: creds, Log: slog.New(slog.DiscardHandler),
		Connect: func(context.Context) (grpc.ClientConnInterface, func(), error) {
			conn, err := wire.Dial(creds, addr, pki.ManagerRole)
			return conn, func() { conn.Close() }, err
		},
		Save: func(_ context.Context, id keystore.Identity) error {
			m, err := wire.NewMaterial(a.root, id.ChainPEM, id.Key)
			if err == nil {
				creds.Set(m)
			}
			return err
		},
	})
	ctx, cancel := context.WithCancel(a.t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	return r, creds, func() {
		cancel()
		if err := <-done; err != nil {
			a.t.Errorf("the renewer ended with %v", err)
		}
	}
}

func TestRenewalInTime(t *testing.T) {
	withAuthority(t, func(t *testing.T, a *authority) {
		_, creds, stop := a.renewing()
		defer stop()
		for range 200 {
			time.Sleep(24 * time.Hour)
			if left := time.Until(creds.Current().Leaf.NotAfter); left < 17*24*time.Hour {
				t.Fatalf("a certificate of 90 days has %v left", left)
			}
		}
		if a.askedFor() < 2 || a.askedFor() > 5 {
			t.Errorf("%d renewals in 200 days", a.askedFor())
		}
	})
}

func TestRenewalAfterAnOutage(t *testing.T) {
	withAuthority(t, func(t *testing.T, a *authority) {
		_, creds, stop := a.renewing()
		defer stop()
		old := creds.Current().Leaf
		a.set(func() { a.failed = model.ErrNoLeader })
		time.Sleep(80 * 24 * time.Hour)
		if a.askedFor() == 0 || a.askedFor() > 35*24+800 {
			t.Errorf("%d attempts during the outage", a.askedFor())
		}
		a.set(func() { a.failed = nil })
		time.Sleep(2 * time.Hour)
		if !creds.Current().Leaf.NotAfter.After(old.NotAfter) {
			t.Error("the certificate was not renewed after the outage")
		}
	})
}

func TestForcedRenewalWaitsForTheRole(t *testing.T) {
	withAuthority(t, func(t *testing.T, a *authority) {
		r, creds, stop := a.renewing()
		defer stop()
		r.Force(pki.ManagerRole)
		time.Sleep(30 * time.Second)
		if creds.Role() != pki.WorkerRole || a.askedFor() < 2 {
			t.Errorf("role %s after %d attempts", creds.Role(), a.askedFor())
		}
		a.set(func() { a.role = pki.ManagerRole })
		time.Sleep(time.Minute)
		if creds.Role() != pki.ManagerRole {
			t.Errorf("role %s", creds.Role())
		}
		asked := a.askedFor()
		r.Force(pki.WorkerRole) // the last wish counts
		r.Force(pki.ManagerRole)
		time.Sleep(time.Minute)
		if creds.Role() != pki.ManagerRole || a.askedFor() != asked+1 {
			t.Errorf("role %s after %d more attempts", creds.Role(), a.askedFor()-asked)
		}
	})
}
