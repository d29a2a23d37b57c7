package containerd

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/runtime/jsonlog"
	"github.com/skep-dev/skep/worker/runtime/shim"
)

// Logs implements runtime.Streams.
func (e *Engine) Logs(ctx context.Context, ref string, opts runtime.LogOptions, write func(runtime.LogLine) error) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	s := e.view(c)
	if s.Host.LogConfig.Type == "none" {
		return model.Errorf(model.Unimplemented, "configured logging driver does not support reading")
	}
	read := jsonlog.Options{Tail: opts.Tail, Since: opts.Since, Until: opts.Until}
	if opts.Follow {
		read.Follow = e.logEnd(ctx, c)
	}
	return jsonlog.Read(ctx, e.logPath(c.id), read, func(x jsonlog.Entry) error {
		if x.Stderr && !opts.Stderr || !x.Stderr && !opts.Stdout {
			return nil
		}
		n := len(x.Data)
		return write(runtime.LogLine{
			Time: x.Time, Stderr: x.Stderr, Data: x.Data, Partial: n == jsonlog.MaxLine && x.Data[n-1] != '\n',
			Attrs: x.Attrs,
		})
	})
}

// logEnd returns a channel that closes when a container that runs, or is still to be
// started, has ended, or was removed.
func (e *Engine) logEnd(ctx context.Context, c *record) <-chan struct{} {
	end := make(chan struct{})
	e.mu.Lock()
	exited, status := c.exited, c.Status
	e.mu.Unlock()
	if exited == nil && status != container.StateCreated && status != container.StateRestarting {
		close(end)
		return end
	}
	ended, err := e.Wait(ctx, c.id, container.WaitConditionNextExit)
	if err != nil { // removed meanwhile
		close(end)
		return end
	}
	e.background(func(life context.Context) {
		defer close(end)
		select {
		case <-ended:
		case <-ctx.Done():
		case <-life.Done():
		}
	})
	return end
}

// awaitAttached gives those who attached before the start a moment to be connected.
func (e *Engine) awaitAttached(ctx context.Context, c *record) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		e.mu.Lock()
		n := c.attaches
		e.mu.Unlock()
		if n == 0 {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// Attach implements runtime.Streams.
func (e *Engine) Attach(ctx context.Context, ref string, stdio runtime.Stdio) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	s := e.view(c)
	if s.Status == container.StatePaused {
		return model.Errorf(model.Conflict, "container %s is paused, unpause the container before attach", c.id)
	}
	e.emit(c, events.ActionAttach)
	if stdio.Logs && s.Host.LogConfig.Type != "none" {
		if err := e.replay(ctx, c, s.Config.Tty, stdio); err != nil {
			return err
		}
		if s.Status == container.StateExited {
			return nil
		}
	}
	conn, err := e.dialStreams(ctx, c)
	if err != nil {
		if errors.Is(err, shim.ErrGone) { // it ended meanwhile
			return nil
		}
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	defer func() { _ = conn.Close() }() // nothing is buffered
	if stdio.Stdin != nil && s.Config.OpenStdin {
		go func() { // ends when its reader or the connection does
			_, err := io.Copy(conn, stdio.Stdin)
			if err == nil && s.Config.StdinOnce && !s.Config.Tty {
				_ = conn.CloseInput() // the task may have ended
			}
		}()
	}
	stderr := stdio.Stderr
	if s.Config.Tty {
		stderr = nil
	}
	if err := conn.Copy(stdio.Stdout, stderr); err != nil {
		return err
	}
	return ctx.Err()
}

// dialStreams connects to a container's streams, waiting for its start if need be.
func (e *Engine) dialStreams(ctx context.Context, c *record) (*shim.Conn, error) {
	e.mu.Lock()
	ready := c.ready
	c.attaches++
	e.mu.Unlock()
	defer func() {
		e.mu.Lock()
		c.attaches--
		e.mu.Unlock()
	}()
	removed, err := e.Wait(ctx, c.id, container.WaitConditionRemoved)
	if err != nil {
		return nil, err
	}
	select {
	case <-ready:
	case <-removed:
		return nil, shim.ErrGone
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	group := e.view(c).Group
	if group == "" {
		return nil, shim.ErrGone
	}
	return shim.Dial(e.groups.socket(group), c.id)
}

func (e *Engine) replay(ctx context.Context, c *record, tty bool, stdio runtime.Stdio) error {
	all := runtime.LogOptions{Stdout: true, Stderr: true, Tail: -1}
	return e.Logs(ctx, c.id, all, func(l runtime.LogLine) error {
		w := stdio.Stdout
		if l.Stderr && !tty {
			w = stdio.Stderr
		}
		if w == nil {
			return nil
		}
		_, err := w.Write(l.Data)
		return err
	})
}
