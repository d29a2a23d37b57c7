package dockerapi_test

import (
	"context"
	"crypto/rand"
	"io"
	"log/slog"
	"net"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/control/ops"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
	"github.com/skep-dev/skep/edge/dockerapi"
	"github.com/skep-dev/skep/edge/dockerapi/convert"
)

const (
	clusterID = "clusterclusterclusterclus"
	managerID = "manager1manager1manager1m"
	workerID  = "worker1worker1worker1work"
)

// daemon is a whole swarm in one process: ops on a Memory behind gRPC, and an
// orchestrator of the simplest kind that runs every task at once.
type daemon struct {
	state     *replica.Memory
	control   api.ControlClient
	insight   skepv1.InsightClient
	limited   skepv1.TokensClient
	unlocking skepv1.UnlockClient
	secrets   skepv1.SecretsClient
	logs      api.LogsClient

	mu    sync.Mutex
	info  swarm.Info // guarded by mu
	ready bool       // guarded by mu: this node is a manager
}

func (d *daemon) Facts() dockerapi.Facts {
	return dockerapi.Facts{
		ID: "d4e1c0de-0000-4000-8000-000000000001", Name: "m1", RootDir: "/var/lib/skep", Version: "0.1.0-test",
		Commit: "0000000", BuildTime: "2026-01-01T00:00:00Z",
	}
}

func (d *daemon) Status() swarm.Info {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.info
}

