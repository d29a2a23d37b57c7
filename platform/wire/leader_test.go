package wire

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// TestLeaderOnly: a manager that believes in a leader which was restarted calls it all the
// same. That one has not applied what was acknowledged since, so it must not answer.
func TestLeaderOnly(t *testing.T) {
	found := map[string]int{}
	for name, m := range methods() {
		service := strings.Split(name, "/")[1]
		if m.leaderOnly {
			found[service]++
		}
	}
	for _, service := range []string{"docker.swarmkit.v1.Control", "docker.swarmkit.v1.Dispatcher", "docker.swarmkit.v1.Logs", "skep.v1.Insight"} {
		if found[service] == 0 {
			t.Errorf("%s is served by managers that do not lead", service)
		}
	}
	if found["docker.swarmkit.v1.Raft"] > 0 {
		t.Error("raft's own messages are forwarded to the leader")
	}
}

// plainManager is a server on loopback that counts the calls it executes.
type plainManager struct {
	api.UnimplementedCAServer

	conn     *grpc.ClientConn
	listen   net.Listener
	executed atomic.Int32
	// during runs in each call, before the answer.
	during func()
	answer error
}

// newPlainManager returns a manager that serves, or where nothing listens any more.
func newPlainManager(t *testing.T, alive bool) *plainManager {
	t.Helper()
	m := new(plainManager)
	var err error
	var config net.ListenConfig
	if m.listen, err = config.Listen(t.Context(), "tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	if m.conn, err = grpc.NewClient(m.listen.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.conn.Close() })
	if !alive {
		if err := m.listen.Close(); err != nil {
			t.Fatal(err)
		}
		return m
	}
	server := grpc.NewServer()
	api.RegisterCAServer(server, m)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(m.listen) }()
	t.Cleanup(func() {
		server.Stop()
		<-ended
	})
	return m
}

func (m *plainManager) GetRootCACertificate(context.Context, *api.GetRootCACertificateRequest) (*api.GetRootCACertificateResponse, error) {
	m.executed.Add(1)
	if m.during != nil {
		m.during()
	}
	return new(api.GetRootCACertificateResponse), m.answer
}

// route leads to each of some managers in turn, and stays with the last.
func route(leaders ...*plainManager) (r *Route, asked *int) {
	asked = new(int)
	return &Route{
		Leading: func() bool { return false },
		Leader: func(context.Context) (grpc.ClientConnInterface, error) {
			m := leaders[min(*asked, len(leaders)-1)]
			*asked++
			return m.conn, nil
		},
	}, asked
}

func callCA(ctx context.Context, r *Route) error {
	_, err := api.NewCAClient(r).GetRootCACertificate(ctx, new(api.GetRootCACertificateRequest))
	return err
}

// TestDeadLeader: the leader that just died is believed in until another is elected. Calls
// to it wait for that one instead of failing.
func TestDeadLeader(t *testing.T) {
	dead, next := newPlainManager(t, false), newPlainManager(t, true)
	r, asked := route(dead, dead, next)
	if err := callCA(t.Context(), r); err != nil || next.executed.Load() != 1 || *asked != 3 {
		t.Errorf("the call was executed %d times after %d questions for the leader: %v", next.executed.Load(), *asked, err)
	}
	r, _ = route(dead, next)
	stream, err := r.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true}, "/docker.swarmkit.v1.Watch/Watch")
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.RecvMsg(new(api.WatchMessage)); status.Code(err) != codes.Unimplemented {
		t.Errorf("the stream did not reach the next leader: %v", err)
	}
}

// TestDeposedLeader: a manager that no longer leads refuses what is forwarded to it,
// which is then made again where it belongs.
func TestDeposedLeader(t *testing.T) {
	old, next := newPlainManager(t, true), newPlainManager(t, true)
	old.answer = status.Error(codes.ResourceExhausted, redirected+"[10.0.0.9:9]")
	r, _ := route(old, next)
	if err := callCA(t.Context(), r); err != nil || next.executed.Load() != 1 {
		t.Errorf("the call was executed %d times: %v", next.executed.Load(), err)
	}
}

