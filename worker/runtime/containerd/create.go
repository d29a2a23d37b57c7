package containerd

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/runtime/docker"
)

// rootMount is one mount that makes up a container's root file system.
type rootMount = mount.Mount

// gcRoot keeps a snapshot from containerd's garbage collection, from its first moment on.
const gcRoot = "containerd.io/gc.root"

// Create implements runtime.Containers.
func (e *Engine) Create(ctx context.Context, opts runtime.CreateOptions) (_ string, _ []string, err error) {
	start := time.Now()
	defer func() { e.metrics.observe("create", start, err) }()
	ctx = e.ns(ctx)
	img, err := e.images.resolve(ctx, opts.Config.Image)
	if err != nil {
		return "", nil, err
	}
	host := &container.HostConfig{}
	if opts.HostConfig != nil {
		*host = *opts.HostConfig
	}
	cfg := docker.Merge(opts.Config, &img.config.Config)
	warnings, err := e.validate(cfg, host, opts)
	if err != nil {
		return "", nil, err
	}
	id, name, err := e.reserve(opts.Name)
	if err != nil {
		return "", nil, err
	}
	overlays, bridged, err := wantedNetworks(host.NetworkMode, opts.Networking)
	if err != nil {
		return "", nil, err
	}
	c := newRecord(saved{
		ID: id, Name: name, Created: time.Now().UTC(), ImageID: img.id, Config: cfg, Host: host,
		Status: container.StateCreated, HasFiles: len(opts.Files) > 0, Overlays: overlays, OnBridge: bridged,
	})
	if cfg.Hostname == "" {
		cfg.Hostname = id[:12]
		if host.NetworkMode.IsHost() || host.UTSMode.IsHost() {
			if name, err := os.Hostname(); err == nil {
				cfg.Hostname = name
			}
		}
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.uncreate(context.WithoutCancel(ctx), c))
		}
	}()
	if c.rootfs, err = e.client.SnapshotService(snapshotter).Prepare(ctx, id, img.chain,
		snapshots.WithLabels(map[string]string{gcRoot: time.Now().UTC().Format(time.RFC3339)})); err != nil {
		if errdefs.IsNotFound(err) {
			return "", nil, model.Errorf(model.Internal, "image %s is not unpacked: %w", cfg.Image, err)
		}
		return "", nil, fmt.Errorf("prepare root file system: %w", err)
	}
	if err := os.MkdirAll(e.containerDir(id), 0o710); err != nil {
		return "", nil, fmt.Errorf("make container directory: %w", err)
	}
	if c.Mounts, c.Anon, err = e.resolveMounts(ctx, c); err != nil {
		return "", nil, err
	}
	if c.HasFiles {
		if err := e.writeFiles(c, opts.Files); err != nil {
			return "", nil, err
		}
	}
	if err := e.save(c.saved); err != nil {
		return "", nil, err
	}
	e.mu.Lock()
	e.containers[id] = c
	e.mu.Unlock()
	e.emit(c, events.ActionCreate)
	return id, warnings, nil
}

