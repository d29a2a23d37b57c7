package sim

import (
	"context"
	"crypto/rand"
	"flag"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/control/ca"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
	"github.com/skep-dev/skep/platform/cfssl"
	"github.com/skep-dev/skep/platform/enroll"
	"github.com/skep-dev/skep/platform/keystore"
	"github.com/skep-dev/skep/platform/wire"
	"github.com/skep-dev/skep/sim/memnet"
)

var daysFlag = flag.Int("days", 5, "how many days TestHourlyCertificates runs")

// office is a certificate authority behind a real server, and the nodes that it certifies:
// what renews certificates, without the rest of a swarm, so that months pass quickly.
type office struct {
	t      *testing.T
	net    *memnet.Network
	state  *replica.Memory
	random *mathrand.Rand
	nodes  []*resident
	made   int
}

// resident is one node as far as its certificate goes.
type resident struct {
	o        *office
	creds    *wire.Credentials
	renewals int
	stop     context.CancelFunc // nil while it is off
	done     chan error
}

const (
	officeAddr = "10.0.0.1:2377"
	officeLife = time.Hour
)

// Certificates of one hour, nodes that come and go, some for longer than an hour, some for
// good: nobody who is on is ever without a valid certificate for long, and nobody needs a
// token twice.
func TestHourlyCertificates(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector kills bubbles with many timers (golang.org/issue/76691)")
	}
	synctest.Test(t, func(t *testing.T) {
		o := &office{
			t: t, net: memnet.New(mathrand.New(mathrand.NewPCG(1, 1))), state: replica.NewMemory(store.Empty()),
			random: mathrand.New(mathrand.NewPCG(2, 2)),
		}
		closed := o.open()
		defer closed()
		// Renewals are due at whole minutes. Who is turned off between the two halves of one
		// cannot return after an hour, for the swarm knows it by a key that it never had.
		time.Sleep(30 * time.Second)
		for range 4 {
			o.join()
		}
		renewals, absences := 0, 0
		for end := time.Now().AddDate(0, 0, *daysFlag); time.Now().Before(end); {
			time.Sleep(time.Duration(1+o.random.IntN(60)) * time.Minute)
			o.check()
			r := o.nodes[1+o.random.IntN(len(o.nodes)-1)] // the first is the manager
			switch dice := o.random.IntN(20); {
			case dice == 0 && len(o.nodes) < 6:
				o.join()
			case dice == 1 && len(o.nodes) > 3:
				renewals += r.renewals
				o.remove(r)
			case r.stop != nil:
				r.halt()
				absences++
			default:
				r.start()
			}
		}
		for _, r := range o.nodes {
			if r.stop == nil {
				r.start()
			}
			renewals += r.renewals
		}
		time.Sleep(time.Minute)
		o.check()
		for _, r := range o.nodes {
			r.halt()
		}
		// A renewal comes within 36 minutes, whenever a node is on, which is half of the time.
		if least := *daysFlag * 24; renewals < least*len(o.nodes)/2 || absences < least/4 {
			t.Errorf("%d renewals and %d absences in %d days", renewals, absences, *daysFlag)
		}
		t.Logf("%d renewals and %d absences in %d days", renewals, absences, *daysFlag)
	})
}

