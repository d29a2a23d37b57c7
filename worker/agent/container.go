package agent

import (
	"maps"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/lifecycle"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

// Labels by which containers of tasks are known.
const (
	labelTaskID      = "com.docker.swarm.task.id"
	labelTaskName    = "com.docker.swarm.task.name"
	labelNodeID      = "com.docker.swarm.node.id"
	labelServiceID   = "com.docker.swarm.service.id"
	labelServiceName = "com.docker.swarm.service.name"
)

// convert describes the container of a task to the runtime.
func (w *worker) convert(task *api.Task) (*runtime.CreateOptions, error) {
	node := w.templateNode()
	spec, err := lifecycle.Expand(task, node)
	if err != nil {
		return nil, err
	}
	mode, networking, err := attachments(task)
	if err != nil {
		return nil, err
	}
	secrets, configs, err := w.dependencies(task, spec, node)
	if err != nil {
		return nil, err
	}
	files, err := taskFiles(spec, secrets, configs)
	if err != nil {
		return nil, err
	}
	exposed, bindings, err := hostPorts(task)
	if err != nil {
		return nil, err
	}
	config := &container.Config{
		Hostname:     spec.GetHostname(),
		User:         spec.GetUser(),
		Tty:          spec.GetTty(),
		OpenStdin:    spec.GetOpenStdin(),
		Env:          append(slices.Clone(spec.GetEnv()), genericEnv(task.GetAssignedGenericResources())...),
		Entrypoint:   spec.GetCommand(),
		Cmd:          spec.GetArgs(),
		Image:        spec.GetImage(),
		WorkingDir:   spec.GetDir(),
		Labels:       w.labels(task, spec),
		StopSignal:   spec.GetStopSignal(),
		Healthcheck:  healthcheck(spec.GetHealthcheck()),
		ExposedPorts: exposed,
	}
	if g := spec.GetStopGracePeriod(); g != nil {
		seconds := int((g.AsDuration() + time.Second - 1) / time.Second)
		config.StopTimeout = &seconds
	}
	host := &container.HostConfig{
		NetworkMode:    container.NetworkMode(mode),
		PortBindings:   bindings,
		GroupAdd:       spec.GetGroups(),
		ReadonlyRootfs: spec.GetReadOnly(),
		CapAdd:         spec.GetCapabilityAdd(),
		CapDrop:        spec.GetCapabilityDrop(),
		Sysctls:        spec.GetSysctls(),
		OomScoreAdj:    int(spec.GetOomScoreAdj()),
		RestartPolicy:  container.RestartPolicy{Name: container.RestartPolicyDisabled},
		Resources:      resources(task, spec),
	}
	if spec.GetInit() != nil {
		on := spec.GetInit().GetValue()
		host.Init = &on
	}
	if d := task.GetLogDriver(); d != nil {
		host.LogConfig = container.LogConfig{Type: d.GetName(), Config: d.GetOptions()}
	}
	if err := addNames(host, spec); err != nil {
		return nil, err
	}
	if err := addPrivileges(host, spec.GetPrivileges()); err != nil {
		return nil, err
	}
	if host.Mounts, err = mounts(spec.GetMounts()); err != nil {
		return nil, err
	}
	return &runtime.CreateOptions{Name: model.TaskName(task), Config: config, HostConfig: host, Networking: networking, Files: files}, nil
}

// templateNode is this node as templates see it: what its description says.
func (w *worker) templateNode() lifecycle.TemplateNode {
	node := lifecycle.TemplateNode{ID: w.cfg.NodeID, Hostname: w.cfg.Hostname}
	node.Platform.OS = "linux"
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		node.Platform.Architecture = unix.ByteSliceToString(u.Machine[:])
	}
	return node
}

// labels returns the container's labels; those of the system win.
func (w *worker) labels(task *api.Task, spec *api.ContainerSpec) map[string]string {
	labels := maps.Clone(spec.GetLabels())
	if labels == nil {
		labels = map[string]string{}
	}
	maps.Copy(labels, map[string]string{
		model.TaskLabel: "", labelTaskID: task.GetId(), labelTaskName: model.TaskName(task), labelNodeID: w.cfg.NodeID,
		labelServiceID: task.GetServiceId(), labelServiceName: task.GetServiceAnnotations().GetName(),
	})
	return labels
}

