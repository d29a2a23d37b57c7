package fake

import (
	"context"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/network"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/runtime/docker"
)

// record is one container; Engine.mu guards it.
type record struct {
	id       string
	sequence uint64
	created  time.Time
	image    *imageRecord
	config   *container.Config
	host     *container.HostConfig
	files    []runtime.File
	anon     []string // anonymous volumes
	volumes  []string // all volumes in use
	script   Script

	status     container.ContainerState
	starting   bool
	pid        int
	exitCode   int
	err        string
	startedAt  time.Time
	finishedAt time.Time
	restarts   int
	manualStop bool
	epoch      int // counts runs, so that timers of an old run do nothing
	timer      *time.Timer
	ports      []runtime.PortBinding
	networks   []runtime.OverlayRequest // besides the network mode's
	apart      bool                     // disconnected from its mode's

	health     *container.Health
	probe      *time.Timer
	probeFails bool

	output   *output
	attached []*attachment
	execs    map[string]*execRecord
	exited   chan struct{} // closed when the current run ends
	waiters  runtime.Waiters
}

type portKey struct {
	proto string
	port  uint16
}

func (c *record) running() bool {
	return c.status == container.StateRunning || c.status == container.StatePaused
}

func (e *Engine) find(ref string) (*record, error) {
	id, err := e.index.Resolve(ref)
	if err != nil {
		return nil, err
	}
	return e.containers[id], nil
}

func (e *Engine) emit(c *record, action events.Action, extra ...string) {
	e.bus.Publish(docker.ContainerEvent(action, c.id, e.index.Name(c.id), c.config, extra...))
}

// Create implements runtime.Containers.
func (e *Engine) Create(_ context.Context, opts runtime.CreateOptions) (string, []string, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	img := e.findImage(opts.Config.Image)
	if img == nil {
		return "", nil, model.Errorf(model.NotFound, "No such image: %s", opts.Config.Image)
	}
	name := strings.TrimPrefix(opts.Name, "/")
	var err error
	if name == "" {
		name, err = docker.GenerateName(e.cfg.Random, e.index.HasName)
	} else {
		err = docker.ValidateName(name)
	}
	if err != nil {
		return "", nil, err
	}
	id, err := docker.NewContainerID(e.cfg.Random)
	if err != nil {
		return "", nil, err
	}
	host := opts.HostConfig
	if host == nil {
		host = &container.HostConfig{}
	}
	if n := opts.Networking; n != nil {
		for name, ep := range n.EndpointsConfig {
			if !builtinNetwork(name) && (ep == nil || ep.NetworkID == "") { // those of the swarm come with their id
				return "", nil, model.Errorf(model.NotFound, "network %s not found", name)
			}
		}
	}
	cfg := docker.Merge(opts.Config, &img.config.Config)
	if cfg.Hostname == "" {
		cfg.Hostname = id[:12]
	}
	if err := e.index.Add(id, name); err != nil {
		return "", nil, err
	}
	text := strings.Join(docker.Argv(cfg), " ")
	if text == "" || img.script != "" && len(opts.Config.Cmd)+len(opts.Config.Entrypoint) == 0 {
		text = img.script
	}
	e.sequence++
	c := &record{
		id: id, sequence: e.sequence, created: time.Now(), image: img,
		config: cfg, host: host, files: opts.Files, script: ParseScript(text),
		status: container.StateCreated, output: newOutput(),
	}
	if err := e.useVolumes(c); err != nil {
		e.index.Remove(id)
		return "", nil, err
	}
	e.containers[id] = c
	e.emit(c, events.ActionCreate)
	return id, nil, nil
}

func builtinNetwork(name string) bool {
	switch name {
	case "", "default", "bridge", "host", "none":
		return true
	}
	return false
}

// Start implements runtime.Containers.
func (e *Engine) Start(ctx context.Context, ref string) error {
	e.mu.Lock()
	c, err := e.find(ref)
	if err == nil {
		switch {
		case c.status == container.StatePaused:
			err = model.Errorf(model.Conflict, "cannot start a paused container, try unpause instead")
		case c.running() || c.starting:
			err = runtime.ErrNotModified
		}
	}
	if err != nil {
		e.mu.Unlock()
		return err
	}
	c.starting = true
	e.mu.Unlock()

	err = sleep(ctx, e.cfg.StartTime)

	e.mu.Lock()
	defer e.mu.Unlock()
	c.starting = false
	if err == nil && e.containers[c.id] != c {
		err = model.Errorf(model.NotFound, "No such container: %s", ref)
	}
	if err == nil {
		err = e.start(c)
	}
	return err
}

