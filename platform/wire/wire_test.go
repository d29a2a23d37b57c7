package wire

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/sim/memnet"
)

// rig is a leader and another manager on a network in memory, in a bubble.
type rig struct {
	*testing.T

	net     *memnet.Network
	root    *pki.Root
	removed map[string]bool
	// seen is who made the last call that a service served.
	seen     Identity
	leads    bool // whether the leader does
	follower *Credentials
	// conns are the connections to both managers.
	conns Conns
}

const (
	leaderAddr   = "10.0.0.1:2377"
	followerAddr = "10.0.0.2:2377"
)

func inRig(t *testing.T, test func(*rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := &rig{T: t, net: memnet.New(mathrand.New(mathrand.NewPCG(1, 1))), removed: map[string]bool{}, leads: true}
		var err error
		if r.root, err = pki.NewRoot(rand.Reader, time.Now()); err != nil {
			t.Fatal(err)
		}
		leader := r.serve(leaderAddr, r.creds("10.0.0.1", "leader", "swarm", pki.ManagerRole), func() bool { return r.leads })
		defer leader()
		r.follower = r.creds("10.0.0.2", "follower", "swarm", pki.ManagerRole)
		follower := r.serve(followerAddr, r.follower, func() bool { return false })
		defer follower()
		test(r)
	})
}

// creds makes a node's credentials; without an id, those of a stranger.
func (r *rig) creds(ip, id, cluster, role string) *Credentials {
	r.Helper()
	c := &Credentials{Network: r.net.Host(ip)}
	if id == "" {
		c.Set(&Material{Root: r.root})
		return c
	}
	c.Set(issue(r.T, r.root, id, cluster, role))
	return c
}

