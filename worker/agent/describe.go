package agent

import (
	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

// Describe makes the description of a node from what its runtime knows.
func Describe(info runtime.Info, hostname, version string, labels map[string]string, tls *api.NodeTLSInfo) *api.NodeDescription {
	return &api.NodeDescription{
		Hostname: hostname,
		Platform: &api.Platform{Architecture: info.Architecture, Os: "linux"},
		Resources: &api.Resources{
			NanoCpus: int64(info.NCPU) * 1e9, MemoryBytes: info.MemTotal,
		},
		Engine: &api.EngineDescription{
			EngineVersion: version,
			Labels:        labels,
			Plugins: []*api.PluginDescription{
				{Type: "Log", Name: "json-file"},
				{Type: "Log", Name: "none"},
				{Type: "Network", Name: "bridge"},
				{Type: "Network", Name: "host"},
				{Type: "Network", Name: "null"},
				{Type: "Network", Name: model.SkepOverlay},
				{Type: "Volume", Name: "local"},
			},
		},
		TlsInfo: tls,
	}
}
