package containerd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/runtime/jsonlog"
	"github.com/skep-dev/skep/worker/runtime/shim"
)

// Start implements runtime.Containers.
func (e *Engine) Start(ctx context.Context, ref string) (err error) {
	begin := time.Now()
	defer func() { e.metrics.observe("start", begin, err) }()
	c, err := e.findTurn(e.ns(ctx), ref)
	if err != nil {
		return err
	}
	defer c.give()
	s := e.view(c)
	switch s.Status {
	case container.StatePaused:
		return model.Errorf(model.Conflict, "cannot start a paused container, try unpause instead")
	case container.StateRunning:
		return runtime.ErrNotModified
	case container.StateRemoving, container.StateDead:
		return model.Errorf(model.Conflict, "container is marked for removal and cannot be started")
	case container.StateCreated, container.StateRestarting, container.StateExited:
	}
	e.mu.Lock()
	if c.timer != nil {
		c.timer.Stop()
	}
	e.mu.Unlock()
	if err := e.start(e.ns(ctx), c); err != nil {
		if s.Host.AutoRemove {
			e.removeLater(c)
		}
		return err
	}
	return nil
}

// start runs a container; the caller has its turn. When it fails, the container shows why.
func (e *Engine) start(ctx context.Context, c *record) error {
	if e.view(c).locked {
		return errLockedContainer(c.id)
	}
	select {
	case e.starts <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-e.starts }()
	e.mu.Lock()
	c.starting = true
	e.mu.Unlock()
	err := e.startTask(ctx, c)
	e.mu.Lock()
	c.starting = false
	if err != nil { // who attached before the start is let go, as with Docker
		c.Group = ""
		select {
		case <-c.ready:
		default:
			close(c.ready)
		}
		c.ready = make(chan struct{})
	}
	e.mu.Unlock()
	if err == nil {
		return nil
	}
	code := exitCodeOf(err)
	cerr := e.change(c, func(s *saved) {
		s.ExitCode, s.Error, s.Finished = code, err.Error(), time.Now().UTC()
		if s.Status != container.StateCreated {
			s.Status = container.StateExited
		}
	})
	e.mu.Lock()
	waiting := c.waiters.Exited()
	e.mu.Unlock()
	waiting.Tell(runtime.WaitResult{ExitCode: code, Err: err})
	return errors.Join(err, cerr)
}

// exitCodeOf returns the exit code Docker shows for a container that did not start.
func exitCodeOf(err error) int {
	text := err.Error()
	switch {
	case strings.Contains(text, "executable file not found"), strings.Contains(text, "no such file or directory"), strings.Contains(text, "not found"):
		return 127
	case strings.Contains(text, "permission denied"), strings.Contains(text, "not executable"), strings.Contains(text, "open executable"), strings.Contains(text, "exec format error"):
		return 126
	}
	return 128
}

