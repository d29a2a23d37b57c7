// Package dataplane gives the containers of a node their network: a namespace each, the
// swarm's overlay networks with names and balancing, a local bridge as the way out, ports
// published on the host and through the routing mesh. docs/network.md describes it.
//
// The manager's updates say what should be (core/netplan), the kernel is compared with
// that and mended, and two small files remember who has what. One mutex guards all of it;
// every method may be called from any goroutine and twice. Only our own namespaces, links
// and nftables tables are ever touched.
package dataplane

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types/network"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/netplan"
	"github.com/skep-dev/skep/platform/disk"
	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/wireguard"
)

// checkEvery is how often the kernel is compared with what should be there.
const checkEvery = 10 * time.Second

// Config says where a Dataplane works. Dir, ExecDir and Log are required.
type Config struct {
	// Dir keeps the leases, ExecDir the mounts of the namespaces.
	Dir, ExecDir string
	// Bridge is the name of the bridge; empty derives one from Dir.
	Bridge string
	// Address is the bridge's address and prefix; zero chooses a free private network.
	Address netip.Prefix
	Log     *slog.Logger
	// Registerer takes the metrics; nil keeps them to the Dataplane.
	Registerer prometheus.Registerer
	// WireGuard is the program, with its first arguments, that runs a userspace WireGuard
	// device (wireguard.ServeArgs); empty for a node without.
	WireGuard []string
}

// Dataplane implements runtime.Network, and makes the kernel match the swarm's networks.
type Dataplane struct {
	cfg     Config
	bridge  string
	metrics *metrics
	hostNS  netns.NsHandle // the namespace of whoever called New
	host    *netlink.Handle
	names   *directory
	// keepsSource is set when the kernel can answer clients by their own addresses.
	keepsSource bool
	// encryption is how this node can encrypt, private the key by which it does.
	encryption []string
	private    wireguard.Key
	ended      chan struct{} // has a value when a WireGuard device ended
	described  chan struct{} // has a value when Labels returns others than before
	forwards   chan struct{} // holds a token for each question that waits for another resolver

	mu        sync.Mutex
	state     state
	reserved  map[string][]*reservation // by container id
	want      *netplan.State
	changed   chan struct{} // closed and replaced when an update came
	published chan struct{} // closed and replaced when what gossip publishes may have changed
	journal   *journal
	bridges   map[string]*bridge  // networks of this node alone, by id
	sandboxes map[string]*sandbox // those on overlay networks, by container id
	fabric    *fabric             // nil until there is an overlay network
	crypts    map[string]*crypt   // open networks encrypted by WireGuard, by id
	esp       esp
	local     watched
	mesh      mesh
	ready     bool // the local bridge was found or made
	broken    bool // the kernel did not match when last looked at
}

// state is what leases.json holds.
type state struct {
	// Address is the bridge's.
	Address netip.Prefix
	// Last is the address handed out last; the next comes after it, so that a freed one
	// rests for as long as possible.
	Last netip.Addr
	// Mesh is the routing mesh's address in the local network; zero until it has one.
	Mesh   netip.Addr
	Leases map[string]lease // by container id
}

// lease is what one container has.
type lease struct {
	// Addr is in the local network; zero for containers on internal networks only.
	Addr  netip.Addr
	Ports []runtime.PortBinding
	// The rest is set for containers on overlay networks.
	Name     string                   `json:",omitempty"`
	Hostname string                   `json:",omitempty"`
	Overlays []runtime.OverlayRequest `json:",omitempty"`
	DNS      []netip.Addr             `json:",omitempty"`
	// Interfaces names the container's ends of its links by network id; nil means in order.
	Interfaces map[string]string `json:",omitempty"`
}

