package replica

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	grpcpeer "google.golang.org/grpc/peer"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
	"github.com/skep-dev/skep/sim/memnet"
)

const (
	testTimeout = 60 * time.Second // of the bubble's time
	nodeHeader  = "test-node"
)

// testSwarm is a swarm in a bubble.
type testSwarm struct {
	t     testing.TB
	net   *memnet.Network
	base  string
	nodes []*testNode
	away  *testNode // is cut off from the others; may be nil
	// change edits the configuration of nodes started from now on.
	change func(*Config)
}

// testNode is one member. Without TLS, a caller says who it is in a header.
type testNode struct {
	id, dir, addr string
	health        Health
	cancel        context.CancelFunc
	done          chan struct{}
	err           error // of Run, after done

	*Replica
}

// inBubble runs a test on a swarm of n members, the first of which leads.
func inBubble(t *testing.T, n int, test func(*testing.T, *testSwarm)) {
	t.Helper()
	base := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := &testSwarm{t: t, base: base, net: memnet.New(rand.New(rand.NewPCG(1, 2)))}
		defer func() {
			for _, node := range s.nodes {
				node.stop()
			}
		}()
		for range n {
			s.add()
		}
		test(t, s)
	})
}

// add starts another member and waits until it is one.
func (s *testSwarm) add() *testNode {
	s.t.Helper()
	i := len(s.nodes) + 1
	addr := fmt.Sprintf("10.0.0.%d:2377", i)
	join := ""
	if i > 1 {
		join = s.leader().addr
	}
	n := s.start(fmt.Sprintf("node%d", i), filepath.Join(s.base, fmt.Sprint(i)), addr, join)
	s.nodes = append(s.nodes, n)
	waitFor(s.t, "joined", func() bool {
		mustRun(s.t, n)
		return isReady(n) && n.Votes()
	})
	waitFor(s.t, "reached by the leader", func() bool {
		leader := s.leader()
		return leader == n || leader.peers.active(n.members.Load().self)
	})
	return n
}

func mustRun(t testing.TB, n *testNode) {
	t.Helper()
	select {
	case <-n.done:
		t.Fatalf("%s ended: %v", n.id, n.err)
	default:
	}
}

func (s *testSwarm) start(id, dir, addr, join string) *testNode {
	n := &testNode{id: id, dir: dir, addr: addr, done: make(chan struct{})}
	cfg := Config{
		NodeID: id, Addr: addr, Dir: dir, JoinAddr: join, Keys: testKey(), Caller: testCaller,
		Log:  testLog().With(slog.String("node", id)),
		Dial: s.dialFrom(addr, id),
	}
	if s.change != nil {
		s.change(&cfg)
	}
	n.Replica = New(cfg)
	server := grpc.NewServer()
	n.health.Set(HealthRaft, true)
	n.register(server)
	api.RegisterHealthServer(server, &n.health)
	ctx, cancel := context.WithCancel(context.Background())
	n.cancel = cancel
	lis, err := s.net.Host(hostOf(addr)).Listen(ctx, addr)
	if err != nil {
		s.t.Fatal(err)
	}
	var serve sync.WaitGroup
	serve.Go(func() { _ = server.Serve(lis) })
	go func() {
		defer close(n.done)
		n.err = n.Run(ctx)
		server.Stop()
		serve.Wait()
	}()
	return n
}

func (n *testNode) register(s *grpc.Server) {
	api.RegisterRaftServer(s, n.RaftServer())
	api.RegisterRaftMembershipServer(s, n.MembershipServer())
}

func (n *testNode) stop() {
	n.cancel()
	<-n.done
}

// ended reports whether Run has returned with an error.
func (n *testNode) ended(with error) bool {
	select {
	case <-n.done:
		return errors.Is(n.err, with)
	default:
		return false
	}
}

// restart starts a stopped node again.
func (s *testSwarm) restart(n *testNode) *testNode {
	s.t.Helper()
	again := s.start(n.id, n.dir, n.addr, "")
	for i := range s.nodes {
		if s.nodes[i] == n {
			s.nodes[i] = again
		}
	}
	return again
}

func hostOf(addr string) string {
	host, _, _ := net.SplitHostPort(addr)
	return host
}

// cut keeps everything from and to a node, without anybody noticing.
func (s *testSwarm) cut(n *testNode) {
	s.away = n
	for _, other := range s.nodes {
		s.net.Cut(hostOf(n.addr), hostOf(other.addr))
		s.net.Cut(hostOf(other.addr), hostOf(n.addr))
	}
}

