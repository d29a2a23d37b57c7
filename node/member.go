package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/manager"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/netmap"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/enroll"
	"github.com/skep-dev/skep/platform/keystore"
	"github.com/skep-dev/skep/platform/wire"
	"github.com/skep-dev/skep/worker/agent"
	"github.com/skep-dev/skep/worker/gossip"
	"github.com/skep-dev/skep/worker/runtime"
)

// member is this node's part in one swarm, from joining or start to leaving or stop.
type member struct {
	cfg   *Config
	dir   string // <data root>/swarm
	saved savedState
	keys  *keystore.Store
	creds *wire.Credentials
	// remotes are the managers as the last session message listed them, and others were told.
	remotes *remotes
	renewer *enroll.Renewer
	agent   *agent.Agent
	// founding is set on the first manager of a new swarm.
	founding *manager.Bootstrap
	forceNew bool
	// joining is set while the request to join the swarm has no answer: until then what
	// goes wrong is told to whoever asked, and not tried again.
	joining atomic.Bool

	// role has a value when the certificate changed, or the role that the swarm wants.
	role    chan struct{}
	manager atomic.Pointer[managerRole]
	// unknown has a value when a manager showed a certificate from a root that this node
	// does not know.
	unknown chan struct{}
	// attempts counts those to reach a manager since the last message of a session; lost has a
	// value when they are many.
	attempts atomic.Int32
	lost     chan struct{}
	// joined is closed at the first message of the first session.
	joined     chan struct{}
	joinedOnce sync.Once

	mu sync.Mutex
	// demanded is the role that a renewal was asked for and has not brought yet.
	demanded string
	// wanted is the role that this node is to have, by the last session message; "" before.
	wanted string
	// refusal is why this node is no manager although it was promoted, nil otherwise.
	refusal error
}

// newMember returns a member with an identity that is stored already.
func newMember(cfg *Config, dir string, saved savedState, keys *keystore.Store, id keystore.Identity) (*member, error) {
	root, err := pki.ParseRoot(id.RootPEM, nil)
	if err != nil {
		return nil, err
	}
	material, err := wire.NewMaterial(root, id.ChainPEM, id.Key)
	if err != nil {
		return nil, err
	}
	m := &member{
		cfg: cfg, dir: dir, saved: saved, keys: keys, creds: &wire.Credentials{Network: cfg.Network},
		remotes: openRemotes(dir, cfg.Log),
		role:    make(chan struct{}, 1), joined: make(chan struct{}), unknown: make(chan struct{}, 1), lost: make(chan struct{}, 1),
	}
	m.creds.Set(material)
	m.creds.Unknown = func() {
		select {
		case m.unknown <- struct{}{}:
		default:
		}
	}
	m.renewer = enroll.NewRenewer(enroll.Renewer{
		Credentials: m.creds, Save: m.saveIdentity, Return: m.comeBack, Log: cfg.Log,
		Connect: func(ctx context.Context) (grpc.ClientConnInterface, func(), error) {
			conn, done, err := m.connect(ctx)
			return conn, func() {
				if done != nil {
					done(true)
				}
			}, err
		},
	})
	m.agent = agent.New(agent.Config{
		NodeID: m.creds.NodeID(), Hostname: cfg.Hostname, Dir: filepath.Join(dir, "worker"),
		Engine: cfg.Engine, Connect: m.connect, Describe: m.describe, OnSession: m.onSession, Networks: cfg.Networks, Attachments: cfg.Attachments,
		Keys: keys, Log: cfg.Log, Registerer: cfg.Registry,
	})
	return m, nil
}

