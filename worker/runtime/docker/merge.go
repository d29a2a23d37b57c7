package docker

import (
	"maps"
	"slices"
	"strings"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
)

// DefaultPath is the PATH of a container whose image and configuration set none.
const DefaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Merge returns a container's configuration completed from its image's, as Docker does:
// what the container says wins; environment, labels, volumes and ports are united; an
// entrypoint given by the container discards the image's command. Neither argument is changed.
func Merge(cfg *container.Config, img *dockerspec.DockerOCIImageConfig) *container.Config {
	out := *cfg
	out.Labels = map[string]string{}
	maps.Copy(out.Labels, img.Labels)
	maps.Copy(out.Labels, cfg.Labels)
	if out.User == "" {
		out.User = img.User
	}
	if out.WorkingDir == "" {
		out.WorkingDir = img.WorkingDir
	}
	if out.StopSignal == "" {
		out.StopSignal = img.StopSignal
	}
	out.Env = MergeEnv(img.Env, cfg.Env)
	if len(cfg.Entrypoint) == 0 {
		if len(cfg.Cmd) == 0 {
			out.Cmd = slices.Clone(img.Cmd)
		}
		if cfg.Entrypoint == nil {
			out.Entrypoint = slices.Clone(img.Entrypoint)
		}
	} else if len(cfg.Entrypoint) == 1 && cfg.Entrypoint[0] == "" {
		out.Entrypoint = nil // an empty string resets the image's entrypoint
	}
	if len(cfg.Shell) == 0 {
		out.Shell = slices.Clone(img.Shell)
	}
	out.Volumes = union(cfg.Volumes, img.Volumes)
	out.ExposedPorts = mergePorts(cfg.ExposedPorts, img.ExposedPorts)
	out.Healthcheck = mergeHealth(cfg.Healthcheck, img.Healthcheck)
	return &out
}

// MergeEnv appends over to base; a variable in over replaces the one of the same name.
func MergeEnv(base, over []string) []string {
	out := slices.Clone(over)
	names := map[string]bool{}
	for _, kv := range over {
		name, _, _ := strings.Cut(kv, "=")
		names[name] = true
	}
	for _, kv := range base {
		name, _, _ := strings.Cut(kv, "=")
		if !names[name] {
			out = append(out, kv)
		}
	}
	return out
}

// Argv returns the command line of a merged configuration.
func Argv(cfg *container.Config) []string {
	return append(slices.Clone(cfg.Entrypoint), cfg.Cmd...)
}

func union(a, b map[string]struct{}) map[string]struct{} {
	if len(a)+len(b) == 0 {
		return a
	}
	out := map[string]struct{}{}
	maps.Copy(out, a)
	maps.Copy(out, b)
	return out
}

func mergePorts(own network.PortSet, image map[string]struct{}) network.PortSet {
	if len(own)+len(image) == 0 {
		return own
	}
	out := network.PortSet{}
	maps.Copy(out, own)
	for s := range image {
		if p, err := network.ParsePort(s); err == nil { // an image may hold anything; Docker ignores what it cannot read
			out[p] = struct{}{}
		}
	}
	return out
}

func mergeHealth(own, image *container.HealthConfig) *container.HealthConfig {
	switch {
	case image == nil:
		return own
	case own == nil:
		h := *image
		return &h
	}
	h := *own
	if len(h.Test) == 0 {
		h.Test = slices.Clone(image.Test)
	}
	if h.Interval == 0 {
		h.Interval = image.Interval
	}
	if h.Timeout == 0 {
		h.Timeout = image.Timeout
	}
	if h.StartPeriod == 0 {
		h.StartPeriod = image.StartPeriod
	}
	if h.StartInterval == 0 {
		h.StartInterval = image.StartInterval
	}
	if h.Retries == 0 {
		h.Retries = image.Retries
	}
	return &h
}