// open founds the swarm and serves.
func (o *office) open() (closed func()) {
	root, err := pki.NewRoot(rand.Reader, time.Now())
	if err != nil {
		o.t.Fatal(err)
	}
	manager := &resident{o: o, creds: &wire.Credentials{Network: o.net.Host("10.0.0.1")}}
	key, err := pki.NewKey(rand.Reader)
	if err != nil {
		o.t.Fatal(err)
	}
	csr, err := pki.NewCSR(rand.Reader, key)
	if err != nil {
		o.t.Fatal(err)
	}
	chain, err := root.Issue(rand.Reader, time.Now(), csr, pki.Leaf{NodeID: "manager", ClusterID: "swarm", OU: pki.ManagerRole, Expiry: officeLife})
	if err != nil {
		o.t.Fatal(err)
	}
	if err := manager.save(o.t.Context(), keystore.Identity{RootPEM: root.CertPEM, ChainPEM: chain, Key: key}); err != nil {
		o.t.Fatal(err)
	}
	tokens := new(api.JoinTokens)
	for _, token := range []*string{&tokens.Worker, &tokens.Manager} {
		if *token, err = pki.NewToken(rand.Reader, root.CertPEM, false); err != nil {
			o.t.Fatal(err)
		}
	}
	o.update(func(tx *store.Tx) error {
		if err := tx.Create(&api.Node{Id: "manager", Role: api.NodeRole_MANAGER, Spec: &api.NodeSpec{Membership: api.NodeSpec_ACCEPTED}}); err != nil {
			return err
		}
		return tx.Create(&api.Cluster{
			Id: "swarm", RootCa: &api.RootCA{CaCert: root.CertPEM, CaKey: root.KeyPEM, JoinTokens: tokens},
			Spec: &api.ClusterSpec{
				Annotations: &api.Annotations{Name: "default"}, CaConfig: &api.CAConfig{NodeCertExpiry: durationpb.New(officeLife)},
			},
		})
	})
	authority := ca.New(ca.Config{
		State: o.state, Members: func() []*api.RaftMember { return []*api.RaftMember{{NodeId: "manager"}} },
		External: new(cfssl.Client), Log: slog.New(slog.DiscardHandler),
	})
	server := wire.NewServer(&wire.Guard{
		Credentials: manager.creds, Leading: func() bool { return true },
		Removed: func(id string) bool {
			_, ok := o.state.View().Cluster().GetBlacklistedCertificates()[id]
			return ok
		},
	})
	api.RegisterCAServer(server, authority)
	api.RegisterNodeCAServer(server, authority)
	skepv1.RegisterEnrollmentServer(server, authority)
	listen, err := wire.Listen(o.t.Context(), manager.creds.Network, officeAddr)
	if err != nil {
		o.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(o.t.Context())
	done := make(chan error, 2)
	go func() { done <- authority.Run(ctx) }()
	go func() { done <- server.Serve(listen) }()
	manager.start()
	o.nodes = append(o.nodes, manager)
	return func() {
		cancel()
		server.Stop()
		for range cap(done) {
			if err := <-done; err != nil {
				o.t.Error(err)
			}
		}
	}
}

func (o *office) update(f func(*store.Tx) error) {
	o.t.Helper()
	if _, err := o.state.Update(o.t.Context(), f); err != nil {
		o.t.Fatal(err)
	}
}

// join adds a node.
func (o *office) join() {
	o.t.Helper()
	o.made++
	r := &resident{o: o, creds: &wire.Credentials{Network: o.net.Host(fmt.Sprintf("10.1.%d.%d", o.made/250, o.made%250))}}
	token := o.state.View().Cluster().GetRootCa().GetJoinTokens().GetWorker()
	id, err := enroll.Join(o.t.Context(), r.creds.Network, officeAddr, token, api.NodeSpec_ACTIVE)
	if err != nil {
		o.t.Fatalf("join: %v", err)
	}
	if err := r.save(o.t.Context(), id); err != nil {
		o.t.Fatal(err)
	}
	r.start()
	o.nodes = append(o.nodes, r)
}

// remove removes a node from the swarm; it cannot renew any more.
func (o *office) remove(r *resident) {
	o.t.Helper()
	id := r.creds.NodeID()
	o.update(func(tx *store.Tx) error {
		c := model.Clone(tx.Snapshot().Cluster())
		if c.BlacklistedCertificates == nil {
			c.BlacklistedCertificates = map[string]*api.BlacklistedCertificate{}
		}
		c.BlacklistedCertificates[id] = new(api.BlacklistedCertificate)
		if err := tx.Update(c); err != nil {
			return err
		}
		return tx.Remove(model.Nodes, id)
	})
	if r.stop != nil {
		r.halt()
	}
	o.nodes = slices.DeleteFunc(o.nodes, func(other *resident) bool { return other == r })
}

// check looks at everybody who is on.
func (o *office) check() {
	o.t.Helper()
	for _, r := range o.nodes {
		leaf := r.creds.Current().Leaf
		if r.stop != nil && time.Now().After(leaf.NotAfter) {
			o.t.Errorf("%v: the certificate of %s ended %v", time.Now(), leaf.Subject.CommonName, leaf.NotAfter)
		}
		if time.Until(leaf.NotAfter) > officeLife {
			o.t.Errorf("the certificate of %s is good until %v", leaf.Subject.CommonName, leaf.NotAfter)
		}
	}
	known := 0
	for range o.state.View().Nodes() {
		known++
	}
	if known != len(o.nodes) {
		o.t.Errorf("the swarm knows %d nodes, want %d", known, len(o.nodes))
	}
}

func (r *resident) save(_ context.Context, id keystore.Identity) error {
	root, err := pki.ParseRoot(id.RootPEM, nil)
	if err != nil {
		return err
	}
	m, err := wire.NewMaterial(root, id.ChainPEM, id.Key)
	if err == nil {
		r.creds.Set(m)
		r.renewals++
	}
	return err
}

// start turns the node on and gives it a minute if its certificate has expired.
func (r *resident) start() {
	renewer := enroll.NewRenewer(enroll.Renewer{
		Credentials: r.creds, Save: r.save, Log: slog.New(slog.DiscardHandler),
		Connect: func(context.Context) (grpc.ClientConnInterface, func(), error) {
			conn, err := wire.Dial(r.creds, officeAddr, pki.ManagerRole)
			return conn, func() { _ = conn.Close() }, err
		},
		Return: func(ctx context.Context) (keystore.Identity, bool, error) {
			id, err := enroll.Return(ctx, r.creds, officeAddr)
			return id, err == nil, err
		},
	})
	ctx, cancel := context.WithCancel(r.o.t.Context())
	r.stop, r.done = cancel, make(chan error, 1)
	go func(done chan error) { done <- renewer.Run(ctx) }(r.done)
	if time.Now().After(r.creds.Current().Leaf.NotAfter) {
		time.Sleep(time.Minute)
	}
}

func (r *resident) halt() {
	r.stop()
	if err := <-r.done; err != nil {
		r.o.t.Error(err)
	}
	r.stop = nil
}
