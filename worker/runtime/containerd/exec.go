package containerd

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	ctd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/runtime/docker"
)

// execKeep is how long an exec that has ended can still be inspected.
const execKeep = 5 * time.Minute

// execRecord is one exec. Engine.mu guards what follows req.
type execRecord struct {
	id  string
	c   *record
	req *container.ExecCreateRequest

	started  bool
	running  bool
	exitCode *int
	pid      int
	process  ctd.Process
	size     [2]uint32 // width, height wanted before the process was there
	expire   *time.Timer
}

// ExecCreate implements runtime.Streams.
func (e *Engine) ExecCreate(_ context.Context, ref string, req *container.ExecCreateRequest) (string, error) {
	c, err := e.find(ref)
	if err != nil {
		return "", err
	}
	s := e.view(c)
	switch {
	case len(req.Cmd) == 0:
		return "", model.Errorf(model.Invalid, "No exec command specified")
	case s.Status == container.StatePaused:
		return "", model.Errorf(model.Conflict, "Container %s is paused, unpause the container before exec", c.id)
	case !isRunning(s):
		return "", model.Errorf(model.Conflict, "container %s is not running", c.id)
	}
	id, err := docker.NewContainerID(rand.Reader)
	if err != nil {
		return "", err
	}
	own := *req
	x := &execRecord{id: id, c: c, req: &own}
	if size := req.ConsoleSize; size != nil {
		x.size = [2]uint32{uint32(size[1]), uint32(size[0])}
	}
	e.mu.Lock()
	if c.execs == nil {
		c.execs = map[string]*execRecord{}
	}
	c.execs[id] = x
	e.execs[id] = x
	e.mu.Unlock()
	e.emit(c, events.ActionExecCreate+events.Action(": "+strings.Join(req.Cmd, " ")), "execID", id)
	return id, nil
}

func (e *Engine) findExec(id string) (*execRecord, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if x := e.execs[id]; x != nil {
		return x, nil
	}
	return nil, model.Errorf(model.NotFound, "No such exec instance: %s", id)
}

// ExecStart implements runtime.Streams.
func (e *Engine) ExecStart(ctx context.Context, execID string, stdio runtime.Stdio) error {
	ctx = e.ns(ctx)
	x, err := e.findExec(execID)
	if err != nil {
		return err
	}
	e.mu.Lock()
	again := x.started
	x.started = true
	s := x.c.saved
	e.mu.Unlock()
	switch {
	case again:
		return model.Errorf(model.Conflict, "exec command %s has already run", execID)
	case !isRunning(s):
		return model.Errorf(model.Conflict, "container %s is not running", s.ID)
	case s.Status == container.StatePaused:
		return model.Errorf(model.Conflict, "Container %s is paused, unpause the container before exec", s.ID)
	}
	attached := stdio.Stdin != nil || stdio.Stdout != nil || stdio.Stderr != nil
	run, err := e.runExec(ctx, x, s, stdio, attached)
	if err != nil {
		code := exitCodeOf(err)
		e.finishExec(x, code)
		return err
	}
	if !attached {
		e.background(func(ctx context.Context) {
			if err := e.awaitExec(ctx, run); err != nil && ctx.Err() == nil {
				e.log.LogAttrs(ctx, slog.LevelWarn, "detached exec did not end well", slog.String("exec_id", execID), slog.Any("error", err))
			}
		})
		return nil
	}
	return e.awaitExec(ctx, run)
}

// execRun is a running exec.
type execRun struct {
	x       *execRecord
	process ctd.Process
	exit    <-chan ctd.ExitStatus
}