// run takes part in the swarm until ctx ends; any other end is an error.
func (m *member) run(ctx context.Context) error {
	if m.cfg.Gossip != nil {
		defer m.cfg.Gossip.SetSession(gossip.Session{})
	}
	if engine, ok := m.cfg.Engine.(runtime.Sealer); ok {
		if err := engine.Unseal(ctx, m.keys); err != nil {
			return err
		}
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return m.renewer.Run(ctx) })
	group.Go(func() error { return m.agent.Run(ctx) })
	group.Go(func() error {
		m.findRoot(ctx)
		return nil
	})
	group.Go(func() error {
		m.findManagers(ctx)
		return nil
	})
	group.Go(func() error { return m.runRoles(ctx) })
	group.Go(func() error {
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-m.cfg.AbilitiesChanged:
				m.agent.DescriptionChanged()
			}
		}
	})
	return group.Wait()
}

// runRoles runs a manager as long as the certificate says that this node is one.
func (m *member) runRoles(ctx context.Context) error {
	for ctx.Err() == nil {
		if m.creds.Role() != pki.ManagerRole {
			if err := m.forgetRaft(); err != nil {
				return err
			}
			m.setRefusal(nil)
			m.beWorker(ctx)
			continue
		}
		if !m.mayJoin() {
			m.cfg.Log.Info("this node has no state of a manager, waiting for the swarm to say whether it is one", slog.String("node_id", m.creds.NodeID()))
			m.waitRole(ctx, nil)
			continue
		}
		if err := m.checkSwarm(ctx); err != nil {
			m.cfg.Log.Error("promotion refused", slog.Any("error", err))
			m.waitRole(ctx, nil)
			continue
		}
		err := m.runManager(ctx)
		switch {
		case ctx.Err() != nil:
			return nil //nolint:nilerr // asked to stop
		case errors.Is(err, replica.ErrRemoved):
			m.cfg.Log.Info("this manager was demoted", slog.String("node_id", m.creds.NodeID()))
			if err := m.forgetRaft(); err != nil {
				return err
			}
			// The session was lost with the manager; the next one says what this node is to be.
			m.waitRole(ctx, time.After(joinAgainAfter))
		case err != nil && !m.joining.Load() && m.founding == nil && !m.hasRaft():
			// It is in the swarm without being a manager, and stays so until it can join.
			m.cfg.Log.Warn("not a manager yet, trying again", slog.Any("error", err))
			m.waitRole(ctx, time.After(joinAgainAfter))
		case err != nil:
			return fmt.Errorf("manager stopped: %w", err)
		}
	}
	return nil
}

// checkSwarm refuses to make this node a manager beside Docker's, which promoted it without
// asking. The node goes on as a worker.
func (m *member) checkSwarm(ctx context.Context) error {
	var refusal error
	if k, ok := m.remotes.pick(m.saved.AdvertiseAddr); ok && !m.hasRaft() && m.founding == nil {
		if err := enroll.CheckManager(ctx, m.creds, k.Addr); errors.Is(err, enroll.ErrDocker) {
			refusal = fmt.Errorf("%w. It goes on as a worker; to have its role right, remove it and join it anew", err)
		}
	}
	m.setRefusal(refusal)
	return refusal
}

func (m *member) setRefusal(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.refusal = err
}

// refused returns why this node is no manager although its certificate is a manager's.
func (m *member) refused() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.refusal
}

// joinAgainAfter is the pause of a manager that could not join the others, or that was
// taken out.
const joinAgainAfter = time.Second

// waitRole returns when the role may have changed, after has a value, or ctx ends.
func (m *member) waitRole(ctx context.Context, after <-chan time.Time) {
	select {
	case <-ctx.Done():
	case <-m.role:
	case <-after:
	}
}