// startTask does the work of a start and undoes it if it fails.
func (e *Engine) startTask(ctx context.Context, c *record) (err error) {
	s := e.view(c)
	rootfs, err := e.rootMounts(ctx, c)
	if err != nil {
		return err
	}
	undo := &undoList{ctx: context.WithoutCancel(ctx)}
	defer func() {
		if err != nil {
			err = errors.Join(err, undo.run())
		}
	}()
	if err := e.connect(ctx, &s, undo); err != nil {
		return err
	}
	if err := e.writeNetFiles(&s); err != nil {
		return err
	}
	if err := os.Remove(e.exitPath(c.id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove old exit status: %w", err)
	}
	spec, err := e.spec(ctx, rootfs, &s)
	if err != nil {
		return err
	}
	pid, group, err := e.newTask(ctx, c, rootfs, &s, spec, undo)
	if err != nil {
		return err
	}
	if err := e.bpf.harvest(spec, filepath.Join(e.stateDir("r"), e.cfg.Namespace, c.id, "seccomp.bpf")); err != nil {
		e.log.LogAttrs(ctx, slog.LevelWarn, "seccomp filter was not kept", slog.Any("error", err))
	}
	// Who attached before the start is connected before there is output.
	e.mu.Lock()
	c.Group = group
	close(c.ready)
	wanted := c.attaches
	e.mu.Unlock()
	if wanted > 0 {
		e.awaitAttached(ctx, c)
	}
	exited := make(chan struct{})
	e.mu.Lock()
	c.exited = exited
	e.mu.Unlock()
	if _, err := e.client.TaskService().Start(ctx, &tasks.StartRequest{ContainerID: c.id}); err != nil {
		return startError(errgrpc.ToNative(err))
	}
	now := time.Now().UTC()
	err = e.change(c, func(to *saved) {
		to.Status, to.Pid, to.ExitCode, to.Error, to.OOMKilled = container.StateRunning, int(pid), 0, "", false
		to.Started, to.Group, to.BootID, to.Sandbox, to.HasNet, to.ManualStop = now, group, e.bootID, s.Sandbox, s.HasNet, false
		to.Health = initialHealth(s.Config)
	})
	if err != nil {
		e.log.LogAttrs(ctx, slog.LevelError, "container runs but its record was not saved", slog.String("container_id", c.id), slog.Any("error", err))
	}
	e.emit(c, events.ActionStart)
	e.watchHealth(c)
	return nil
}

// rootMounts returns how to mount a container's root file system. It never changes.
func (e *Engine) rootMounts(ctx context.Context, c *record) ([]rootMount, error) {
	e.mu.Lock()
	m := c.rootfs
	e.mu.Unlock()
	if m != nil {
		return m, nil
	}
	m, err := e.client.SnapshotService(snapshotter).Mounts(ctx, c.id)
	if err != nil {
		return nil, fmt.Errorf("find root file system: %w", err)
	}
	e.mu.Lock()
	c.rootfs = m
	e.mu.Unlock()
	return m, nil
}

// undoList are the steps back from a start that fails.
type undoList struct {
	ctx   context.Context //nolint:containedctx // lives for one start
	steps []func(context.Context) error
}

func (u *undoList) add(f func(context.Context) error) { u.steps = append(u.steps, f) }

func (u *undoList) run() error {
	ctx, cancel := context.WithTimeout(u.ctx, 30*time.Second)
	defer cancel()
	var errs []error
	for _, v := range slices.Backward(u.steps) {
		errs = append(errs, v(ctx))
	}
	return errors.Join(errs...)
}

// startError puts what the OCI runtime said into Docker's words.
func startError(err error) error {
	text := err.Error()
	if strings.Contains(text, "executable file") && strings.Contains(text, "not found in $PATH") || strings.Contains(text, "executable file `") {
		return model.Wrap(model.Invalid, err, "OCI runtime create failed: executable file not found in $PATH")
	}
	if strings.Contains(text, "open executable") { // crun, of a directory or a file without the right
		return model.Wrap(model.Internal, err, "OCI runtime create failed: permission denied")
	}
	return model.Wrap(model.Internal, err, "OCI runtime create failed")
}

// connect gives the container its network.
func (e *Engine) connect(ctx context.Context, s *saved, undo *undoList) error {
	s.Sandbox = runtime.Sandbox{}
	s.HasNet = e.cfg.Network != nil && !s.Host.NetworkMode.IsContainer()
	if !s.HasNet {
		return nil
	}
	req, err := sandboxRequest(s)
	if err != nil {
		return err
	}
	undo.add(func(ctx context.Context) error { return e.cfg.Network.Detach(ctx, s.ID) })
	s.Sandbox, err = e.cfg.Network.Attach(ctx, req)
	if err != nil {
		if model.KindOf(err) == model.Conflict {
			return model.Wrap(model.Conflict, err, "driver failed programming external connectivity on endpoint "+s.Name)
		}
		return model.Wrap(model.KindOf(err), err, "failed to set up container networking")
	}
	return nil
}

func sandboxRequest(s *saved) (runtime.SandboxRequest, error) {
	req := runtime.SandboxRequest{
		ContainerID: s.ID, Name: s.Name, Hostname: s.Config.Hostname, Mode: string(s.Host.NetworkMode), Overlays: places(s), Local: onBridge(s),
	}
	switch {
	case len(s.Overlays) > 0:
		req.Mode, req.DNS = "bridge", s.Host.DNS
	case s.OnBridge:
		req.Mode = "bridge"
	case s.OffBridge: // it was taken off its last network
		req.Mode = "none"
		return req, nil
	}
	for port, bindings := range s.Host.PortBindings {
		for _, b := range bindings {
			n := uint64(0)
			if b.HostPort != "" {
				var err error
				if n, err = strconv.ParseUint(b.HostPort, 10, 16); err != nil {
					return req, model.Errorf(model.Unimplemented, "host port %q: port ranges are not implemented by skep", b.HostPort)
				}
			}
			ip := b.HostIP
			if !ip.IsValid() {
				ip = netip.IPv4Unspecified()
			}
			req.Ports = append(req.Ports, runtime.PortBinding{Protocol: string(port.Proto()), ContainerPort: port.Num(), HostIP: ip, HostPort: uint16(n)})
		}
	}
	if s.Host.PublishAllPorts {
		for port := range s.Config.ExposedPorts {
			if len(s.Host.PortBindings[port]) == 0 {
				req.Ports = append(req.Ports, runtime.PortBinding{Protocol: string(port.Proto()), ContainerPort: port.Num(), HostIP: netip.IPv4Unspecified()})
			}
		}
	}
	return req, nil
}

// newTask makes containerd's container and task in a shim with room. A shim that died
// meanwhile is replaced once.
func (e *Engine) newTask(ctx context.Context, c *record, rootfs []rootMount, s *saved, spec *specs.Spec, undo *undoList) (pid uint32, group string, err error) {
	for attempt := 0; ; attempt++ {
		g, err := e.groups.join(ctx)
		if err != nil {
			return 0, "", err
		}
		step := &undoList{ctx: undo.ctx}
		step.add(func(context.Context) error { e.groups.leave(g.id, false); return nil })
		pid, err = e.createTask(ctx, c, rootfs, s, spec, g.id, step)
		if err == nil {
			undo.steps = append(undo.steps, step.steps...)
			return pid, g.id, nil
		}
		uerr := step.run()
		gone := errdefs.IsUnavailable(err) || errdefs.IsNotFound(err) || strings.Contains(err.Error(), "ttrpc: closed")
		if attempt == 0 && gone && ctx.Err() == nil {
			_ = e.groups.condemn(g.id) // known: it was joined just now
			continue
		}
		return 0, "", errors.Join(err, uerr)
	}
}

func (e *Engine) createTask(ctx context.Context, c *record, rootfs []rootMount, s *saved, spec *specs.Spec, group string, undo *undoList) (uint32, error) {
	// containerd keeps specifications, so it gets one that only this start can read.
	hiddenSpec, key, err := shim.SealSpec(spec)
	if err != nil {
		return 0, err
	}
	specAny, err := typeurl.MarshalAny(hiddenSpec)
	if err != nil {
		return 0, fmt.Errorf("encode container specification: %w", err)
	}
	runcOptions, err := typeurl.MarshalAny(e.runcOptions(spec.Process.User.UID, spec.Process.User.GID))
	if err != nil {
		return 0, fmt.Errorf("encode runtime options: %w", err)
	}
	_, err = e.client.ContainerService().Create(ctx, containers.Container{
		ID: c.id, Spec: specAny, SandboxID: group, Snapshotter: snapshotter, SnapshotKey: c.id,
		Runtime: containers.RuntimeInfo{Name: shimPath(e.cfg), Options: runcOptions},
	})
	if err != nil {
		return 0, fmt.Errorf("create container: %w", err)
	}
	undo.add(func(ctx context.Context) error { return ignoreNotFound(e.client.ContainerService().Delete(ctx, c.id)) })
	streams, err := e.streams(s, group)
	if err != nil {
		return 0, err
	}
	streams.Key = key
	req := &tasks.CreateTaskRequest{
		ContainerID: c.id, Terminal: s.Config.Tty, Stdout: streams.String(),
		Rootfs: mount.ToProto(rootfs), Options: typeurl.MarshalProto(runcOptions),
	}
	if !s.Config.Tty {
		req.Stderr = req.Stdout
	}
	undo.add(func(ctx context.Context) error { return e.deleteTask(ctx, c.id) })
	resp, err := e.client.TaskService().Create(ctx, req)
	if err != nil {
		err = errgrpc.ToNative(err)
		if errdefs.IsUnavailable(err) || strings.Contains(err.Error(), "ttrpc: closed") {
			return 0, fmt.Errorf("create task: %w", err)
		}
		return 0, startError(err)
	}
	return resp.Pid, nil
}

func ignoreNotFound(err error) error {
	if errdefs.IsNotFound(err) || errdefs.IsNotFound(errgrpc.ToNative(err)) {
		return nil
	}
	return err
}

// deleteTask kills and deletes a task whatever its state.
func (e *Engine) deleteTask(ctx context.Context, id string) error {
	_, err := e.client.TaskService().Delete(ctx, &tasks.DeleteTaskRequest{ContainerID: id})
	if ignoreNotFound(err) == nil {
		return nil
	}
	if _, err := e.client.TaskService().Kill(ctx, &tasks.KillRequest{ContainerID: id, Signal: 9, All: true}); ignoreNotFound(err) != nil {
		e.log.LogAttrs(ctx, slog.LevelDebug, "leftover task was not killed", slog.String("container_id", id), slog.Any("error", err))
	}
	for {
		if _, err = e.client.TaskService().Delete(ctx, &tasks.DeleteTaskRequest{ContainerID: id}); ignoreNotFound(err) == nil {
			return nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("delete task %s: %w", id, err)
		}
	}
}

func (e *Engine) exitPath(id string) string { return filepath.Join(e.containerDir(id), "exit.json") }

func (e *Engine) logPath(id string) string { return filepath.Join(e.containerDir(id), id+"-json.log") }

// streams says where a task's output goes.
func (e *Engine) streams(s *saved, group string) (shim.Spec, error) {
	cfg, err := logOptions(s.Host.LogConfig)
	if err != nil {
		return shim.Spec{}, err
	}
	out := shim.Spec{
		MaxSize: cfg.MaxSize, MaxFiles: cfg.MaxFiles, ExitPath: e.exitPath(s.ID), Socket: e.groups.socket(group),
		// Leaving a terminal is not the end of its input: detach keys must not end a shell.
		Stdin: s.Config.OpenStdin, StdinOnce: s.Config.StdinOnce && !s.Config.Tty,
	}
	if s.Host.LogConfig.Type == "none" {
		return out, nil
	}
	out.LogPath = e.logPath(s.ID)
	out.LogAttrs, err = jsonlog.Attributes(s.Host.LogConfig.Config, jsonlog.Source{
		Labels: s.Config.Labels, Env: s.Config.Env, ID: s.ID, Name: s.Name, ImageID: s.ImageID, ImageName: s.Config.Image, DaemonName: "skep",
	})
	if err != nil {
		return shim.Spec{}, model.Wrap(model.Invalid, err, "failed to initialize logging driver")
	}
	return out, nil
}

// parseSize reads "10m", "512k", "1g" or bytes; -1 is unbounded.
func parseSize(s string) (int64, error) {
	if s == "-1" {
		return -1, nil
	}
	t := strings.TrimSuffix(strings.TrimSuffix(strings.ToLower(s), "b"), "i")
	shift := 0
	for i, unit := range []string{"k", "m", "g", "t"} {
		if rest, ok := strings.CutSuffix(t, unit); ok {
			t, shift = rest, 10*(i+1)
			break
		}
	}
	n, err := strconv.ParseInt(t, 10, 64)
	if err != nil || n <= 0 || n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("invalid size %q", s)
	}
	return n << shift, nil
}
