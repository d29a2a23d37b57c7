package node

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/control/ca"
	"github.com/skep-dev/skep/control/dispatcher"
	"github.com/skep-dev/skep/control/logbroker"
	"github.com/skep-dev/skep/control/manager"
	"github.com/skep-dev/skep/control/ops"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
	"github.com/skep-dev/skep/platform/audit"
	"github.com/skep-dev/skep/platform/cfssl"
	"github.com/skep-dev/skep/platform/keystore"
	"github.com/skep-dev/skep/platform/plugin"
	"github.com/skep-dev/skep/platform/wire"
)

// managerRole is the manager part of a node.
type managerRole struct {
	log     *slog.Logger
	creds   *wire.Credentials
	replica *replica.Replica
	listen  net.Listener
	server  *grpc.Server
	local   *wire.Local
	lead    []func(context.Context) error
	health  *replica.Health
	keys    *keystore.Store
	// renew asks for a certificate with a new private key.
	renew func(role string)
	// credential is the file of what this manager is unlocked for by the others.
	credential string
	// registry holds the metrics of this role.
	registry *prometheus.Registry

	// peers are those that are connected.
	peers wire.Conns

	mu    sync.Mutex
	conns map[string]*grpc.ClientConn // to leaders, by address
}

// newManagerRole binds the swarm port and puts the services together.
func (m *member) newManagerRole(ctx context.Context) (*managerRole, error) {
	log := m.cfg.Log
	listen, err := wire.Listen(ctx, m.cfg.Network, m.saved.ListenAddr)
	if err != nil {
		return nil, model.Wrap(model.Internal, err, "failed to listen on remote API address")
	}
	role := &managerRole{
		log: log, creds: m.creds, listen: listen, health: new(replica.Health), keys: m.keys, renew: m.renewer.Force,
		credential: credentialFile(m.dir),
		registry:   prometheus.NewRegistry(), conns: map[string]*grpc.ClientConn{},
	}
	joinAddr := ""
	if !m.hasRaft() && m.founding == nil {
		k, ok := m.remotes.pick(m.saved.AdvertiseAddr)
		if !ok {
			_ = listen.Close()
			return nil, model.Errorf(model.Unavailable, "no manager of the swarm is known to join it")
		}
		joinAddr = k.Addr
	}
	role.replica = replica.New(replica.Config{
		NodeID: m.creds.NodeID(), Addr: m.saved.AdvertiseAddr, Dir: m.raftDir(), Keys: m.keys,
		Dial: func(_ context.Context, addr string) (*grpc.ClientConn, error) {
			return wire.Dial(m.creds, addr, pki.ManagerRole)
		},
		Caller: wire.CallerNode, CallerCertificate: wire.CallerCertificate, Log: log, Registerer: role.registry, JoinAddr: joinAddr, ForceNewCluster: m.forceNew,
	})
	guard := &wire.Guard{
		Credentials: m.creds, Removed: role.removed, Role: role.roleOf, Conns: &role.peers, Leading: role.leading, Leader: role.leader,
		Refused: m.recordRefusal,
	}
	role.server = wire.NewServer(guard)
	if role.local, err = wire.NewLocal(guard); err != nil {
		_ = listen.Close()
		return nil, err
	}
	role.register(m)
	return role, nil
}

