package containerd

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/runtime/docker"
)

// Stop implements runtime.Containers.
func (e *Engine) Stop(ctx context.Context, ref, signal string, timeout *time.Duration) (err error) {
	begin := time.Now()
	defer func() { e.metrics.observe("stop", begin, err) }()
	ctx = e.ns(ctx)
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	if err := e.cancelRestart(ctx, c); err == nil || !errors.Is(err, errNoRestart) {
		return err
	}
	s := e.view(c)
	if !isRunning(s) {
		return runtime.ErrNotModified
	}
	if signal == "" {
		signal = s.Config.StopSignal
	}
	if signal == "" {
		signal = "SIGTERM"
	}
	sig, err := docker.ParseSignal(signal)
	if err != nil {
		return err
	}
	grace := 10 * time.Second
	if t := s.Config.StopTimeout; t != nil {
		grace = time.Duration(*t) * time.Second
	}
	if timeout != nil {
		grace = *timeout
	}
	exited := e.markStopped(c)
	if exited == nil {
		return runtime.ErrNotModified
	}
	if err := e.signal(ctx, c, sig); err != nil && !gone(err) {
		return err
	}
	if s.Status == container.StatePaused { // it cannot act on the signal otherwise
		if err := e.Unpause(ctx, c.id); err != nil && !gone(err) {
			return err
		}
	}
	if err := e.awaitExit(ctx, c, exited, grace); err != nil {
		return err
	}
	e.emit(c, events.ActionStop)
	return nil
}

var errNoRestart = errors.New("no restart is pending")

// cancelRestart stops a container that waits for its restart.
func (e *Engine) cancelRestart(ctx context.Context, c *record) error {
	if e.view(c).Status != container.StateRestarting {
		return errNoRestart
	}
	if err := c.take(ctx); err != nil {
		return err
	}
	defer c.give()
	if e.view(c).Status != container.StateRestarting {
		return errNoRestart
	}
	e.mu.Lock()
	if c.timer != nil {
		c.timer.Stop()
	}
	e.mu.Unlock()
	return e.change(c, func(s *saved) { s.Status, s.ManualStop = container.StateExited, true })
}

// markStopped notes that a person wants the container stopped and returns the channel
// that closes at its exit, nil if it does not run.
func (e *Engine) markStopped(c *record) <-chan struct{} {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !c.running() || c.exited == nil {
		return nil
	}
	c.ManualStop = true
	return c.exited
}

// awaitExit waits for an exit for grace (for ever if negative), then kills.
func (e *Engine) awaitExit(ctx context.Context, c *record, exited <-chan struct{}, grace time.Duration) error {
	var expired <-chan time.Time
	if grace >= 0 {
		t := time.NewTimer(grace)
		defer t.Stop()
		expired = t.C
	}
	select {
	case <-exited:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-expired:
	}
	// A first process may miss a signal that comes before its handler is set; KILL it never misses.
	if err := e.signal(ctx, c, unix.SIGKILL); err != nil && !gone(err) {
		return err
	}
	for {
		t := time.NewTimer(10 * time.Second)
		select {
		case <-exited:
			t.Stop()
			return nil
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
			if err := e.reconcile(ctx, false); err != nil { // an event may have been lost
				return err
			}
		}
	}
}

// gone reports whether an error says that the process has ended already.
func gone(err error) bool {
	return errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) || model.KindOf(err) == model.Conflict
}

// signal sends sig to a container's main process.
func (e *Engine) signal(ctx context.Context, c *record, sig unix.Signal) error {
	e.emit(c, events.ActionKill, "signal", strconv.Itoa(int(sig)))
	_, err := e.client.TaskService().Kill(ctx, &tasks.KillRequest{ContainerID: c.id, Signal: uint32(sig)})
	if err == nil {
		return nil
	}
	err = errgrpc.ToNative(err)
	if gone(err) || strings.Contains(err.Error(), "ttrpc: closed") {
		return model.Wrap(model.Conflict, err, fmt.Sprintf("container %s is not running", c.id))
	}
	return fmt.Errorf("signal container: %w", err)
}