func (d *daemon) Init(ctx context.Context, req swarm.InitRequest) (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ready {
		return "", model.Errorf(model.Unavailable, `This node is already part of a swarm. Use "docker swarm leave" to leave this swarm and join another one.`)
	}
	spec, err := convert.InitClusterSpec(req.Spec)
	if err != nil {
		return "", err
	}
	availability, err := convert.StoreAvailability(req.Availability)
	if err != nil {
		return "", err
	}
	_, err = d.state.Update(ctx, func(tx *store.Tx) error {
		for _, o := range []model.Object{
			&api.Cluster{Id: clusterID, Spec: spec, RootCa: &api.RootCA{JoinTokens: &api.JoinTokens{
				Worker:  "SWMTKN-1-00000000000000000000000000000000000000000000000001-0000000000000000000000001",
				Manager: "SWMTKN-1-00000000000000000000000000000000000000000000000001-0000000000000000000000002",
			}}},
			node(managerID, "m1", api.NodeRole_MANAGER, availability),
			node(workerID, "w1", api.NodeRole_WORKER, api.NodeSpec_ACTIVE),
			&api.Network{Id: "hosthosthosthosthosthosth", Spec: &api.NetworkSpec{
				Annotations:  &api.Annotations{Name: "host", Labels: map[string]string{"com.docker.swarm.predefined": "true"}},
				DriverConfig: &api.Driver{Name: "host"},
			}},
			&api.Network{Id: "ingressingressingressingr", Spec: &api.NetworkSpec{Annotations: &api.Annotations{Name: "ingress"}, Ingress: true}},
		} {
			if err := tx.Create(o); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	d.ready = true
	d.info = swarm.Info{
		NodeID: managerID, NodeAddr: "192.0.2.1", LocalNodeState: swarm.LocalNodeStateActive, ControlAvailable: true,
		RemoteManagers: []swarm.Peer{{NodeID: managerID, Addr: "192.0.2.1:2377"}},
	}
	return managerID, nil
}

func node(id, hostname string, role api.NodeRole, availability api.NodeSpec_Availability) *api.Node {
	return &api.Node{
		Id:   id,
		Spec: &api.NodeSpec{DesiredRole: role, Membership: api.NodeSpec_ACCEPTED, Availability: availability},
		Description: &api.NodeDescription{
			Hostname: hostname, Platform: &api.Platform{Architecture: "x86_64", Os: "linux"},
			Resources: &api.Resources{NanoCpus: 2e9, MemoryBytes: 4 << 30},
			Engine: &api.EngineDescription{EngineVersion: "0.1.0-test", Plugins: []*api.PluginDescription{
				{Type: "Volume", Name: "local"}, {Type: "Network", Name: "bridge"},
			}},
		},
		Status: &api.NodeStatus{State: api.NodeStatus_READY, Addr: "192.0.2.1"},
		Role:   role,
	}
}

func (d *daemon) Join(context.Context, swarm.JoinRequest) error {
	return model.Errorf(model.Invalid, "at least 1 RemoteAddr is required to join")
}

func (d *daemon) Leave(_ context.Context, force bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.ready {
		return model.Errorf(model.Unavailable, "This node is not part of a swarm")
	}
	if !force {
		return model.Errorf(model.Unavailable, "You are attempting to leave the swarm on a node that is participating as a manager. Removing the last manager erases all current state of the swarm. Use `--force` to ignore this message. ")
	}
	d.ready, d.info = false, swarm.Info{LocalNodeState: swarm.LocalNodeStateInactive}
	return nil
}

func (d *daemon) Unlock(context.Context, swarm.UnlockRequest) error {
	return model.Errorf(model.Conflict, "swarm is not locked")
}

// unlockKey is what a locked swarm shows, whatever its key is.
const unlockKey = "SWMKEY-1-AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"

func (d *daemon) UnlockKey(context.Context) (string, error) {
	if !d.state.View().Cluster().GetSpec().GetEncryptionConfig().GetAutoLockManagers() {
		return "", nil
	}
	return unlockKey, nil
}

func (d *daemon) check() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.ready {
		return dockerapi.NotManager(swarm.LocalNodeStateInactive, true, "")
	}
	return nil
}

func (d *daemon) Control() (api.ControlClient, error)     { return d.control, d.check() }
func (d *daemon) Logs() (api.LogsClient, error)           { return d.logs, d.check() }
func (d *daemon) Secrets() (skepv1.SecretsClient, error)  { return d.secrets, d.check() }
func (d *daemon) Insight() (skepv1.InsightClient, error)  { return d.insight, d.check() }
func (d *daemon) Tokens() (skepv1.TokensClient, error)    { return d.limited, d.check() }
func (d *daemon) Unlocking() (skepv1.UnlockClient, error) { return d.unlocking, d.check() }
func (d *daemon) Networks() (skepv1.NetworksClient, error) {
	return nil, dockerapi.NotManager(swarm.LocalNodeStateActive, false, "")
}
func (d *daemon) Follow() (*replica.Cursor, error) { return d.state.Follow(), d.check() }
func (d *daemon) Members() []*api.RaftMember {
	return []*api.RaftMember{{
		RaftId: 1, NodeId: managerID, Addr: "192.0.2.1:2377",
		Status: &api.RaftMemberStatus{Leader: true, Reachability: api.RaftMemberStatus_REACHABLE},
	}}
}
func (d *daemon) Voters() []*api.RaftMember { return d.Members() }

// counter makes ids that are the same in every run.
type counter struct{ n byte }

// Read fills b with zeros around a number.
func (c *counter) Read(b []byte) (int, error) {
	clear(b)
	c.n++
	b[1] = c.n // the top of an id, which keeps its last digits too
	return len(b), nil
}

// newDaemon returns a daemon outside any swarm whose parts end with the test. Its
// tasks are made at once; without orchestrator there are none.
func newDaemon(t *testing.T, orchestrated bool) *daemon {
	t.Helper()
	d := &daemon{state: replica.NewMemory(store.Empty()), info: swarm.Info{LocalNodeState: swarm.LocalNodeStateInactive}}
	server := grpc.NewServer()
	api.RegisterControlServer(server, ops.New(ops.Config{State: d.state, Membership: d, Random: new(counter)}))
	skepv1.RegisterSecretsServer(server, ops.NewSecrets(d.state, rand.Reader))
	skepv1.RegisterInsightServer(server, ops.NewInsight(d.state, d, nil))
	skepv1.RegisterTokensServer(server, ops.NewTokens(d.state))
	skepv1.RegisterUnlockServer(server, skepv1.UnimplementedUnlockServer{})
	api.RegisterLogsServer(server, &logServer{state: d.state})
	listener := bufconn.Listen(1 << 20)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = server.Serve(listener) })
	if orchestrated {
		wg.Go(func() { d.orchestrate(ctx) })
	}
	conn, err := grpc.NewClient("passthrough:bufconn", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return listener.Dial() }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		server.Stop()
		cancel()
		wg.Wait()
	})
	d.secrets = skepv1.NewSecretsClient(conn)
	d.control, d.logs, d.insight = api.NewControlClient(conn), api.NewLogsClient(conn), skepv1.NewInsightClient(conn)
	d.limited, d.unlocking = skepv1.NewTokensClient(conn), skepv1.NewUnlockClient(conn)
	return d
}