// runExec starts the process of an exec.
func (e *Engine) runExec(ctx context.Context, x *execRecord, s saved, stdio runtime.Stdio, attached bool) (*execRun, error) {
	spec, err := e.execSpec(x, s)
	if err != nil {
		return nil, err
	}
	k, err := e.client.LoadContainer(ctx, s.ID)
	if err != nil {
		return nil, fmt.Errorf("find container of exec: %w", err)
	}
	task, err := k.Task(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("find task of exec: %w", err)
	}
	var process ctd.Process
	// When its input ends, the process is to notice; there may be no process yet then.
	ready := make(chan struct{})
	input := stdio.Stdin
	if input != nil {
		input = &eofNotifier{r: input, notify: func() {
			go func() {
				<-ready
				if process != nil {
					_ = process.CloseIO(context.WithoutCancel(ctx), ctd.WithStdinCloser) // it may have ended
				}
			}()
		}}
	}
	process, err = task.Exec(ctx, x.id, spec, e.execIO(x.req.Tty, input, stdio, attached))
	close(ready)
	if err != nil {
		return nil, startError(err)
	}
	exit, err := process.Wait(context.WithoutCancel(ctx))
	if err == nil {
		err = process.Start(ctx)
	}
	if err != nil {
		_, derr := process.Delete(context.WithoutCancel(ctx))
		return nil, errors.Join(startError(err), ignoreNotFound(derr))
	}
	e.mu.Lock()
	x.running, x.pid, x.process = true, int(process.Pid()), process
	size := x.size
	e.mu.Unlock()
	e.emit(x.c, events.ActionExecStart+events.Action(": "+strings.Join(x.req.Cmd, " ")), "execID", x.id)
	if x.req.Tty && size[0] > 0 {
		_ = process.Resize(ctx, size[0], size[1]) // the client asks again when it draws
	}
	return &execRun{x: x, process: process, exit: exit}, nil
}

// eofNotifier tells when its reader has ended.
type eofNotifier struct {
	r      io.Reader
	notify func()
	done   bool
}

func (n *eofNotifier) Read(p []byte) (int, error) {
	k, err := n.r.Read(p)
	if err != nil && !n.done {
		n.done = true
		n.notify()
	}
	return k, err
}

// execIO connects an exec. What is not attached is drained: a process must never find its
// output closed or full.
func (e *Engine) execIO(tty bool, input io.Reader, stdio runtime.Stdio, attached bool) cio.Creator {
	if !attached {
		null := &url.URL{Scheme: "file", Path: "/dev/null"}
		if tty {
			return cio.TerminalLogURI(null)
		}
		return cio.LogURI(null)
	}
	stdout, stderr := stdio.Stdout, stdio.Stderr
	if stdout == nil {
		stdout = io.Discard
	}
	if stderr == nil {
		stderr = io.Discard
	}
	opts := []cio.Opt{cio.WithStreams(input, stdout, stderr), cio.WithFIFODir(e.stateDir("x"))}
	if tty {
		opts = []cio.Opt{cio.WithStreams(input, stdout, nil), cio.WithTerminal, cio.WithFIFODir(e.stateDir("x"))}
	}
	return cio.NewCreator(opts...)
}

// awaitExec waits for the end of an exec and its output. When ctx ends first the process
// runs on, but without its streams.
func (e *Engine) awaitExec(ctx context.Context, r *execRun) error {
	var code int
	select {
	case st := <-r.exit:
		n, _, err := st.Result()
		if err != nil {
			e.finishExec(r.x, 137)
			return fmt.Errorf("wait for exec: %w", err)
		}
		code = int(n)
	case <-ctx.Done():
		r.process.IO().Cancel()
		e.background(func(life context.Context) {
			select {
			case st := <-r.exit:
				e.deleteExec(life, r)
				e.finishExec(r.x, int(st.ExitCode()))
			case <-life.Done():
			}
		})
		return ctx.Err()
	}
	e.deleteExec(context.WithoutCancel(ctx), r)
	e.finishExec(r.x, code)
	return nil
}

// deleteExec waits for the output of an ended exec and deletes its process.
func (e *Engine) deleteExec(ctx context.Context, r *execRun) {
	drained := make(chan struct{})
	go func() {
		r.process.IO().Wait()
		close(drained)
	}()
	t := time.NewTimer(2 * time.Second)
	defer t.Stop()
	select {
	case <-drained:
	case <-t.C: // a child of the exec holds its output open
		r.process.IO().Cancel()
	}
	if _, err := r.process.Delete(ctx); ignoreNotFound(err) != nil {
		e.log.LogAttrs(ctx, slog.LevelDebug, "exec was not deleted", slog.String("exec_id", r.x.id), slog.Any("error", err))
	}
}

// finishExec records the end of an exec.
func (e *Engine) finishExec(x *execRecord, code int) {
	e.mu.Lock()
	if x.exitCode != nil {
		e.mu.Unlock()
		return
	}
	x.running, x.exitCode, x.process = false, &code, nil
	if !e.closed {
		x.expire = time.AfterFunc(execKeep, func() { e.dropExecs([]*execRecord{x}) })
	}
	e.mu.Unlock()
	e.emit(x.c, events.ActionExecDie, "execID", x.id, "exitCode", strconv.Itoa(code))
}