func (s *testSwarm) heal() {
	s.away = nil
	s.net.Heal()
}

func (s *testSwarm) dialFrom(from, id string) func(context.Context, string) (*grpc.ClientConn, error) {
	return func(_ context.Context, to string) (*grpc.ClientConn, error) {
		return dialAs(id, to, grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return s.net.Host(hostOf(from)).Dial(ctx, to)
		}))
	}
}

// leader waits for a leader among the members that are connected.
func (s *testSwarm) leader() *testNode {
	s.t.Helper()
	var leader *testNode
	waitFor(s.t, "there is a leader", func() bool {
		for _, n := range s.nodes {
			if leading, _ := n.Leading(); leading && n != s.away {
				leader = n
				return true
			}
		}
		return false
	})
	return leader
}

func (s *testSwarm) followers() []*testNode {
	leader := s.leader()
	var out []*testNode
	for _, n := range s.nodes {
		if n != leader {
			out = append(out, n)
		}
	}
	return out
}

// write creates records through the leader.
func (s *testSwarm) write(ids ...string) {
	s.t.Helper()
	for _, id := range ids {
		mustCreate(s.t, s.leader(), id)
	}
}

func (s *testSwarm) mustHave(n *testNode, ids ...string) {
	s.t.Helper()
	for _, id := range ids {
		waitFor(s.t, n.id+" has "+id, func() bool { mustRun(s.t, n); return n.View().Config(id) != nil })
	}
}

// configure sets how often snapshots are taken.
func (s *testSwarm) configure(raft *api.RaftConfig) {
	s.t.Helper()
	_, err := s.leader().Update(s.t.Context(), func(tx *store.Tx) error {
		return tx.Create(&api.Cluster{Id: "cluster", Spec: &api.ClusterSpec{
			Annotations: &api.Annotations{Name: "default"}, Raft: raft,
		}})
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

func names(prefix string, n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf("%s%03d", prefix, i)
	}
	return out
}

func testLog() *slog.Logger {
	if os.Getenv("REPLICA_TEST_LOG") == "" {
		return slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func testKey() StaticKey { return StaticKey(strings.Repeat("k", 32)) }

func dialAs(nodeID, addr string, opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	identify := func(ctx context.Context, method string, req, reply any,
		cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption,
	) error {
		return invoke(metadata.AppendToOutgoingContext(ctx, nodeHeader, nodeID), method, req, reply, cc, opts...)
	}
	identifyStream := func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string,
		open grpc.Streamer, opts ...grpc.CallOption,
	) (grpc.ClientStream, error) {
		return open(metadata.AppendToOutgoingContext(ctx, nodeHeader, nodeID), desc, cc, method, opts...)
	}
	return grpc.NewClient("passthrough:///"+addr, append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithUnaryInterceptor(identify), grpc.WithStreamInterceptor(identifyStream))...)
}

func testCaller(ctx context.Context) (nodeID, addr string, err error) {
	md, _ := metadata.FromIncomingContext(ctx)
	if ids := md.Get(nodeHeader); len(ids) > 0 {
		nodeID = ids[0]
	}
	if p, ok := grpcpeer.FromContext(ctx); ok {
		addr = p.Addr.String()
	}
	return nodeID, addr, nil
}

func isReady(n *testNode) bool {
	select {
	case <-n.Ready():
		return true
	default:
		return false
	}
}

// waitFor polls a condition that no channel tells about.
func waitFor(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(testTimeout); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("timed out waiting until %s", what)
		}
	}
}

func createConfig(tx *store.Tx, id, text string) error {
	return tx.Create(&api.Config{Id: id, Spec: &api.ConfigSpec{
		Annotations: &api.Annotations{Name: id}, Data: []byte(text),
	}})
}

func mustCreate(t testing.TB, n *testNode, id string) {
	t.Helper()
	s, err := n.Update(t.Context(), func(tx *store.Tx) error { return createConfig(tx, id, "text of "+id) })
	if err != nil {
		t.Fatalf("create %s: %v", id, err)
	}
	if s.Config(id) == nil {
		t.Fatalf("the answer to create %s does not have it", id)
	}
}

func wantKind(t testing.TB, err error, kind model.Kind) {
	t.Helper()
	if err == nil || model.KindOf(err) != kind {
		t.Errorf("got error %v of kind %d, want kind %d", err, model.KindOf(err), kind)
	}
}