// New returns a Dataplane that works in the calling thread's network namespace. What a
// former process left is compared with what that process knew, and mended; containers'
// questions are answered when New returns.
func New(cfg Config) (*Dataplane, error) {
	d := &Dataplane{
		cfg: cfg, bridge: cfg.Bridge, names: newDirectory(), forwards: make(chan struct{}, maxForwards),
		reserved: map[string][]*reservation{}, want: netplan.NewState(), changed: make(chan struct{}), published: make(chan struct{}),
		journal: newJournal(cfg.ExecDir), sandboxes: map[string]*sandbox{}, crypts: map[string]*crypt{},
		ended: make(chan struct{}, 1), described: make(chan struct{}, 1), mesh: newMesh(),
	}
	if d.bridge == "" {
		sum := sha256.Sum256([]byte(cfg.Dir))
		d.bridge = "skep" + hex.EncodeToString(sum[:4])
	}
	for _, dir := range []string{cfg.Dir, cfg.ExecDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("set up network: %w", err)
		}
	}
	var err error
	if d.metrics, err = newMetrics(cfg.Registerer); err != nil {
		return nil, err
	}
	if d.hostNS, err = netns.Get(); err != nil {
		return nil, fmt.Errorf("find network namespace: %w", err)
	}
	if d.host, err = netlink.NewHandleAt(d.hostNS, unix.NETLINK_ROUTE); err != nil {
		return nil, errors.Join(fmt.Errorf("open netlink: %w", err), d.hostNS.Close())
	}
	if err := d.probeSource(); err != nil {
		cfg.Log.Info("tasks of this node see the entry node's address at published ports: its kernel cannot answer clients by theirs", slog.Any("error", err))
	} else {
		d.keepsSource = true
	}
	if err := d.recover(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// Labels returns the engine labels that tell managers what this node's network can do.
func (d *Dataplane) Labels() []string {
	var out []string
	if d.keepsSource {
		out = append(out, model.MeshSourceLabel+"="+model.MeshSourceKeep)
	}
	return append(out, d.cryptLabels()...)
}

// LabelsChanged has a value when Labels returns others than before.
func (d *Dataplane) LabelsChanged() <-chan struct{} { return d.described }

// recover takes over what a former process left.
func (d *Dataplane) recover() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := errors.Join(d.load(), d.recoverKey()); err != nil {
		return err
	}
	if err := d.recoverESP(); err != nil {
		return err
	}
	switch {
	case d.cfg.Address.IsValid():
		d.state.Address = d.cfg.Address
	case !d.state.Address.IsValid():
		if err := d.claimNetwork(); err != nil {
			return err
		}
	}
	for id, l := range d.state.Leases {
		if _, _, err := d.reserve(id, l.Ports); err != nil {
			d.cfg.Log.Warn("published port not held", slog.String("container_id", id), slog.Any("error", err))
		}
	}
	if err := d.journal.load(func(u *skepv1.NetworkUpdate) {
		d.names.merge(d.want.Merge(withoutBridges(u)))
	}); err != nil {
		return err
	}
	if err := d.loadBridges(); err != nil {
		return err
	}
	for id, l := range d.state.Leases {
		if len(l.Overlays) > 0 && pinned(d.netns(id)) {
			d.setLocals(id, l, true)
			d.sandboxes[id] = &sandbox{id: id, lease: l}
		}
	}
	if err := d.answerFirst(); err != nil {
		d.cfg.Log.Warn("container cannot ask for names", slog.Any("error", err))
	}
	if err := d.converge(&drift{repair: true, repairs: d.metrics.repairs}); err != nil {
		d.broken = true
		d.cfg.Log.Warn("network not as it should be", slog.Any("error", err))
	}
	return d.save()
}

