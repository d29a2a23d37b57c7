package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/grpc"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/edge/dockerapi"
	"github.com/skep-dev/skep/edge/dockerapi/convert"
	"github.com/skep-dev/skep/platform/cfssl"
	"github.com/skep-dev/skep/platform/enroll"
	"github.com/skep-dev/skep/platform/keystore"
)

const (
	// activateTimeout bounds what init and join wait for the node to take part.
	activateTimeout = 20 * time.Second
	// unlockTimeout bounds the same for unlock.
	unlockTimeout = 5 * time.Second
	lockedText    = `Swarm is encrypted and needs to be unlocked before it can be used. Please use "docker swarm unlock" to unlock it.`
	// defaultListen is what Docker's client sends when nobody says otherwise.
	defaultListen = "0.0.0.0:2377"
)

// membership is this daemon's relation to swarms: in none, or in one by a member. It
// implements the API's Swarm and Manager.
type membership struct {
	cfg  *Config
	dir  string
	keys *keystore.Store
	// ctx ends the members; it is the daemon's.
	ctx context.Context //nolint:containedctx // members outlive the requests that make them
	// changing holds a value while init, join, leave or unlock is under way.
	changing chan struct{}

	mu     sync.Mutex
	state  swarm.LocalNodeState
	fault  string // why, in state error or pending
	member *member
	cancel context.CancelFunc
	done   chan struct{} // closed when the member has ended
	// pending is the join that goes on, in state pending, or what waits to be unlocked, in
	// state locked.
	pending savedState
}

// openMembership goes on with the swarm that this node is in, if any.
func openMembership(ctx context.Context, cfg *Config) (*membership, error) {
	dir := filepath.Join(cfg.DataRoot, "swarm")
	keys, err := keystore.Open(filepath.Join(dir, "certificates"))
	if err != nil {
		return nil, err
	}
	s := &membership{cfg: cfg, dir: dir, keys: keys, ctx: ctx, changing: make(chan struct{}, 1), state: swarm.LocalNodeStateInactive}
	saved, ok, err := loadState(dir)
	if err != nil || !ok {
		return s, err
	}
	id, err := keys.Load(nil)
	switch {
	case errors.Is(err, keystore.ErrNone):
		return s, nil // a join that a restart forgot
	case errors.Is(err, pki.ErrLocked):
		s.state, s.pending = swarm.LocalNodeStateLocked, saved
		s.fault = lockedText
		return s, nil
	case err != nil:
		return nil, err
	}
	m, err := newMember(cfg, dir, saved, keys, id)
	if err != nil {
		return nil, err
	}
	s.start(m)
	// The state that the first request sees should be final, where that does not take long.
	wait, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_ = s.active(wait, m)
	return s, nil
}

// start runs a member until it ends or is stopped.
func (s *membership) start(m *member) {
	ctx, cancel := context.WithCancel(s.ctx)
	done := make(chan struct{})
	s.mu.Lock()
	s.member, s.cancel, s.done, s.state, s.fault, s.pending = m, cancel, done, swarm.LocalNodeStateActive, "", savedState{}
	s.mu.Unlock()
	go func() {
		defer close(done)
		defer cancel()
		err := m.run(ctx)
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.member != m || ctx.Err() != nil || err == nil {
			return
		}
		s.state, s.fault = swarm.LocalNodeStateError, err.Error()
		s.cfg.Log.Error("this node's part in the swarm ended", slog.Any("error", err))
	}()
}

// stop ends the member and waits for it.
func (s *membership) stop() {
	s.mu.Lock()
	cancel, done := s.cancel, s.done
	s.mu.Unlock()
	if cancel != nil {
		cancel()
		<-done
	}
}

// current returns the member, nil without one.
func (s *membership) current() *member {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.member
}

