package node

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/wire"
	"github.com/skep-dev/skep/sim/memnet"
)

// town is a swarm's root and network, without a swarm.
type town struct {
	t    *testing.T
	net  *memnet.Network
	root *pki.Root
	// issuer signs certificates.
	issuer *pki.Root
}

// inTown runs a test in a bubble.
func inTown(t *testing.T, test func(*testing.T, *town)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		root, err := pki.NewRoot(rand.Reader, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		test(t, &town{t: t, net: memnet.New(mathrand.New(mathrand.NewPCG(1, 1))), root: root, issuer: root})
	})
}

// creds are those of a node of a swarm with the town's root; none without a role.
func (w *town) creds(ip, swarm, role string) *wire.Credentials {
	w.t.Helper()
	creds := &wire.Credentials{Network: w.net.Host(ip)}
	creds.Set(&wire.Material{Root: w.root})
	if role == "" {
		return creds
	}
	key, err := pki.NewKey(rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	csr, err := pki.NewCSR(rand.Reader, key)
	if err != nil {
		w.t.Fatal(err)
	}
	chain, err := w.issuer.Issue(rand.Reader, time.Now(), csr, pki.Leaf{NodeID: "node" + ip, ClusterID: swarm, OU: role, Expiry: 90 * 24 * time.Hour})
	if err != nil {
		w.t.Fatal(err)
	}
	material, err := wire.NewMaterial(w.root, chain, key)
	if err != nil {
		w.t.Fatal(err)
	}
	creds.Set(material)
	return creds
}

// member is a node that knows managers, as far as finding them goes.
func (w *town) member(ip, role string, managers ...string) *member {
	w.t.Helper()
	dir, log := w.t.TempDir(), slog.New(slog.DiscardHandler)
	creds := w.creds(ip, "swarm", role)
	m := &member{
		cfg: &Config{Network: creds.Network, Log: log}, dir: dir, saved: savedState{ListenAddr: ip + ":2377", AdvertiseAddr: ip + ":2377"},
		creds: creds, remotes: openRemotes(dir, log), role: make(chan struct{}, 1), lost: make(chan struct{}, 1),
		joined: make(chan struct{}),
	}
	m.remotes.replace(peers(managers...))
	return m
}

func peers(addrs ...string) (list []*api.WeightedPeer) {
	for _, a := range addrs {
		list = append(list, &api.WeightedPeer{Peer: &api.Peer{NodeId: "id of " + a, Addr: a}})
	}
	return list
}

// serve runs a server of a node until the test ends.
func (w *town) serve(ip, role string, register func(*grpc.Server)) {
	w.t.Helper()
	creds := w.creds(ip, "swarm", role)
	server := wire.NewServer(&wire.Guard{Credentials: creds, Removed: func(string) bool { return false }, Leading: func() bool { return true }})
	register(server)
	listen, err := wire.Listen(w.t.Context(), creds.Network, ip+":2377")
	if err != nil {
		w.t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(listen) }()
	w.t.Cleanup(func() {
		server.Stop()
		<-done
	})
}

// teller tells of managers, and counts how often.
type teller struct {
	skepv1.UnimplementedDirectoryServer

	addrs []string
	asked atomic.Int32
}

func (d *teller) Managers(context.Context, *skepv1.ManagersRequest) (*skepv1.ManagersResponse, error) {
	d.asked.Add(1)
	return &skepv1.ManagersResponse{Addrs: d.addrs}, nil
}

func (d *teller) register(s *grpc.Server) { skepv1.RegisterDirectoryServer(s, d) }

// running runs a node as a worker until stop.
func running(t *testing.T, m *member) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.beWorker(ctx)
	}()
	synctest.Wait()
	return func() {
		cancel()
		<-done
	}
}

// free reports whether the port of a node can be had.
func free(t *testing.T, m *member) bool {
	t.Helper()
	l, err := wire.Listen(t.Context(), m.cfg.Network, m.saved.ListenAddr)
	if err != nil {
		return false
	}
	return l.Close() == nil
}