// attachments returns Docker's network mode for a task's attachments, and the networks of
// the swarm that its container is connected to besides.
func attachments(task *api.Task) (string, *network.NetworkingConfig, error) {
	mode := "bridge"
	endpoints := map[string]*network.EndpointSettings{}
	for _, a := range task.GetNetworks() {
		name := a.GetNetwork().GetSpec().GetAnnotations().GetName()
		driver := a.GetNetwork().GetDriverState().GetName()
		switch {
		case name == "host" || name == "none" || name == "bridge":
			mode = name
		case driver == "host" || driver == "bridge":
			mode = driver
		case driver == "overlay":
			e, err := endpoint(a)
			if err != nil {
				return "", nil, err
			}
			endpoints[name] = e
		default:
			return "", nil, model.Errorf(model.Unimplemented, "network %s: the driver %s is not implemented by skep", name, driver)
		}
	}
	if len(endpoints) == 0 {
		return mode, nil, nil
	}
	if mode != "bridge" {
		return "", nil, model.Errorf(model.Invalid, "a container on the network %s can be on no other", mode)
	}
	return mode, &network.NetworkingConfig{EndpointsConfig: endpoints}, nil
}

// endpoint describes one attachment with the address that the swarm gave.
func endpoint(a *api.NetworkAttachment) (*network.EndpointSettings, error) {
	e := &network.EndpointSettings{
		NetworkID: a.GetNetwork().GetId(), Aliases: a.GetAliases(), DriverOpts: a.GetDriverAttachmentOpts(), IPAMConfig: &network.EndpointIPAMConfig{},
	}
	for _, text := range a.GetAddresses() {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			return nil, model.Errorf(model.Invalid, "network %s: address %q is not in CIDR form", a.GetNetwork().GetSpec().GetAnnotations().GetName(), text)
		}
		if p.Addr().Is4() {
			e.IPAMConfig.IPv4Address, e.IPPrefixLen = p.Addr(), p.Bits()
		} else {
			e.IPAMConfig.IPv6Address, e.GlobalIPv6PrefixLen = p.Addr(), p.Bits()
		}
	}
	if !e.IPAMConfig.IPv4Address.IsValid() {
		return nil, model.Errorf(model.Unavailable, "network %s: the swarm gave the task no address", a.GetNetwork().GetSpec().GetAnnotations().GetName())
	}
	return e, nil
}

// hostPorts returns the ports that the task publishes on its own node.
func hostPorts(task *api.Task) (network.PortSet, network.PortMap, error) {
	exposed, bindings := network.PortSet{}, network.PortMap{}
	for _, p := range task.GetEndpoint().GetSpec().GetPorts() {
		if p.GetProtocol() == api.PortConfig_SCTP && !kernelHas(unix.IPPROTO_SCTP) {
			return nil, nil, model.Errorf(model.Unimplemented, "port %d/sctp cannot be served: the kernel of this node has no SCTP", p.GetTargetPort())
		}
		if p.GetPublishMode() != api.PortConfig_HOST {
			continue // the routing mesh publishes it
		}
		port, ok := network.PortFrom(uint16(p.GetTargetPort()), network.IPProtocol(strings.ToLower(p.GetProtocol().String())))
		if !ok {
			return nil, nil, model.Errorf(model.Invalid, "invalid port %d/%s", p.GetTargetPort(), p.GetProtocol())
		}
		published := ""
		if p.GetPublishedPort() != 0 {
			published = strconv.FormatUint(uint64(p.GetPublishedPort()), 10)
		}
		exposed[port] = struct{}{}
		bindings[port] = append(bindings[port], network.PortBinding{HostPort: published})
	}
	return exposed, bindings, nil
}

// kernelHas reports whether this node's kernel opens sockets of a protocol; asking loads
// its module.
func kernelHas(protocol int) bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return false
	}
	_ = unix.Close(fd)
	return true
}

// portStatus reports the host ports that a running task really has.
func portStatus(task *api.Task, c *container.InspectResponse) *api.PortStatus {
	if c.NetworkSettings == nil || len(task.GetEndpoint().GetSpec().GetPorts()) == 0 {
		return nil
	}
	status := new(api.PortStatus)
	for _, p := range task.GetEndpoint().GetSpec().GetPorts() {
		port, ok := network.PortFrom(uint16(p.GetTargetPort()), network.IPProtocol(strings.ToLower(p.GetProtocol().String())))
		if !ok || p.GetPublishMode() != api.PortConfig_HOST {
			continue
		}
		published := p.GetPublishedPort()
		for _, b := range c.NetworkSettings.Ports[port] {
			if n, err := strconv.ParseUint(b.HostPort, 10, 16); err == nil && published == 0 {
				published = uint32(n)
			}
		}
		status.Ports = append(status.Ports, &api.PortConfig{
			Name: p.GetName(), Protocol: p.GetProtocol(), TargetPort: p.GetTargetPort(), PublishedPort: published, PublishMode: p.GetPublishMode(),
		})
	}
	return status
}

