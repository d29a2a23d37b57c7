package dockerapi

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	goruntime "runtime"
	"time"

	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/api/types/system"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/edge/dockerapi/convert"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
)

const twoManagers = "WARNING: Running Swarm in a two-manager configuration. This configuration provides\n" +
	"         no fault tolerance, and poses a high risk to lose control over the cluster.\n" +
	"         Refer to https://docs.docker.com/engine/swarm/admin_guide/ to configure the\n" +
	"         Swarm for fault-tolerance."

func (a *API) info(w http.ResponseWriter, r *http.Request) error {
	facts := a.daemon.Facts()
	info := &system.Info{
		ID: facts.ID, Name: facts.Name, DockerRootDir: facts.RootDir, Labels: facts.Labels, Debug: facts.Debug,
		ServerVersion: facts.Version, GenericResources: facts.GenericResources, ExperimentalBuild: a.config.Experimental,
		OSType: "linux", NCPU: goruntime.NumCPU(), NGoroutines: goruntime.NumGoroutine(), SystemTime: time.Now().Format(time.RFC3339Nano),
		LoggingDriver: "json-file", IndexServerAddress: "https://index.docker.io/v1/",
		Plugins: system.PluginsInfo{
			Volume: []string{"local"}, Network: []string{"bridge", "host", "null"}, Log: []string{"json-file"},
		},
		RegistryConfig: registryConfig(facts.InsecureRegistries), Warnings: []string{}, CDISpecDirs: []string{},
	}
	if info.Labels == nil {
		info.Labels = []string{}
	}
	if a.local != nil {
		if err := a.local.Info(r.Context(), info); err != nil {
			return err
		}
	}
	info.Swarm = a.swarmInfo(r.Context())
	info.Warnings = append(info.Warnings, info.Swarm.Warnings...)
	return writeInfo(w, info, httpapi.RequestVersion(r))
}

// registryConfig says how registries are treated: those on loopback may lack TLS, and
// those that the daemon was told of.
func registryConfig(insecure []string) *registry.ServiceConfig {
	c := &registry.ServiceConfig{
		InsecureRegistryCIDRs: []netip.Prefix{netip.MustParsePrefix("::1/128"), netip.MustParsePrefix("127.0.0.0/8")},
		IndexConfigs: map[string]*registry.IndexInfo{
			"docker.io": {Name: "docker.io", Mirrors: []string{}, Secure: true, Official: true},
		},
	}
	for _, r := range insecure {
		if network, err := netip.ParsePrefix(r); err == nil {
			c.InsecureRegistryCIDRs = append(c.InsecureRegistryCIDRs, network)
			continue
		}
		c.IndexConfigs[r] = &registry.IndexInfo{Name: r, Mirrors: []string{}}
	}
	return c
}

// swarmInfo is the local status and, on a manager with a leader, the cluster's.
func (a *API) swarmInfo(ctx context.Context) swarm.Info {
	info := a.swarm.Status()
	if !info.ControlAvailable {
		return info
	}
	ctx, cancel := context.WithTimeout(ctx, infoTimeout)
	defer cancel()
	c, err := a.manager.Control()
	if err != nil {
		info.Error = err.Error()
		return info
	}
	cluster, err := theCluster(ctx, c)
	if err != nil {
		info.Error = err.Error()
		return info
	}
	nodes, err := c.ListNodes(ctx, new(api.ListNodesRequest))
	if err != nil {
		info.Error = err.Error()
		return info
	}
	info.Cluster = new(convert.DockerSwarm(cluster).ClusterInfo)
	info.Nodes = len(nodes.GetNodes())
	for _, n := range nodes.GetNodes() {
		if n.GetManagerStatus() != nil {
			info.Managers++
		}
	}
	if info.Managers == 2 {
		info.Warnings = append(info.Warnings, twoManagers)
	}
	return info
}

// writeInfo adds what clients of older versions look for.
func writeInfo(w http.ResponseWriter, info *system.Info, v httpapi.Version) error {
	if !v.Before(50) {
		return httpapi.WriteJSON(w, http.StatusOK, info)
	}
	data, err := json.Marshal(info)
	if err != nil {
		return fmt.Errorf("encode info: %w", err)
	}
	var members map[string]any
	if err := json.Unmarshal(data, &members); err != nil {
		return fmt.Errorf("encode info: %w", err)
	}
	delete(members, "DiscoveredDevices")
	members["BridgeNfIptables"], members["BridgeNfIp6tables"] = false, false
	if v.Before(49) {
		delete(members, "FirewallBackend")
		for _, key := range []string{"ContainerdCommit", "RuncCommit", "InitCommit"} {
			if commit, ok := members[key].(map[string]any); ok {
				commit["Expected"] = commit["ID"]
			}
		}
	}
	if registry, ok := members["RegistryConfig"].(map[string]any); ok && v.Before(47) {
		registry["AllowNondistributableArtifactsCIDRs"], registry["AllowNondistributableArtifactsHostnames"] = nil, nil
	}
	if v.Before(46) {
		delete(members, "Containerd")
	}
	return httpapi.WriteJSON(w, http.StatusOK, members)
}

func (a *API) version(w http.ResponseWriter, r *http.Request) error {
	facts := a.daemon.Facts()
	info := new(system.Info)
	if a.local != nil {
		if err := a.local.Info(r.Context(), info); err != nil {
			return err
		}
	}
	out := system.VersionResponse{
		Platform: system.PlatformInfo{Name: "Skep"}, Version: facts.Version,
		APIVersion: httpapi.MaxVersion, MinAPIVersion: httpapi.MinVersion, Os: "linux", Arch: goruntime.GOARCH,
		GitCommit: facts.Commit, GoVersion: goruntime.Version(), KernelVersion: kernelVersion(info), BuildTime: facts.BuildTime,
		Experimental: a.config.Experimental,
	}
	out.Components = []system.ComponentVersion{{
		Name: "Engine", Version: facts.Version,
		Details: map[string]string{
			"ApiVersion": out.APIVersion, "Arch": out.Arch, "BuildTime": out.BuildTime, "Experimental": fmt.Sprint(a.config.Experimental),
			"GitCommit": out.GitCommit, "GoVersion": out.GoVersion, "KernelVersion": out.KernelVersion,
			"MinAPIVersion": out.MinAPIVersion, "Os": out.Os,
		},
	}}
	if a.local != nil {
		out.Components = append(out.Components, a.local.Components(r.Context())...)
	}
	return httpapi.WriteJSON(w, http.StatusOK, out)
}

func kernelVersion(info *system.Info) string {
	if info.KernelVersion != "" {
		return info.KernelVersion
	}
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return "" // not Linux, or no /proc: nothing to tell
	}
	return string(release[:max(len(release)-1, 0)])
}