// A demoted node tells nodes of its swarm where the managers are, and whoever asks which root
// the swarm has, but nothing else.
func TestDemotedNodeTells(t *testing.T) {
	inTown(t, func(t *testing.T, w *town) {
		managers := []string{"10.0.0.8:2377", "10.0.0.9:2377"}
		m := w.member("10.0.0.1", pki.WorkerRole, managers...)
		m.noteManaged()
		m.remotes.suggest("10.0.0.8:2377", []string{"10.9.9.9:2377"}, "") // hearsay is not passed on
		defer running(t, m)()
		other, err := pki.NewRoot(rand.Reader, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		foreign := &town{t: t, net: w.net, root: w.root, issuer: other}
		for name, c := range map[string]struct {
			creds *wire.Credentials
			want  codes.Code
		}{
			"a worker":                    {w.creds("10.0.0.2", "swarm", pki.WorkerRole), codes.OK},
			"a manager":                   {w.creds("10.0.0.3", "swarm", pki.ManagerRole), codes.OK},
			"no certificate":              {w.creds("10.0.0.4", "swarm", ""), codes.PermissionDenied},
			"one of another root":         {foreign.creds("10.0.0.5", "swarm", pki.ManagerRole), codes.Unavailable},
			"one of another swarm's node": {w.creds("10.0.0.6", "other", pki.ManagerRole), codes.PermissionDenied},
		} {
			addrs, err := askDirectory(t.Context(), c.creds, "10.0.0.1:2377")
			if code := code(err); code != c.want {
				t.Errorf("%s: %v, want %v", name, err, c.want)
			} else if err == nil && !slices.Equal(addrs, managers) {
				t.Errorf("%s: told of %v", name, addrs)
			}
		}
		for _, role := range []string{"", pki.WorkerRole, pki.ManagerRole} {
			conn, err := wire.Dial(w.creds("10.0.0.7", "swarm", role), "10.0.0.1:2377", pki.WorkerRole)
			if err != nil {
				t.Fatal(err)
			}
			if root, err := api.NewCAClient(conn).GetRootCACertificate(t.Context(), new(api.GetRootCACertificateRequest)); err != nil || string(root.GetCertificate()) != string(w.root.CertPEM) {
				t.Errorf("role %q gets another root certificate: %v", role, err)
			}
			for _, name := range methods() {
				if name == skepv1.Directory_Managers_FullMethodName || name == api.CA_GetRootCACertificate_FullMethodName {
					continue
				}
				err := conn.Invoke(t.Context(), name, new(emptypb.Empty), new(emptypb.Empty))
				if c := status.Code(err); c != codes.Unimplemented && c != codes.PermissionDenied {
					t.Errorf("role %q calls %s: %v", role, name, err)
				}
			}
			if err := conn.Close(); err != nil {
				t.Error(err)
			}
		}
	})
}

// code is the code of what askDirectory failed with.
func code(err error) codes.Code {
	if s, ok := status.FromError(err); ok {
		return s.Code()
	}
	return codes.Unknown
}

// methods are all methods that managers have.
func methods() (names []string) {
	protoregistry.GlobalFiles.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		if f.Package() != api.File_docker_swarmkit_v1_types_proto.Package() && f.Package() != skepv1.File_skep_v1_access_proto.Package() {
			return true
		}
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			for j := range s.Methods().Len() {
				names = append(names, fmt.Sprintf("/%s/%s", s.FullName(), s.Methods().Get(j).Name()))
			}
		}
		return true
	})
	return names
}