func (e *Engine) start(c *record) error {
	if c.script.StartError != "" {
		return e.startFailed(c, model.Errorf(model.Internal, "%s", c.script.StartError))
	}
	if !builtinNetwork(string(c.host.NetworkMode)) {
		return e.startFailed(c, model.Errorf(model.NotFound, "network %s not found", c.host.NetworkMode))
	}
	if err := e.publish(c); err != nil {
		return e.startFailed(c, err)
	}
	c.epoch++
	c.status, c.exitCode, c.err, c.manualStop = container.StateRunning, 0, "", false
	c.startedAt = time.Now()
	e.nextPID++
	c.pid = e.nextPID
	c.exited = make(chan struct{})
	epoch := c.epoch
	e.emit(c, events.ActionStart)
	for _, l := range c.script.Output {
		c.print(l.Text+"\n", l.Stderr)
	}
	e.startHealth(c)
	if c.script.Exits {
		if c.script.ExitAfter == 0 {
			e.exit(c, epoch, c.script.ExitCode)
			return nil
		}
		e.exitLater(c, c.script.ExitAfter, c.script.ExitCode)
	}
	return nil
}

func (e *Engine) startFailed(c *record, err error) error {
	c.exitCode, c.err = 127, err.Error()
	if c.status == container.StateCreated {
		c.exitCode = 128
	}
	e.unpublish(c)
	c.waiters.Exited().Tell(runtime.WaitResult{ExitCode: c.exitCode, Err: err})
	return err
}

func (e *Engine) exitLater(c *record, d time.Duration, code int) {
	epoch := c.epoch
	c.timer = time.AfterFunc(d, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.exit(c, epoch, code)
	})
}

// exit ends run epoch of a container; a later run is left alone.
func (e *Engine) exit(c *record, epoch, code int) {
	if c.epoch != epoch || !c.running() {
		return
	}
	if c.timer != nil {
		c.timer.Stop()
	}
	e.stopHealth(c)
	c.status, c.exitCode, c.pid = container.StateExited, code, 0
	c.finishedAt = time.Now()
	e.unpublish(c)
	for _, x := range c.execs {
		x.finish(137)
	}
	c.output.close()
	c.output = c.output.next()
	for _, a := range c.attached {
		a.end()
	}
	c.attached = nil
	close(c.exited)
	e.emit(c, events.ActionDie, "exitCode", strconv.Itoa(code),
		"execDuration", strconv.Itoa(int(c.finishedAt.Sub(c.startedAt).Seconds())))
	c.waiters.Exited().Tell(runtime.WaitResult{ExitCode: code})
	if c.host.AutoRemove {
		e.remove(c, true)
		return
	}
	e.restart(c, code)
}

// restart applies the container's own restart policy.
func (e *Engine) restart(c *record, code int) {
	p := c.host.RestartPolicy
	again := p.IsAlways() || p.IsUnlessStopped() ||
		p.IsOnFailure() && code != 0 && (p.MaximumRetryCount == 0 || c.restarts < p.MaximumRetryCount)
	if !again || c.manualStop {
		return
	}
	c.restarts++
	c.status = container.StateRestarting
	delay := min(time.Minute, 100*time.Millisecond<<min(c.restarts-1, 10))
	c.timer = time.AfterFunc(delay, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.containers[c.id] == c && c.status == container.StateRestarting {
			_ = e.start(c) // the error is in the container's state
		}
	})
}