// begin makes the caller the only one who changes the membership until end is called.
func (s *membership) begin(ctx context.Context) (end func(), err error) {
	select {
	case s.changing <- struct{}{}:
		return func() { <-s.changing }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// clear forgets the swarm.
func (s *membership) clear() error {
	s.stop()
	err := errors.Join(s.keys.Clear(), os.RemoveAll(s.dir))
	s.mu.Lock()
	s.member, s.cancel, s.state, s.fault, s.pending = nil, nil, swarm.LocalNodeStateInactive, "", savedState{}
	s.mu.Unlock()
	if err != nil {
		return fmt.Errorf("delete swarm state: %w", err)
	}
	if _, err := keystore.Open(filepath.Join(s.dir, "certificates")); err != nil {
		return err
	}
	return nil
}

func errInSwarm() error {
	return model.Errorf(model.Unavailable, `This node is already part of a swarm. Use "docker swarm leave" to leave this swarm and join another one.`)
}

// Init implements dockerapi.Swarm.
func (s *membership) Init(ctx context.Context, req swarm.InitRequest) (string, error) {
	end, err := s.begin(ctx)
	if err != nil {
		return "", err
	}
	defer end()
	if req.ForceNewCluster {
		return s.forceNewCluster(ctx, req)
	}
	if s.Status().LocalNodeState != swarm.LocalNodeStateInactive {
		return "", errInSwarm()
	}
	req.Spec.EncryptionConfig.AutoLockManagers = req.Spec.EncryptionConfig.AutoLockManagers || req.AutoLockManagers
	saved, err := s.addresses(req.ListenAddr, req.AdvertiseAddr, req.DataPathAddr)
	if err != nil {
		return "", err
	}
	if err := checkPools(req); err != nil {
		return "", err
	}
	spec, err := convert.InitClusterSpec(req.Spec)
	if err != nil {
		return "", err
	}
	if d := spec.GetCaConfig().GetNodeCertExpiry().AsDuration(); d < pki.MinExpiry {
		return "", model.Errorf(model.Invalid, "minimum certificate expiry time is: %s", pki.MinExpiry)
	}
	if err := cfssl.Check(spec.GetCaConfig().GetExternalCas()); err != nil {
		return "", err
	}
	root, err := s.foundingRoot(spec.GetCaConfig())
	if err != nil {
		return "", err
	}
	id, boot, err := found(ctx, spec, root)
	if err != nil {
		return "", err
	}
	kek := pki.ManagersKEK(&api.Cluster{UnlockKeys: boot.UnlockKeys})
	if boot.Availability, err = convert.StoreAvailability(req.Availability); err != nil {
		return "", err
	}
	for _, p := range req.DefaultAddrPool {
		boot.DefaultAddressPool = append(boot.DefaultAddressPool, p.String())
	}
	boot.SubnetSize, boot.VXLANUDPPort = req.SubnetSize, req.DataPathPort
	saved.DefaultAddressPool, saved.SubnetSize, saved.DataPathPort = boot.DefaultAddressPool, req.SubnetSize, req.DataPathPort
	if err := errors.Join(saved.save(s.dir), s.keys.SaveManager(id, kek, 0), s.keys.ForgetBroughtKey()); err != nil {
		return "", err
	}
	m, err := newMember(s.cfg, s.dir, saved, s.keys, id)
	if err != nil {
		return "", err
	}
	m.founding = boot
	s.start(m)
	wait, cancel := context.WithTimeout(ctx, activateTimeout)
	defer cancel()
	if err := s.active(wait, m); err != nil {
		return "", errors.Join(err, s.clear())
	}
	s.cfg.Log.Info("swarm initialized", slog.String("node_id", m.creds.NodeID()), slog.String("cluster_id", boot.ClusterID))
	return m.creds.NodeID(), nil
}

// forceNewCluster continues this manager's state as the only manager. Addresses that the
// request names replace those of before, which may be why the quorum was lost.
func (s *membership) forceNewCluster(ctx context.Context, req swarm.InitRequest) (string, error) {
	old := s.current()
	if old == nil || old.creds.Role() != pki.ManagerRole {
		state := s.Status().LocalNodeState
		return "", dockerapi.NotManager(state, true, "")
	}
	saved, err := s.movedAddresses(req, old.saved)
	if err != nil {
		return "", err
	}
	s.stop()
	// The other managers are none any more.
	if err := errors.Join(saved.save(s.dir), forgetRemotes(s.dir)); err != nil {
		return "", err
	}
	id, err := s.keys.Reload()
	if err != nil {
		return "", err
	}
	m, err := newMember(s.cfg, s.dir, saved, s.keys, id)
	if err != nil {
		return "", err
	}
	m.forceNew = true
	s.start(m)
	wait, cancel := context.WithTimeout(ctx, activateTimeout)
	defer cancel()
	return m.creds.NodeID(), s.active(wait, m)
}

// movedAddresses returns a node's addresses with those that a request names in the place of
// what it had.
func (s *membership) movedAddresses(req swarm.InitRequest, had savedState) (savedState, error) {
	listen, advertise, dataPath := req.ListenAddr, req.AdvertiseAddr, req.DataPathAddr
	if (listen == "" || listen == defaultListen) && advertise == "" && dataPath == "" {
		return had, nil
	}
	if listen == "" || listen == defaultListen {
		listen = had.ListenAddr
	}
	if advertise == "" {
		advertise = had.AdvertiseAddr
	}
	if dataPath == "" {
		dataPath = had.DataPathAddr
	}
	moved, err := s.addresses(listen, advertise, dataPath)
	if err != nil {
		return savedState{}, err
	}
	had.LocalAddr, had.ListenAddr, had.AdvertiseAddr, had.DataPathAddr = moved.LocalAddr, moved.ListenAddr, moved.AdvertiseAddr, moved.DataPathAddr
	return had, nil
}

// active returns when the member takes part in its swarm: a manager of a swarm with a
// leader has its node object, a worker has a session.
func (s *membership) active(ctx context.Context, m *member) error {
	s.mu.Lock()
	done := s.done
	s.mu.Unlock()
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	for {
		select {
		case <-done:
			s.mu.Lock()
			fault := s.fault
			s.mu.Unlock()
			return model.Errorf(model.Internal, "%s", fault)
		case <-ctx.Done():
			return ctx.Err()
		case <-poll.C:
		}
		if m.creds.Role() == pki.ManagerRole {
			role := m.manager.Load()
			if role == nil || !role.isReady() || !role.replica.Votes() || role.replica.View().Node(m.creds.NodeID()) == nil {
				continue
			}
			if _, _, ok := role.replica.Leader(); !ok {
				continue
			}
		}
		select {
		case <-m.joined:
			return nil
		default:
		}
	}
}

// addresses works out where to listen and what to advertise.
func (s *membership) addresses(listen, advertise, dataPath string) (savedState, error) {
	links, err := systemLinks()
	if err != nil {
		return savedState{}, err
	}
	if advertise == "" {
		advertise = s.cfg.AdvertiseAddr
	}
	if s.cfg.ListenAddr != "" && listen == defaultListen {
		listen = s.cfg.ListenAddr // the client's default gives way to the daemon's setting
	}
	l, err := resolveListen(links, listen)
	if err != nil {
		return savedState{}, err
	}
	a, err := resolveAdvertise(links, advertise, l)
	if err != nil {
		return savedState{}, err
	}
	d, err := resolveDataPath(links, dataPath)
	if err != nil {
		return savedState{}, err
	}
	return savedState{LocalAddr: a.Addr().String(), ListenAddr: l.String(), AdvertiseAddr: a.String(), DataPathAddr: d}, nil
}

func checkPools(req swarm.InitRequest) error {
	if req.DataPathPort != 0 && (req.DataPathPort < 1024 || req.DataPathPort > 49151) {
		return model.Errorf(model.Internal, "Datapath port number is not in valid range (1024-49151) : %d", req.DataPathPort)
	}
	if req.SubnetSize > 29 {
		return model.Errorf(model.Internal, "subnet size is out of range: %d", req.SubnetSize)
	}
	for i, p := range req.DefaultAddrPool {
		if req.SubnetSize != 0 && p.Bits() > int(req.SubnetSize) {
			return model.Errorf(model.Internal, "invalid CIDR: %q. Subnet size is too small for pool: %d", p, req.SubnetSize)
		}
		for _, q := range req.DefaultAddrPool[:i] {
			if p.Overlaps(q) {
				return model.Errorf(model.Internal, "address pools %s and %s overlap", q, p)
			}
		}
	}
	return nil
}

// Join implements dockerapi.Swarm.
func (s *membership) Join(ctx context.Context, req swarm.JoinRequest) error {
	end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	if s.Status().LocalNodeState != swarm.LocalNodeStateInactive {
		return errInSwarm()
	}
	if len(req.RemoteAddrs) == 0 {
		return model.Errorf(model.Invalid, "at least 1 RemoteAddr is required to join")
	}
	remote := withDefaultPort(req.RemoteAddrs[0])
	saved, err := s.joinAddresses(req, remote)
	if err != nil {
		return err
	}
	saved.RemoteAddr, saved.JoinInProgress = remote, true
	availability, err := convert.StoreAvailability(req.Availability)
	if err != nil {
		return err
	}
	join, cancel := context.WithCancel(s.ctx)
	done := make(chan struct{})
	s.mu.Lock()
	s.state, s.pending, s.cancel, s.done = swarm.LocalNodeStatePending, saved, cancel, done
	s.mu.Unlock()
	result := make(chan error, 1)
	go func() { result <- s.join(join, done, saved, req.JoinToken, availability) }()
	timer := time.NewTimer(activateTimeout)
	defer timer.Stop()
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
	case <-timer.C:
	}
	return model.Errorf(model.Unavailable, `Timeout was reached before node joined. The attempt to join the swarm will continue in the background. Use the "docker info" command to see the current swarm status of your node.`)
}

// joinAddresses is addresses for a node that joins: without a clear choice it advertises
// the address from which it reaches the manager.
func (s *membership) joinAddresses(req swarm.JoinRequest, remote string) (savedState, error) {
	listen := req.ListenAddr
	if listen == "" {
		listen = defaultListen
	}
	advertise := req.AdvertiseAddr
	if advertise == "" && s.cfg.AdvertiseAddr == "" {
		if conn, err := net.DialTimeout("udp", remote, time.Second); err == nil { //nolint:noctx // sends nothing
			if host, _, err := net.SplitHostPort(conn.LocalAddr().String()); err == nil {
				advertise = host
			}
			_ = conn.Close()
		}
	}
	return s.addresses(listen, advertise, req.DataPathAddr)
}

// join enrolls this node and starts its part. It owns the pending state.
func (s *membership) join(ctx context.Context, done chan struct{}, saved savedState, token string, availability api.NodeSpec_Availability) error {
	fail := func(err error) error {
		s.mu.Lock()
		if s.done == done {
			s.state, s.pending, s.cancel = swarm.LocalNodeStateInactive, savedState{}, nil
		}
		s.mu.Unlock()
		close(done)
		return errors.Join(err, s.keys.Clear())
	}
	id, err := enroll.Join(ctx, s.cfg.Network, saved.RemoteAddr, token, availability)
	if err != nil {
		return fail(err)
	}
	saved.JoinInProgress = false
	m, err := newMember(s.cfg, s.dir, saved, s.keys, id)
	if err != nil {
		return fail(err)
	}
	if m.creds.Role() == pki.ManagerRole {
		if err := enroll.CheckManager(ctx, m.creds, saved.RemoteAddr); errors.Is(err, enroll.ErrDocker) {
			return fail(fmt.Errorf("%w. Join with the token that `docker swarm join-token worker` shows there, and remove what this attempt left: docker node rm %s", err, m.creds.NodeID()))
		}
	}
	if err := errors.Join(os.MkdirAll(s.dir, 0o700), saved.save(s.dir), m.saveJoined(ctx, id)); err != nil {
		return fail(err)
	}
	m.remotes.add(saved.RemoteAddr)
	m.joining.Store(true)
	close(done)
	s.start(m)
	err = s.active(ctx, m)
	m.joining.Store(false)
	if err != nil {
		if ctx.Err() == nil {
			return errors.Join(err, s.clear())
		}
		return err
	}
	s.cfg.Log.Info("joined swarm", slog.String("node_id", m.creds.NodeID()), slog.String("role", m.creds.Role()))
	return nil
}

// saveJoined makes the identity that a join brought durable.
func (m *member) saveJoined(ctx context.Context, id keystore.Identity) error {
	if m.creds.Role() != pki.ManagerRole {
		return m.keys.SaveWorker(id)
	}
	return saveManager(ctx, m.keys, id, m.creds, m.saved.RemoteAddr)
}

// Leave implements dockerapi.Swarm.
func (s *membership) Leave(ctx context.Context, force bool) error {
	end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	status := s.Status()
	m := s.current()
	switch {
	case status.LocalNodeState == swarm.LocalNodeStateInactive:
		return model.Errorf(model.Unavailable, "This node is not part of a swarm")
	case status.LocalNodeState == swarm.LocalNodeStateLocked && !force:
		return model.Errorf(model.Unavailable, "Swarm is encrypted and locked. Please unlock it first or use `--force` to ignore this message.")
	case m != nil && m.creds.Role() == pki.ManagerRole && m.refused() == nil && !force:
		return leaveRefusal(m)
	}
	if err := s.clear(); err != nil {
		return err
	}
	return removeTasks(ctx, s.cfg)
}

// leaveRefusal says what a manager's leaving would cost.
func leaveRefusal(m *member) error {
	const begin = "You are attempting to leave the swarm on a node that is participating as a manager. "
	const restore = "The only way to restore a swarm that has lost consensus is to reinitialize it with `--force-new-cluster`. "
	role := m.manager.Load()
	if role == nil || !role.isReady() {
		return model.Errorf(model.Unavailable, "%s", begin+"Doing so may lose the consensus of your cluster. "+restore+"Use `--force` to suppress this message.")
	}
	reachable, unreachable := 0, 0
	for _, member := range role.replica.Voters() {
		if member.GetStatus().GetReachability() == api.RaftMemberStatus_REACHABLE {
			reachable++
		} else {
			unreachable++
		}
	}
	switch {
	case reachable+unreachable == 1:
		return model.Errorf(model.Unavailable, "%s", begin+"Removing the last manager erases all current state of the swarm. Use `--force` to ignore this message. ")
	case reachable-2 <= unreachable:
		return model.Errorf(model.Unavailable, "%s", begin+fmt.Sprintf(
			"Removing this node leaves %d managers out of %d. Without a Raft quorum your swarm will be inaccessible. ",
			reachable-1, reachable+unreachable)+restore+"Use `--force` to suppress this message.")
	default:
		return model.Errorf(model.Unavailable, "%s", begin+restore+"Use `--force` to suppress this message.")
	}
}

// removeTasks removes the containers of all tasks.
func removeTasks(ctx context.Context, cfg *Config) error {
	return eachContainer(ctx, cfg, func(c *container.InspectResponse) error {
		if _, ok := c.Config.Labels[model.TaskLabel]; !ok {
			return loseNetworks(ctx, cfg, c)
		}
		return cfg.Engine.Remove(ctx, c.ID, true, true)
	})
}

// loseNetworks takes a container that is no task off the networks of a swarm that was left.
func loseNetworks(ctx context.Context, cfg *Config, c *container.InspectResponse) error {
	if c.NetworkSettings == nil {
		return nil
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(c.NetworkSettings.Networks)) {
		if ep := c.NetworkSettings.Networks[name]; ep != nil && len(ep.NetworkID) == model.IDLength {
			errs = append(errs, cfg.Engine.Disconnect(ctx, c.ID, ep.NetworkID))
		}
	}
	return errors.Join(errs...)
}

// eachContainer calls f for all containers, several at once.
func eachContainer(ctx context.Context, cfg *Config, f func(*container.InspectResponse) error) error {
	all, err := cfg.Engine.List(ctx)
	if err != nil {
		return err
	}
	slots := make(chan struct{}, 8)
	errs := make([]error, len(all))
	var group sync.WaitGroup
	for i, c := range all {
		if c.Config == nil {
			continue
		}
		slots <- struct{}{}
		group.Go(func() {
			defer func() { <-slots }()
			errs[i] = f(c)
		})
	}
	group.Wait()
	return errors.Join(errs...)
}

// Unlock implements dockerapi.Swarm.
func (s *membership) Unlock(ctx context.Context, req swarm.UnlockRequest) error {
	end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	s.mu.Lock()
	state, saved := s.state, s.pending
	s.mu.Unlock()
	if state != swarm.LocalNodeStateLocked {
		return model.Errorf(model.Conflict, "swarm is not locked")
	}
	kek, err := pki.ParseUnlockKey(req.UnlockKey)
	if err != nil {
		return err
	}
	id, err := s.keys.Load(kek)
	if err != nil {
		return err
	}
	m, err := newMember(s.cfg, s.dir, saved, s.keys, id)
	if err != nil {
		return err
	}
	s.start(m)
	s.cfg.Log.Info("swarm unlocked", slog.String("node_id", m.creds.NodeID()))
	// The others may still be locked, so that there is no leader to wait for.
	wait, cancel := context.WithTimeout(ctx, unlockTimeout)
	defer cancel()
	if err := s.active(wait, m); err != nil && wait.Err() == nil {
		return err
	}
	return nil
}

// UnlockKey implements dockerapi.Swarm.
func (s *membership) UnlockKey(ctx context.Context) (string, error) {
	role, err := s.role()
	if err != nil {
		return "", err
	}
	resp, err := api.NewCAClient(role.route()).GetUnlockKey(ctx, new(api.GetUnlockKeyRequest))
	if err != nil {
		return "", err
	}
	return pki.EncodeUnlockKey(resp.GetUnlockKey()), nil
}

// Status implements dockerapi.Swarm.
func (s *membership) Status() swarm.Info {
	s.mu.Lock()
	info := swarm.Info{LocalNodeState: s.state, Error: s.fault}
	m, pending := s.member, s.pending
	s.mu.Unlock()
	switch info.LocalNodeState {
	case swarm.LocalNodeStatePending:
		info.NodeAddr = hostOf(pending.AdvertiseAddr)
		info.RemoteManagers = []swarm.Peer{{Addr: pending.RemoteAddr}}
	case swarm.LocalNodeStateActive, swarm.LocalNodeStateError:
		if m == nil {
			break
		}
		info.NodeID, info.NodeAddr = m.creds.NodeID(), hostOf(m.saved.AdvertiseAddr)
		if err := m.refused(); err != nil && info.Error == "" {
			info.Error = err.Error()
		}
		info.ControlAvailable = m.creds.Role() == pki.ManagerRole && m.refused() == nil && info.LocalNodeState == swarm.LocalNodeStateActive
		for _, r := range m.remotes.list() {
			info.RemoteManagers = append(info.RemoteManagers, swarm.Peer{NodeID: r.NodeID, Addr: r.Addr})
		}
	case swarm.LocalNodeStateLocked:
		info.NodeAddr = hostOf(pending.AdvertiseAddr)
	case swarm.LocalNodeStateInactive:
	}
	return info
}

func hostOf(addr string) string {
	if host, _, err := net.SplitHostPort(addr); err == nil {
		return host
	}
	return addr
}

// role returns the running manager, or the error that Docker's users know.
func (s *membership) role() (*managerRole, error) {
	status := s.Status()
	m := s.current()
	if m == nil || status.LocalNodeState != swarm.LocalNodeStateActive {
		return nil, dockerapi.NotManager(status.LocalNodeState, true, status.Error)
	}
	role := m.manager.Load()
	if m.creds.Role() != pki.ManagerRole || m.refused() != nil {
		return nil, dockerapi.NotManager(status.LocalNodeState, true, "")
	}
	if role == nil || !role.isReady() {
		return nil, dockerapi.NotManager(status.LocalNodeState, false, "")
	}
	return role, nil
}

// clientOf makes a client of a service that runs on the leader.
func clientOf[C any](s *membership, over func(grpc.ClientConnInterface) C) (c C, err error) {
	role, err := s.role()
	if err != nil {
		return c, err
	}
	return over(role.route()), nil
}

// Control implements dockerapi.Manager.
func (s *membership) Control() (api.ControlClient, error) { return clientOf(s, api.NewControlClient) }

// Logs implements dockerapi.Manager.
func (s *membership) Logs() (api.LogsClient, error) { return clientOf(s, api.NewLogsClient) }

// Insight implements dockerapi.Manager.
func (s *membership) Insight() (skepv1.InsightClient, error) {
	return clientOf(s, skepv1.NewInsightClient)
}

// Secrets implements dockerapi.Manager.
func (s *membership) Secrets() (skepv1.SecretsClient, error) {
	return clientOf(s, skepv1.NewSecretsClient)
}

// Networks implements dockerapi.Manager.
func (s *membership) Networks() (skepv1.NetworksClient, error) {
	return clientOf(s, skepv1.NewNetworksClient)
}

// Tokens implements dockerapi.Manager.
func (s *membership) Tokens() (skepv1.TokensClient, error) {
	return clientOf(s, skepv1.NewTokensClient)
}

// Unlocking implements dockerapi.Manager.
func (s *membership) Unlocking() (skepv1.UnlockClient, error) {
	return clientOf(s, skepv1.NewUnlockClient)
}

// Follow implements dockerapi.Manager.
func (s *membership) Follow() (*replica.Cursor, error) {
	role, err := s.role()
	if err != nil {
		return nil, err
	}
	return role.replica.Follow(), nil
}
