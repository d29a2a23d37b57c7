// Package dataplane gives the containers of a node their network: a namespace each, a
// local bridge with addresses and a way out by NAT, and ports published on the host.
//
// The kernel is the truth and a small file remembers who has which address. One mutex
// guards both; every method may be called from any goroutine and twice. Only our own
// bridge, links and nftables table are ever touched. Overlay networks are to come.
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
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/moby/moby/api/types/network"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/platform/disk"
	"github.com/skep-dev/skep/worker/runtime"
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
}

// Dataplane implements runtime.Network.
type Dataplane struct {
	cfg    Config
	bridge string

	mu       sync.Mutex
	state    state
	reserved map[string][]*reservation // by container id
}

// state is what leases.json holds.
type state struct {
	// Address is the bridge's.
	Address netip.Prefix
	// Last is the address handed out last; the next comes after it, so that a freed one
	// rests for as long as possible.
	Last   netip.Addr
	Leases map[string]lease // by container id
}

// lease is what one container has.
type lease struct {
	Addr  netip.Addr
	Ports []runtime.PortBinding
}

// New returns a Dataplane that has found what a former process left.
func New(cfg Config) (*Dataplane, error) {
	d := &Dataplane{cfg: cfg, bridge: cfg.Bridge, reserved: map[string][]*reservation{}}
	if d.bridge == "" {
		sum := sha256.Sum256([]byte(cfg.Dir))
		d.bridge = "skep" + hex.EncodeToString(sum[:4])
	}
	for _, dir := range []string{cfg.Dir, cfg.ExecDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("set up network: %w", err)
		}
	}
	if err := d.load(); err != nil {
		return nil, err
	}
	switch {
	case cfg.Address.IsValid():
		d.state.Address = cfg.Address
	case !d.state.Address.IsValid():
		if err := d.claimNetwork(); err != nil {
			return nil, err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for id, l := range d.state.Leases {
		if _, _, err := d.reserve(id, l.Ports); err != nil {
			cfg.Log.Warn("published port not held", slog.String("container_id", id), slog.Any("error", err))
		}
	}
	return d, d.save()
}

func (d *Dataplane) path() string { return filepath.Join(d.cfg.Dir, "leases.json") }

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
	return nil
}

// save writes the leases. Callers hold mu.
func (d *Dataplane) save() error {
	data, err := json.Marshal(d.state)
	if err != nil {
		return fmt.Errorf("write leases: %w", err)
	}
	return disk.WriteFile(d.path(), data, 0o600)
}

// Attach implements runtime.Network.
func (d *Dataplane) Attach(_ context.Context, req runtime.SandboxRequest) (runtime.Sandbox, error) {
	var s runtime.Sandbox
	s.Nameservers, s.Search, s.Options = resolver(req.Mode == "host")
	switch req.Mode {
	case "host":
		s.NetworkName = "host"
		return s, nil
	case "none":
		s.NetworkName, s.NetNS = "none", d.netns(req.ContainerID)
		return s, d.makeNamespace(req.ContainerID)
	case "", "default", "bridge":
	default:
		return s, model.Errorf(model.NotFound, "network %s not found", req.Mode)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.ensureBridge(); err != nil {
		return s, err
	}
	l, known := d.state.Leases[req.ContainerID]
	if !known {
		var err error
		if l.Addr, err = d.allocate(); err != nil {
			return s, err
		}
	}
	ports, fresh, err := d.reserve(req.ContainerID, mergePorts(l.Ports, req.Ports))
	if err != nil {
		return s, err
	}
	l.Ports = ports
	if !known || fresh {
		d.state.Leases[req.ContainerID], d.state.Last = l, l.Addr
		if err := d.save(); err != nil {
			return s, err
		}
	}
	err = d.connect(req.ContainerID, l.Addr)
	if err == nil && len(l.Ports) > 0 {
		err = d.publish(l, true)
	}
	if err != nil {
		return s, errors.Join(fmt.Errorf("connect container %s: %w", req.ContainerID, err), d.drop(req.ContainerID))
	}
	s.NetNS, s.NetworkName, s.Ports = d.netns(req.ContainerID), "bridge", l.Ports
	s.Endpoint = &network.EndpointSettings{
		NetworkID: d.bridge, EndpointID: req.ContainerID, Gateway: d.state.Address.Addr(), IPAddress: l.Addr,
		IPPrefixLen: d.state.Address.Bits(), MacAddress: network.HardwareAddr(mac(l.Addr)),
	}
	return s, nil
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
	used := map[netip.Addr]bool{d.state.Address.Addr(): true, prefix.Addr(): true, broadcast(prefix): true}
	for _, l := range d.state.Leases {
		used[l.Addr] = true
	}
	at := d.state.Last
	if !at.IsValid() || !prefix.Contains(at) {
		at = prefix.Addr()
	}
	for range 1 << (32 - prefix.Bits()) {
		if at = at.Next(); !prefix.Contains(at) {
			at = prefix.Addr()
		}
		if !used[at] {
			return at, nil
		}
	}
	return netip.Addr{}, model.Errorf(model.Exhausted, "no address is free in the local network %s; give the daemon a larger one with --bip", prefix)
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
	errs = append(errs, d.removeNamespace(containerID))
	if known {
		delete(d.state.Leases, containerID)
		errs = append(errs, d.save())
	}
	return errors.Join(errs...)
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
		if !slices.Contains(containerIDs, e.Name()) {
			errs = append(errs, d.removeNamespace(e.Name()))
		}
	}
	return errors.Join(errs...)
}

// Run compares the kernel with what should be there, now and then, and mends it, until ctx
// ends. Containers keep their network then.
func (d *Dataplane) Run(ctx context.Context) error {
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		d.mu.Lock()
		var err error
		if len(d.state.Leases) > 0 {
			err = d.ensureBridge()
		}
		d.mu.Unlock()
		if err != nil {
			d.cfg.Log.Warn("local network not as it should be", slog.Any("error", err))
		}
	}
}

// Destroy removes the bridge, the table and all namespaces.
func (d *Dataplane) Destroy(ctx context.Context) error {
	err := d.Retain(ctx, nil)
	d.mu.Lock()
	defer d.mu.Unlock()
	return errors.Join(err, d.removeTable(), d.removeBridge())
}

// resolver returns the host's resolver settings; inside a sandbox servers on loopback
// cannot be reached and are left out.
func resolver(host bool) (servers, search, options []string) {
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