// mayJoin reports whether a node with the certificate of a manager may run as one. Without
// raft's state it may have been demoted without having got its new certificate; then it
// waits until the swarm says which role it is to have.
func (m *member) mayJoin() bool {
	if m.hasRaft() || m.founding != nil || m.joining.Load() {
		return true
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.wanted == pki.ManagerRole
}

// runManager runs the manager until the certificate says otherwise, which returns nil.
func (m *member) runManager(ctx context.Context) error {
	role, err := m.newManagerRole(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- role.run(ctx) }()
	m.manager.Store(role)
	m.noteManaged()
	defer m.manager.Store(nil)
	for {
		select {
		case err := <-done:
			return err
		case <-m.role:
			if m.creds.Role() == pki.ManagerRole {
				continue
			}
			cancel()
			if err := <-done; err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, replica.ErrRemoved) {
				m.cfg.Log.Warn("manager role ended", slog.Any("error", err))
			}
			return nil
		}
	}
}

// forgetRaft deletes what only a manager needs.
func (m *member) forgetRaft() error {
	if err := os.RemoveAll(m.raftDir()); err != nil {
		return fmt.Errorf("delete raft state: %w", err)
	}
	m.founding, m.forceNew = nil, false
	return errors.Join(forgetCredential(credentialFile(m.dir)), m.keys.ForgetDEKs())
}

func (m *member) raftDir() string { return filepath.Join(m.dir, "raft") }

func (m *member) hasRaft() bool {
	_, err := os.Stat(filepath.Join(m.raftDir(), "wal-v3-encrypted"))
	return !errors.Is(err, fs.ErrNotExist)
}

// connect reaches a manager: the own one if this node is one, else one of those known.
func (m *member) connect(ctx context.Context) (grpc.ClientConnInterface, func(bool), error) {
	role := m.manager.Load()
	ready := role != nil && role.isReady()
	m.attempt()
	if ready && role.replica.Votes() && !m.deserted(role) {
		return role.route(), func(bool) {}, nil
	}
	// A manager without a vote may be one no more, and know of no leader.
	k, ok := m.remotes.pick(m.saved.AdvertiseAddr)
	switch {
	case !ok && ready:
		return role.route(), func(bool) {}, nil
	case !ok:
		return nil, nil, model.Errorf(model.Unavailable, "no manager is known; waiting for this node's own")
	}
	conn, err := wire.Dial(m.creds, k.Addr, pki.ManagerRole)
	if err != nil {
		m.remotes.observe(k, false)
		return nil, nil, err
	}
	return conn, func(ok bool) {
		// A session that ended counts against its manager, however well it went.
		m.remotes.observe(k, false)
		_ = conn.Close()
	}, nil
}

// deserted reports whether a manager has no leader and was told of managers that it did not
// know: those that it counts on may be none any more.
func (m *member) deserted(role *managerRole) bool {
	_, _, led := role.replica.Leader()
	return !led && m.remotes.toldOthers()
}

// saveIdentity makes a renewed certificate durable and active.
func (m *member) saveIdentity(ctx context.Context, id keystore.Identity) error {
	root, err := pki.ParseRoot(id.RootPEM, nil)
	if err != nil {
		return err
	}
	material, err := wire.NewMaterial(root, id.ChainPEM, id.Key)
	if err != nil {
		return err
	}
	next := &wire.Credentials{Network: m.cfg.Network}
	next.Set(material)
	switch {
	case next.Role() == m.creds.Role():
		err = m.keys.Save(id)
	case next.Role() == pki.ManagerRole:
		k, ok := m.remotes.pick(m.saved.AdvertiseAddr)
		if !ok {
			return model.Errorf(model.Unavailable, "no manager is known to ask whether the swarm is locked")
		}
		err = saveManager(ctx, m.keys, id, next, k.Addr)
	default:
		err = m.keys.SaveWorker(id)
	}
	if err != nil {
		return err
	}
	m.creds.Set(material)
	m.roleChanged()
	m.agent.DescriptionChanged()
	return nil
}

// saveManager makes the first identity of a manager durable, sealed if the swarm locks its
// managers. creds holds the identity, addr is another manager.
func saveManager(ctx context.Context, keys *keystore.Store, id keystore.Identity, creds *wire.Credentials, addr string) error {
	kek, version, err := enroll.UnlockKey(ctx, creds, addr)
	if err != nil {
		return fmt.Errorf("ask for the swarm's unlock key: %w", err)
	}
	return keys.SaveManager(id, kek, version)
}