// Stop implements runtime.Containers.
func (e *Engine) Stop(ctx context.Context, ref, signal string, timeout *time.Duration) error {
	e.mu.Lock()
	c, err := e.find(ref)
	if err == nil && c.status == container.StateRestarting {
		c.timer.Stop()
		c.status, c.manualStop = container.StateExited, true
		e.mu.Unlock()
		return nil
	}
	if err == nil && !c.running() {
		err = runtime.ErrNotModified
	}
	if err != nil {
		e.mu.Unlock()
		return err
	}
	if signal == "" {
		signal = c.config.StopSignal
	}
	if signal == "" {
		signal = "SIGTERM"
	}
	sig, err := docker.ParseSignal(signal)
	if err != nil {
		e.mu.Unlock()
		return err
	}
	grace := 10 * time.Second
	if t := c.config.StopTimeout; t != nil {
		grace = time.Duration(*t) * time.Second
	}
	if timeout != nil {
		grace = *timeout
	}
	c.manualStop = true
	exited, epoch := c.exited, c.epoch
	e.signal(c, sig, true)
	e.mu.Unlock()

	var expired <-chan time.Time
	if grace >= 0 {
		t := time.NewTimer(grace)
		defer t.Stop()
		expired = t.C
	}
	select {
	case <-exited:
	case <-ctx.Done():
		return ctx.Err()
	case <-expired:
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if c.epoch == epoch && c.running() {
		e.emit(c, events.ActionKill, "signal", "9")
		e.exit(c, epoch, 128+int(unix.SIGKILL))
	}
	if e.containers[c.id] == c {
		e.emit(c, events.ActionStop)
	}
	return nil
}

// Kill implements runtime.Containers.
func (e *Engine) Kill(_ context.Context, ref, signal string) error {
	sig, err := docker.ParseSignal(signal)
	e.mu.Lock()
	defer e.mu.Unlock()
	c, ferr := e.find(ref)
	if ferr != nil {
		return ferr
	}
	if err != nil {
		return err
	}
	if !c.running() {
		return model.Errorf(model.Conflict, "cannot kill container: %s: container %s is not running", ref, c.id)
	}
	c.manualStop = true
	e.signal(c, sig, false)
	return nil
}

// signal delivers sig. Signals that end most programs end the fake process too.
func (e *Engine) signal(c *record, sig unix.Signal, stopping bool) {
	e.emit(c, events.ActionKill, "signal", strconv.Itoa(int(sig)))
	if sig == unix.SIGKILL {
		e.exit(c, c.epoch, 128+int(unix.SIGKILL))
		return
	}
	ends := stopping || sig == unix.SIGTERM || sig == unix.SIGINT || sig == unix.SIGQUIT
	if !ends || c.script.Ignore {
		return
	}
	code := c.script.StopCode
	if code < 0 {
		code = 128 + int(sig)
	}
	wait := c.script.StopTime
	if wait < 0 {
		wait = e.cfg.StopTime
	}
	if wait == 0 {
		e.exit(c, c.epoch, code)
		return
	}
	e.exitLater(c, wait, code)
}

// Remove implements runtime.Containers.
func (e *Engine) Remove(_ context.Context, ref string, force, volumes bool) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	if c.running() || c.status == container.StateRestarting {
		if !force {
			return model.Errorf(model.Conflict,
				"cannot remove container %q: container is %s: stop the container before removing or force remove", "/"+e.index.Name(c.id), c.status)
		}
		c.manualStop = true
		if c.timer != nil {
			c.timer.Stop()
		}
		if c.running() {
			e.emit(c, events.ActionKill, "signal", "9")
			e.exit(c, c.epoch, 137)
		}
		if e.containers[c.id] != c { // removed itself
			return nil
		}
	}
	e.remove(c, volumes)
	return nil
}

func (e *Engine) remove(c *record, volumes bool) {
	for id := range c.execs {
		delete(e.execs, id)
	}
	if volumes {
		for _, v := range c.anon {
			delete(e.volumes, v)
		}
	}
	e.emit(c, events.ActionDestroy)
	delete(e.containers, c.id)
	e.index.Remove(c.id)
	c.output.close()
	c.waiters.Removed().Tell(runtime.WaitResult{ExitCode: c.exitCode})
}

// Wait implements runtime.Containers.
func (e *Engine) Wait(ctx context.Context, ref string, condition container.WaitCondition) (<-chan runtime.WaitResult, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, err := e.find(ref)
	if err != nil {
		return nil, err
	}
	var ended *runtime.WaitResult
	if !c.running() && !c.starting {
		ended = &runtime.WaitResult{ExitCode: c.exitCode}
	}
	return c.waiters.Add(ctx, &e.mu, condition, ended)
}

// publish reserves the container's host ports.
func (e *Engine) publish(c *record) error {
	for port, bindings := range c.host.PortBindings {
		for _, b := range bindings {
			n, err := strconv.ParseUint(b.HostPort, 10, 16)
			if err != nil && b.HostPort != "" {
				return model.Errorf(model.Invalid, "invalid port specification: %q", b.HostPort)
			}
			key := portKey{proto: string(port.Proto()), port: uint16(n)}
			for n == 0 && (key.port == 0 || e.ports[key] != "") {
				key.port = e.nextPort
				e.nextPort = max(32768, e.nextPort+1)
			}
			if e.ports[key] != "" {
				return model.Errorf(model.Conflict,
					"driver failed programming external connectivity on endpoint %s: Bind for 0.0.0.0:%d failed: port is already allocated",
					e.index.Name(c.id), key.port)
			}
			e.ports[key] = c.id
			c.ports = append(c.ports, runtime.PortBinding{
				Protocol: key.proto, ContainerPort: port.Num(), HostIP: b.HostIP, HostPort: key.port,
			})
		}
	}
	return nil
}

func (e *Engine) unpublish(c *record) {
	for _, p := range c.ports {
		delete(e.ports, portKey{proto: p.Protocol, port: p.HostPort})
	}
	c.ports = nil
}

func portMap(ports []runtime.PortBinding) network.PortMap {
	out := network.PortMap{}
	for _, b := range ports {
		if p, ok := network.PortFrom(b.ContainerPort, network.IPProtocol(b.Protocol)); ok {
			out[p] = append(out[p], network.PortBinding{HostIP: b.HostIP, HostPort: strconv.Itoa(int(b.HostPort))})
		}
	}
	return out
}