// The port is a demoted node's until it leaves or is promoted; one that is taken is tried again.
func TestDemotedNodesPort(t *testing.T) {
	inTown(t, func(t *testing.T, w *town) {
		m := w.member("10.0.0.1", pki.WorkerRole, "10.0.0.8:2377")
		stop := running(t, m)
		if !free(t, m) {
			t.Error("a node that was no manager listens")
		}
		stop()
		m.noteManaged()
		stop = running(t, m)
		if free(t, m) {
			t.Error("a node that was a manager does not listen")
		}
		stop()
		if !free(t, m) {
			t.Error("a node that left listens")
		}
		stop = running(t, m)
		m.roleChanged()
		synctest.Wait()
		if !free(t, m) {
			t.Error("a node that is to become a manager has not let go of the port")
		}
		stop()
		taken, err := wire.Listen(t.Context(), m.cfg.Network, m.saved.ListenAddr)
		if err != nil {
			t.Fatal(err)
		}
		stop = running(t, m)
		time.Sleep(time.Minute)
		if err := taken.Close(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(listenAgainAfter)
		if _, err := askDirectory(t.Context(), w.creds("10.0.0.2", "swarm", pki.WorkerRole), "10.0.0.1:2377"); err != nil {
			t.Errorf("once the port was free: %v", err)
		}
		stop()
	})
}

// One liar among the demoted nodes, some that do not answer, and managers without a quorum.
func TestAskManagers(t *testing.T) {
	inTown(t, func(t *testing.T, w *town) {
		var lies []string
		for i := range 64 {
			lies = append(lies, fmt.Sprintf("10.1.0.%d:2377", i))
		}
		liar, honest := &teller{addrs: lies}, &teller{addrs: []string{"10.0.0.8:2377", "10.0.0.9:2377"}}
		w.serve("10.0.0.1", pki.WorkerRole, liar.register)
		w.serve("10.0.0.2", pki.WorkerRole, honest.register)
		w.serve("10.0.0.3", pki.ManagerRole, func(*grpc.Server) {})
		for i := range 4 { // so many that do not answer, asked one after the other, would take 12 s
			w.net.Cut("10.0.0.7", fmt.Sprintf("10.0.1.%d", i))
		}
		m := w.member("10.0.0.7", pki.WorkerRole, "10.0.0.1:2377", "10.0.0.2:2377", "10.0.0.3:2377", "10.0.0.4:2377",
			"10.0.1.0:2377", "10.0.1.1:2377", "10.0.1.2:2377", "10.0.1.3:2377", "10.0.0.7:2377")
		skip := map[string]time.Time{}
		begin := time.Now()
		m.askManagers(t.Context(), skip)
		if took := time.Since(begin); took > directoryTimeout+time.Second {
			t.Errorf("asking took %v", took)
		}
		if _, ok := skip["10.0.0.3:2377"]; !ok || len(skip) != 1 {
			t.Errorf("not asked again soon are %v, want the manager", skip)
		}
		want := map[string][]string{"10.0.0.1:2377": lies[:maxTold], "10.0.0.2:2377": honest.addrs}
		if diff := cmp.Diff(want, m.remotes.told); diff != "" {
			t.Error(diff)
		}
		m.onSession(&api.SessionMessage{Managers: peers("10.0.0.8:2377")})
		if m.remotes.toldOthers() {
			t.Error("after a session there is still what others told")
		}
	})
}

// Nodes that are lost for long ask seldom; those that have a session do not ask.
func TestFindManagersSlowsDown(t *testing.T) {
	inTown(t, func(t *testing.T, w *town) {
		silent := new(teller) // it knows nobody
		w.serve("10.0.0.1", pki.WorkerRole, silent.register)
		m := w.member("10.0.0.7", pki.WorkerRole, "10.0.0.1:2377")
		ctx, cancel := context.WithCancel(t.Context())
		var group sync.WaitGroup
		group.Go(func() { m.findManagers(ctx) })
		for range lostAfter - 1 {
			m.attempt()
		}
		time.Sleep(time.Hour)
		if n := silent.asked.Load(); n != 0 {
			t.Errorf("a node that is not lost asked %d times", n)
		}
		for range 3600 / 4 {
			m.attempt()
			time.Sleep(4 * time.Second)
		}
		if n := silent.asked.Load(); n < 60 || n > 180 { // every 30 s or so
			t.Errorf("a lost node asked %d times in an hour", n)
		}
		m.onSession(new(api.SessionMessage))
		before := silent.asked.Load()
		time.Sleep(time.Hour)
		if n := silent.asked.Load(); n != before {
			t.Errorf("a node with a session asked %d times", n-before)
		}
		cancel()
		group.Wait()
	})
}
