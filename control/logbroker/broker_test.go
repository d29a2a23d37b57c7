package logbroker

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/store"
)

// rig is a broker behind gRPC, in a bubble, over a state with tasks.
type rig struct {
	*testing.T

	state *replica.Memory
	conn  *grpc.ClientConn
}

func inTerm(t *testing.T, test func(*rig), tasks ...*api.Task) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := &rig{T: t, state: replica.NewMemory(store.Empty())}
		for _, task := range tasks {
			r.put(task)
		}
		b := New(Config{State: r.state, Log: slog.New(slog.DiscardHandler), Caller: func(ctx context.Context) (string, string, error) {
			md, _ := metadata.FromIncomingContext(ctx)
			return strings.Join(md.Get("node"), ""), "", nil
		}})
		term, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- b.Run(term) }()
		server, listen := grpc.NewServer(), bufconn.Listen(1<<16)
		api.RegisterLogsServer(server, b)
		api.RegisterLogBrokerServer(server, b)
		go server.Serve(listen)
		conn, err := grpc.NewClient("passthrough:///broker", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listen.DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		r.conn = conn
		defer func() {
			_ = conn.Close()
			stop()
			if err := <-ended; err != nil {
				t.Error(err)
			}
			server.Stop()
		}()
		synctest.Wait()
		test(r)
	})
}

func task(id, service, node string) *api.Task {
	return &api.Task{Id: id, ServiceId: service, NodeId: node, Status: &api.TaskStatus{State: api.TaskState_RUNNING}, DesiredState: api.TaskState_RUNNING}
}

func (r *rig) put(t *api.Task) {
	r.Helper()
	if _, err := r.state.Update(r.Context(), func(tx *store.Tx) error { return tx.Create(t) }); err != nil {
		r.Fatal(err)
	}
}

// as is the context of a node's calls.
func (r *rig) as(node string) (context.Context, context.CancelFunc) {
	return context.WithCancel(metadata.AppendToOutgoingContext(r.Context(), "node", node))
}

// listen opens the stream of a node.
func (r *rig) listen(node string) (api.LogBroker_ListenSubscriptionsClient, context.CancelFunc) {
	r.Helper()
	ctx, cancel := r.as(node)
	stream, err := api.NewLogBrokerClient(r.conn).ListenSubscriptions(ctx, new(api.ListenSubscriptionsRequest))
	if err != nil {
		r.Fatal(err)
	}
	synctest.Wait()
	return stream, cancel
}

func (r *rig) subscribe(follow bool, sel *api.LogSelector) (api.Logs_SubscribeLogsClient, context.CancelFunc) {
	r.Helper()
	ctx, cancel := context.WithCancel(r.Context())
	stream, err := api.NewLogsClient(r.conn).SubscribeLogs(ctx, &api.SubscribeLogsRequest{Selector: sel, Options: &api.LogSubscriptionOptions{Follow: follow}})
	if err != nil {
		r.Fatal(err)
	}
	synctest.Wait()
	return stream, cancel
}

// hears returns the subscription that a node is told of next.
func (r *rig) hears(stream api.LogBroker_ListenSubscriptionsClient) *api.SubscriptionMessage {
	r.Helper()
	msg, err := stream.Recv()
	if err != nil {
		r.Fatal(err)
	}
	return msg
}

// publish sends one line of a node's and leaves the stream open.
func (r *rig) publish(node, sub, line string) (api.LogBroker_PublishLogsClient, context.CancelFunc) {
	r.Helper()
	ctx, cancel := r.as(node)
	stream, err := api.NewLogBrokerClient(r.conn).PublishLogs(ctx)
	if err != nil {
		r.Fatal(err)
	}
	if err := stream.Send(&api.PublishLogsMessage{SubscriptionId: sub, Messages: []*api.LogMessage{
		{Context: &api.LogContext{NodeId: node}, Data: []byte(line)},
	}}); err != nil {
		r.Fatal(err)
	}
	synctest.Wait()
	return stream, cancel
}

// rest reads what a client still gets.
func rest(stream api.Logs_SubscribeLogsClient) (string, error) {
	var lines []string
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return strings.Join(lines, " "), nil
		}
		if err != nil {
			return strings.Join(lines, " "), err
		}
		for _, m := range msg.GetMessages() {
			lines = append(lines, string(m.GetData()))
		}
	}
}

var (
	byService = &api.LogSelector{ServiceIds: []string{"s"}}
	byTask    = &api.LogSelector{TaskIds: []string{"t2"}}
)

