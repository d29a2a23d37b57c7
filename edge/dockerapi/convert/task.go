package convert

import (
	"maps"
	"net/netip"

	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

func storeTaskSpec(t swarm.TaskSpec) (*api.TaskSpec, error) {
	switch t.Runtime {
	case "", swarm.RuntimeContainer:
		if t.ContainerSpec == nil || t.PluginSpec != nil {
			return nil, invalid("mismatched Runtime and *Spec fields")
		}
	case swarm.RuntimePlugin:
		return nil, model.Errorf(model.Internal, "runtime type %q only supported in experimental", t.Runtime)
	case swarm.RuntimeNetworkAttachment:
		return nil, invalid("unsupported runtime")
	default:
		return nil, invalid("unsupported runtime")
	}
	container, err := storeContainer(t.ContainerSpec)
	if err != nil {
		return nil, err
	}
	out := &api.TaskSpec{
		Runtime:   &api.TaskSpec_Container{Container: container},
		Placement: storePlacement(t.Placement), LogDriver: storeDriver(t.LogDriver), ForceUpdate: t.ForceUpdate,
		Networks: each(t.Networks, StoreAttachmentConfig),
	}
	if out.Resources, err = storeResources(t.Resources); err != nil {
		return nil, err
	}
	if t.Resources != nil && t.Resources.Limits != nil {
		container.PidsLimit = t.Resources.Limits.Pids
	}
	if out.Restart, err = storeRestart(t.RestartPolicy); err != nil {
		return nil, err
	}
	return out, nil
}

// StoreAttachmentConfig returns what is stored of a reference to a network.
func StoreAttachmentConfig(n swarm.NetworkAttachmentConfig) *api.NetworkAttachmentConfig {
	return &api.NetworkAttachmentConfig{Target: n.Target, Aliases: clone(n.Aliases), DriverAttachmentOpts: maps.Clone(n.DriverOpts)}
}

func dockerAttachmentConfig(n *api.NetworkAttachmentConfig) swarm.NetworkAttachmentConfig {
	return swarm.NetworkAttachmentConfig{Target: n.GetTarget(), Aliases: clone(n.GetAliases()), DriverOpts: maps.Clone(n.GetDriverAttachmentOpts())}
}

func storeResources(r *swarm.ResourceRequirements) (*api.ResourceRequirements, error) {
	if r == nil {
		return nil, nil //nolint:nilnil // absent stays absent
	}
	out := new(api.ResourceRequirements)
	if r.Limits != nil {
		out.Limits = &api.Resources{NanoCpus: r.Limits.NanoCPUs, MemoryBytes: r.Limits.MemoryBytes}
	}
	if r.Reservations != nil {
		out.Reservations = &api.Resources{
			NanoCpus: r.Reservations.NanoCPUs, MemoryBytes: r.Reservations.MemoryBytes,
			Generic: each(r.Reservations.GenericResources, storeGeneric),
		}
	}
	if r.SwapBytes != nil {
		if out.GetLimits().GetMemoryBytes() == 0 {
			return nil, invalid("memory swap provided, but no memory-limit was set")
		}
		out.SwapBytes = wrapperspb.Int64(*r.SwapBytes)
	}
	if r.MemorySwappiness != nil {
		out.MemorySwappiness = wrapperspb.Int64(*r.MemorySwappiness)
	}
	return out, nil
}

func dockerResources(r *api.ResourceRequirements, pids int64) *swarm.ResourceRequirements {
	if r == nil {
		return nil
	}
	out := new(swarm.ResourceRequirements)
	if l := r.GetLimits(); l != nil {
		out.Limits = &swarm.Limit{NanoCPUs: l.GetNanoCpus(), MemoryBytes: l.GetMemoryBytes(), Pids: pids}
	}
	if r.GetReservations() != nil {
		reservations := dockerAmounts(r.GetReservations())
		out.Reservations = &reservations
	}
	if v := r.GetSwapBytes(); v != nil {
		out.SwapBytes = new(v.GetValue())
	}
	if v := r.GetMemorySwappiness(); v != nil {
		out.MemorySwappiness = new(v.GetValue())
	}
	return out
}

func dockerAmounts(r *api.Resources) swarm.Resources {
	return swarm.Resources{NanoCPUs: r.GetNanoCpus(), MemoryBytes: r.GetMemoryBytes(), GenericResources: each(r.GetGeneric(), dockerGeneric)}
}

func storeGeneric(g swarm.GenericResource) *api.GenericResource {
	switch {
	case g.NamedResourceSpec != nil:
		return &api.GenericResource{Resource: &api.GenericResource_NamedResourceSpec{
			NamedResourceSpec: &api.NamedGenericResource{Kind: g.NamedResourceSpec.Kind, Value: g.NamedResourceSpec.Value},
		}}
	case g.DiscreteResourceSpec != nil:
		return &api.GenericResource{Resource: &api.GenericResource_DiscreteResourceSpec{
			DiscreteResourceSpec: &api.DiscreteGenericResource{Kind: g.DiscreteResourceSpec.Kind, Value: g.DiscreteResourceSpec.Value},
		}}
	default:
		return new(api.GenericResource)
	}
}

func dockerGeneric(g *api.GenericResource) swarm.GenericResource {
	var out swarm.GenericResource
	if n := g.GetNamedResourceSpec(); n != nil {
		out.NamedResourceSpec = &swarm.NamedGenericResource{Kind: n.GetKind(), Value: n.GetValue()}
	}
	if d := g.GetDiscreteResourceSpec(); d != nil {
		out.DiscreteResourceSpec = &swarm.DiscreteGenericResource{Kind: d.GetKind(), Value: d.GetValue()}
	}
	return out
}

func storeRestart(p *swarm.RestartPolicy) (*api.RestartPolicy, error) {
	if p == nil {
		return nil, nil //nolint:nilnil // absent stays absent
	}
	condition := api.RestartPolicy_ANY
	if p.Condition != "" {
		var err error
		condition, err = enum[api.RestartPolicy_RestartCondition](api.RestartPolicy_RestartCondition_value, string(p.Condition), "RestartCondition")
		if err != nil {
			return nil, err
		}
	}
	out := &api.RestartPolicy{Condition: condition, Delay: storeOptionalDuration(p.Delay), Window: storeOptionalDuration(p.Window)}
	if p.MaxAttempts != nil {
		out.MaxAttempts = *p.MaxAttempts
	}
	return out, nil
}

func dockerRestart(p *api.RestartPolicy) *swarm.RestartPolicy {
	if p == nil {
		return nil
	}
	return &swarm.RestartPolicy{
		Condition: swarm.RestartPolicyCondition(word(p.GetCondition())), Delay: optionalDuration(p.GetDelay()),
		MaxAttempts: new(p.GetMaxAttempts()), Window: optionalDuration(p.GetWindow()),
	}
}

func storePlacement(p *swarm.Placement) *api.Placement {
	if p == nil {
		return nil
	}
	out := &api.Placement{Constraints: clone(p.Constraints), MaxReplicas: p.MaxReplicas}
	for _, preference := range p.Preferences {
		if preference.Spread == nil {
			continue
		}
		out.Preferences = append(out.Preferences, &api.PlacementPreference{
			Preference: &api.PlacementPreference_Spread{Spread: &api.SpreadOver{SpreadDescriptor: preference.Spread.SpreadDescriptor}},
		})
	}
	out.Platforms = each(p.Platforms, func(p swarm.Platform) *api.Platform {
		return &api.Platform{Architecture: p.Architecture, Os: p.OS}
	})
	return out
}

func dockerPlacement(p *api.Placement) *swarm.Placement {
	if p == nil {
		return nil
	}
	out := &swarm.Placement{Constraints: clone(p.GetConstraints()), MaxReplicas: p.GetMaxReplicas()}
	for _, preference := range p.GetPreferences() {
		if s := preference.GetSpread(); s != nil {
			out.Preferences = append(out.Preferences, swarm.PlacementPreference{Spread: &swarm.SpreadOver{SpreadDescriptor: s.GetSpreadDescriptor()}})
		}
	}
	out.Platforms = each(p.GetPlatforms(), dockerPlatform)
	return out
}

func dockerPlatform(p *api.Platform) swarm.Platform {
	return swarm.Platform{Architecture: p.GetArchitecture(), OS: p.GetOs()}
}

func dockerTaskSpec(t *api.TaskSpec) swarm.TaskSpec {
	out := swarm.TaskSpec{
		Resources:     dockerResources(t.GetResources(), t.GetContainer().GetPidsLimit()),
		RestartPolicy: dockerRestart(t.GetRestart()), Placement: dockerPlacement(t.GetPlacement()),
		Networks: each(t.GetNetworks(), dockerAttachmentConfig), LogDriver: dockerDriver(t.GetLogDriver()),
		ForceUpdate: t.GetForceUpdate(),
	}
	switch r := t.GetRuntime().(type) {
	case *api.TaskSpec_Container:
		out.ContainerSpec = dockerContainer(r.Container)
	case *api.TaskSpec_Attachment:
		out.NetworkAttachmentSpec = &swarm.NetworkAttachmentSpec{ContainerID: r.Attachment.GetContainerId()}
		out.Runtime = swarm.RuntimeNetworkAttachment
	case *api.TaskSpec_Generic:
		out.Runtime = swarm.RuntimeType(r.Generic.GetKind())
	}
	return out
}

// DockerTask returns what clients read of a task.
func DockerTask(t *api.Task) swarm.Task {
	out := swarm.Task{
		ID: t.GetId(), Meta: meta(t.GetMeta()), Annotations: dockerAnnotations(t.GetAnnotations()),
		Spec: dockerTaskSpec(t.GetSpec()), ServiceID: t.GetServiceId(), Slot: int(t.GetSlot()), NodeID: t.GetNodeId(),
		Status: swarm.TaskStatus{
			Timestamp: instant(t.GetStatus().GetTimestamp()), State: State(t.GetStatus().GetState()),
			Message: t.GetStatus().GetMessage(), Err: t.GetStatus().GetErr(),
			PortStatus: swarm.PortStatus{Ports: each(t.GetStatus().GetPortStatus().GetPorts(), dockerPort)},
		},
		DesiredState:        State(t.GetDesiredState()),
		NetworksAttachments: each(t.GetNetworks(), dockerAttachment),
		GenericResources:    each(t.GetAssignedGenericResources(), dockerGeneric),
		Volumes: each(t.GetVolumes(), func(v *api.VolumeAttachment) swarm.VolumeAttachment {
			return swarm.VolumeAttachment{ID: v.GetId(), Source: v.GetSource(), Target: v.GetTarget()}
		}),
	}
	if c := t.GetStatus().GetContainer(); c != nil {
		out.Status.ContainerStatus = &swarm.ContainerStatus{ContainerID: c.GetContainerId(), PID: int(c.GetPid()), ExitCode: int(c.GetExitCode())}
	}
	if j := t.GetJobIteration(); j != nil {
		out.JobIteration = &swarm.Version{Index: j.GetIndex()}
	}
	return out
}

func dockerAttachment(a *api.NetworkAttachment) swarm.NetworkAttachment {
	return swarm.NetworkAttachment{
		Network:   DockerNetwork(a.GetNetwork()),
		Addresses: each(a.GetAddresses(), func(s string) netip.Prefix { return prefix(s) }),
	}
}
