package convert

import (
	"maps"
	"net/netip"
	"os"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/skep-dev/skep/api"
)

func storeContainer(c *swarm.ContainerSpec) (*api.ContainerSpec, error) {
	out := &api.ContainerSpec{
		Image: c.Image, Labels: maps.Clone(c.Labels), Command: clone(c.Command), Args: clone(c.Args), Hostname: c.Hostname,
		Env: clone(c.Env), Dir: c.Dir, User: c.User, Groups: clone(c.Groups), StopSignal: c.StopSignal, Tty: c.TTY,
		OpenStdin: c.OpenStdin, ReadOnly: c.ReadOnly, StopGracePeriod: storeOptionalDuration(c.StopGracePeriod),
		Healthcheck: storeHealth(c.Healthcheck), Hosts: clone(c.Hosts), Sysctls: maps.Clone(c.Sysctls),
		CapabilityAdd: clone(c.CapabilityAdd), CapabilityDrop: clone(c.CapabilityDrop), OomScoreAdj: c.OomScoreAdj,
		Ulimits: each(present(c.Ulimits), func(u *container.Ulimit) *api.ContainerSpec_Ulimit {
			return &api.ContainerSpec_Ulimit{Name: u.Name, Soft: u.Soft, Hard: u.Hard}
		}),
		Secrets: each(present(c.Secrets), storeSecretReference),
	}
	if c.Init != nil {
		out.Init = wrapperspb.Bool(*c.Init)
	}
	if d := c.DNSConfig; d != nil {
		out.DnsConfig = &api.ContainerSpec_DNSConfig{
			Nameservers: each(d.Nameservers, netip.Addr.String), Search: clone(d.Search), Options: clone(d.Options),
		}
	}
	if c.Isolation != "" && !c.Isolation.IsDefault() {
		return nil, invalid("invalid Isolation: %q", c.Isolation) // the others are for Windows
	}
	var err error
	if out.Privileges, err = storePrivileges(c.Privileges); err != nil {
		return nil, err
	}
	if out.Mounts, err = tryEach(c.Mounts, storeMount); err != nil {
		return nil, err
	}
	if out.Configs, err = tryEach(present(c.Configs), storeConfigReference); err != nil {
		return nil, err
	}
	return out, nil
}

func dockerContainer(c *api.ContainerSpec) *swarm.ContainerSpec {
	out := &swarm.ContainerSpec{
		Image: c.GetImage(), Labels: maps.Clone(c.GetLabels()), Command: clone(c.GetCommand()), Args: clone(c.GetArgs()),
		Hostname: c.GetHostname(), Env: clone(c.GetEnv()), Dir: c.GetDir(), User: c.GetUser(), Groups: clone(c.GetGroups()),
		Privileges: dockerPrivileges(c.GetPrivileges()), StopSignal: c.GetStopSignal(), TTY: c.GetTty(), OpenStdin: c.GetOpenStdin(),
		ReadOnly: c.GetReadOnly(), Mounts: each(c.GetMounts(), dockerMount), StopGracePeriod: optionalDuration(c.GetStopGracePeriod()),
		Healthcheck: dockerHealth(c.GetHealthcheck()), Hosts: clone(c.GetHosts()), Secrets: each(c.GetSecrets(), dockerSecretReference),
		Configs: each(c.GetConfigs(), dockerConfigReference), Isolation: dockerIsolation(c.GetIsolation()), Sysctls: maps.Clone(c.GetSysctls()),
		CapabilityAdd: clone(c.GetCapabilityAdd()), CapabilityDrop: clone(c.GetCapabilityDrop()), OomScoreAdj: c.GetOomScoreAdj(),
		Ulimits: each(c.GetUlimits(), func(u *api.ContainerSpec_Ulimit) *container.Ulimit {
			return &container.Ulimit{Name: u.GetName(), Soft: u.GetSoft(), Hard: u.GetHard()}
		}),
	}
	if c.GetInit() != nil {
		out.Init = new(c.GetInit().GetValue())
	}
	if d := c.GetDnsConfig(); d != nil {
		out.DNSConfig = &swarm.DNSConfig{Nameservers: each(d.GetNameservers(), addr), Search: clone(d.GetSearch()), Options: clone(d.GetOptions())}
	}
	return out
}