func issue(t *testing.T, root *pki.Root, id, cluster, role string) *Material {
	t.Helper()
	key, err := pki.NewKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.NewCSR(rand.Reader, key)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := root.Issue(rand.Reader, time.Now(), csr, pki.Leaf{NodeID: id, ClusterID: cluster, OU: role, Expiry: 24 * time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	m, err := NewMaterial(root, chain, key)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// serve runs a manager whose services note who calls.
func (r *rig) serve(addr string, creds *Credentials, leading func() bool) (stop func()) {
	r.Helper()
	guard := &Guard{
		Credentials: creds, Leading: leading, Conns: &r.conns, Removed: func(id string) bool { return r.removed[id] },
		Leader: func(context.Context) (grpc.ClientConnInterface, error) {
			conn, err := Dial(creds, leaderAddr, pki.ManagerRole)
			if err == nil {
				r.Cleanup(func() { conn.Close() })
			}
			return &closing{conn}, err
		},
	}
	s := NewServer(guard)
	register(s, r)
	l, err := Listen(r.Context(), creds.Network, addr)
	if err != nil {
		r.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	return func() { s.Stop(); <-done }
}

// closing closes its connection after one unary call.
type closing struct{ *grpc.ClientConn }

func (c *closing) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	defer c.Close()
	return c.ClientConn.Invoke(ctx, method, args, reply, opts...)
}

// register adds every service there is. All methods answer Unimplemented but those that
// note their caller.
func register(s *grpc.Server, r *rig) {
	n := &noting{r: r}
	api.RegisterRaftServer(s, api.UnimplementedRaftServer{})
	api.RegisterRaftMembershipServer(s, api.UnimplementedRaftMembershipServer{})
	api.RegisterHealthServer(s, api.UnimplementedHealthServer{})
	api.RegisterCAServer(s, api.UnimplementedCAServer{})
	api.RegisterNodeCAServer(s, n)
	api.RegisterDispatcherServer(s, n)
	api.RegisterResourceAllocatorServer(s, api.UnimplementedResourceAllocatorServer{})
	api.RegisterLogBrokerServer(s, api.UnimplementedLogBrokerServer{})
	api.RegisterLogsServer(s, api.UnimplementedLogsServer{})
	api.RegisterControlServer(s, api.UnimplementedControlServer{})
	api.RegisterWatchServer(s, api.UnimplementedWatchServer{})
	skepv1.RegisterInsightServer(s, skepv1.UnimplementedInsightServer{})
	skepv1.RegisterSecretsServer(s, skepv1.UnimplementedSecretsServer{})
	skepv1.RegisterNetworksServer(s, skepv1.UnimplementedNetworksServer{})
	skepv1.RegisterTokensServer(s, skepv1.UnimplementedTokensServer{})
	skepv1.RegisterEnrollmentServer(s, skepv1.UnimplementedEnrollmentServer{})
	skepv1.RegisterUnlockServer(s, skepv1.UnimplementedUnlockServer{})
	skepv1.RegisterDirectoryServer(s, skepv1.UnimplementedDirectoryServer{})
}

type noting struct {
	api.UnimplementedNodeCAServer
	api.UnimplementedDispatcherServer

	r *rig
}

func (n *noting) NodeCertificateStatus(ctx context.Context, _ *api.NodeCertificateStatusRequest) (*api.NodeCertificateStatusResponse, error) {
	n.r.seen, _ = Caller(ctx)
	return new(api.NodeCertificateStatusResponse), nil
}

func (n *noting) Heartbeat(ctx context.Context, _ *api.HeartbeatRequest) (*api.HeartbeatResponse, error) {
	n.r.seen, _ = Caller(ctx)
	return new(api.HeartbeatResponse), nil
}

func (n *noting) Session(_ *api.SessionRequest, stream api.Dispatcher_SessionServer) error {
	n.r.seen, _ = Caller(stream.Context())
	for i := range 3 {
		if err := stream.Send(&api.SessionMessage{SessionId: fmt.Sprint(i)}); err != nil {
			return err
		}
	}
	return model.Errorf(model.NotFound, "that was all")
}

// dial connects to a manager.
func (r *rig) dial(creds *Credentials, addr, name string) *grpc.ClientConn {
	r.Helper()
	conn, err := Dial(creds, addr, name)
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(func() { conn.Close() })
	return conn
}

// with runs f with a connection and closes it.
func (r *rig) with(creds *Credentials, addr string, f func(*grpc.ClientConn)) {
	r.Helper()
	conn := r.dial(creds, addr, pki.ManagerRole)
	defer conn.Close()
	f(conn)
}

// try calls a method and returns how that ended.
func try(ctx context.Context, conn *grpc.ClientConn, name string, m method) error {
	in, err := newMessage(m.desc.Input())
	if err != nil {
		return err
	}
	out, err := newMessage(m.desc.Output())
	if err != nil {
		return err
	}
	if !m.desc.IsStreamingClient() && !m.desc.IsStreamingServer() {
		return conn.Invoke(ctx, name, in, out)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: m.desc.IsStreamingServer(), ClientStreams: m.desc.IsStreamingClient()}, name)
	if err != nil {
		return err
	}
	_ = s.SendMsg(in)
	_ = s.CloseSend()
	return s.RecvMsg(out)
}

// TestEveryMethodByRole holds the rules of the .proto files to this table: who is let in.
func TestEveryMethodByRole(t *testing.T) {
	anyone := []string{
		"/docker.swarmkit.v1.CA/GetRootCACertificate",
		"/docker.swarmkit.v1.NodeCA/IssueNodeCertificate", "/docker.swarmkit.v1.NodeCA/NodeCertificateStatus",
		"/skep.v1.Enrollment/Return", "/skep.v1.Unlock/Ask",
	}
	workers := []string{
		"/docker.swarmkit.v1.Dispatcher/", "/docker.swarmkit.v1.ResourceAllocator/", "/docker.swarmkit.v1.LogBroker/",
		"/skep.v1.Networks/Watch", "/skep.v1.Networks/Programmed", "/skep.v1.Networks/Checked",
		"/skep.v1.Networks/RenameAttachments",
		"/skep.v1.Directory/Managers",
	}
	within := func(name string, prefixes []string) bool {
		for _, p := range prefixes {
			if strings.HasPrefix(name, p) {
				return true
			}
		}
		return false
	}
	inRig(t, func(r *rig) {
		for _, c := range []struct {
			name  string
			creds *Credentials
			may   func(method string) bool
		}{
			{"a stranger", r.creds("10.0.0.9", "", "", ""), func(m string) bool { return within(m, anyone) }},
			{"a worker", r.creds("10.0.0.9", "w", "swarm", pki.WorkerRole), func(m string) bool { return within(m, anyone) || within(m, workers) }},
			{"a manager", r.creds("10.0.0.9", "m", "swarm", pki.ManagerRole), func(string) bool { return true }},
			{"a manager of another swarm", r.creds("10.0.0.9", "m", "other", pki.ManagerRole), func(m string) bool { return within(m, anyone) }},
			{"a node of an unknown role", r.creds("10.0.0.9", "x", "swarm", "swarm-guest"), func(m string) bool { return within(m, anyone) }},
		} {
			r.with(c.creds, leaderAddr, func(conn *grpc.ClientConn) {
				tried := 0
				for name, m := range methods() {
					tried++
					err := try(r.Context(), conn, name, m)
					if denied := status.Code(err) == codes.PermissionDenied; denied == c.may(name) {
						t.Errorf("%s calls %s: %v", c.name, name, err)
					}
				}
				if tried < 60 {
					t.Errorf("only %d methods are known", tried)
				}
			})
		}
	})
}

func TestRemovedNodeIsDenied(t *testing.T) {
	inRig(t, func(r *rig) {
		r.removed["w"] = true
		r.with(r.creds("10.0.0.9", "w", "swarm", pki.WorkerRole), leaderAddr, func(conn *grpc.ClientConn) {
			_, err := api.NewDispatcherClient(conn).Heartbeat(r.Context(), new(api.HeartbeatRequest))
			if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "w was removed from swarm") {
				t.Errorf("heartbeat: %v", err)
			}
			// Where anyone is let in it is a stranger, who needs a token.
			if _, err := api.NewNodeCAClient(conn).NodeCertificateStatus(r.Context(), new(api.NodeCertificateStatusRequest)); err != nil || !r.seen.Anonymous() {
				t.Errorf("certificate status: %v, as %+v", err, r.seen)
			}
		})
	})
}

func TestForwardedCallKeepsItsCaller(t *testing.T) {
	inRig(t, func(r *rig) {
		// What a caller claims about itself is dropped on the way.
		lies := metadata.AppendToOutgoingContext(r.Context(), keyOU, pki.ManagerRole, keyCN, "leader", keyOrg, "swarm", keyAddr, "10.0.0.1:1")
		r.with(r.creds("10.0.0.9", "w", "swarm", pki.WorkerRole), followerAddr, func(conn *grpc.ClientConn) {
			if _, err := api.NewDispatcherClient(conn).Heartbeat(lies, new(api.HeartbeatRequest)); err != nil {
				t.Fatal(err)
			}
			if got := fmt.Sprintf("%+v", r.seen); got != "{NodeID:w ClusterID:swarm OUs:[swarm-worker] Addr:10.0.0.9:1 Forwarder:follower Skep:true}" {
				t.Errorf("the leader sees %s", got)
			}
			_, err := skepv1.NewInsightClient(conn).Overview(lies, new(skepv1.OverviewRequest))
			if status.Code(err) != codes.PermissionDenied {
				t.Errorf("a manager's method for a worker: %v", err)
			}
		})
		r.with(r.creds("10.0.0.9", "", "", ""), followerAddr, func(conn *grpc.ClientConn) {
			if _, err := api.NewNodeCAClient(conn).NodeCertificateStatus(lies, new(api.NodeCertificateStatusRequest)); err != nil {
				t.Fatal(err)
			}
			if !r.seen.Anonymous() || r.seen.ClusterID != "" || r.seen.Forwarder != "follower" {
				t.Errorf("the leader takes a stranger for %+v", r.seen)
			}
			if _, err := api.NewDispatcherClient(conn).Heartbeat(lies, new(api.HeartbeatRequest)); status.Code(err) != codes.PermissionDenied {
				t.Errorf("a stranger's heartbeat: %v", err)
			}
		})
	})
}

func TestForwardedStream(t *testing.T) {
	inRig(t, func(r *rig) {
		r.with(r.creds("10.0.0.9", "w", "swarm", pki.WorkerRole), followerAddr, func(conn *grpc.ClientConn) {
			stream, err := api.NewDispatcherClient(conn).Session(r.Context(), new(api.SessionRequest))
			if err != nil {
				t.Fatal(err)
			}
			for i := range 3 {
				if m, err := stream.Recv(); err != nil || m.GetSessionId() != fmt.Sprint(i) {
					t.Fatalf("message %d: %v, %v", i, m, err)
				}
			}
			if _, err := stream.Recv(); status.Code(err) != codes.NotFound || status.Convert(err).Message() != "that was all" {
				t.Errorf("the end: %v", err)
			}
			if r.seen.NodeID != "w" || r.seen.Forwarder != "follower" {
				t.Errorf("the leader sees %+v", r.seen)
			}
		})
	})
}

// Only a manager of this swarm speaks for others.
func TestForgedForwarding(t *testing.T) {
	inRig(t, func(r *rig) {
		claim := metadata.AppendToOutgoingContext(r.Context(), keyForwarded, "true",
			keyOU, pki.ManagerRole, keyCN, "leader", keyOrg, "swarm", keyAddr, "10.0.0.1:1")
		twice := metadata.AppendToOutgoingContext(claim, keyForwarded, "true")
		for _, c := range []*Credentials{
			r.creds("10.0.0.9", "", "", ""),
			r.creds("10.0.0.9", "w", "swarm", pki.WorkerRole),
			r.creds("10.0.0.9", "m", "other", pki.ManagerRole),
		} {
			r.with(c, leaderAddr, func(conn *grpc.ClientConn) {
				for _, ctx := range []context.Context{claim, twice} {
					if _, err := api.NewControlClient(conn).ListNodes(ctx, new(api.ListNodesRequest)); status.Code(err) != codes.PermissionDenied {
						t.Errorf("%s forges a manager's call: %v", c.NodeID(), err)
					}
				}
				if _, err := api.NewNodeCAClient(conn).NodeCertificateStatus(claim, new(api.NodeCertificateStatusRequest)); status.Code(err) != codes.PermissionDenied {
					t.Errorf("%s forges a stranger's call: %v", c.NodeID(), err)
				}
			})
		}
		r.removed["m"] = true
		r.with(r.creds("10.0.0.9", "m", "swarm", pki.ManagerRole), leaderAddr, func(conn *grpc.ClientConn) {
			if _, err := api.NewControlClient(conn).ListNodes(claim, new(api.ListNodesRequest)); status.Code(err) != codes.PermissionDenied {
				t.Errorf("a removed manager forwards: %v", err)
			}
		})
	})
}

func TestForwardingGoesOneStep(t *testing.T) {
	inRig(t, func(r *rig) {
		r.leads = false // but the follower thinks so
		r.with(r.creds("10.0.0.9", "w", "swarm", pki.WorkerRole), followerAddr, func(conn *grpc.ClientConn) {
			_, err := api.NewDispatcherClient(conn).Heartbeat(r.Context(), new(api.HeartbeatRequest))
			if status.Code(err) != codes.ResourceExhausted {
				t.Errorf("heartbeat: %v", err)
			}
		})
	})
}

// A worker's certificate does not make a manager.
func TestOnlyManagersAreServers(t *testing.T) {
	inRig(t, func(r *rig) {
		stop := r.serve("10.0.0.3:2377", r.creds("10.0.0.3", "w", "swarm", pki.WorkerRole), func() bool { return true })
		defer stop()
		r.with(r.creds("10.0.0.9", "w2", "swarm", pki.WorkerRole), "10.0.0.3:2377", func(conn *grpc.ClientConn) {
			_, err := api.NewDispatcherClient(conn).Heartbeat(r.Context(), new(api.HeartbeatRequest))
			if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "swarm-manager") {
				t.Errorf("talk to a worker as a manager: %v", err)
			}
		})
	})
}