// Kill implements runtime.Containers.
func (e *Engine) Kill(ctx context.Context, ref, signal string) error {
	ctx = e.ns(ctx)
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	sig, err := docker.ParseSignal(signal)
	if err != nil {
		return err
	}
	s := e.view(c)
	if !isRunning(s) {
		return model.Errorf(model.Conflict, "cannot kill container: %s: container %s is not running", ref, c.id)
	}
	if sig == unix.SIGKILL || sig == unix.SIGTERM || sig == unix.SIGINT {
		e.markStopped(c)
	}
	if err := e.signal(ctx, c, sig); err != nil {
		return err
	}
	if sig == unix.SIGKILL && s.Status == container.StatePaused {
		if err := e.Unpause(ctx, c.id); err != nil && !gone(err) {
			return err
		}
	}
	return nil
}

// Remove implements runtime.Containers.
func (e *Engine) Remove(ctx context.Context, ref string, force, volumes bool) (err error) {
	begin := time.Now()
	defer func() { e.metrics.observe("remove", begin, err) }()
	ctx = e.ns(ctx)
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	if err := e.cancelRestartIf(ctx, c, force); err != nil {
		return err
	}
	s := e.view(c)
	if isRunning(s) && !force {
		return model.Errorf(model.Conflict,
			"cannot remove container %q: container is %s: stop the container before removing or force remove", "/"+s.Name, s.Status)
	}
	if isRunning(s) {
		if err := e.killNow(ctx, c); err != nil {
			return err
		}
	}
	c, err = e.findTurn(ctx, c.id)
	if err != nil {
		if model.KindOf(err) == model.NotFound { // it removed itself
			return nil
		}
		return err
	}
	defer c.give()
	s = e.view(c)
	if isRunning(s) {
		return model.Errorf(model.Conflict, "cannot remove container %q: it was started meanwhile", "/"+s.Name)
	}
	return e.remove(ctx, c, volumes)
}

// killNow ends a container without asking it and waits until it has ended.
func (e *Engine) killNow(ctx context.Context, c *record) error {
	exited := e.markStopped(c)
	if exited == nil {
		return nil
	}
	if err := e.Kill(ctx, c.id, "KILL"); err != nil && !gone(err) {
		return err
	}
	return e.awaitExit(ctx, c, exited, -1)
}

func (e *Engine) cancelRestartIf(ctx context.Context, c *record, force bool) error {
	s := e.view(c)
	if s.Status != container.StateRestarting {
		return nil
	}
	if !force {
		return model.Errorf(model.Conflict,
			"cannot remove container %q: container is restarting: stop the container before removing or force remove", "/"+s.Name)
	}
	if err := e.cancelRestart(ctx, c); err != nil && !errors.Is(err, errNoRestart) {
		return err
	}
	return nil
}

// remove deletes a container that does not run; the caller has its turn.
func (e *Engine) remove(ctx context.Context, c *record, volumes bool) error {
	e.mu.Lock()
	c.removing = true
	c.Status = container.StateRemoving
	anon := c.Anon
	e.mu.Unlock()
	// Once begun it is finished, whoever stops waiting.
	ctx = context.WithoutCancel(ctx)
	if err := e.discard(ctx, c); err != nil {
		e.mu.Lock()
		c.Status = container.StateDead
		e.mu.Unlock()
		return err
	}
	e.emit(c, events.ActionDestroy)
	e.mu.Lock()
	delete(e.containers, c.id)
	e.index.Remove(c.id)
	waiting := c.waiters.Removed()
	code := c.ExitCode
	e.mu.Unlock()
	waiting.Tell(runtime.WaitResult{ExitCode: code})
	if !volumes {
		return nil
	}
	for _, v := range anon {
		if err := e.RemoveVolume(ctx, v, true); err != nil && model.KindOf(err) != model.Conflict {
			return err
		}
	}
	return nil
}

// Wait implements runtime.Containers.
func (e *Engine) Wait(ctx context.Context, ref string, condition container.WaitCondition) (<-chan runtime.WaitResult, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, err := e.findLocked(ref)
	if err != nil {
		return nil, err
	}
	var ended *runtime.WaitResult
	if !c.running() && !c.starting {
		ended = &runtime.WaitResult{ExitCode: c.ExitCode}
	}
	return c.waiters.Add(ctx, &e.mu, condition, ended)
}