func TestLogsEndWhenAllNodesHavePublished(t *testing.T) {
	for name, sel := range map[string]*api.LogSelector{"service": byService, "task": byTask} {
		t.Run(name, func(t *testing.T) {
			inTerm(t, func(r *rig) {
				one, stop1 := r.listen("n1")
				defer stop1()
				two, stop2 := r.listen("n2")
				defer stop2()
				client, cancel := r.subscribe(false, sel)
				defer cancel()
				want := "b"
				nodes := map[string]api.LogBroker_ListenSubscriptionsClient{"n2": two}
				if name == "service" {
					nodes["n1"], want = one, "b b"
				}
				for node, stream := range nodes {
					p, end := r.publish(node, r.hears(stream).GetId(), "b")
					defer end()
					if _, err := p.CloseAndRecv(); err != nil {
						t.Error(err)
					}
				}
				if got, err := rest(client); got != want || err != nil {
					t.Errorf("got %q, %v, want %q", got, err, want)
				}
			}, task("t1", "s", "n1"), task("t2", "s", "n2"))
		})
	}
}

func TestFollowHearsOfNewTasksAndCloses(t *testing.T) {
	inTerm(t, func(r *rig) {
		node, stop := r.listen("n9")
		defer stop()
		client, cancel := r.subscribe(true, byService)
		r.put(task("late", "s", "n9"))
		sub := r.hears(node)
		_, end := r.publish("n9", sub.GetId(), "hello")
		defer end()
		if msg, err := client.Recv(); err != nil || string(msg.GetMessages()[0].GetData()) != "hello" {
			t.Errorf("got %v, %v", msg, err)
		}
		cancel()
		if msg := r.hears(node); !msg.GetClose() || msg.GetId() != sub.GetId() {
			t.Errorf("the node heard %v, want the end of %s", msg, sub.GetId())
		}
	})
}

// incomplete checks the error of logs that are not whole.
func incomplete(t *testing.T, err error, reason string) {
	t.Helper()
	want := "warning: incomplete log stream. some logs could not be retrieved for the following reasons: " + reason
	if s := status.Convert(err); s.Code() != codes.Unknown || s.Message() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestNodesThatCannotBeAsked(t *testing.T) {
	inTerm(t, func(r *rig) {
		client, cancel := r.subscribe(false, byTask)
		defer cancel()
		_, err := rest(client)
		incomplete(t, err, "node n2 is not available")
		client, cancel = r.subscribe(false, &api.LogSelector{TaskIds: []string{"t3"}})
		defer cancel()
		_, err = rest(client)
		incomplete(t, err, "task t3 has not been scheduled")
	}, task("t2", "s", "n2"), task("t3", "s", ""))
}

func TestNodeGoesAwayBeforeItPublished(t *testing.T) {
	inTerm(t, func(r *rig) {
		node, stop := r.listen("n2")
		client, cancel := r.subscribe(false, byTask)
		defer cancel()
		r.hears(node)
		stop()
		_, err := rest(client)
		incomplete(t, err, "node n2 disconnected unexpectedly")
	}, task("t2", "s", "n2"))
}

// A node that came back before its old connection broke left its clients waiting.
func TestNodeComesBackBeforeItPublished(t *testing.T) {
	inTerm(t, func(r *rig) {
		_, stop := r.listen("n2")
		defer stop()
		client, cancel := r.subscribe(false, byTask)
		defer cancel()
		_, stop2 := r.listen("n2")
		defer stop2()
		_, err := rest(client)
		incomplete(t, err, "node n2 disconnected unexpectedly")
	}, task("t2", "s", "n2"))
}

// A publisher that broke off midway ended the client's logs as if they were whole.
func TestPublisherBreaksOff(t *testing.T) {
	inTerm(t, func(r *rig) {
		node, stop := r.listen("n2")
		defer stop()
		client, cancel := r.subscribe(false, byTask)
		defer cancel()
		_, breakOff := r.publish("n2", r.hears(node).GetId(), "half")
		breakOff()
		got, err := rest(client)
		incomplete(t, err, "node n2 disconnected unexpectedly")
		if got != "half" {
			t.Errorf("got %q, want what had come", got)
		}
	}, task("t2", "s", "n2"))
}

func TestForeignLinesAreRefused(t *testing.T) {
	inTerm(t, func(r *rig) {
		node, stop := r.listen("n2")
		defer stop()
		_, cancel := r.subscribe(true, byTask)
		defer cancel()
		ctx, end := r.as("n1")
		defer end()
		p, err := api.NewLogBrokerClient(r.conn).PublishLogs(ctx)
		if err != nil {
			t.Fatal(err)
		}
		_ = p.Send(&api.PublishLogsMessage{SubscriptionId: r.hears(node).GetId(), Messages: []*api.LogMessage{
			{Context: &api.LogContext{NodeId: "n2"}, Data: []byte("forged")},
		}}) // the answer tells
		if _, err := p.CloseAndRecv(); status.Code(err) != codes.PermissionDenied {
			t.Errorf("got %v", err)
		}
	}, task("t2", "s", "n2"))
}