// TestPeersWithoutALPN holds that both sides talk to peers that do not negotiate a protocol,
// as Docker Engine does not once it has renewed its certificate.
func TestPeersWithoutALPN(t *testing.T) {
	inRig(t, func(r *rig) {
		worker := r.creds("10.0.0.9", "w", "swarm", pki.WorkerRole)
		config := worker.ClientTLS(pki.ManagerRole)
		config.NextProtos = nil
		conn, err := grpc.NewClient("passthrough:///"+leaderAddr, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
				raw, err := worker.Network.Dial(ctx, addr)
				if err != nil {
					return nil, err
				}
				c := tls.Client(raw, config)
				return c, c.HandshakeContext(ctx)
			}))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := api.NewDispatcherClient(conn).Heartbeat(r.Context(), new(api.HeartbeatRequest)); err != nil {
			t.Errorf("a client without ALPN: %v", err)
		}
		if r.seen.NodeID != "w" || r.seen.Skep {
			t.Errorf("the manager sees %+v", r.seen)
		}

		manager := r.creds("10.0.0.3", "m", "swarm", pki.ManagerRole)
		l, err := Listen(r.Context(), manager.Network, "10.0.0.3:2377")
		if err != nil {
			t.Fatal(err)
		}
		s := grpc.NewServer()
		api.RegisterDispatcherServer(s, &noting{r: r})
		served := make(chan struct{})
		go func() {
			defer close(served)
			_ = s.Serve(tls.NewListener(l, &tls.Config{
				Certificates: []tls.Certificate{manager.Current().tls}, ClientAuth: tls.RequireAnyClientCert,
			}))
		}()
		defer func() { s.Stop(); <-served }()
		r.with(worker, "10.0.0.3:2377", func(conn *grpc.ClientConn) {
			if _, err := api.NewDispatcherClient(conn).Heartbeat(r.Context(), new(api.HeartbeatRequest)); err != nil {
				t.Errorf("a manager without ALPN: %v", err)
			}
		})
	})
}