// dropExecs forgets execs that do not run; those that run still are told their end first.
func (e *Engine) dropExecs(list []*execRecord) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, x := range list {
		if x.started && x.exitCode == nil {
			continue // its own goroutine records the end; then it expires
		}
		delete(e.execs, x.id)
		delete(x.c.execs, x.id)
		if x.expire != nil {
			x.expire.Stop()
		}
	}
}

// execSpec describes the process of an exec: the container's, with what the request changes.
func (e *Engine) execSpec(x *execRecord, s saved) (*specs.Process, error) {
	caps, err := capabilities(s.Host)
	if err != nil {
		return nil, err
	}
	if x.req.Privileged {
		if caps, err = capabilities(&container.HostConfig{Privileged: true}); err != nil {
			return nil, err
		}
	}
	sec, err := securityOptions(s.Host)
	if err != nil {
		return nil, err
	}
	rootfs, err := e.rootMounts(e.life, x.c)
	if err != nil {
		return nil, err
	}
	spec := x.req.User
	if spec == "" {
		spec = s.Config.User
	}
	user, err := lookupUser(spec, s.Host.GroupAdd, func(name string) []byte { return readLayers(rootfs, name) })
	if err != nil {
		return nil, err
	}
	cwd := x.req.WorkingDir
	if cwd == "" {
		cwd = s.Config.WorkingDir
	}
	if cwd == "" {
		cwd = "/"
	}
	withTTY := s
	cfg := *s.Config
	cfg.Tty = x.req.Tty
	withTTY.Config = &cfg
	p := &specs.Process{
		Terminal: x.req.Tty, User: user, Args: slices.Clone(x.req.Cmd), Cwd: cwd,
		Env:          docker.MergeEnv(environment(&withTTY), x.req.Env),
		Capabilities: caps.spec(user.UID != 0), NoNewPrivileges: sec.noNewPrivileges,
		Rlimits: rlimits(s.Host), OOMScoreAdj: oomScore(s.Host.OomScoreAdj),
	}
	if size := x.req.ConsoleSize; x.req.Tty && size != nil && size[0] > 0 {
		p.ConsoleSize = &specs.Box{Height: size[0], Width: size[1]}
	}
	return p, nil
}

// ExecInspect implements runtime.Streams.
func (e *Engine) ExecInspect(_ context.Context, execID string) (*container.ExecInspectResponse, error) {
	x, err := e.findExec(execID)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	privileged := x.req.Privileged
	return &container.ExecInspectResponse{
		ID: x.id, Running: x.running, ExitCode: x.exitCode, ContainerID: x.c.id, Pid: x.pid,
		OpenStdin: x.req.AttachStdin, OpenStdout: x.req.AttachStdout, OpenStderr: x.req.AttachStderr,
		DetachKeys: []byte(x.req.DetachKeys),
		ProcessConfig: &container.ExecProcessConfig{
			Tty: x.req.Tty, Entrypoint: x.req.Cmd[0], Arguments: x.req.Cmd[1:], Privileged: &privileged, User: x.req.User,
		},
	}, nil
}

// ExecResize implements runtime.ExecResizer.
func (e *Engine) ExecResize(ctx context.Context, execID string, width, height uint32) error {
	x, err := e.findExec(execID)
	if err != nil {
		return err
	}
	e.mu.Lock()
	process := x.process
	if process == nil && !x.started {
		x.size = [2]uint32{width, height}
	}
	e.mu.Unlock()
	if process == nil {
		return model.Errorf(model.Conflict, "exec process is not started")
	}
	if err := process.Resize(e.ns(ctx), width, height); err != nil {
		return fmt.Errorf("resize exec: %w", err)
	}
	return nil
}

// Resize implements runtime.Streams.
func (e *Engine) Resize(ctx context.Context, ref string, width, height uint32) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	if !isRunning(e.view(c)) {
		return model.Errorf(model.Conflict, "container %s is not running", c.id)
	}
	_, err = e.client.TaskService().ResizePty(e.ns(ctx), &tasks.ResizePtyRequest{ContainerID: c.id, Width: width, Height: height})
	if err != nil && !isRunning(e.view(c)) {
		return model.Errorf(model.Conflict, "container %s is not running", c.id)
	}
	if err != nil {
		return fmt.Errorf("resize container: %w", errgrpc.ToNative(err))
	}
	return nil
}

// killExec ends the process of an exec.
func killExec(ctx context.Context, r *execRun) error {
	return ignoreNotFound(r.process.Kill(ctx, unix.SIGKILL))
}