// reserve chooses an id and takes the name.
func (e *Engine) reserve(name string) (string, string, error) {
	id, err := docker.NewContainerID(rand.Reader)
	if err != nil {
		return "", "", err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	name = strings.TrimPrefix(name, "/")
	if name == "" {
		name, err = docker.GenerateName(rand.Reader, e.index.HasName)
	} else {
		err = docker.ValidateName(name)
	}
	if err != nil {
		return "", "", err
	}
	return id, name, e.index.Add(id, name)
}

// uncreate takes back what Create did before it failed.
func (e *Engine) uncreate(ctx context.Context, c *record) error {
	err := e.discard(ctx, c)
	for _, v := range c.Anon {
		if verr := e.RemoveVolume(ctx, v, true); verr != nil {
			err = errors.Join(err, verr)
		}
	}
	e.mu.Lock()
	e.index.Remove(c.id)
	e.mu.Unlock()
	return err
}

// discard removes a container's snapshot, files and record.
func (e *Engine) discard(ctx context.Context, c *record) error {
	var errs []error
	if err := e.client.SnapshotService(snapshotter).Remove(ctx, c.id); err != nil && !errdefs.IsNotFound(err) {
		errs = append(errs, fmt.Errorf("remove root file system: %w", err))
	}
	if err := e.dropFiles(c.id); err != nil {
		errs = append(errs, err)
	}
	if err := os.RemoveAll(e.containerDir(c.id)); err != nil {
		errs = append(errs, fmt.Errorf("remove container directory: %w", err))
	}
	if err := e.forget(containerBucket, c.id); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// validate refuses what cannot be done and completes host with defaults.
func (e *Engine) validate(cfg *container.Config, host *container.HostConfig, opts runtime.CreateOptions) ([]string, error) {
	if len(docker.Argv(cfg)) == 0 {
		return nil, model.Errorf(model.Invalid, "no command specified")
	}
	if cfg.WorkingDir != "" && !strings.HasPrefix(cfg.WorkingDir, "/") {
		return nil, model.Errorf(model.Invalid, "the working directory '%s' is invalid, it needs to be an absolute path", cfg.WorkingDir)
	}
	if cfg.StopSignal != "" {
		if _, err := docker.ParseSignal(cfg.StopSignal); err != nil {
			return nil, err
		}
	}
	for _, env := range cfg.Env {
		if env == "" || env[0] == '=' {
			return nil, model.Errorf(model.Invalid, "invalid environment variable: %s", env)
		}
	}
	if h := cfg.Healthcheck; h != nil {
		for _, d := range []struct {
			name  string
			value time.Duration
		}{{"Interval", h.Interval}, {"Timeout", h.Timeout}, {"StartPeriod", h.StartPeriod}, {"StartInterval", h.StartInterval}} {
			if d.value != 0 && d.value < container.MinimumDuration {
				return nil, model.Errorf(model.Invalid, "%s in Healthcheck cannot be less than %s", d.name, container.MinimumDuration)
			}
		}
		if h.Retries < 0 {
			return nil, model.Errorf(model.Invalid, "Retries in Healthcheck cannot be negative")
		}
	}
	if err := container.ValidateRestartPolicy(host.RestartPolicy); err != nil {
		return nil, model.Wrap(model.Invalid, err, "check restart policy")
	}
	if host.AutoRemove && !host.RestartPolicy.IsNone() {
		return nil, model.Errorf(model.Invalid, "can't create 'AutoRemove' container with restart policy")
	}
	if _, err := logOptions(host.LogConfig); err != nil {
		return nil, err
	}
	overlays, _, err := wantedNetworks(host.NetworkMode, opts.Networking)
	if err != nil {
		return nil, err
	}
	if len(overlays) > 0 && e.cfg.Network == nil {
		return nil, model.Errorf(model.NotFound, "network %s not found", overlays[0].Name)
	}
	if host.Runtime != "" && host.Runtime != e.oci.name && host.Runtime != "io.containerd.runc.v2" {
		return nil, model.Errorf(model.Invalid, "unknown or invalid runtime name: %s", host.Runtime)
	}
	if len(host.Links) > 0 {
		return nil, model.Errorf(model.Unimplemented, "legacy container links are not implemented by skep")
	}
	if len(host.DeviceRequests) > 0 {
		return nil, model.Errorf(model.Unimplemented, "device requests are not implemented by skep")
	}
	if !host.UsernsMode.Valid() {
		return nil, model.Errorf(model.Invalid, "invalid user namespace or isolation mode")
	}
	warnings, err := e.validateResources(host)
	if err != nil {
		return nil, err
	}
	if host.LogConfig.Type == "" {
		host.LogConfig = container.LogConfig{Type: "json-file", Config: maps.Clone(host.LogConfig.Config)}
	}
	if host.ShmSize == 0 {
		host.ShmSize = 64 << 20
	}
	if host.ShmSize < 0 {
		return nil, model.Errorf(model.Invalid, "SHM size can not be less than 0")
	}
	if host.NetworkMode == "" {
		host.NetworkMode = "bridge"
	}
	host.Binds = slices.Clone(host.Binds)
	if _, err := capabilities(host); err != nil {
		return nil, err
	}
	if _, err := securityOptions(host); err != nil {
		return nil, err
	}
	return warnings, nil
}

// validateResources checks limits.
func (e *Engine) validateResources(host *container.HostConfig) ([]string, error) {
	r := &host.Resources
	var warnings []string
	const minMemory = 6 << 20
	switch {
	case r.Memory != 0 && r.Memory < minMemory:
		return nil, model.Errorf(model.Invalid, "Minimum memory limit allowed is 6MB")
	case r.Memory == 0 && r.MemorySwap > 0:
		return nil, model.Errorf(model.Invalid, "You should always set the Memory limit when using Memoryswap limit, see usage")
	case r.MemorySwap > 0 && r.MemorySwap < r.Memory:
		return nil, model.Errorf(model.Invalid, "Minimum memoryswap limit should be larger than memory limit, see usage")
	case r.Memory > 0 && r.MemoryReservation > r.Memory:
		return nil, model.Errorf(model.Invalid, "Minimum memory limit can not be less than memory reservation limit, see usage")
	case r.NanoCPUs != 0 && (r.CPUPeriod != 0 || r.CPUQuota != 0):
		return nil, model.Errorf(model.Invalid, "Conflicting options: Nano CPUs and CPU Period or Quota cannot both be set.")
	case r.NanoCPUs < 0 || r.NanoCPUs > int64(cpus())*1e9:
		return nil, model.Errorf(model.Invalid, "range of CPUs is from 0.01 to %d.00, as there are only %d CPUs available", cpus(), cpus())
	case host.OomScoreAdj < -1000 || host.OomScoreAdj > 1000:
		return nil, model.Errorf(model.Invalid, "Invalid value %d, range for oom score adj is [-1000, 1000]", host.OomScoreAdj)
	}
	warnings = append(warnings, discard(r, cgroupV1())...)
	if r.Memory > 0 && r.MemorySwap == 0 {
		r.MemorySwap = 2 * r.Memory
	}
	if r.MemorySwap != 0 && !swapLimit() {
		warnings = append(warnings, "Your kernel does not support swap limit capabilities or the cgroup is not mounted. Memory limited without swap.")
		r.MemorySwap = -1
	}
	if p := r.PidsLimit; p != nil && *p <= 0 {
		r.PidsLimit = nil
	}
	return warnings, nil
}