// register makes the services and adds them to both servers.
func (r *managerRole) register(m *member) {
	registerer := r.registry
	var plugins plugin.Finder
	external := &cfssl.Client{Credentials: m.creds}
	authority := ca.New(ca.Config{State: r.replica, Members: r.replica.Members, External: external, Log: r.log})
	dispatch := dispatcher.New(dispatcher.Config{
		State: r.replica, Members: r.replica.Members, NodeID: m.creds.NodeID(), Caller: wire.CallerNode, Secret: plugins.Secret,
		Log: r.log, Registerer: registerer,
	})
	broker := logbroker.New(logbroker.Config{State: r.replica, Caller: wire.CallerNode, Log: r.log})
	control := ops.New(ops.Config{
		State: r.replica, Membership: r.replica, External: external, SecretDriver: plugins.CheckSecretDriver,
	})
	insight := ops.NewInsight(r.replica, r.replica, func(s *store.Snapshot) func(*api.Task) []*skepv1.Refusal {
		return func(t *api.Task) []*skepv1.Refusal { return manager.Refuse(s, t, time.Now()) }
	})
	secrets := ops.NewSecrets(r.replica, rand.Reader)
	watcher, tokens := ops.NewWatcher(r.replica), ops.NewTokens(r.replica)
	peers := ca.NewPeers(ca.PeersConfig{State: r.replica, Members: r.replica.Members, Asked: m.recordAsked, Log: r.log})
	leader := manager.New(manager.Config{
		State: r.replica, Membership: r.replica, NodeID: m.creds.NodeID(), Bootstrap: m.founding, Log: r.log, Registerer: registerer,
		KeysTaken: dispatch.KeysTaken,
	})
	for _, s := range []*grpc.Server{r.server, r.local.Server} {
		api.RegisterRaftServer(s, r.replica.RaftServer())
		api.RegisterRaftMembershipServer(s, r.replica.MembershipServer())
		api.RegisterHealthServer(s, r.health)
		api.RegisterCAServer(s, authority)
		api.RegisterNodeCAServer(s, authority)
		api.RegisterDispatcherServer(s, dispatch)
		api.RegisterResourceAllocatorServer(s, dispatch)
		skepv1.RegisterNetworksServer(s, dispatch.Networks())
		api.RegisterLogBrokerServer(s, broker)
		api.RegisterLogsServer(s, broker)
		api.RegisterControlServer(s, control)
		api.RegisterWatchServer(s, watcher)
		skepv1.RegisterInsightServer(s, insight)
		skepv1.RegisterTokensServer(s, tokens)
		skepv1.RegisterEnrollmentServer(s, authority)
		skepv1.RegisterSecretsServer(s, secrets)
		skepv1.RegisterUnlockServer(s, peers)
	}
	r.lead = []func(context.Context) error{leader.RunTerm, dispatch.Run, authority.Run, broker.Run}
}

// run serves until ctx ends, this manager is removed, or something fails.
func (r *managerRole) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	r.health.Set(replica.HealthRaft, true)
	group.Go(func() error {
		stop := context.AfterFunc(ctx, r.server.Stop)
		defer stop()
		err := r.server.Serve(r.listen)
		if ctx.Err() != nil {
			return nil
		}
		return err
	})
	group.Go(func() error { return r.local.Serve(ctx) })
	group.Go(func() error {
		r.dropVoid(ctx)
		return nil
	})
	group.Go(func() error {
		err := r.replica.Run(ctx)
		if err == nil && ctx.Err() == nil {
			err = errors.New("raft ended")
		}
		return err
	})
	group.Go(func() error { return r.followLock(ctx) })
	group.Go(func() error {
		r.followPeers(ctx)
		return nil
	})
	group.Go(func() error {
		err := r.replica.RunTerms(ctx, r.runTerm)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // asked to stop
		}
		return err
	})
	err := group.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.conns {
		_ = c.Close()
	}
	return err
}

// followLock keeps this manager's key file sealed as the swarm wants it.
func (r *managerRole) followLock(ctx context.Context) error {
	select {
	case <-r.replica.Ready():
	case <-ctx.Done():
		return nil
	}
	var seen *api.Cluster
	for at := r.replica.Follow(); ; {
		if c := at.Snapshot().Cluster(); c != nil && c != seen {
			seen = c
			was := r.keys.Locks()
			locked, err := r.keys.Follow(pki.ManagersKEK(c), c.GetMeta().GetVersion().GetIndex())
			if err != nil {
				r.log.Error("key file not sealed as the swarm wants it", slog.Any("error", err))
			} else if now := r.keys.Locks(); now != was {
				r.log.Info("locking of this manager changed", slog.Bool("autolock", now))
			}
			if locked {
				r.renew(pki.ManagerRole) // the private key lay readable on the disk
			}
		}
		if _, _, err := at.Next(ctx); err != nil {
			return nil //nolint:nilerr // asked to stop
		}
	}
}

// leadPause is how long a leader waits that could not write for the moment.
const leadPause = 200 * time.Millisecond

