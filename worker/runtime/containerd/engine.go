package containerd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	ctd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/moby/moby/api/types/events"
	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/bbolt"
	"golang.org/x/sync/errgroup"

	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/runtime/docker"
)

const (
	snapshotter = "overlayfs"
	// parallel is how many starts, and how many exits, are worked on at a time: more
	// only wait for one another.
	parallel = 8
)

// Config says where an engine lives and what it uses. Root and BinDir must be set.
type Config struct {
	// Root holds what must survive a reboot: images, records, logs, volumes.
	Root string
	// State holds sockets and what dies with the machine. Keep it short: a socket's
	// path has at most 108 bytes. Empty is Root/run.
	State string
	// Address is the socket of a running containerd. Empty means to supervise our own.
	Address string
	// BinDir holds containerd, containerd-shim-skep-v1 and skep-init.
	BinDir string
	// Namespace is containerd's namespace; empty is "skep".
	Namespace string
	// Runtime is "crun", "runc" or empty: crun if it passes a test, else runc.
	Runtime string
	// CgroupParent is the cgroup under which containers get theirs; empty is "/skep".
	CgroupParent string
	// GroupSize is the most containers one shim serves; zero is 48.
	GroupSize int
	// InsecureRegistries may speak plain HTTP or show any certificate: each is a host,
	// host:port or network in CIDR notation.
	InsecureRegistries []string
	// Network connects containers; nil gives every container an empty network
	// namespace, except those of mode "host".
	Network runtime.Network
	// Init makes containers that do not say get an init process.
	Init bool
	Log  *slog.Logger
	// Registerer may be nil.
	Registerer prometheus.Registerer
}

// Engine runs containers.
type Engine struct {
	cfg     Config
	log     *slog.Logger
	bus     docker.Bus
	metrics *metrics
	db      *bbolt.DB
	child   *child // nil when containerd is not ours
	client  *ctd.Client
	oci     ociRuntime
	bpf     *filterCache
	bootID  string
	groups  *groups
	starts  chan struct{} // a slot for each start in progress
	exits   chan struct{} // a slot for each exit in progress
	images  *imageStore
	life    context.Context //nolint:containedctx // ends with Close; for work that outlives its caller
	end     context.CancelFunc
	wg      sync.WaitGroup // goroutines that outlive their caller

	mu         sync.Mutex
	index      *docker.Index
	containers map[string]*record
	execs      map[string]*execRecord
	volumes    map[string]*volumeRecord
	closed     bool
	keys       runtime.Keys // nil before Unseal
	lastKeys   [][]byte     // as keys told last
}

var (
	_ runtime.Engine = (*Engine)(nil)
	_ runtime.Sealer = (*Engine)(nil)
)

// New opens an engine: it makes sure that containerd runs, chooses the OCI runtime and
// loads the records. Containers are looked after once Run runs.
func New(ctx context.Context, cfg Config) (_ *Engine, err error) {
	if cfg.State == "" {
		cfg.State = filepath.Join(cfg.Root, "run")
	}
	if cfg.Namespace == "" {
		cfg.Namespace = "skep"
	}
	if cfg.CgroupParent == "" {
		cfg.CgroupParent = "/skep"
	}
	if cfg.GroupSize <= 0 {
		cfg.GroupSize = 48
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	life, end := context.WithCancel(context.WithoutCancel(ctx)) // Close ends it, not the caller of New
	e := &Engine{
		cfg: cfg, log: cfg.Log,
		starts: make(chan struct{}, parallel), exits: make(chan struct{}, parallel),
		life: namespaces.WithNamespace(life, cfg.Namespace), end: end,
		index: docker.NewIndex(), containers: map[string]*record{},
		execs: map[string]*execRecord{}, volumes: map[string]*volumeRecord{},
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.Close())
		}
	}()
	if e.metrics, err = newMetrics(cfg.Registerer); err != nil {
		return nil, err
	}
	for _, dir := range []string{cfg.Root, cfg.State, e.containerDir(""), e.volumeDir(""), e.stateDir("f"), e.stateDir("a"), e.stateDir("s"), e.stateDir("x"), e.stateDir("m")} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return nil, fmt.Errorf("make runtime directories: %w", err)
		}
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("read boot id: %w", err)
	}
	e.bootID = string(boot)
	if err := e.sweepMounts(); err != nil {
		return nil, err
	}
	if e.db, err = openDB(filepath.Join(cfg.Root, "containers.db")); err != nil {
		return nil, err
	}
	if e.oci, err = chooseRuntime(ctx, cfg); err != nil {
		return nil, err
	}
	e.bpf = newFilterCache(filepath.Join(cfg.Root, "seccomp"), e.oci)
	address := cfg.Address
	if address == "" {
		e.child = newChild(cfg, e.oci)
		if err := e.child.ensure(ctx); err != nil {
			return nil, err
		}
		address = e.child.address
	}
	e.client, err = ctd.New(address, ctd.WithDefaultNamespace(cfg.Namespace), ctd.WithTimeout(20*time.Second))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd at %s: %w", address, err)
	}
	e.groups = newGroups(e)
	e.images = newImageStore(e)
	if err := e.load(); err != nil {
		return nil, err
	}
	if err := e.reconcile(e.life, true); err != nil {
		return nil, err
	}
	return e, nil
}

// Run implements runtime.Engine. When it returns, the engine is closed.
func (e *Engine) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(namespaces.WithNamespace(ctx, e.cfg.Namespace))
	if e.child != nil {
		g.Go(func() error { return e.child.supervise(ctx, e.log, e.metrics.restarts.Inc) })
	}
	g.Go(func() error { return e.watch(ctx) })
	g.Go(func() error { return e.groups.reap(ctx) })
	<-ctx.Done()
	err := g.Wait()
	return errors.Join(err, e.Close())
}

// Close frees everything but the containers and containerd, which run on.
func (e *Engine) Close() error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil
	}
	e.closed = true
	for _, c := range e.containers {
		if c.timer != nil {
			c.timer.Stop()
		}
	}
	e.mu.Unlock()
	e.end()
	e.wg.Wait()
	var errs []error
	if e.client != nil {
		errs = append(errs, e.client.Close())
	}
	if e.db != nil {
		errs = append(errs, e.db.Close())
	}
	if e.metrics != nil {
		e.metrics.unregister()
	}
	return errors.Join(errs...)
}

// background runs f in a goroutine that Close waits for. It is not run after Close.
func (e *Engine) background(f func(ctx context.Context)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return
	}
	e.wg.Go(func() { f(e.life) })
}

// ns gives ctx our namespace.
func (e *Engine) ns(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, e.cfg.Namespace)
}

func (e *Engine) containerDir(id string) string { return filepath.Join(e.cfg.Root, "containers", id) }

func (e *Engine) stateDir(name string) string { return filepath.Join(e.cfg.State, name) }

// Events implements runtime.Inspector.
func (e *Engine) Events(ctx context.Context) (<-chan events.Message, <-chan error) {
	return e.bus.Subscribe(ctx)
}