func TestForeignAndOldCertificates(t *testing.T) {
	inRig(t, func(r *rig) {
		beat := func(c *Credentials) (err error) {
			r.with(c, leaderAddr, func(conn *grpc.ClientConn) {
				_, err = api.NewDispatcherClient(conn).Heartbeat(r.Context(), new(api.HeartbeatRequest))
			})
			return err
		}
		other, err := pki.NewRoot(rand.Reader, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		forged := &Credentials{Network: r.net.Host("10.0.0.9")}
		m := issue(t, other, "w", "swarm", pki.WorkerRole)
		m.Root = r.root // it trusts the swarm, but the swarm did not issue it
		forged.Set(m)
		if err := beat(forged); status.Code(err) != codes.Unavailable {
			t.Errorf("with a forged certificate: %v", err)
		}
		creds := r.creds("10.0.0.9", "w", "swarm", pki.WorkerRole)
		if err := beat(creds); err != nil {
			t.Fatal(err)
		}
		time.Sleep(23 * time.Hour)
		leader := r.creds("10.0.0.1", "leader", "swarm", pki.ManagerRole)
		r.follower.Set(leader.Current())
		fresh := issue(t, r.root, "w", "swarm", pki.WorkerRole)
		time.Sleep(2 * time.Hour)
		follower := func(c *Credentials) (err error) {
			r.with(c, followerAddr, func(conn *grpc.ClientConn) {
				_, err = api.NewCAClient(conn).GetRootCACertificate(r.Context(), new(api.GetRootCACertificateRequest))
			})
			return err
		}
		if err := follower(creds); status.Code(err) != codes.Unavailable {
			t.Errorf("with an expired certificate: %v", err)
		}
		creds.Set(fresh)
		_ = follower(creds)
		if err := beat(creds); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "expired") {
			t.Errorf("at a manager with an expired certificate: %v", err)
		}
	})
}

