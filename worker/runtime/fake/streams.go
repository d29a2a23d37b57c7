package fake

import (
	"context"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/runtime/docker"
)

// output is what one container has written in all its runs. Engine.mu guards it.
type output struct {
	lines   []runtime.LogLine
	changed chan struct{} // closed and replaced when a line comes or the run ends
	done    bool
}

func newOutput() *output { return &output{changed: make(chan struct{})} }

func (o *output) wake() {
	close(o.changed)
	o.changed = make(chan struct{})
}

func (o *output) close() {
	if !o.done {
		o.done = true
		o.wake()
	}
}

// next returns the log that the next run continues.
func (o *output) next() *output {
	return &output{lines: slices.Clip(o.lines), changed: make(chan struct{})}
}

func (c *record) print(text string, stderr bool) {
	line := runtime.LogLine{Time: time.Now(), Stderr: stderr, Data: []byte(text)}
	if c.host.LogConfig.Type != "none" {
		c.output.lines = append(c.output.lines, line)
	}
	c.output.wake()
	for _, a := range c.attached {
		a.put(line)
	}
}

// Logs implements runtime.Streams.
func (e *Engine) Logs(ctx context.Context, ref string, opts runtime.LogOptions, write func(runtime.LogLine) error) error {
	e.mu.Lock()
	c, err := e.find(ref)
	if err == nil && c.host.LogConfig.Type == "none" {
		err = model.Errorf(model.Unimplemented, "configured logging driver does not support reading")
	}
	if err != nil {
		e.mu.Unlock()
		return err
	}
	out := c.output
	at := 0
	if opts.Tail >= 0 {
		at = max(0, len(out.lines)-opts.Tail)
	}
	e.mu.Unlock()
	for {
		e.mu.Lock()
		lines, changed := out.lines[at:], out.changed
		done := out.done || !opts.Follow || !c.running() && !c.starting && c.status != container.StateCreated
		at = len(out.lines)
		e.mu.Unlock()
		for _, l := range lines {
			if !opts.Until.IsZero() && l.Time.After(opts.Until) {
				return nil
			}
			if l.Time.Before(opts.Since) || l.Stderr && !opts.Stderr || !l.Stderr && !opts.Stdout {
				continue
			}
			if err := write(l); err != nil {
				return err
			}
		}
		if done {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// attachment is one attached client; Engine.mu guards pending.
type attachment struct {
	pending []runtime.LogLine
	wake    chan struct{} // capacity 1
	ended   chan struct{}
}

func (a *attachment) put(l runtime.LogLine) {
	a.pending = append(a.pending, l)
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

func (a *attachment) end() { close(a.ended) }

// Attach implements runtime.Streams. Standard input is not read.
func (e *Engine) Attach(ctx context.Context, ref string, stdio runtime.Stdio) error {
	e.mu.Lock()
	c, err := e.find(ref)
	if err == nil && c.status == container.StatePaused {
		err = model.Errorf(model.Conflict, "container %s is paused, unpause the container before attach", c.id)
	}
	if err != nil {
		e.mu.Unlock()
		return err
	}
	a := &attachment{wake: make(chan struct{}, 1), ended: make(chan struct{})}
	if stdio.Logs {
		a.pending = slices.Clone(c.output.lines)
		a.wake <- struct{}{}
	}
	if stdio.Logs && !c.running() && c.status == container.StateExited {
		a.end()
	} else {
		c.attached = append(c.attached, a)
	}
	e.emit(c, events.ActionAttach)
	e.mu.Unlock()
	defer func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		c.attached = slices.DeleteFunc(c.attached, func(x *attachment) bool { return x == a })
	}()
	for {
		ended := false
		select {
		case <-a.wake:
		case <-a.ended:
			ended = true
		case <-ctx.Done():
			return ctx.Err()
		}
		e.mu.Lock()
		lines := a.pending
		a.pending = nil
		e.mu.Unlock()
		for _, l := range lines {
			w := stdio.Stdout
			if l.Stderr && !c.config.Tty {
				w = stdio.Stderr
			}
			if w == nil {
				continue
			}
			if _, err := w.Write(l.Data); err != nil {
				return err
			}
		}
		if ended {
			return nil
		}
	}
}

// Resize implements runtime.Streams.
func (e *Engine) Resize(_ context.Context, ref string, _, _ uint32) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	if !c.running() {
		return notRunning(c)
	}
	return nil
}

// execRecord is one exec; Engine.mu guards it.
type execRecord struct {
	id       string
	c        *record
	req      *container.ExecCreateRequest
	script   Script
	started  bool
	running  bool
	exitCode int
	pid      int
	done     chan struct{}
}

func (x *execRecord) finish(code int) {
	if x.running {
		x.running, x.exitCode = false, code
		close(x.done)
	}
}

// ExecCreate implements runtime.Streams. The command is a Script; one that does not say
// "exit" ends at once with 0.
func (e *Engine) ExecCreate(_ context.Context, ref string, req *container.ExecCreateRequest) (string, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, err := e.find(ref)
	switch {
	case err != nil:
		return "", err
	case len(req.Cmd) == 0:
		return "", model.Errorf(model.Invalid, "No exec command specified")
	case c.status == container.StatePaused:
		return "", model.Errorf(model.Conflict, "Container %s is paused, unpause the container before exec", c.id)
	case !c.running():
		return "", notRunning(c)
	}
	id, err := docker.NewContainerID(e.cfg.Random)
	if err != nil {
		return "", err
	}
	x := &execRecord{id: id, c: c, req: req, script: ParseScript(join(req.Cmd)), done: make(chan struct{})}
	e.execs[id] = x
	if c.execs == nil {
		c.execs = map[string]*execRecord{}
	}
	c.execs[id] = x
	e.emit(c, events.ActionExecCreate+events.Action(": "+join(req.Cmd)), "execID", id)
	return id, nil
}

func join(argv []string) string {
	var s strings.Builder
	for i, a := range argv {
		if i > 0 {
			s.WriteString(" ")
		}
		s.WriteString(a)
	}
	return s.String()
}

// ExecStart implements runtime.Streams.
func (e *Engine) ExecStart(ctx context.Context, execID string, stdio runtime.Stdio) error {
	e.mu.Lock()
	x := e.execs[execID]
	var err error
	switch {
	case x == nil:
		err = model.Errorf(model.NotFound, "No such exec instance: %s", execID)
	case x.started:
		err = model.Errorf(model.Conflict, "exec command %s has already run", execID)
	case !x.c.running():
		err = notRunning(x.c)
	}
	if err != nil {
		e.mu.Unlock()
		return err
	}
	x.started, x.running = true, true
	e.nextPID++
	x.pid = e.nextPID
	e.emit(x.c, events.ActionExecStart+events.Action(": "+join(x.req.Cmd)), "execID", x.id)
	if x.script.ExitAfter == 0 {
		e.execEnd(x, x.script.ExitCode)
	} else {
		time.AfterFunc(x.script.ExitAfter, func() {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.execEnd(x, x.script.ExitCode)
		})
	}
	e.mu.Unlock()
	if stdio.Stdin == nil && stdio.Stdout == nil && stdio.Stderr == nil {
		return nil
	}
	for _, l := range x.script.Output {
		w := stdio.Stdout
		if l.Stderr && !x.req.Tty {
			w = stdio.Stderr
		}
		if w == nil {
			continue
		}
		if _, err := io.WriteString(w, l.Text+"\n"); err != nil {
			return err
		}
	}
	select {
	case <-x.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (e *Engine) execEnd(x *execRecord, code int) {
	if !x.running {
		return
	}
	x.finish(code)
	e.emit(x.c, events.ActionExecDie, "execID", x.id, "exitCode", itoa(code))
}

// ExecInspect implements runtime.Streams.
func (e *Engine) ExecInspect(_ context.Context, execID string) (*container.ExecInspectResponse, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	x := e.execs[execID]
	if x == nil {
		return nil, model.Errorf(model.NotFound, "No such exec instance: %s", execID)
	}
	privileged := x.req.Privileged
	r := &container.ExecInspectResponse{
		ID: x.id, Running: x.running, ContainerID: x.c.id, Pid: x.pid,
		OpenStdin: x.req.AttachStdin, OpenStdout: x.req.AttachStdout, OpenStderr: x.req.AttachStderr,
		ProcessConfig: &container.ExecProcessConfig{
			Tty: x.req.Tty, Entrypoint: x.req.Cmd[0], Arguments: x.req.Cmd[1:],
			Privileged: &privileged, User: x.req.User,
		},
	}
	if x.started && !x.running {
		code := x.exitCode
		r.ExitCode = &code
	}
	return r, nil
}

// ExecResize implements runtime.ExecResizer.
func (e *Engine) ExecResize(_ context.Context, execID string, _, _ uint32) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	x := e.execs[execID]
	switch {
	case x == nil:
		return model.Errorf(model.NotFound, "No such exec instance: %s", execID)
	case !x.running:
		return model.Errorf(model.Conflict, "exec process is not started")
	}
	return nil
}