// taskFiles returns the secrets and configs that the container sees.
func taskFiles(spec *api.ContainerSpec, secrets, configs map[string][]byte) ([]runtime.File, error) {
	var files []runtime.File
	add := func(target *api.FileTarget, dir string, data []byte) error {
		uid, gid := 0, 0
		var err error
		if target.GetUid() != "" {
			if uid, err = strconv.Atoi(target.GetUid()); err != nil {
				return model.Errorf(model.Invalid, "file %s: uid %q is not a number", target.GetName(), target.GetUid())
			}
		}
		if target.GetGid() != "" {
			if gid, err = strconv.Atoi(target.GetGid()); err != nil {
				return model.Errorf(model.Invalid, "file %s: gid %q is not a number", target.GetName(), target.GetGid())
			}
		}
		name := target.GetName()
		if !path.IsAbs(name) {
			name = path.Join(dir, path.Clean("/"+name))
		}
		files = append(files, runtime.File{Path: name, UID: uid, GID: gid, Mode: target.GetMode() & 0o7777, Data: data})
		return nil
	}
	for _, ref := range spec.GetSecrets() {
		if ref.GetFile() == nil {
			return nil, model.Errorf(model.Invalid, "secret %s has no file target", ref.GetSecretName())
		}
		if err := add(ref.GetFile(), "/run/secrets", secrets[ref.GetSecretId()]); err != nil {
			return nil, err
		}
	}
	for _, ref := range spec.GetConfigs() {
		if ref.GetFile() == nil {
			continue // used by the runtime, not seen by the container
		}
		if err := add(ref.GetFile(), "/", configs[ref.GetConfigId()]); err != nil {
			return nil, err
		}
	}
	return files, nil
}

// genericEnv tells the container which generic resources it got.
func genericEnv(assigned []*api.GenericResource) []string {
	values := map[string][]string{}
	for _, g := range assigned {
		switch r := g.GetResource().(type) {
		case *api.GenericResource_NamedResourceSpec:
			values[r.NamedResourceSpec.GetKind()] = append(values[r.NamedResourceSpec.GetKind()], r.NamedResourceSpec.GetValue())
		case *api.GenericResource_DiscreteResourceSpec:
			values[r.DiscreteResourceSpec.GetKind()] = append(values[r.DiscreteResourceSpec.GetKind()], strconv.FormatInt(r.DiscreteResourceSpec.GetValue(), 10))
		}
	}
	var env []string
	for _, kind := range slices.Sorted(maps.Keys(values)) {
		env = append(env, "DOCKER_RESOURCE_"+strings.ToUpper(kind)+"="+strings.Join(values[kind], ","))
	}
	return env
}

func healthcheck(h *api.HealthConfig) *container.HealthConfig {
	if h == nil {
		return nil
	}
	return &container.HealthConfig{
		Test: h.GetTest(), Interval: h.GetInterval().AsDuration(), Timeout: h.GetTimeout().AsDuration(),
		Retries: int(h.GetRetries()), StartPeriod: h.GetStartPeriod().AsDuration(), StartInterval: h.GetStartInterval().AsDuration(),
	}
}

// resources returns the limits. Swap is twice the memory unless said otherwise.
func resources(task *api.Task, spec *api.ContainerSpec) container.Resources {
	var r container.Resources
	req := task.GetSpec().GetResources()
	r.NanoCPUs = req.GetLimits().GetNanoCpus()
	r.Memory = req.GetLimits().GetMemoryBytes()
	r.MemoryReservation = req.GetReservations().GetMemoryBytes()
	if r.Memory > 0 {
		r.MemorySwap = 2 * r.Memory
		if swap := req.GetSwapBytes(); swap != nil {
			if r.MemorySwap = r.Memory + swap.GetValue(); swap.GetValue() < 0 {
				r.MemorySwap = -1
			}
		}
	}
	if s := req.GetMemorySwappiness(); s != nil && s.GetValue() >= 0 {
		v := s.GetValue()
		r.MemorySwappiness = &v
	}
	if pids := spec.GetPidsLimit(); pids != 0 {
		r.PidsLimit = &pids
	}
	for _, u := range spec.GetUlimits() {
		r.Ulimits = append(r.Ulimits, &container.Ulimit{Name: u.GetName(), Soft: u.GetSoft(), Hard: u.GetHard()})
	}
	return r
}

// addNames adds hosts and DNS settings.
func addNames(host *container.HostConfig, spec *api.ContainerSpec) error {
	for _, h := range spec.GetHosts() {
		fields := strings.Fields(h)
		if len(fields) < 2 {
			return model.Errorf(model.Invalid, "host entry %q is not an address and a name", h)
		}
		for _, name := range fields[1:] {
			host.ExtraHosts = append(host.ExtraHosts, name+":"+fields[0])
		}
	}
	for _, s := range spec.GetDnsConfig().GetNameservers() {
		addr, err := netip.ParseAddr(s)
		if err != nil {
			return model.Errorf(model.Invalid, "name server %q is not an IP address", s)
		}
		host.DNS = append(host.DNS, addr)
	}
	host.DNSSearch = spec.GetDnsConfig().GetSearch()
	host.DNSOptions = spec.GetDnsConfig().GetOptions()
	return nil
}

