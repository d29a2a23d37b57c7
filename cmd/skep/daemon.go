package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/skep-dev/skep/edge/cli"
	"github.com/skep-dev/skep/node"
	"github.com/skep-dev/skep/worker/runtime/containerd"
)

// runDaemon runs a node until ctx ends, with an engine on containerd.
func runDaemon(ctx context.Context, d cli.Daemon) (err error) {
	log, err := newLogger(os.Stderr, d.LogLevel, d.LogFormat)
	if err != nil {
		return err
	}
	hostname, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("start daemon: %w", err)
	}
	executable, err := os.Executable()
	if err != nil {
		return fmt.Errorf("start daemon: %w", err)
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	reload := make(chan struct{}, 1)
	go relaySignals(ctx, stop, reload)

	registry := prometheus.NewRegistry()
	engine, err := containerd.New(ctx, containerd.Config{
		Root: d.DataRoot, State: filepath.Join(d.ExecRoot, "containerd"), Address: d.Containerd, BinDir: filepath.Dir(executable),
		Runtime: d.Runtime, CgroupParent: d.CgroupParent, Log: log.With(slog.String("component", "runtime")), Registerer: registry,
	})
	if err != nil {
		return fmt.Errorf("start daemon: %w", err)
	}
	defer func() { err = errors.Join(err, engine.Close()) }()
	return node.Run(ctx, node.Config{
		DataRoot: d.DataRoot, ExecRoot: d.ExecRoot, Hosts: d.Hosts, TLSCert: d.TLSCert, TLSKey: d.TLSKey, TLSCACert: d.TLSCACert,
		AdvertiseAddr: d.AdvertiseAddr, ListenAddr: d.ListenAddr, Labels: d.Labels, MetricsAddr: d.MetricsAddr, StopTasks: d.StopTasks,
		Debug: d.LogLevel == "debug", Hostname: hostname, Version: version, Commit: commit, Engine: engine, Reload: reload,
		Log: log, Registry: registry,
	})
}

// relaySignals turns SIGHUP into a wish to read the configuration again, and SIGUSR1
// into the end of the daemon and its tasks.
func relaySignals(ctx context.Context, stop context.CancelCauseFunc, reload chan<- struct{}) {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGUSR1)
	defer signal.Stop(signals)
	for {
		select {
		case <-ctx.Done():
			return
		case s := <-signals:
			if s == syscall.SIGUSR1 {
				stop(node.ErrStopTasks)
				return
			}
			select {
			case reload <- struct{}{}:
			default: // one wish is pending already
			}
		}
	}
}

// newLogger returns a logger to w.
func newLogger(w io.Writer, level, format string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("read log level: %w", err)
	}
	o := &slog.HandlerOptions{Level: l}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, o)), nil
	}
	return slog.New(slog.NewTextHandler(w, o)), nil
}