func dockerIsolation(i api.ContainerSpec_Isolation) container.Isolation {
	switch i {
	case api.ContainerSpec_ISOLATION_HYPERV:
		return container.IsolationHyperV
	case api.ContainerSpec_ISOLATION_PROCESS:
		return container.IsolationProcess
	case api.ContainerSpec_ISOLATION_DEFAULT:
		return container.IsolationDefault
	default:
		return container.IsolationDefault
	}
}

func storeHealth(h *container.HealthConfig) *api.HealthConfig {
	if h == nil {
		return nil
	}
	return &api.HealthConfig{
		Test: clone(h.Test), Interval: durationpb.New(h.Interval), Timeout: durationpb.New(h.Timeout), Retries: int32(h.Retries),
		StartPeriod: durationpb.New(h.StartPeriod), StartInterval: durationpb.New(h.StartInterval),
	}
}

func dockerHealth(h *api.HealthConfig) *container.HealthConfig {
	if h == nil {
		return nil
	}
	return &container.HealthConfig{
		Test: clone(h.GetTest()), Interval: h.GetInterval().AsDuration(), Timeout: h.GetTimeout().AsDuration(), Retries: int(h.GetRetries()),
		StartPeriod: h.GetStartPeriod().AsDuration(), StartInterval: h.GetStartInterval().AsDuration(),
	}
}

func storeSecretReference(r *swarm.SecretReference) *api.SecretReference {
	out := &api.SecretReference{SecretId: r.SecretID, SecretName: r.SecretName}
	if f := r.File; f != nil {
		out.Target = &api.SecretReference_File{File: &api.FileTarget{Name: f.Name, Uid: f.UID, Gid: f.GID, Mode: uint32(f.Mode)}}
	}
	return out
}

func dockerSecretReference(r *api.SecretReference) *swarm.SecretReference {
	out := &swarm.SecretReference{SecretID: r.GetSecretId(), SecretName: r.GetSecretName()}
	if f := r.GetFile(); f != nil {
		out.File = &swarm.SecretReferenceFileTarget{Name: f.GetName(), UID: f.GetUid(), GID: f.GetGid(), Mode: os.FileMode(f.GetMode())}
	}
	return out
}

func storeConfigReference(r *swarm.ConfigReference) (*api.ConfigReference, error) {
	out := &api.ConfigReference{ConfigId: r.ConfigID, ConfigName: r.ConfigName}
	switch {
	case r.File != nil && r.Runtime != nil:
		return nil, invalid("invalid Config: cannot specify both File and Runtime")
	case r.File != nil:
		f := r.File
		out.Target = &api.ConfigReference_File{File: &api.FileTarget{Name: f.Name, Uid: f.UID, Gid: f.GID, Mode: uint32(f.Mode)}}
	case r.Runtime != nil:
		out.Target = &api.ConfigReference_Runtime{Runtime: new(api.RuntimeTarget)}
	default:
		return nil, invalid("invalid Config: either File or Runtime should be set")
	}
	return out, nil
}

func dockerConfigReference(r *api.ConfigReference) *swarm.ConfigReference {
	out := &swarm.ConfigReference{ConfigID: r.GetConfigId(), ConfigName: r.GetConfigName()}
	switch t := r.GetTarget().(type) {
	case *api.ConfigReference_File:
		out.File = &swarm.ConfigReferenceFileTarget{Name: t.File.GetName(), UID: t.File.GetUid(), GID: t.File.GetGid(), Mode: os.FileMode(t.File.GetMode())}
	case *api.ConfigReference_Runtime:
		out.Runtime = new(swarm.ConfigReferenceRuntimeTarget)
	}
	return out
}