// answerFirst opens the resolvers of all sandboxes. Callers hold mu.
func (d *Dataplane) answerFirst() error {
	var errs []error
	for _, s := range d.sandboxes {
		err := withinPath(d.netns(s.id), func(ns netns.NsHandle) (err error) { s.dns, err = d.listen(ns, s); return err })
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Close ends the answering of names and frees what the process holds. The kernel keeps
// everything else, for the next process.
func (d *Dataplane) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range d.sandboxes {
		s.dns.close()
		s.dns = nil
	}
	for id, held := range d.reserved {
		for _, r := range held {
			r.close()
		}
		delete(d.reserved, id)
	}
	d.open(nil)
	if d.mesh.space != nil {
		d.mesh.space.close()
		d.mesh.space = nil
	}
	if d.fabric != nil {
		d.fabric.close()
		d.fabric = nil
	}
	for id, c := range d.crypts {
		c.close()
		delete(d.crypts, id)
	}
	d.host.Close()
	return d.hostNS.Close()
}

func (d *Dataplane) path() string { return filepath.Join(d.cfg.Dir, "leases.json") }

// attachmentsPath is the file with names of services and networks, which belong to the
// swarm and so must not lie on the disk of a manager that may be locked.
func (d *Dataplane) attachmentsPath() string { return filepath.Join(d.cfg.ExecDir, ".leases") }

func (d *Dataplane) load() error {
	d.state.Leases = map[string]lease{}
	data, err := os.ReadFile(d.path())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read leases: %w", err)
	}
	if err := json.Unmarshal(data, &d.state); err != nil {
		return fmt.Errorf("read leases %s: %w", d.path(), err)
	}
	if d.state.Leases == nil {
		d.state.Leases = map[string]lease{}
	}
	return d.loadAttachments()
}

// loadAttachments completes leases by what memory keeps of them.
func (d *Dataplane) loadAttachments() error {
	data, err := os.ReadFile(d.attachmentsPath())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read attachments: %w", err)
	}
	whole := map[string]lease{}
	if err := json.Unmarshal(data, &whole); err != nil {
		return fmt.Errorf("read attachments %s: %w", d.attachmentsPath(), err)
	}
	for id, l := range whole {
		if _, ok := d.state.Leases[id]; ok {
			d.state.Leases[id] = l
		}
	}
	return nil
}