func TestLocalCallsAreThisNodes(t *testing.T) {
	inRig(t, func(r *rig) {
		guard := &Guard{Credentials: r.follower, Leading: func() bool { return true }, Removed: func(string) bool { return false }}
		l, err := NewLocal(guard)
		if err != nil {
			t.Fatal(err)
		}
		register(l.Server, r)
		ctx, cancel := context.WithCancel(r.Context())
		done := make(chan error, 1)
		go func() { done <- l.Serve(ctx) }()
		if _, err := api.NewDispatcherClient(l.Conn).Heartbeat(r.Context(), new(api.HeartbeatRequest)); err != nil {
			t.Fatal(err)
		}
		if r.seen.NodeID != "follower" || !r.seen.Is(pki.ManagerRole) || r.seen.Addr != "@" {
			t.Errorf("a local call is %+v's", r.seen)
		}
		// A manager that becomes the leader while it forwards a call forwards it to itself.
		passed := forwardContext(r.Context(), Identity{NodeID: "w", ClusterID: "swarm", OUs: []string{pki.WorkerRole}, Addr: "10.0.0.9:1"})
		if _, err := api.NewDispatcherClient(l.Conn).Heartbeat(passed, new(api.HeartbeatRequest)); err != nil {
			t.Fatal(err)
		}
		if r.seen.NodeID != "w" || r.seen.Is(pki.ManagerRole) {
			t.Errorf("a worker's call passed on to itself is %+v's", r.seen)
		}
		if _, err := api.NewControlClient(l.Conn).ListNodes(passed, new(api.ListNodesRequest)); status.Code(err) != codes.PermissionDenied {
			t.Errorf("a manager's method for a worker: %v", err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestErrorsKeepTheirKind(t *testing.T) {
	for kind := model.Internal; kind <= model.Unimplemented; kind++ {
		err := FromStatus(ToStatus(model.Errorf(kind, "text of %d", kind)))
		want := kind
		if kind == model.Conflict {
			want = model.Internal // both are Unknown on the wire, as with SwarmKit
		}
		if model.KindOf(err) != want || err.Error() != fmt.Sprintf("text of %d", kind) {
			t.Errorf("kind %d came back as %d, %v", kind, model.KindOf(err), err)
		}
	}
	for _, sentinel := range []error{model.ErrNoLeader, model.ErrSequence} {
		wrapped := fmt.Errorf("propose: %w", sentinel)
		if err := FromStatus(ToStatus(wrapped)); !errors.Is(err, sentinel) {
			t.Errorf("%v came back as %v", sentinel, err)
		}
		if code := status.Code(ToStatus(wrapped)); code != codes.Unknown {
			t.Errorf("%v travels as %s", sentinel, code)
		}
	}
	if ToStatus(nil) != nil || FromStatus(nil) != nil {
		t.Error("nil became an error")
	}
	if code := status.Code(ToStatus(fmt.Errorf("wait: %w", context.DeadlineExceeded))); code != codes.DeadlineExceeded {
		t.Errorf("a deadline travels as %s", code)
	}
}
