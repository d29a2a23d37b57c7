package node

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi"
	"github.com/skep-dev/skep/edge/dockerapi/local"
	"github.com/skep-dev/skep/platform/disk"
	"github.com/skep-dev/skep/platform/unlock"
	"github.com/skep-dev/skep/worker/runtime"
)

// shutdownTimeout bounds what requests may take to finish when the daemon stops.
const shutdownTimeout = 3 * time.Second

// Run is a whole daemon, from start until ctx ends. Containers keep running then, unless
// the configuration says otherwise. The caller holds the Lock of its directories.
func Run(ctx context.Context, cfg Config) error {
	if cfg.Registry == nil {
		cfg.Registry = prometheus.NewRegistry()
	}
	cfg.Registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	id, err := daemonID(cfg.DataRoot)
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	// The engine outlives the rest, which needs it to stop.
	engineCtx, stopEngine := context.WithCancel(context.WithoutCancel(ctx))
	engineDone := make(chan error, 1)
	go func() {
		err := cfg.Engine.Run(engineCtx)
		engineDone <- err
	}()
	defer func() {
		stopEngine()
		if err := <-engineDone; err != nil && !errors.Is(err, context.Canceled) {
			cfg.Log.Warn("container runtime ended", slog.Any("error", err))
		}
	}()
	roles, err := dockerapi.ParseRoleRules(cfg.Roles)
	if err != nil {
		return fmt.Errorf("read --api-role: %w", err)
	}
	stopAudit, err := startAudit(ctx, &cfg)
	if err != nil {
		return err
	}
	defer stopAudit()
	swarm, err := openMembership(ctx, &cfg)
	if err != nil {
		return err
	}
	cfg.Registry.MustRegister(newNodeFacts(swarm))
	facts := &daemonFacts{cfg: &cfg, id: id}
	endpoints := local.New(local.Config{Engine: cfg.Engine, Bridges: cfg.Bridges, Log: cfg.Log, DaemonID: id, DaemonName: cfg.Hostname})
	front := dockerapi.New(dockerapi.Config{
		Daemon: facts, Swarm: swarm, Manager: swarm, Backups: swarm, Local: endpoints, Log: cfg.Log, Registerer: cfg.Registry,
		Roles: roles, Audit: cfg.audit,
	})
	front.Register(endpoints.Register)
	group.Go(func() error { return endpoints.Run(ctx) })
	group.Go(func() error { return front.Run(ctx) })
	certs := &apiCerts{cfg: &cfg}
	if err := serve(ctx, group, &cfg, certs, front.Handler()); err != nil {
		return err
	}
	if cfg.MetricsAddr != "" {
		mux := http.NewServeMux()
		mux.Handle("GET /metrics", promhttp.HandlerFor(gatherer{cfg.Registry, swarm}, promhttp.HandlerOpts{}))
		if err := serveOn(ctx, group, "tcp", cfg.MetricsAddr, nil, mux); err != nil {
			return err
		}
	}
	group.Go(func() error { return reloads(ctx, &cfg, certs, endpoints) })
	if cfg.UnlockProvider != "" {
		provider, err := unlock.Parse(cfg.UnlockProvider)
		if err != nil {
			return err
		}
		group.Go(func() error { return swarm.unlockByProvider(ctx, provider) })
	}
	group.Go(func() error { return swarm.unlockByPeers(ctx) })
	group.Go(func() error {
		<-ctx.Done()
		swarm.stop()
		return nil
	})
	cfg.Log.Info("daemon is ready", slog.String("data_root", cfg.DataRoot), slog.Any("hosts", cfg.Hosts), slog.String("version", cfg.Version))
	err = group.Wait()
	if cfg.stopsTasks(ctx) {
		err = errors.Join(err, stopContainers(context.WithoutCancel(ctx), &cfg))
	}
	cfg.Log.Info("daemon stopped")
	return err
}

// stopContainers stops every running container by its signal and grace period.
func stopContainers(ctx context.Context, cfg *Config) error {
	return eachContainer(ctx, cfg, func(c *container.InspectResponse) error {
		if c.State == nil || !c.State.Running {
			return nil
		}
		if err := cfg.Engine.Stop(ctx, c.ID, "", nil); err != nil && !errors.Is(err, runtime.ErrNotModified) {
			return err
		}
		return nil
	})
}

// reloads answers wishes to read the configuration again: the files that flags name,
// which are those of the API's certificates. What cannot be read stays as it was.
func reloads(ctx context.Context, cfg *Config, certs *apiCerts, endpoints *local.API) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-cfg.Reload:
			if err := certs.reload(); err != nil {
				cfg.Log.Error("configuration not read again", slog.Any("error", err))
				continue
			}
			cfg.Log.Info("configuration read again")
			endpoints.Reloaded()
		}
	}
}