// runTerm does a leader's work for one term. What fails because raft takes no writes, as
// while leadership is being handed over, begins again if this manager still leads then.
func (r *managerRole) runTerm(ctx context.Context) error {
	r.log.Info("this manager leads", slog.String("node_id", r.creds.NodeID()))
	for {
		group, work := errgroup.WithContext(ctx)
		for _, f := range r.lead {
			group.Go(func() error { return f(work) })
		}
		err := group.Wait()
		if ctx.Err() != nil || model.KindOf(err) != model.Unavailable {
			return err
		}
		r.log.Warn("the leader could not write, beginning again", slog.Any("error", err))
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(leadPause):
		}
	}
}

// recordRefusal records a call of the swarm's port that its caller had no right to make.
func (m *member) recordRefusal(caller wire.Identity, method string, err error) {
	if m.cfg.audit == nil {
		return
	}
	who := "anonymous"
	if caller.NodeID != "" {
		who = fmt.Sprintf("node %s of %s (%s)", caller.NodeID, caller.ClusterID, strings.Join(caller.OUs, ", "))
	}
	m.cfg.audit.Add(audit.Record{
		Who: who, From: caller.Addr, What: method, Outcome: audit.Refused, Reason: status.Convert(err).Message(),
	})
}

// isReady reports whether the manager takes part in raft.
func (r *managerRole) isReady() bool {
	select {
	case <-r.replica.Ready():
		return true
	default:
		return false
	}
}

func (r *managerRole) leading() bool {
	leading, _ := r.replica.Leading()
	return leading
}

// removed reports whether a node's certificate is void.
func (r *managerRole) removed(nodeID string) bool {
	_, ok := r.replica.View().Cluster().GetBlacklistedCertificates()[nodeID]
	return ok
}

// roleOf returns the role that the swarm gives a node, "" for one that is not known.
func (r *managerRole) roleOf(nodeID string) string {
	n := r.replica.View().Node(nodeID)
	if n == nil {
		return ""
	}
	return pki.RoleOU(n.GetRole())
}

// dropVoid closes the connections of nodes that were removed or demoted, as that happens.
func (r *managerRole) dropVoid(ctx context.Context) {
	for at := r.replica.Follow(); ; {
		events, reset, err := at.Next(ctx)
		if err != nil {
			return
		}
		if !reset && !slices.ContainsFunc(events, voids) {
			continue
		}
		n := r.peers.CloseIf(func(peer wire.Identity) bool {
			return r.removed(peer.NodeID) || peer.Is(pki.ManagerRole) && r.roleOf(peer.NodeID) == pki.WorkerRole
		})
		if n > 0 {
			r.log.Info("closed connections of removed or demoted nodes", slog.Int("connections", n))
		}
	}
}

// voids reports whether a change may have made a certificate void.
func voids(e model.Event) bool {
	switch was := e.Old.(type) {
	case *api.Cluster:
		now, ok := e.New.(*api.Cluster)
		return ok && len(now.GetBlacklistedCertificates()) != len(was.GetBlacklistedCertificates())
	case *api.Node:
		now, ok := e.New.(*api.Node)
		return !ok || now == nil || now.GetRole() != was.GetRole()
	default:
		return false
	}
}

// leader connects to the leader, with nil when that is this manager: then the caller's own
// identity must not be lost on the way through the local connection. It waits a little
// while there is none.
func (r *managerRole) leader(ctx context.Context) (grpc.ClientConnInterface, error) {
	deadline := time.NewTimer(wire.LeaderWait)
	defer deadline.Stop()
	for {
		leading, changed := r.replica.Leading()
		if leading {
			return nil, nil //nolint:nilnil // nil is the answer "here"
		}
		nodeID, addr, ok := r.replica.Leader()
		if ok && nodeID != r.creds.NodeID() {
			return r.conn(addr)
		}
		select {
		case <-changed:
		case <-deadline.C:
			return nil, model.ErrNoLeader
		case <-ctx.Done():
			return nil, model.ErrNoLeader
		}
	}
}

// conn returns the connection to a manager.
func (r *managerRole) conn(addr string) (*grpc.ClientConn, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c := r.conns[addr]; c != nil {
		return c, nil
	}
	c, err := wire.Dial(r.creds, addr, pki.ManagerRole)
	if err != nil {
		return nil, err
	}
	r.conns[addr] = c
	return c, nil
}

// route is the connection by which this node reaches the leader's services.
func (r *managerRole) route() grpc.ClientConnInterface {
	return &wire.Route{Local: r.local.Conn, Leading: r.leading, Leader: r.leader}
}