// save writes the leases: to disk what does not say what they are for, and all of them to
// memory that a reboot clears with the namespaces. Callers hold mu.
func (d *Dataplane) save() error {
	d.publishAgain()
	whole, err := json.Marshal(d.state.Leases)
	if err != nil {
		return fmt.Errorf("write leases: %w", err)
	}
	lasting := state{Address: d.state.Address, Last: d.state.Last, Mesh: d.state.Mesh, Leases: make(map[string]lease, len(d.state.Leases))}
	for id, l := range d.state.Leases {
		lasting.Leases[id] = lease{Addr: l.Addr, Ports: l.Ports}
	}
	data, err := json.Marshal(lasting)
	if err != nil {
		return fmt.Errorf("write leases: %w", err)
	}
	if len(d.state.Leases) == 0 {
		err = os.Remove(d.attachmentsPath())
	} else {
		err = disk.WriteFile(d.attachmentsPath(), whole, 0o600)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return disk.WriteFile(d.path(), data, 0o600)
}

// Attach implements runtime.Network.
func (d *Dataplane) Attach(ctx context.Context, req runtime.SandboxRequest) (runtime.Sandbox, error) {
	var s runtime.Sandbox
	s.Nameservers, s.Search, s.Options = resolverSettings(req.Mode == "host")
	switch req.Mode {
	case "host":
		s.NetworkName = "host"
		return s, nil
	case "none":
		s.NetworkName, s.NetNS = "none", d.netns(req.ContainerID)
		return s, errors.Join(makeNamespace(s.NetNS), d.isolate(req.ContainerID))
	case "", "default", "bridge":
	default:
		return s, model.Errorf(model.NotFound, "network %s not found", req.Mode)
	}
	if len(req.Overlays) > 0 {
		if err := d.takePlaces(ctx, &req); err != nil {
			return s, err
		}
		s.Nameservers = []string{resolverAddr.String()}
		s.Options = append(slices.DeleteFunc(s.Options, func(o string) bool { return strings.HasPrefix(o, "ndots:") }), "ndots:0")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	had, known := d.state.Leases[req.ContainerID]
	l, err := d.lease(req)
	if err != nil {
		return s, err
	}
	if known {
		err = d.shed(req.ContainerID, had, l)
	}
	if err == nil {
		err = d.attach(req.ContainerID, l)
	}
	if err != nil {
		err = fmt.Errorf("connect container %s: %w", req.ContainerID, err)
		if !known {
			return s, errors.Join(err, d.drop(req.ContainerID))
		}
		return s, errors.Join(err, d.restore(req.ContainerID, had, l))
	}
	d.announce(req.ContainerID, l)
	s.NetNS, s.NetworkName, s.Ports = d.netns(req.ContainerID), "bridge", l.Ports
	s.Overlays, s.Attached = endpoints(l, req.ContainerID), l.Overlays
	if l.Addr.IsValid() {
		s.Endpoint = &network.EndpointSettings{
			NetworkID: d.bridge, EndpointID: req.ContainerID, Gateway: d.state.Address.Addr(), IPAddress: l.Addr,
			IPPrefixLen: d.state.Address.Bits(), MacAddress: network.HardwareAddr(mac(l.Addr)),
		}
	}
	return s, nil
}

// lease finds or makes what a container has, and saves it. Callers hold mu.
func (d *Dataplane) lease(req runtime.SandboxRequest) (lease, error) {
	l, known := d.state.Leases[req.ContainerID]
	had := l
	l.Name, l.Hostname, l.Overlays, l.DNS = "", "", nil, nil
	if len(req.Overlays) > 0 {
		l.Name, l.Hostname, l.Overlays, l.DNS = req.Name, req.Hostname, req.Overlays, req.DNS
	}
	want := req.Ports
	switch {
	case !req.Local && d.internal(req.Overlays):
		l.Addr = netip.Addr{}
		if len(want) > 0 {
			d.cfg.Log.Warn("ports are not published: the container is on internal networks only", slog.String("container_id", req.ContainerID))
			want = nil
		}
	case !l.Addr.IsValid():
		var err error
		if l.Addr, err = d.allocate(); err != nil {
			return l, err
		}
	}
	ports, fresh, err := d.reserve(req.ContainerID, mergePorts(l.Ports, want))
	if err != nil {
		return l, err
	}
	l.Ports, l.Interfaces = ports, l.interfaces(had)
	if known && !fresh && len(l.Overlays)+len(had.Overlays) == 0 {
		return l, nil
	}
	d.state.Leases[req.ContainerID] = l
	if l.Addr.IsValid() {
		d.state.Last = l.Addr
	}
	return l, d.save()
}

// internal reports whether no network of a container leads outside.
func (d *Dataplane) internal(overlays []runtime.OverlayRequest) bool {
	for _, o := range overlays {
		if !d.want.Network(o.NetworkID).GetInternal() {
			return false
		}
	}
	return len(overlays) > 0
}

// attach makes a container's namespace and connects it. Callers hold mu.
func (d *Dataplane) attach(id string, l lease) error {
	if err := makeNamespace(d.netns(id)); err != nil {
		return err
	}
	if l.Addr.IsValid() && !d.ready {
		if err := d.ensureBridge(&drift{repair: true}); err != nil {
			return err
		}
		d.ready = true
	}
	if len(l.Overlays) > 0 {
		if err := d.addOverlays(id, l); err != nil {
			return err
		}
	}
	if !l.Addr.IsValid() {
		return nil
	}
	err := d.join(id, l)
	if err != nil { // perhaps somebody removed our bridge or table since
		if err = d.ensureBridge(&drift{repair: true, repairs: d.metrics.repairs}); err == nil {
			err = d.join(id, l)
		}
	}
	return err
}

// join connects a container to the local network. Callers hold mu.
func (d *Dataplane) join(id string, l lease) error {
	if err := d.connect(id, l.Addr, l.interfaceOf(wayOut)); err != nil {
		return err
	}
	if len(l.Ports) == 0 {
		return nil
	}
	return d.publish(l, true)
}

// mergePorts keeps host ports that were chosen before.
func mergePorts(had, want []runtime.PortBinding) []runtime.PortBinding {
	out := slices.Clone(want)
	for i, p := range out {
		if p.HostPort != 0 {
			continue
		}
		for _, h := range had {
			if h.Protocol == p.Protocol && h.ContainerPort == p.ContainerPort && h.HostIP == p.HostIP {
				out[i].HostPort = h.HostPort
			}
		}
	}
	return out
}

// allocate returns a free address. Callers hold mu.
func (d *Dataplane) allocate() (netip.Addr, error) {
	prefix := d.state.Address.Masked()
	used := map[netip.Addr]bool{d.state.Address.Addr(): true, d.state.Mesh: true}
	for _, l := range d.state.Leases {
		used[l.Addr] = true
	}
	at, ok := nextFree(prefix, d.state.Last, used)
	if !ok {
		return at, model.Errorf(model.Exhausted, "no address is free in the local network %s; give the daemon a larger one with --bip", prefix)
	}
	return at, nil
}

// nextFree returns the first address of an IPv4 network after last that is not used, so that a
// freed one rests for as long as possible. Its own and the broadcast address never are.
func nextFree(p netip.Prefix, last netip.Addr, used map[netip.Addr]bool) (netip.Addr, bool) {
	at := last
	if !p.Contains(at) {
		at = p.Addr()
	}
	for range 1 << (32 - p.Bits()) {
		if at = at.Next(); !p.Contains(at) {
			at = p.Addr()
		}
		if !used[at] && at != p.Addr() && at != broadcast(p) {
			return at, true
		}
	}
	return netip.Addr{}, false
}

func broadcast(p netip.Prefix) netip.Addr {
	b := p.Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	return netip.AddrFrom4(b)
}

// Detach implements runtime.Network.
func (d *Dataplane) Detach(_ context.Context, containerID string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.drop(containerID)
}

// drop frees everything of a container. Callers hold mu.
func (d *Dataplane) drop(containerID string) error {
	l, known := d.state.Leases[containerID]
	var errs []error
	if known && len(l.Ports) > 0 {
		errs = append(errs, d.publish(l, false))
	}
	for _, r := range d.reserved[containerID] {
		r.close()
	}
	delete(d.reserved, containerID)
	if s := d.sandboxes[containerID]; s != nil {
		s.dns.close()
		delete(d.sandboxes, containerID)
	}
	errs = append(errs, removeNamespace(d.netns(containerID)))
	if known {
		delete(d.state.Leases, containerID)
		errs = append(errs, d.save())
	}
	if len(l.Overlays) > 0 {
		errs = append(errs, d.leave(containerID, l))
	}
	return errors.Join(errs...)
}

// leave takes a container out of its networks: what is elsewhere now is forwarded, and
// networks without containers go away. Callers hold mu.
func (d *Dataplane) leave(id string, l lease) error {
	errs := []error{d.retract(id, l.Overlays)}
	moved := d.setLocals(id, l, false)
	x := &drift{repair: true}
	for _, o := range l.Overlays {
		if n, c := d.want.Network(o.NetworkID), d.crypts[o.NetworkID]; n != nil && c != nil && c.routed {
			errs = append(errs, d.ensureCrypt(n, x), d.ensureRoutes(o.NetworkID, x))
		}
	}
	errs = append(errs, d.forward(moved, true), d.tidyCrypts(x))
	if d.fabric != nil {
		errs = append(errs, d.tidySwitch(x))
	}
	return errors.Join(append(errs, d.tidyESP(x))...)
}

// tidySwitch removes the networks that no container of this node is on, and the switch
// with the last one. Callers hold mu.
func (d *Dataplane) tidySwitch(x *drift) error {
	needed, _ := d.needed()
	if len(needed) == 0 {
		if !x.repair {
			return nil
		}
		return errors.Join(d.ensureMesh(&drift{repair: true}), d.closeSwitch())
	}
	return d.fabric.keepOnly(segmentNames(needed), x)
}

// Retain implements runtime.Network.
func (d *Dataplane) Retain(_ context.Context, containerIDs []string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for id := range d.state.Leases {
		if !slices.Contains(containerIDs, id) {
			errs = append(errs, d.drop(id))
		}
	}
	entries, err := os.ReadDir(d.cfg.ExecDir)
	if err != nil {
		return errors.Join(append(errs, fmt.Errorf("list namespaces: %w", err))...)
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") && !slices.Contains(containerIDs, e.Name()) {
			errs = append(errs, removeNamespace(d.netns(e.Name())))
		}
	}
	return errors.Join(errs...)
}

// Run compares the kernel with what should be there, now and then and when somebody
// removes tables of rules, and mends it, until ctx ends. Containers keep their network then.
func (d *Dataplane) Run(ctx context.Context) error {
	removed, watched := make(chan struct{}, 1), make(chan error, 1)
	go func() { watched <- d.watchTables(ctx, removed) }()
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			if watched != nil {
				return <-watched
			}
			return nil
		case err := <-watched: // what it would tell is found by the next check
			if watched = nil; err != nil {
				d.cfg.Log.LogAttrs(ctx, slog.LevelWarn, "removed tables are noticed only every ten seconds", slog.Any("error", err))
			}
			continue
		case <-tick.C:
		case <-d.ended:
		case <-removed:
		}
		d.check(ctx)
	}
}

