package containerd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	eventtypes "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/services/tasks/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	ctdevents "github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/runtime/shim"
)

// watch follows containerd's events until ctx ends. After every gap it compares what
// containerd has with the records.
func (e *Engine) watch(ctx context.Context) error {
	for ctx.Err() == nil {
		sub, cancel := context.WithCancel(ctx)
		messages, errs := e.client.EventService().Subscribe(sub,
			`topic=="/tasks/exit",namespace==`+e.cfg.Namespace, `topic=="/tasks/oom",namespace==`+e.cfg.Namespace)
		err := e.reconcile(ctx, false)
		if err == nil {
			err = e.follow(ctx, messages, errs)
		}
		cancel()
		if err != nil && ctx.Err() == nil {
			level := slog.LevelWarn
			if e.child != nil && e.child.ending.Load() {
				level = slog.LevelDebug
			}
			e.log.LogAttrs(ctx, level, "containerd does not answer", slog.Any("error", err))
			select {
			case <-time.After(200 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	}
	return nil
}

func (e *Engine) follow(ctx context.Context, messages <-chan *ctdevents.Envelope, errs <-chan error) error {
	for {
		select {
		case m := <-messages:
			v, err := typeurl.UnmarshalAny(m.Event)
			if err != nil {
				e.log.LogAttrs(ctx, slog.LevelWarn, "unreadable containerd event", slog.Any("error", err))
				continue
			}
			e.handle(ctx, v)
		case err := <-errs:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (e *Engine) handle(ctx context.Context, event any) {
	switch v := event.(type) {
	case *eventtypes.TaskExit:
		if e.groups.condemn(v.ContainerID) { // containerd tells the death of a shim so
			e.shimDied(ctx, v.ContainerID)
		} else if v.ContainerID == v.ID {
			e.exitLater(v.ContainerID, shim.Exit{Code: v.ExitStatus, At: v.ExitedAt.AsTime()})
		}
	case *eventtypes.TaskOOM:
		c, err := e.find(v.ContainerID)
		if err != nil {
			return
		}
		if err := e.change(c, func(s *saved) { s.OOMKilled = true }); err != nil {
			e.log.LogAttrs(ctx, slog.LevelError, "out-of-memory mark was not saved", slog.Any("error", err))
		}
		e.emit(c, events.ActionOOM)
	}
}

// exitLater settles the exit of a container's main process in the background.
func (e *Engine) exitLater(id string, x shim.Exit) {
	c, err := e.find(id)
	if err != nil {
		return // being removed, or not ours
	}
	e.background(func(ctx context.Context) {
		select {
		case e.exits <- struct{}{}:
		case <-ctx.Done():
			return
		}
		defer func() { <-e.exits }()
		if err := c.take(ctx); err != nil {
			return
		}
		defer c.give()
		if err := e.settle(ctx, c, x); err != nil {
			e.log.LogAttrs(ctx, slog.LevelError, "exit of container was not settled", slog.String("container_id", id), slog.Any("error", err))
		}
	})
}

// settle ends the run of a container whose main process is gone: its output is complete
// and its network free before anybody learns of the exit. The caller has the turn.
func (e *Engine) settle(ctx context.Context, c *record, x shim.Exit) error {
	s := e.view(c)
	if !isRunning(s) || x.At.Before(s.Started.Add(-time.Second)) {
		return nil // settled already, or news of an earlier run
	}
	begin := time.Now()
	var errs []error
	resp, err := e.client.TaskService().Delete(ctx, &tasks.DeleteTaskRequest{ContainerID: c.id})
	switch err {
	case nil:
		if resp.ExitedAt.IsValid() && resp.ExitedAt.AsTime().Unix() > 0 {
			x = shim.Exit{Code: resp.ExitStatus, At: resp.ExitedAt.AsTime()}
		}
	default: // its shim is gone, or containerd has given it up
		e.purge(ctx, c.id)
		errs = append(errs, e.deleteTask(ctx, c.id))
	}
	errs = append(errs, ignoreNotFound(e.client.ContainerService().Delete(ctx, c.id)))
	if s.HasNet {
		if err := e.cfg.Network.Detach(ctx, c.id); err != nil {
			errs = append(errs, fmt.Errorf("disconnect from network: %w", err))
		}
	}
	e.groups.leave(s.Group, false)
	if s.HasFiles && !wantsRestart(ending(s, x)) { // secrets are there for as long as they are used
		errs = append(errs, e.dropFiles(c.id))
	}
	errs = append(errs, e.ended(c, x))
	e.metrics.observe("exit", begin, errors.Join(errs...))
	return errors.Join(errs...)
}

// shimDied ends the containers of a shim that was killed: nobody holds their output or
// would learn of their exit any more.
func (e *Engine) shimDied(ctx context.Context, group string) {
	e.log.LogAttrs(ctx, slog.LevelError, "shim died and its containers with it", slog.String("group_id", group))
	for _, c := range e.all() {
		if s := e.view(c); s.Group == group && isRunning(s) {
			e.exitLater(c.id, shim.Exit{Code: 128 + uint32(unix.SIGKILL), At: time.Now()})
		}
	}
}

// purge kills what is left of a container that containerd has lost.
func (e *Engine) purge(ctx context.Context, id string) {
	argv := e.oci.command(e.cfg, "--root", filepath.Join(e.stateDir("r"), e.cfg.Namespace), "delete", "--force", id)
	if out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput(); err != nil {
		e.log.LogAttrs(ctx, slog.LevelDebug, "runtime knows nothing of lost container",
			slog.String("container_id", id), slog.Any("error", err), slog.String("output", strings.TrimSpace(string(out))))
	}
}

// ended records an exit and tells everybody.
func (e *Engine) ended(c *record, x shim.Exit) error {
	e.stopHealth(c)
	code := int(x.Code)
	e.mu.Lock()
	c.Status, c.Pid, c.ExitCode, c.Finished = container.StateExited, 0, code, x.At.UTC()
	c.Group, c.HasNet = "", false
	if c.Health != nil {
		h := *c.Health
		h.Status = container.Unhealthy
		c.Health = &h
	}
	c.ready = make(chan struct{})
	waiting := c.waiters.Exited()
	exited := c.exited
	c.exited = nil
	s := c.saved
	execs := make([]*execRecord, 0, len(c.execs))
	for _, x := range c.execs {
		execs = append(execs, x)
	}
	e.mu.Unlock()
	err := e.save(s)
	e.dropExecs(execs)
	if exited != nil {
		close(exited)
	}
	e.emit(c, events.ActionDie, "exitCode", strconv.Itoa(code),
		"execDuration", strconv.Itoa(int(max(0, s.Finished.Sub(s.Started))/time.Second)))
	waiting.Tell(runtime.WaitResult{ExitCode: code})
	e.afterExit(c, s)
	return err
}

// ending is what a record will say after an exit, as far as restarts depend on it.
func ending(s saved, x shim.Exit) saved {
	s.ExitCode = int(x.Code)
	return s
}

// afterExit removes or restarts a container if it is to be.
func (e *Engine) afterExit(c *record, s saved) {
	switch {
	case s.Host.AutoRemove:
		e.removeLater(c)
	case wantsRestart(s):
		e.restartLater(c, s)
	}
}

// wantsRestart reports whether the policy of a container that has ended restarts it.
func wantsRestart(s saved) bool {
	p := s.Host.RestartPolicy
	return !s.ManualStop && (p.IsAlways() || p.IsUnlessStopped() ||
		p.IsOnFailure() && s.ExitCode != 0 && (p.MaximumRetryCount == 0 || s.Restarts < p.MaximumRetryCount))
}

// removeLater removes a container that wants to be removed at its end.
func (e *Engine) removeLater(c *record) {
	e.background(func(ctx context.Context) {
		if err := e.Remove(ctx, c.id, true, true); err != nil {
			e.log.LogAttrs(ctx, slog.LevelError, "container was not removed", slog.String("container_id", c.id), slog.Any("error", err))
		}
	})
}

// restartLater starts a container again after a delay that doubles up to a minute, and
// begins anew once it has run for ten seconds.
func (e *Engine) restartLater(c *record, s saved) {
	const first, most = 100 * time.Millisecond, time.Minute
	delay := first
	if s.Finished.Sub(s.Started) < 10*time.Second {
		delay = min(most, first<<min(s.Restarts, 10))
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return
	}
	c.Status = container.StateRestarting
	c.timer = time.AfterFunc(delay, func() {
		e.background(func(ctx context.Context) { e.restart(ctx, c) })
	})
}

func (e *Engine) restart(ctx context.Context, c *record) {
	if err := c.take(ctx); err != nil {
		return
	}
	defer c.give()
	if e.view(c).Status != container.StateRestarting {
		return
	}
	err := e.change(c, func(s *saved) { s.Restarts++ })
	if err == nil {
		err = e.start(ctx, c)
	}
	if err != nil && ctx.Err() == nil {
		e.log.LogAttrs(ctx, slog.LevelWarn, "container does not restart", slog.String("container_id", c.id), slog.Any("error", err))
		s := e.view(c)
		s.Started, s.Finished = time.Time{}, time.Time{}
		if !s.ManualStop {
			e.restartLater(c, s)
		}
	}
}

// reconcile makes records and containerd agree: after a restart of this process (first),
// or of containerd.
func (e *Engine) reconcile(ctx context.Context, first bool) error {
	list, err := e.client.TaskService().List(ctx, &tasks.ListTasksRequest{})
	if err != nil {
		return fmt.Errorf("list tasks: %w", errgrpc.ToNative(err))
	}
	have := map[string]*tasktypes.Process{}
	for _, t := range list.Tasks {
		have[t.ID] = t
	}
	var retain []string
	for _, c := range e.all() {
		t := have[c.id]
		delete(have, c.id)
		if e.reconcileOne(ctx, c, t, first) {
			retain = append(retain, c.id)
		}
	}
	if !first {
		return nil
	}
	if err := e.groups.find(ctx); err != nil {
		return err
	}
	if e.cfg.Network != nil {
		if err := e.cfg.Network.Retain(ctx, retain); err != nil {
			return fmt.Errorf("free networks of former containers: %w", err)
		}
	}
	return e.sweep(ctx, have)
}

// reconcileOne compares one container with its task. It reports whether the container runs.
func (e *Engine) reconcileOne(ctx context.Context, c *record, t *tasktypes.Process, first bool) bool {
	if !first { // a step that is under way takes care itself
		select {
		case <-c.turn:
			defer c.give()
		default:
			return true
		}
	}
	s := e.view(c)
	alive := t != nil && t.Status != tasktypes.Status_STOPPED
	switch {
	case !isRunning(s) && first && alive:
		// We died between the start and its record: the task counts as if it had never been.
		if err := e.deleteTask(ctx, c.id); err != nil {
			e.log.LogAttrs(ctx, slog.LevelError, "leftover task was not deleted", slog.String("container_id", c.id), slog.Any("error", err))
		}
		return false
	case !isRunning(s):
		if first {
			e.resume(c, s)
		}
		return false
	case alive:
		if first {
			e.adopt(ctx, c, s, int(t.Pid))
		}
		return true
	}
	x, ok := e.lostExit(s, t)
	if !ok && !first {
		return true // its exit event is on the way
	}
	if first {
		e.groups.adopt(s.Group)
		e.background(func(ctx context.Context) {
			if c.take(ctx) == nil {
				defer c.give()
				e.logSettle(ctx, c, x)
			}
		})
		return false
	}
	e.logSettle(ctx, c, x)
	return false
}

func (e *Engine) logSettle(ctx context.Context, c *record, x shim.Exit) {
	if err := e.settle(ctx, c, x); err != nil {
		e.log.LogAttrs(ctx, slog.LevelError, "exit of container was not settled", slog.String("container_id", c.id), slog.Any("error", err))
	}
}

// lostExit finds out how a container ended while nobody looked. It reports false if that
// is not known, and the exit given then is Docker's 255.
func (e *Engine) lostExit(s saved, t *tasktypes.Process) (shim.Exit, bool) {
	if t != nil && t.ExitedAt.IsValid() && t.ExitedAt.AsTime().Unix() > 0 {
		return shim.Exit{Code: t.ExitStatus, At: t.ExitedAt.AsTime()}, true
	}
	if x, err := shim.ReadExit(e.exitPath(s.ID)); err == nil && !x.At.Before(s.Started.Add(-time.Second)) {
		return x, true
	}
	return shim.Exit{Code: 255, At: time.Now()}, t == nil
}

// adopt takes a running container over from a former process.
func (e *Engine) adopt(ctx context.Context, c *record, s saved, pid int) {
	e.groups.adopt(s.Group)
	e.mu.Lock()
	c.Pid = pid
	close(c.ready)
	e.mu.Unlock()
	if !s.locked {
		e.rejoin(ctx, c, s)
	}
}

// rejoin finds the network of a running container again and watches its health.
func (e *Engine) rejoin(ctx context.Context, c *record, s saved) {
	if s.HasNet && e.cfg.Network != nil {
		if err := e.adoptNetwork(ctx, c, &s); err != nil {
			e.log.LogAttrs(ctx, slog.LevelError, "network of running container was not found again", slog.String("container_id", c.id), slog.Any("error", err))
		}
	}
	e.watchHealth(c)
}

// adoptNetwork attaches a running container again, which finds what it has.
func (e *Engine) adoptNetwork(ctx context.Context, c *record, s *saved) error {
	req, err := sandboxRequest(s)
	if err != nil {
		return err
	}
	if len(req.Ports) > 0 && len(s.Sandbox.Ports) > 0 { // those that were ephemeral keep their number
		req.Ports = s.Sandbox.Ports
	}
	sandbox, err := e.cfg.Network.Attach(ctx, req)
	if err != nil {
		return err
	}
	e.mu.Lock()
	c.Sandbox = sandbox
	e.mu.Unlock()
	return nil
}

// resume restarts what was waiting for its restart, which is not on record, and what the
// policy "always" wants running although somebody stopped it; and it removes what was to
// be removed at its end, or never started.
func (e *Engine) resume(c *record, s saved) {
	ended := s.Status == container.StateExited || s.Status == container.StateRestarting
	switch {
	case ended && (wantsRestart(s) || s.Host.RestartPolicy.IsAlways()):
		e.restartLater(c, s)
	case (ended || s.Status == container.StateCreated) && s.Host.AutoRemove:
		e.removeLater(c)
	}
}

// sweep removes what no record accounts for.
func (e *Engine) sweep(ctx context.Context, leftover map[string]*tasktypes.Process) error {
	for id := range leftover {
		if err := e.deleteTask(ctx, id); err != nil {
			return err
		}
	}
	list, err := e.client.ContainerService().List(ctx)
	if err != nil {
		return fmt.Errorf("list containers: %w", err)
	}
	for _, k := range list {
		if c, err := e.find(k.ID); err == nil && isRunning(e.view(c)) {
			continue
		}
		if err := ignoreNotFound(e.client.ContainerService().Delete(ctx, k.ID)); err != nil {
			return fmt.Errorf("delete leftover container: %w", err)
		}
	}
	return e.sweepSnapshots(ctx)
}
