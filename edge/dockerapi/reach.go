package dockerapi

import (
	"context"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// reach says by what the tasks of a service get out of their containers and at the machines
// they run on; nothing for most services. hostNetwork tells the id of the network "host".
func reach(spec *api.ServiceSpec, hostNetwork string) []string {
	var by []string
	c := spec.GetTask().GetContainer()
	for _, m := range c.GetMounts() {
		d := m.GetVolumeOptions().GetDriverConfig()
		switch {
		case m.GetType() == api.Mount_BIND:
			by = append(by, "the bind mount of "+m.GetSource())
		case len(d.GetOptions()) > 0 || d.GetName() != "" && d.GetName() != "local":
			by = append(by, "the volume driver options of "+m.GetTarget())
		case m.GetType() != api.Mount_VOLUME && m.GetType() != api.Mount_TMPFS:
			by = append(by, "the mount of "+m.GetTarget())
		}
	}
	if added := c.GetCapabilityAdd(); len(added) > 0 {
		by = append(by, "the added capabilities "+strings.Join(added, ", "))
	}
	if !proto.Equal(harmless(c.GetPrivileges()), c.GetPrivileges()) {
		by = append(by, "changed privileges")
	}
	networks := slices.Concat(spec.GetTask().GetNetworks(), spec.GetNetworks()) //nolint:staticcheck // old members still write it
	if slices.ContainsFunc(networks, func(n *api.NetworkAttachmentConfig) bool {
		return n.GetTarget() == hostNetwork || n.GetTarget() == "host"
	}) {
		by = append(by, "the network of the host")
	}
	if spec.GetTask().GetContainer() == nil && spec.GetTask().GetRuntime() != nil {
		by = append(by, "a runtime that is not containers")
	}
	return by
}

// harmless returns what of privileges takes away and gives nothing.
func harmless(p *api.Privileges) *api.Privileges {
	if p == nil {
		return nil
	}
	return &api.Privileges{NoNewPrivileges: p.GetNoNewPrivileges()}
}

// admitService refuses a service of an operator that would reach the machines: who may do
// that is admin. Of a service that an admin made so, an operator may change the number of
// tasks and have them made anew. old is nil for a new service.
func admitService(ctx context.Context, c api.ControlClient, old *api.Service, spec *api.ServiceSpec, back bool) error {
	caller := callerOf(ctx)
	if caller.Role >= Admin {
		return nil
	}
	host := ""
	resp, err := c.ListNetworks(ctx, new(api.ListNetworksRequest))
	if err != nil {
		return err
	}
	for _, n := range resp.GetNetworks() {
		if n.GetSpec().GetAnnotations().GetName() == "host" {
			host = n.GetId()
		}
	}
	by := reach(spec, host)
	if old != nil {
		by = append(by, reach(old.GetSpec(), host)...)
		if back {
			by = append(by, reach(old.GetPreviousSpec(), host)...)
		}
		if !back && onlyScaled(old.GetSpec(), spec) {
			return nil
		}
	}
	if len(by) == 0 {
		return nil
	}
	return model.Errorf(model.Denied, "permission denied: %s has the role %s, and a service with %s needs the role admin", caller.Who, caller.Role, by[0])
}

// onlyScaled reports whether two specs differ at most in the number of tasks, in what forces
// new ones, and in credentials for the same image.
func onlyScaled(old, spec *api.ServiceSpec) bool {
	old, spec = model.Clone(old), model.Clone(spec)
	for _, s := range []*api.ServiceSpec{old, spec} {
		if r := s.GetReplicated(); r != nil {
			r.Replicas = 0
		}
		if s.GetTask() != nil {
			s.Task.ForceUpdate = 0
		}
		if c := s.GetTask().GetContainer(); c != nil {
			c.PullOptions = nil
		}
	}
	return proto.Equal(old, spec)
}
