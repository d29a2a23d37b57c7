package dockerapi

import (
	"context"
	"net/http"
	"strings"

	"github.com/moby/moby/api/types/swarm"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
)

// adaptServiceSpec drops what a client of an older API version cannot have meant, as
// Docker does.
func adaptServiceSpec(s *swarm.ServiceSpec, v httpapi.Version) {
	task := &s.TaskTemplate
	if r := task.Resources; r != nil {
		if v.Before(52) {
			r.SwapBytes, r.MemorySwappiness = nil, nil
		}
		if v.Before(41) && r.Limits != nil {
			r.Limits.Pids = 0
		}
	}
	if v.Before(41) {
		s.Mode.ReplicatedJob, s.Mode.GlobalJob = nil, nil
	}
	if v.Before(40) && task.Placement != nil {
		task.Placement.MaxReplicas = 0
	}
	if task.ContainerSpec != nil {
		adaptContainerSpec(task.ContainerSpec, v)
	}
}

func adaptContainerSpec(c *swarm.ContainerSpec, v httpapi.Version) {
	if v.Before(46) {
		c.OomScoreAdj = 0
		for _, m := range c.Mounts {
			if m.TmpfsOptions != nil {
				m.TmpfsOptions.Options = nil
			}
		}
	}
	if v.Before(44) {
		if c.Privileges != nil {
			c.Privileges.Seccomp, c.Privileges.AppArmor, c.Privileges.NoNewPrivileges = nil, nil, false
		}
		if c.Healthcheck != nil {
			c.Healthcheck.StartInterval = 0
		}
	}
	if v.Before(41) {
		c.CapabilityAdd, c.CapabilityDrop, c.Ulimits = nil, nil, nil
	}
	if v.Before(40) {
		c.Sysctls = nil
		if c.Privileges != nil && c.Privileges.CredentialSpec != nil {
			c.Privileges.CredentialSpec.Config = ""
		}
		for _, config := range c.Configs {
			if config != nil {
				config.Runtime = nil
			}
		}
	}
}

// pinImage adds the digest to the image of clients before 1.30, which leave that to
// the daemon. A registry that does not answer costs a warning.
func (a *API) pinImage(ctx context.Context, spec *api.ServiceSpec, r *http.Request) []string {
	container := spec.GetTask().GetContainer()
	image := container.GetImage()
	if !httpapi.RequestVersion(r).Before(30) || container == nil || strings.Contains(image, "@") {
		return nil
	}
	if a.local != nil {
		found, err := a.local.Distribution(ctx, image, httpapi.RegistryAuth(r))
		if err == nil {
			container.Image = image + "@" + found.Descriptor.Digest.String()
			return nil
		}
	}
	return []string{"image " + image + " could not be accessed on a registry to record\nits digest. Each node will access " + image +
		" independently,\npossibly leading to different nodes running different\nversions of the image.\n"}
}