// serve returns a test server with the whole API of a daemon.
func serve(t *testing.T, d *daemon) *httptest.Server {
	t.Helper()
	a := dockerapi.New(dockerapi.Config{Daemon: d, Swarm: d, Manager: d, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	server := httptest.NewServer(a.Handler())
	t.Cleanup(server.Close)
	return server
}

// orchestrate makes the tasks of each service run on the worker, and stops old ones.
func (d *daemon) orchestrate(ctx context.Context) {
	cursor := d.state.Follow()
	for {
		if _, _, err := cursor.Next(ctx); err != nil {
			return
		}
		_, _ = d.state.Update(ctx, reconcile)
	}
}

func reconcile(tx *store.Tx) error {
	for _, task := range slices.Collect(tx.Snapshot().Tasks()) {
		if tx.Snapshot().Service(task.GetServiceId()) == nil {
			if err := tx.Remove(model.Tasks, task.GetId()); err != nil {
				return err
			}
		}
	}
	for _, service := range slices.Collect(tx.Snapshot().Services()) {
		if err := reconcileService(tx, service); err != nil {
			return err
		}
	}
	return nil
}

func reconcileService(tx *store.Tx, service *api.Service) error {
	wanted := service.GetSpec().GetReplicated().GetReplicas()
	have := make(map[uint64]bool)
	for _, task := range slices.Collect(tx.Snapshot().TasksByService(service.GetId())) {
		if task.GetDesiredState() != api.TaskState_RUNNING {
			continue
		}
		if task.GetSpecVersion().GetIndex() == service.GetSpecVersion().GetIndex() && task.GetSlot() <= wanted {
			have[task.GetSlot()] = true
			continue
		}
		old := model.Clone(task)
		old.DesiredState, old.Status.State = api.TaskState_SHUTDOWN, api.TaskState_SHUTDOWN
		if err := tx.Update(old); err != nil {
			return err
		}
	}
	for slot := uint64(1); slot <= wanted; slot++ {
		if have[slot] {
			continue
		}
		id, err := model.NewID(rand.Reader)
		if err != nil {
			return err
		}
		err = tx.Create(&api.Task{
			Id: id, Spec: service.GetSpec().GetTask(), SpecVersion: service.GetSpecVersion(), ServiceId: service.GetId(),
			Slot: slot, NodeId: workerID, ServiceAnnotations: service.GetSpec().GetAnnotations(),
			DesiredState: api.TaskState_RUNNING,
			Status: &api.TaskStatus{
				Timestamp: timestamppb.New(tx.Now()), State: api.TaskState_RUNNING, Message: "started",
				RuntimeStatus: &api.TaskStatus_Container{Container: &api.ContainerStatus{ContainerId: "c0ffee", Pid: 42}},
			},
		})
		if err != nil {
			return err
		}
	}
	return settle(tx, service)
}

// settle does what the allocator and the updater would at the end.
func settle(tx *store.Tx, service *api.Service) error {
	rollingBack := service.GetUpdateStatus().GetState() == api.UpdateStatus_ROLLBACK_STARTED
	if service.GetEndpoint() != nil && !rollingBack {
		return nil
	}
	updated := model.Clone(service)
	if e := service.GetSpec().GetEndpoint(); len(e.GetPorts()) > 0 {
		updated.Endpoint = &api.Endpoint{Spec: e, Ports: e.GetPorts()}
	} else {
		updated.Endpoint = new(api.Endpoint)
	}
	if rollingBack {
		updated.UpdateStatus.State = api.UpdateStatus_ROLLBACK_COMPLETED
	}
	return tx.Update(updated)
}

// logServer answers every subscription with two lines.
type logServer struct {
	api.UnimplementedLogsServer

	state *replica.Memory
}

func (l *logServer) SubscribeLogs(req *api.SubscribeLogsRequest, stream grpc.ServerStreamingServer[api.SubscribeLogsMessage]) error {
	logContext := &api.LogContext{ServiceId: req.GetSelector().GetServiceIds()[0], NodeId: workerID}
	for task := range l.state.View().TasksByService(logContext.GetServiceId()) {
		logContext.TaskId = task.GetId()
	}
	at := timestamppb.New(time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC))
	return stream.Send(&api.SubscribeLogsMessage{Messages: []*api.LogMessage{
		{Context: logContext, Timestamp: at, Stream: api.LogStream_LOG_STREAM_STDOUT, Data: []byte("hello\n")},
		{Context: logContext, Timestamp: at, Stream: api.LogStream_LOG_STREAM_STDERR, Data: []byte("oops\n"), Attrs: []*api.LogAttr{{Key: "a b", Value: "c,d"}}},
	}})
}
