package replica

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	grpcpeer "google.golang.org/grpc/peer"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/store"
)

const (
	testTick    = 10 * time.Millisecond
	testTimeout = 30 * time.Second
	nodeHeader  = "test-node"
)

// testNode is one member of a test swarm on loopback, without TLS: the caller says who
// it is in a header.
type testNode struct {
	t      testing.TB
	dir    string
	id     string
	addr   string
	server *grpc.Server
	health Health
	cancel context.CancelFunc
	done   chan struct{}
	err    error // of Run, after done

	*Replica
}

func testLog(t testing.TB) *slog.Logger {
	t.Helper()
	if os.Getenv("REPLICA_TEST_LOG") == "" {
		return slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func testKey() StaticKey { return StaticKey(strings.Repeat("k", 32)) }

func dialAs(nodeID string) func(context.Context, string) (*grpc.ClientConn, error) {
	return func(_ context.Context, addr string) (*grpc.ClientConn, error) {
		identify := func(ctx context.Context) context.Context {
			return metadata.AppendToOutgoingContext(ctx, nodeHeader, nodeID)
		}
		return grpc.NewClient("passthrough:///"+addr,
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any,
				cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption,
			) error {
				return invoke(identify(ctx), method, req, reply, cc, opts...)
			}))
	}
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

// startNode runs a member whose files are in dir. addr may be empty to take a free port.
func startNode(t testing.TB, id, dir, addr string, change func(*Config)) *testNode {
	t.Helper()
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	var lc net.ListenConfig
	lis, err := lc.Listen(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	n := &testNode{t: t, dir: dir, id: id, addr: lis.Addr().String(), server: grpc.NewServer(), done: make(chan struct{})}
	cfg := Config{
		NodeID: id, Addr: n.addr, Dir: dir, Keys: testKey(), Dial: dialAs(id), Caller: testCaller,
		Log: testLog(t).With(slog.String("node", id)), TickInterval: testTick,
	}
	if change != nil {
		change(&cfg)
	}
	n.Replica = New(cfg)
	api.RegisterRaftServer(n.server, n.RaftServer())
	api.RegisterRaftMembershipServer(n.server, n.MembershipServer())
	n.health.Set(HealthRaft, true)
	api.RegisterHealthServer(n.server, &n.health)
	ctx, cancel := context.WithCancel(context.Background())
	n.cancel = cancel
	var serve sync.WaitGroup
	serve.Go(func() { _ = n.server.Serve(lis) })
	go func() {
		defer close(n.done)
		n.err = n.Run(ctx)
		n.server.Stop()
		serve.Wait()
	}()
	t.Cleanup(n.stop)
	return n
}

func (n *testNode) stop() {
	n.cancel()
	<-n.done
}

// startSwarm runs n members, the first of which began the swarm.
func startSwarm(t testing.TB, n int, change func(*Config)) []*testNode {
	t.Helper()
	base := t.TempDir()
	nodes := []*testNode{startNode(t, "node1", filepath.Join(base, "1"), "", change)}
	waitLeader(t, nodes...)
	for i := 2; i <= n; i++ {
		nodes = append(nodes, startNode(t, fmt.Sprintf("node%d", i), filepath.Join(base, fmt.Sprint(i)), "", func(c *Config) {
			c.JoinAddr = nodes[0].addr
			if change != nil {
				change(c)
			}
		}))
		waitFor(t, "joined", func() bool { return len(nodes[i-1].Members()) == i && isReady(nodes[i-1]) })
	}
	return nodes
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
	for deadline := time.Now().Add(testTimeout); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("timed out waiting until %s", what)
		}
	}
}

func waitLeader(t testing.TB, nodes ...*testNode) *testNode {
	t.Helper()
	var leader *testNode
	waitFor(t, "there is a leader", func() bool {
		for _, n := range nodes {
			if leading, _ := n.Leading(); leading {
				leader = n
				return true
			}
		}
		return false
	})
	return leader
}

func createConfig(tx *store.Tx, id, text string) error {
	return tx.Create(&api.Config{Id: id, Spec: &api.ConfigSpec{
		Annotations: &api.Annotations{Name: id}, Data: []byte(text),
	}})
}

func mustCreate(t testing.TB, n *testNode, id string) *store.Snapshot {
	t.Helper()
	s, err := n.Update(t.Context(), func(tx *store.Tx) error { return createConfig(tx, id, "text of "+id) })
	if err != nil {
		t.Fatalf("create %s: %v", id, err)
	}
	if s.Config(id) == nil {
		t.Fatalf("the answer to create %s does not have it", id)
	}
	return s
}