// check compares and mends once.
func (d *Dataplane) check(ctx context.Context) {
	x := &drift{repair: true, repairs: d.metrics.repairs}
	d.mu.Lock()
	err := d.converge(x)
	d.broken = err != nil
	d.mu.Unlock()
	for _, text := range x.found {
		d.cfg.Log.LogAttrs(ctx, slog.LevelWarn, "network differed from the plan", slog.String("difference", text))
	}
	if err != nil {
		d.metrics.failed.Inc()
		d.cfg.Log.LogAttrs(ctx, slog.LevelWarn, "network not as it should be", slog.Any("error", err))
	}
}

// Destroy removes everything: bridges, links, tables and all namespaces.
func (d *Dataplane) Destroy(ctx context.Context) error {
	err := d.Retain(ctx, nil)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.want = netplan.NewState()
	return errors.Join(err, d.removeMesh(&drift{repair: true}), d.closeSwitch(), d.tidyCrypts(&drift{repair: true}), d.tidyESP(&drift{repair: true}), d.forgetESP(), d.journal.remove(),
		d.localRules().remove(d.hostNS), d.removeBridge())
}

// resolverSettings returns the host's resolver settings; inside a sandbox servers on loopback
// cannot be reached and are left out.
func resolverSettings(host bool) (servers, search, options []string) {
	for _, file := range []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"} {
		data, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		servers, search, options = parseResolvConf(string(data))
		if host {
			return servers, search, options
		}
		servers = slices.DeleteFunc(servers, func(s string) bool {
			addr, err := netip.ParseAddr(s)
			return err != nil || addr.IsLoopback()
		})
		if len(servers) > 0 {
			return servers, search, options
		}
	}
	return []string{"8.8.8.8", "8.8.4.4"}, search, options
}

// leases returns the local addresses of all containers.
func leases(m map[string]lease) []netip.Addr {
	out := make([]netip.Addr, 0, len(m))
	for _, l := range m {
		out = append(out, l.Addr)
	}
	return out
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