// onSession follows what the swarm says about this node, its managers and its root.
func (m *member) onSession(msg *api.SessionMessage) {
	m.attempts.Store(0)
	m.joinedOnce.Do(func() { close(m.joined) })
	m.remotes.replace(msg.GetManagers())
	m.adoptRoot(msg.GetRootCA())
	node := msg.GetNode()
	if node == nil {
		return
	}
	if m.cfg.Gossip != nil {
		m.cfg.Gossip.SetSession(m.gossipSession(msg))
	}
	want := pki.RoleOU(node.GetSpec().GetDesiredRole())
	rotate := node.GetCertificate().GetStatus().GetState() == api.IssuanceStatus_ROTATE
	m.mu.Lock()
	if m.wanted != want {
		m.wanted = want
		m.roleChanged()
	}
	m.mu.Unlock()
	m.demand(want, want != m.creds.Role() || rotate)
}

// demand asks for a renewal that brings the role wanted, once for each change of what is
// wanted. Where none is needed, it takes back a demand for the other role: that would be
// made until it is met, which can be never, and keep the certificate from being renewed.
func (m *member) demand(want string, needed bool) {
	m.mu.Lock()
	before := m.demanded
	m.demanded = ""
	if needed {
		m.demanded = want
	}
	m.mu.Unlock()
	switch {
	case needed && before != want:
		m.renewer.Force(want)
	case !needed && before != "" && before != want:
		m.renewer.Force("")
	}
}

// roleChanged has runRoles look again.
func (m *member) roleChanged() {
	select {
	case m.role <- struct{}{}:
	default:
	}
}

// adoptRoot takes over a new root bundle if this node's own certificate fits it.
func (m *member) adoptRoot(rootPEM []byte) {
	now := m.creds.Current()
	if len(rootPEM) == 0 || string(rootPEM) == string(now.Root.CertPEM) {
		return
	}
	root, err := pki.ParseRoot(rootPEM, nil)
	if err == nil {
		_, err = root.Verify(now.ChainPEM, time.Now())
	}
	if err == nil {
		err = m.keys.SaveRoot(rootPEM)
	}
	if err != nil {
		m.cfg.Log.Warn("new root certificate not taken over", slog.Any("error", err))
		return
	}
	next := *now
	next.Root = root
	m.creds.Set(&next)
	m.cfg.Log.Info("root certificate replaced")
	m.agent.DescriptionChanged()
}

// describe returns the node's description.
func (m *member) describe(ctx context.Context) (*api.NodeDescription, error) {
	info, err := m.cfg.Engine.Info(ctx)
	if err != nil {
		return nil, err
	}
	labels := map[string]string{}
	var abilities []string
	if m.cfg.Abilities != nil {
		abilities = m.cfg.Abilities()
	}
	for _, l := range slices.Concat(abilities, m.cfg.Labels) {
		k, v, _ := strings.Cut(l, "=")
		labels[k] = v
	}
	if m.saved.DataPathAddr != "" {
		labels[netmap.DataAddrLabel] = m.saved.DataPathAddr
	}
	return agent.Describe(info, m.cfg.Hostname, m.cfg.Version, labels, m.tlsInfo()), nil
}

// tlsInfo tells the swarm which root and issuer this node's certificate has.
func (m *member) tlsInfo() *api.NodeTLSInfo {
	now := m.creds.Current()
	info := &api.NodeTLSInfo{TrustRoot: now.Root.CertPEM}
	if chain, err := pki.ParseCerts(now.ChainPEM); err == nil {
		issuer := now.Root.SelfIssuer(chain)
		info.CertIssuerSubject, info.CertIssuerPublicKey = issuer.Subject, issuer.PublicKey
	}
	return info
}
