package fake

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime/docker"
)

// Inspect implements runtime.Inspector.
func (e *Engine) Inspect(_ context.Context, ref string) (*container.InspectResponse, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, err := e.find(ref)
	if err != nil {
		return nil, err
	}
	return e.inspect(c), nil
}

// List implements runtime.Inspector.
func (e *Engine) List(context.Context) ([]*container.InspectResponse, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := make([]*record, 0, len(e.containers))
	for _, c := range e.containers {
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b *record) int { return int(b.sequence) - int(a.sequence) })
	out := make([]*container.InspectResponse, len(all))
	for i, c := range all {
		out[i] = e.inspect(c)
	}
	return out, nil
}

func (e *Engine) inspect(c *record) *container.InspectResponse {
	argv := docker.Argv(c.config)
	path, args := "", []string{}
	if len(argv) > 0 {
		path, args = argv[0], argv[1:]
	}
	host := *c.host
	r := &container.InspectResponse{
		ID:      c.id,
		Created: stamp(c.created),
		Path:    path,
		Args:    args,
		State: &container.State{
			Status: c.status, Running: c.running(), Paused: c.status == container.StatePaused,
			Restarting: c.status == container.StateRestarting,
			Pid:        c.pid, ExitCode: c.exitCode, Error: c.err,
			StartedAt: stamp(c.startedAt), FinishedAt: stamp(c.finishedAt),
			Health: copyHealth(c.health),
		},
		Image: c.image.id, Name: "/" + e.index.Name(c.id), RestartCount: c.restarts,
		Driver: "overlayfs", Platform: "linux", HostConfig: &host, Config: c.config,
		NetworkSettings: &container.NetworkSettings{
			Ports:    portMap(c.ports),
			Networks: map[string]*network.EndpointSettings{},
		},
	}
	if !c.apart {
		r.NetworkSettings.Networks[c.mode()] = &network.EndpointSettings{}
	}
	for _, o := range c.networks {
		r.NetworkSettings.Networks[o.Name] = &network.EndpointSettings{NetworkID: o.NetworkID, Aliases: o.Aliases}
	}
	for _, v := range c.volumes {
		r.Mounts = append(r.Mounts, container.MountPoint{
			Type: mount.TypeVolume, Name: v, Driver: "local", RW: true,
			Source: "/volumes/" + v + "/_data", Destination: e.volumes[v].target[c.id],
		})
	}
	for id := range c.execs {
		r.ExecIDs = append(r.ExecIDs, id)
	}
	slices.Sort(r.ExecIDs)
	return r
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

// Top implements runtime.Inspector.
func (e *Engine) Top(_ context.Context, ref string, _ []string) (*container.TopResponse, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, err := e.find(ref)
	if err != nil {
		return nil, err
	}
	if !c.running() {
		return nil, notRunning(c)
	}
	cmd := fmt.Sprint(docker.Argv(c.config))
	return &container.TopResponse{
		Titles:    []string{"UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"},
		Processes: [][]string{{"root", strconv.Itoa(c.pid), "1", "0", c.startedAt.Format("15:04"), "?", "00:00:00", cmd[1 : len(cmd)-1]}},
	}, nil
}

// Stats implements runtime.Inspector. The figures are constant but for the time.
func (e *Engine) Stats(_ context.Context, ref string) (*container.StatsResponse, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, err := e.find(ref)
	if err != nil {
		return nil, err
	}
	s := &container.StatsResponse{Name: "/" + e.index.Name(c.id), ID: c.id, OSType: "linux"}
	if !c.running() {
		return s, nil
	}
	s.Read = time.Now()
	s.PidsStats.Current = 1
	s.MemoryStats.Usage, s.MemoryStats.Limit = 1<<20, uint64(e.cfg.MemTotal)
	s.CPUStats.OnlineCPUs = uint32(e.cfg.NCPU)
	return s, nil
}

// Update implements runtime.Inspector.
func (e *Engine) Update(_ context.Context, ref string, u container.UpdateConfig) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	host := *c.host // shared with the caller of Create
	docker.UpdateResources(&host, u)
	c.host = &host
	e.emit(c, events.ActionUpdate)
	return nil
}

// Pause implements runtime.Pauser.
func (e *Engine) Pause(_ context.Context, ref string) error {
	return e.setPaused(ref, true)
}

// Unpause implements runtime.Pauser.
func (e *Engine) Unpause(_ context.Context, ref string) error {
	return e.setPaused(ref, false)
}

func (e *Engine) setPaused(ref string, pause bool) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, err := e.find(ref)
	switch {
	case err != nil:
		return err
	case !c.running():
		return notRunning(c)
	case pause && c.status == container.StatePaused:
		return model.Errorf(model.Conflict, "container %s is already paused", c.id)
	case !pause && c.status != container.StatePaused:
		return model.Errorf(model.Conflict, "Container %s is not paused", c.id)
	case pause:
		c.status = container.StatePaused
		e.emit(c, events.ActionPause)
	default:
		c.status = container.StateRunning
		e.emit(c, events.ActionUnPause)
	}
	return nil
}

// Rename implements runtime.Pauser.
func (e *Engine) Rename(_ context.Context, ref, name string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	if err := docker.ValidateName(name); err != nil {
		return err
	}
	old := e.index.Name(c.id)
	if err := e.index.Add(c.id, name); err != nil {
		return err
	}
	e.emit(c, events.ActionRename, "oldName", "/"+old)
	return nil
}
