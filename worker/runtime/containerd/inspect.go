package containerd

import (
	"context"
	"slices"
	"strconv"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/runtime/docker"
)

func isRunning(s saved) bool {
	return s.Status == container.StateRunning || s.Status == container.StatePaused
}

// Inspect implements runtime.Inspector.
func (e *Engine) Inspect(_ context.Context, ref string) (*container.InspectResponse, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, err := e.findLocked(ref)
	if err != nil {
		return nil, err
	}
	return e.inspectLocked(c), nil
}

// List implements runtime.Inspector.
func (e *Engine) List(context.Context) ([]*container.InspectResponse, error) {
	all := e.all()
	e.mu.Lock()
	defer e.mu.Unlock()
	out := make([]*container.InspectResponse, 0, len(all))
	for _, c := range all {
		if e.containers[c.id] == c {
			out = append(out, e.inspectLocked(c))
		}
	}
	return out, nil
}

func (e *Engine) inspectLocked(c *record) *container.InspectResponse {
	s := &c.saved
	argv := docker.Argv(s.Config)
	host := *s.Host
	cfg := *s.Config
	r := &container.InspectResponse{
		ID: s.ID, Created: s.Created.Format(time.RFC3339Nano), Path: argv[0], Args: argv[1:],
		State: state(s), Image: s.ImageID, Name: "/" + s.Name, RestartCount: s.Restarts,
		ResolvConfPath: e.netFile(s.ID, resolvFile), HostnamePath: e.netFile(s.ID, hostnameFile), HostsPath: e.netFile(s.ID, hostsFile),
		Driver: snapshotter, Platform: "linux", HostConfig: &host, Config: &cfg,
		NetworkSettings: networkSettings(s), Mounts: []container.MountPoint{},
	}
	if host.LogConfig.Type != "none" {
		r.LogPath = e.logPath(s.ID)
	}
	for _, m := range s.Mounts {
		r.Mounts = append(r.Mounts, m.MountPoint)
	}
	for id := range c.execs {
		r.ExecIDs = append(r.ExecIDs, id)
	}
	slices.Sort(r.ExecIDs)
	return r
}

func (e *Engine) netFile(id, name string) string { return e.containerDir(id) + "/" + name }

func state(s *saved) *container.State {
	st := &container.State{
		Status: s.Status, Running: isRunning(*s), Paused: s.Status == container.StatePaused,
		Restarting: s.Status == container.StateRestarting, OOMKilled: s.OOMKilled, Dead: s.Status == container.StateDead,
		Pid: s.Pid, ExitCode: s.ExitCode, Error: s.Error,
		StartedAt: s.Started.Format(time.RFC3339Nano), FinishedAt: s.Finished.Format(time.RFC3339Nano),
	}
	if st.Running {
		st.ExitCode = 0
	}
	if s.Health != nil {
		h := *s.Health
		st.Health = &h
	}
	return st
}

func networkSettings(s *saved) *container.NetworkSettings {
	n := &container.NetworkSettings{
		SandboxKey: s.Sandbox.NetNS, Ports: network.PortMap{}, Networks: map[string]*network.EndpointSettings{},
	}
	if isRunning(*s) {
		n.SandboxID = s.ID
		for port := range s.Config.ExposedPorts {
			n.Ports[port] = nil
		}
		for _, b := range s.Sandbox.Ports {
			if p, ok := network.PortFrom(b.ContainerPort, network.IPProtocol(b.Protocol)); ok {
				n.Ports[p] = append(n.Ports[p], network.PortBinding{HostIP: b.HostIP, HostPort: strconv.Itoa(int(b.HostPort))})
			}
		}
	}
	if s.Host.NetworkMode.IsContainer() {
		return n
	}
	for i, o := range places(s) {
		n.Networks[o.Name] = &network.EndpointSettings{NetworkID: o.NetworkID, Aliases: o.Aliases}
		if len(s.Overlays[i].Wanted) > 0 {
			n.Networks[o.Name].IPAMConfig = wantedAddresses(s.Overlays[i])
		}
		if ep := s.Sandbox.Overlays[o.Name]; ep != nil && isRunning(*s) {
			n.Networks[o.Name] = ep.Copy()
		}
	}
	if len(s.Overlays) > 0 && !onBridge(s) { // the local network is only their way out
		return n
	}
	name := s.Sandbox.NetworkName
	if name == "" || s.OnBridge {
		if name = string(s.Host.NetworkMode); name == "default" || s.OnBridge {
			name = "bridge"
		}
	}
	if s.OffBridge {
		return n
	}
	n.Networks[name] = &network.EndpointSettings{}
	if ep := s.Sandbox.Endpoint; ep != nil && isRunning(*s) {
		n.Networks[name] = ep.Copy()
	}
	return n
}

func wantedAddresses(o runtime.OverlayRequest) *network.EndpointIPAMConfig {
	c := new(network.EndpointIPAMConfig)
	for _, a := range o.Wanted {
		if a.Is4() {
			c.IPv4Address = a
		} else {
			c.IPv6Address = a
		}
	}
	return c
}