func addPrivileges(host *container.HostConfig, p *api.Privileges) error {
	if p == nil {
		return nil
	}
	if p.GetCredentialSpec() != nil {
		return model.Errorf(model.Unimplemented, "credential specs are for Windows containers")
	}
	if p.GetNoNewPrivileges() {
		host.SecurityOpt = append(host.SecurityOpt, "no-new-privileges")
	}
	switch s := p.GetSeccomp(); s.GetMode() {
	case api.Privileges_SeccompOpts_UNCONFINED:
		host.SecurityOpt = append(host.SecurityOpt, "seccomp=unconfined")
	case api.Privileges_SeccompOpts_CUSTOM:
		host.SecurityOpt = append(host.SecurityOpt, "seccomp="+string(s.GetProfile()))
	case api.Privileges_SeccompOpts_DEFAULT:
	}
	if p.GetApparmor().GetMode() == api.Privileges_AppArmorOpts_DISABLED {
		host.SecurityOpt = append(host.SecurityOpt, "apparmor=unconfined")
	}
	if l := p.GetSelinuxContext(); l != nil {
		if l.GetDisable() {
			host.SecurityOpt = append(host.SecurityOpt, "label=disable")
		}
		for _, kv := range [][2]string{{"user", l.GetUser()}, {"role", l.GetRole()}, {"type", l.GetType()}, {"level", l.GetLevel()}} {
			if kv[1] != "" {
				host.SecurityOpt = append(host.SecurityOpt, "label="+kv[0]+":"+kv[1])
			}
		}
	}
	return nil
}

// mounts converts and checks mounts; the texts are those that tasks are rejected with.
func mounts(in []*api.Mount) ([]mount.Mount, error) {
	var out []mount.Mount
	for _, m := range in {
		if !path.IsAbs(m.GetTarget()) {
			return nil, model.Errorf(model.Invalid, "invalid mount target, must be an absolute path: %s", m.GetTarget())
		}
		c := mount.Mount{Source: m.GetSource(), Target: m.GetTarget(), ReadOnly: m.GetReadonly()}
		switch m.GetType() {
		case api.Mount_BIND:
			if !path.IsAbs(m.GetSource()) {
				return nil, model.Errorf(model.Invalid, "invalid bind mount source, must be an absolute path: %s", m.GetSource())
			}
			c.Type = mount.TypeBind
			if o := m.GetBindOptions(); o != nil {
				c.BindOptions = &mount.BindOptions{
					Propagation:            mount.Propagation(strings.ToLower(o.GetPropagation().String())),
					NonRecursive:           o.GetNonrecursive(),
					CreateMountpoint:       o.GetCreatemountpoint(),
					ReadOnlyNonRecursive:   o.GetReadonlynonrecursive(),
					ReadOnlyForceRecursive: o.GetReadonlyforcerecursive(),
				}
			}
		case api.Mount_VOLUME:
			if path.IsAbs(m.GetSource()) {
				return nil, model.Errorf(model.Invalid, "invalid volume mount source, must not be an absolute path: %s", m.GetSource())
			}
			c.Type = mount.TypeVolume
			if o := m.GetVolumeOptions(); o != nil {
				c.VolumeOptions = &mount.VolumeOptions{NoCopy: o.GetNocopy(), Labels: o.GetLabels(), Subpath: o.GetSubpath()}
				if d := o.GetDriverConfig(); d != nil {
					c.VolumeOptions.DriverConfig = &mount.Driver{Name: d.GetName(), Options: d.GetOptions()}
				}
			}
		case api.Mount_TMPFS:
			if m.GetSource() != "" {
				return nil, model.Errorf(model.Invalid, "invalid tmpfs source, source must be empty")
			}
			c.Type = mount.TypeTmpfs
			if o := m.GetTmpfsOptions(); o != nil {
				c.TmpfsOptions = &mount.TmpfsOptions{SizeBytes: o.GetSizeBytes(), Mode: fileMode(o.GetMode())}
			}
		case api.Mount_NPIPE, api.Mount_CLUSTER:
			return nil, model.Errorf(model.Unimplemented, "mounts of type %s are not implemented by skep", strings.ToLower(m.GetType().String()))
		default:
			return nil, model.Errorf(model.Invalid, "invalid mount type %d", m.GetType())
		}
		out = append(out, c)
	}
	return out, nil
}
