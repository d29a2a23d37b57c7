package local

import (
	"context"
	"maps"
	"net/netip"
	"os"
	goruntime "runtime"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/system"

	"github.com/skep-dev/skep/core/model"
)

// Info fills in what `docker info` says about containers, images and the machine.
func (a *API) Info(ctx context.Context, info *system.Info) error {
	facts, err := a.engine.Info(ctx)
	if err != nil {
		return err
	}
	all, err := a.engine.List(ctx)
	if err != nil {
		return err
	}
	for _, c := range all {
		info.Containers++
		switch c.State.Status {
		case container.StateRunning, container.StateRestarting:
			info.ContainersRunning++
		case container.StatePaused:
			info.ContainersPaused++
		case container.StateCreated, container.StateExited, container.StateDead, container.StateRemoving:
			info.ContainersStopped++
		}
	}
	images, err := a.engine.ListImages(ctx)
	if err != nil {
		return err
	}
	info.Images = len(images)
	info.Driver = facts.StorageDriver
	info.Plugins = system.PluginsInfo{
		Volume: []string{"local"}, Network: []string{"bridge", "host", "null", "overlay"}, Log: []string{"json-file", "none"},
	}
	info.MemoryLimit, info.SwapLimit, info.CPUCfsPeriod, info.CPUCfsQuota = true, true, true, true
	info.CPUShares, info.CPUSet, info.PidsLimit, info.IPv4Forwarding = true, true, true, true
	info.NGoroutines = goruntime.NumGoroutine()
	if fds, err := os.ReadDir("/proc/self/fd"); err == nil {
		info.NFd = len(fds)
	}
	info.SystemTime = time.Now().Format(time.RFC3339Nano)
	info.LoggingDriver, info.CgroupDriver, info.CgroupVersion = "json-file", facts.CgroupDriver, facts.CgroupVersion
	info.KernelVersion, info.OperatingSystem, info.OSType = facts.KernelVersion, facts.OperatingSystem, "linux"
	info.Architecture, info.NCPU, info.MemTotal = facts.Architecture, facts.NCPU, facts.MemTotal
	info.IndexServerAddress = "https://index.docker.io/v1/"
	info.RegistryConfig = &registry.ServiceConfig{
		InsecureRegistryCIDRs: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")},
		IndexConfigs:          map[string]*registry.IndexInfo{"docker.io": {Name: "docker.io", Secure: true, Official: true, Mirrors: []string{}}},
		Mirrors:               []string{},
	}
	info.Runtimes = map[string]system.RuntimeWithStatus{facts.RuntimeName: {Runtime: system.Runtime{Path: facts.RuntimeName}}}
	info.DefaultRuntime = facts.RuntimeName
	info.LiveRestoreEnabled = true
	info.InitBinary = "skep-init"
	info.ContainerdCommit.ID, info.RuncCommit.ID = facts.ContainerdVersion, facts.RuntimeVersion
	info.SecurityOptions = []string{"name=seccomp,profile=builtin"}
	if facts.CgroupVersion == "2" {
		info.SecurityOptions = append(info.SecurityOptions, "name=cgroupns")
	}
	info.Warnings = append(info.Warnings, facts.Warnings...)
	return nil
}

// Components are the parts for `docker version` besides the Engine.
func (a *API) Components(ctx context.Context) []system.ComponentVersion {
	facts, err := a.engine.Info(ctx)
	if err != nil {
		return nil
	}
	return []system.ComponentVersion{
		{Name: "containerd", Version: strings.TrimPrefix(facts.ContainerdVersion, "v"), Details: map[string]string{"GitCommit": facts.ContainerdVersion}},
		{Name: facts.RuntimeName, Version: facts.RuntimeVersion, Details: map[string]string{"GitCommit": facts.RuntimeVersion}},
	}
}

// Distribution asks a registry for an image's descriptor and platforms.
func (a *API) Distribution(ctx context.Context, ref string, auth *registry.AuthConfig) (*registry.DistributionInspect, error) {
	return a.engine.Distribution(ctx, ref, auth)
}

// Networks lists this node's own networks with the containers on them, then the networks
// of the swarm that containers of this node are attached to.
func (a *API) Networks(ctx context.Context) ([]network.Inspect, error) {
	all, err := a.engine.List(ctx)
	if err != nil {
		return nil, err
	}
	var out []network.Inspect
	for _, name := range []string{"bridge", "host", "none"} {
		driver := name
		if name == "none" {
			driver = "null"
		}
		n := emptyNetwork(name, localID(a.cfg.DaemonID, name), driver, "local")
		n.EnableIPv4 = name == "bridge"
		out = append(out, n)
	}
	if a.cfg.Bridges != nil {
		for _, n := range a.cfg.Bridges.ListBridges() {
			out = append(out, network.Inspect{Network: n, Containers: map[string]network.EndpointResource{}})
		}
	}
	for _, c := range all {
		if c.NetworkSettings == nil || !c.State.Running {
			continue
		}
		for _, name := range slices.Sorted(maps.Keys(c.NetworkSettings.Networks)) {
			endpoint := c.NetworkSettings.Networks[name]
			if endpoint == nil {
				continue
			}
			i := slices.IndexFunc(out, func(n network.Inspect) bool {
				// A network of the swarm may be called like one of this node.
				return n.Name == name && (n.Scope == "swarm") == (len(endpoint.NetworkID) == model.IDLength)
			})
			if i < 0 && len(endpoint.NetworkID) == model.IDLength {
				n := emptyNetwork(name, endpoint.NetworkID, "overlay", "swarm")
				n.EnableIPv4 = true
				i, out = len(out), append(out, n)
			}
			if i >= 0 {
				addEndpoint(&out[i], c.ID, strings.TrimPrefix(c.Name, "/"), endpoint)
			}
		}
	}
	return out, nil
}

func emptyNetwork(name, id, driver, scope string) network.Inspect {
	n := network.Inspect{Containers: map[string]network.EndpointResource{}}
	n.Name, n.ID, n.Driver, n.Scope = name, id, driver, scope
	n.IPAM = network.IPAM{Driver: "default", Config: []network.IPAMConfig{}}
	n.Options, n.Labels = map[string]string{}, map[string]string{}
	return n
}

func addEndpoint(n *network.Inspect, containerID, name string, endpoint *network.EndpointSettings) {
	e := network.EndpointResource{Name: name, EndpointID: endpoint.EndpointID, MacAddress: endpoint.MacAddress}
	if endpoint.IPAddress.IsValid() {
		e.IPv4Address = netip.PrefixFrom(endpoint.IPAddress, endpoint.IPPrefixLen)
	}
	if endpoint.IPAddress.IsValid() && len(n.IPAM.Config) == 0 {
		n.IPAM.Config = []network.IPAMConfig{{Subnet: e.IPv4Address.Masked(), Gateway: endpoint.Gateway}}
	}
	if endpoint.GlobalIPv6Address.IsValid() {
		e.IPv6Address = netip.PrefixFrom(endpoint.GlobalIPv6Address, endpoint.GlobalIPv6PrefixLen)
		n.EnableIPv6 = true
	}
	n.Containers[containerID] = e
}