// serve opens the API's listeners.
func serve(ctx context.Context, group *errgroup.Group, cfg *Config, certs *apiCerts, handler http.Handler) error {
	for _, listen := range cfg.Listeners {
		serveListener(ctx, group, listen, handler)
	}
	for _, host := range cfg.Hosts {
		network, addr, ok := strings.Cut(host, "://")
		if !ok {
			return model.Errorf(model.Invalid, "host %q must be unix://PATH or tcp://HOST:PORT", host)
		}
		var config *tls.Config
		switch network {
		case "unix":
			if err := removeSocket(addr); err != nil {
				return err
			}
		case "tcp":
			if cfg.Clear || cfg.AnyClient {
				cfg.Log.Warn("whoever reaches this address is root on this machine", slog.String("host", host))
			}
			if cfg.Clear {
				break
			}
			if err := certs.read(); err != nil {
				return err
			}
			config = certs.server()
		default:
			return model.Errorf(model.Invalid, "host %q must be unix://PATH or tcp://HOST:PORT", host)
		}
		if err := serveOn(ctx, group, network, addr, config, handler); err != nil {
			return err
		}
	}
	return nil
}

// serveOn serves HTTP on one address until ctx ends.
func serveOn(ctx context.Context, group *errgroup.Group, network, addr string, config *tls.Config, handler http.Handler) error {
	if network == "unix" {
		if err := os.MkdirAll(filepath.Dir(addr), 0o711); err != nil {
			return fmt.Errorf("listen on %s: %w", addr, err)
		}
	}
	var lc net.ListenConfig
	listen, err := lc.Listen(ctx, network, addr)
	if err != nil {
		return fmt.Errorf("listen on %s: %w", addr, err)
	}
	if network == "unix" {
		if err := restrict(addr); err != nil {
			return fmt.Errorf("listen on %s: %w", addr, err)
		}
	}
	if config != nil {
		listen = tls.NewListener(listen, config)
	}
	serveListener(ctx, group, listen, handler)
	return nil
}

// serveListener serves HTTP on a listener until ctx ends, and closes it.
func serveListener(ctx context.Context, group *errgroup.Group, listen net.Listener, handler http.Handler) {
	// Streams end with the daemon, not with their clients.
	base, cancel := context.WithCancel(context.WithoutCancel(ctx))
	server := &http.Server{
		Handler: handler, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 10 * time.Minute,
		BaseContext: func(net.Listener) context.Context { return base },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if who := localPeer(c); who != "" {
				return dockerapi.WithPeer(ctx, who)
			}
			return ctx
		},
	}
	group.Go(func() error {
		defer cancel()
		if err := server.Serve(listen); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve %s: %w", listen.Addr(), err)
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		cancel()
		stop, done := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer done()
		if err := server.Shutdown(stop); err != nil {
			return server.Close()
		}
		return nil
	})
}

// restrict leaves a socket to root and to the group docker where the machine has one, as
// Docker does.
func restrict(socket string) error {
	if group, err := user.LookupGroup("docker"); err == nil {
		gid, err := strconv.Atoi(group.Gid)
		if err == nil {
			err = os.Chown(socket, 0, gid)
		}
		if err != nil {
			return fmt.Errorf("give it to the group docker: %w", err)
		}
	}
	return os.Chmod(socket, 0o660)
}

// removeSocket deletes what a killed daemon left; a live one is refused.
func removeSocket(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("listen on %s: %w", path, err)
	}
	if info.Mode()&fs.ModeSocket == 0 {
		return model.Errorf(model.Invalid, "%s exists and is no socket", path)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil { //nolint:noctx // local and bounded
		_ = c.Close()
		return model.Errorf(model.Conflict, "another daemon listens on %s", path)
	}
	return os.Remove(path)
}

// daemonFacts implements dockerapi.Daemon.
type daemonFacts struct {
	cfg *Config
	id  string
}

// Facts tells what the daemon is.
func (d *daemonFacts) Facts() dockerapi.Facts {
	return dockerapi.Facts{
		ID: d.id, Name: d.cfg.Hostname, RootDir: d.cfg.DataRoot,
		Version: d.cfg.Version, Commit: d.cfg.Commit, BuildTime: d.cfg.BuildTime, Labels: d.cfg.Labels, Debug: d.cfg.Debug,
		InsecureRegistries: d.cfg.InsecureRegistries,
	}
}

// daemonID returns the daemon's own id, made at its first start.
func daemonID(dir string) (string, error) {
	path := filepath.Join(dir, "engine-id")
	data, err := os.ReadFile(path)
	if err == nil && len(data) > 0 {
		return strings.TrimSpace(string(data)), nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("read daemon id: %w", err)
	}
	id, err := model.NewID(rand.Reader)
	if err != nil {
		return "", err
	}
	return id, disk.WriteFile(path, []byte(id+"\n"), 0o600)
}