// TestNeverTwice: a call during which the leader died may have been executed, so it fails.
func TestNeverTwice(t *testing.T) {
	dying, next := newPlainManager(t, true), newPlainManager(t, true)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	held := make(chan struct{})
	dying.during = func() {
		close(held)
		<-ctx.Done()
	}
	broken := &breaking{}
	conn, err := grpc.NewClient(dying.listen.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(broken.dial))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go func() {
		<-held
		broken.cut()
	}()
	r, _ := route(&plainManager{conn: conn}, next)
	err = callCA(t.Context(), r)
	if status.Code(err) != codes.Unavailable || dying.executed.Load() != 1 || next.executed.Load() != 0 {
		t.Errorf("executed %d and %d times: %v", dying.executed.Load(), next.executed.Load(), err)
	}
}

// breaking is a dialer whose connection can be cut.
type breaking struct{ conn atomic.Pointer[net.Conn] }

func (b *breaking) dial(ctx context.Context, addr string) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", addr)
	if err == nil {
		b.conn.Store(&c)
	}
	return c, err
}

func (b *breaking) cut() { _ = (*b.conn.Load()).Close() }

// refusing is a connection to a manager that nobody reaches.
type refusing struct{ calls int }

func (r *refusing) Invoke(context.Context, string, any, any, ...grpc.CallOption) error {
	r.calls++
	return status.Error(codes.Unavailable, "connection refused")
}

func (r *refusing) NewStream(ctx context.Context, _ *grpc.StreamDesc, name string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, r.Invoke(ctx, name, nil, nil)
}

// TestNoNextLeader: the wait for another leader has an end, which is the caller's own if
// that is sooner, and other failures are not waited for.
func TestNoNextLeader(t *testing.T) {
	for name, c := range map[string]struct {
		patience time.Duration
		leader   error
		want     time.Duration
		code     codes.Code
	}{
		"nobody is reached":     {patience: time.Minute, want: LeaderWait, code: codes.Unavailable},
		"the caller gives up":   {patience: time.Second, want: time.Second, code: codes.Unavailable},
		"there is no leader":    {patience: time.Minute, leader: model.ErrNoLeader, code: codes.Unknown},
		"something else breaks": {patience: time.Minute, leader: errors.New("broken"), code: codes.Unknown},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				conn := new(refusing)
				r := &Route{Leading: func() bool { return false }, Leader: func(context.Context) (grpc.ClientConnInterface, error) { return conn, c.leader }}
				ctx, cancel := context.WithTimeout(t.Context(), c.patience)
				defer cancel()
				begin := time.Now()
				err := callCA(ctx, r)
				if took := time.Since(begin); took != c.want || status.Code(err) != c.code {
					t.Errorf("after %s, wanted %s: %v", took, c.want, err)
				}
				if want := int(c.want/leaderPoll) + 1; c.leader == nil && (conn.calls < want-1 || conn.calls > want) {
					t.Errorf("%d calls in %s", conn.calls, c.want)
				}
			})
		})
	}
}

// knowing is a service that remembers who called it.
type knowing struct {
	api.UnimplementedCAServer

	caller Identity
}

func (k *knowing) GetRootCACertificate(ctx context.Context, _ *api.GetRootCACertificateRequest) (*api.GetRootCACertificateResponse, error) {
	k.caller, _ = Caller(ctx)
	return new(api.GetRootCACertificateResponse), nil
}

// TestLeadsByNow: a call that waited until this very manager led is served here, for the
// caller and not in this node's own name.
func TestLeadsByNow(t *testing.T) {
	guard := testGuard()
	guard.Leading = func() bool { return false }
	guard.Leader = func(context.Context) (grpc.ClientConnInterface, error) { return nil, nil } //nolint:nilnil // led by now
	var config net.ListenConfig
	listen, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	service, server := new(knowing), grpc.NewServer(guard.ServerOptions()...)
	api.RegisterCAServer(server, service)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listen) }()
	defer func() {
		server.Stop()
		<-ended
	}()
	conn, err := grpc.NewClient(listen.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := api.NewCAClient(conn).GetRootCACertificate(t.Context(), new(api.GetRootCACertificateRequest)); err != nil {
		t.Fatal(err)
	}
	if !service.caller.Anonymous() || service.caller.Addr == "" {
		t.Errorf("a stranger was taken for %+v", service.caller)
	}
}
