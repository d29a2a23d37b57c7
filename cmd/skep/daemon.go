package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"

	ctdlog "github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/cli"
	"github.com/skep-dev/skep/node"
	"github.com/skep-dev/skep/worker/agent"
	"github.com/skep-dev/skep/worker/dataplane"
	"github.com/skep-dev/skep/worker/gossip"
	"github.com/skep-dev/skep/worker/runtime/containerd"
)

// runDaemon is `skep daemon`: it builds the parts that are chosen by flags and runs the
// node until ctx ends.
func runDaemon(ctx context.Context, d cli.Daemon) error {
	log, err := logger(d)
	if err != nil {
		return err
	}
	// The memory holds keys and secrets: no core dump of it, and no look into it but root's.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	hostname, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("find host name: %w", err)
	}
	executable, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find own program: %w", err)
	}
	var bridge netip.Prefix
	if d.BridgeIP != "" {
		if bridge, err = netip.ParsePrefix(d.BridgeIP); err != nil || !bridge.Addr().Is4() {
			return model.Errorf(model.Invalid, "--bip %q must be an IPv4 address with its prefix, like 172.30.0.1/16", d.BridgeIP)
		}
	}
	// containerd's client tells every attempt at a registry; errors reach us anyway.
	if err := ctdlog.SetLevel("warn"); err != nil {
		return fmt.Errorf("set log level: %w", err)
	}
	release, err := node.Lock(d.DataRoot, d.ExecRoot)
	if err != nil {
		return err
	}
	defer release()
	registry := prometheus.NewRegistry()
	network, err := dataplane.New(dataplane.Config{
		Dir: filepath.Join(d.DataRoot, "network"), ExecDir: filepath.Join(d.ExecRoot, "netns"), Address: bridge, Log: log, Registerer: registry,
		WireGuard: []string{executable, cli.WireGuardCommand},
	})
	if err != nil {
		return err
	}
	attachments := agent.NewAttachments(network, network)
	engine, err := containerd.New(ctx, containerd.Config{
		Root: d.DataRoot, State: filepath.Join(d.ExecRoot, "c"), Address: d.Containerd, BinDir: filepath.Dir(executable),
		Namespace: namespace(d), Runtime: d.Runtime, CgroupParent: d.CgroupParent, InsecureRegistries: d.Insecure,
		Network: attachments, Log: log, Registerer: registry,
	})
	if err != nil {
		return err
	}
	reload := make(chan struct{}, 1)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go relaySignals(ctx, cancel, reload)
	gossiped := gossip.New(gossip.Config{Log: log, Registerer: registry})
	checked := make(chan error, 1)
	go func() {
		var group errgroup.Group
		group.Go(func() error { return network.Run(ctx) })
		group.Go(func() error { return network.Publish(ctx, gossiped) })
		group.Go(func() error { return gossiped.Run(ctx) })
		checked <- group.Wait()
	}()
	err = node.Run(ctx, node.Config{
		DataRoot: d.DataRoot, ExecRoot: d.ExecRoot, UnlockProvider: d.UnlockProvider, Hosts: d.Hosts,
		TLSCert: d.TLSCert, TLSKey: d.TLSKey, TLSCACert: d.TLSCACert,
		AnyClient: !d.TLSVerify, Clear: !d.TLS, Roles: d.Roles,
		AdvertiseAddr: d.AdvertiseAddr, ListenAddr: d.ListenAddr, Labels: d.Labels, Abilities: network.Labels, AbilitiesChanged: network.LabelsChanged(),
		MetricsAddr: d.MetricsAddr, StopTasks: d.StopTasks, Debug: d.LogLevel == "debug", Hostname: hostname, Version: version, Commit: commit, BuildTime: buildTime(),
		InsecureRegistries: d.Insecure, Engine: engine, Networks: network, Gossip: gossiped, Attachments: attachments, Bridges: network, Reload: reload, Log: log, Registry: registry,
	})
	withTasks := d.StopTasks || errors.Is(context.Cause(ctx), node.ErrStopTasks)
	cancel(nil)
	err = errors.Join(err, <-checked)
	if withTasks {
		err = errors.Join(err, network.Destroy(context.WithoutCancel(ctx)))
	}
	return errors.Join(err, network.Close())
}

// namespace returns the daemon's namespace in containerd. One that it shares with others
// may serve several daemons, each of which would remove what it does not know.
func namespace(d cli.Daemon) string {
	if d.Containerd == "" {
		return "skep"
	}
	sum := sha256.Sum256([]byte(filepath.Clean(d.DataRoot)))
	return "skep-" + hex.EncodeToString(sum[:4])
}

// buildTime returns the time of the commit that the program was built from.
func buildTime() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.time" {
			return s.Value
		}
	}
	return ""
}

// relaySignals turns SIGHUP into a wish to read the configuration again, and SIGUSR1
// into the end of the daemon with its tasks, until ctx ends.
func relaySignals(ctx context.Context, cancel context.CancelCauseFunc, reload chan<- struct{}) {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGUSR1)
	defer signal.Stop(signals)
	for {
		select {
		case <-ctx.Done():
			return
		case s := <-signals:
			if s == syscall.SIGUSR1 {
				cancel(node.ErrStopTasks)
				return
			}
			select {
			case reload <- struct{}{}:
			default: // one wish is pending already
			}
		}
	}
}

func logger(d cli.Daemon) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(d.LogLevel)); err != nil {
		return nil, model.Errorf(model.Invalid, "--log-level %q must be debug, info, warn or error", d.LogLevel)
	}
	options := &slog.HandlerOptions{Level: level}
	switch d.LogFormat {
	case "json":
		return slog.New(slog.NewJSONHandler(os.Stderr, options)), nil
	case "", "text":
		return slog.New(slog.NewTextHandler(os.Stderr, options)), nil
	default:
		return nil, model.Errorf(model.Invalid, "--log-format %q must be text or json", d.LogFormat)
	}
}
