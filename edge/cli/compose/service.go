package compose

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/swarm"
)

// service converts one service.
func (s *Stack) service(p *types.Project, c types.ServiceConfig) (Service, error) {
	at := "services." + c.Name
	if c.Image == "" {
		return Service{}, fmt.Errorf("%s.image: name the image to run", at)
	}
	d := c.Deploy
	if d == nil {
		d = &types.DeployConfig{}
	}
	var errs []error
	note := func(err error) { errs = append(errs, err) }

	spec, err := s.container(p, at, c)
	note(err)
	resources, err := resourcesOf(at, c, d)
	note(err)
	restart, err := restartOf(at, c, d)
	note(err)
	mode, err := modeOf(at, c, d)
	note(err)
	placement, err := placementOf(at, c, d)
	note(err)
	ports, err := portsOf(at, c)
	note(err)
	endpoint, err := endpointOf(at, d, ports)
	note(err)
	update, err := updateOf(at+".deploy.update_config", d.UpdateConfig)
	note(err)
	rollback, err := updateOf(at+".deploy.rollback_config", d.RollbackConfig)
	note(err)
	after, err := afterOf(at, c)
	note(err)
	if err := errors.Join(errs...); err != nil {
		return Service{}, err
	}
	labels := s.labels(d.Labels)
	labels[LabelImage] = c.Image
	out := Service{Key: c.Name, After: after, Spec: swarm.ServiceSpec{
		Annotations: swarm.Annotations{Name: s.scoped(c.Name), Labels: labels},
		TaskTemplate: swarm.TaskSpec{
			ContainerSpec: spec, Resources: resources, RestartPolicy: restart, Placement: placement, LogDriver: logDriver(c.Logging),
			Networks: s.attachments(p, c),
		},
		Mode: mode, UpdateConfig: update, RollbackConfig: rollback, EndpointSpec: endpoint,
	}}
	return out, nil
}

func (s *Stack) container(p *types.Project, at string, c types.ServiceConfig) (*swarm.ContainerSpec, error) {
	var errs []error
	note := func(err error) { errs = append(errs, err) }
	mounts, err := s.mounts(p, at, c)
	note(err)
	health, err := healthOf(at, c.HealthCheck)
	note(err)
	dns, err := dnsOf(at, c)
	note(err)
	privileges, err := privilegesOf(at, c.SecurityOpt)
	note(err)
	secrets, err := s.secretRefs(p, at, c)
	note(err)
	configs, err := s.configRefs(p, at, c)
	note(err)
	return &swarm.ContainerSpec{
		Image: c.Image, Labels: s.labels(c.Labels), Command: orNil([]string(c.Entrypoint)), Args: orNil([]string(c.Command)),
		Hostname: c.Hostname, Env: environment(c.Environment), Dir: c.WorkingDir, User: c.User, Groups: orNil(c.GroupAdd),
		Privileges: privileges, Init: c.Init, StopSignal: c.StopSignal, TTY: c.Tty, OpenStdin: c.StdinOpen, ReadOnly: c.ReadOnly,
		Mounts: mounts, StopGracePeriod: duration(c.StopGracePeriod), Healthcheck: health, Hosts: hosts(c.ExtraHosts), DNSConfig: dns,
		Secrets: secrets, Configs: configs, Sysctls: mapping(c.Sysctls), CapabilityAdd: capabilities(c.CapAdd), CapabilityDrop: capabilities(c.CapDrop),
		Ulimits: ulimits(c.Ulimits), OomScoreAdj: c.OomScoreAdj,
	}, errors.Join(errs...)
}

// environment leaves variables out that have no value and are not set for this process.
func environment(m types.MappingWithEquals) []string {
	values := map[string]string{}
	for k, v := range m {
		if v != nil {
			values[k] = *v
		}
	}
	return orNil(sortedPairs(values))
}

func duration(d *types.Duration) *time.Duration {
	if d == nil {
		return nil
	}
	out := time.Duration(*d)
	return &out
}

func mapping(m types.Mapping) map[string]string {
	if len(m) == 0 {
		return nil
	}
	return m
}

// hosts converts name → addresses into lines of /etc/hosts.
func hosts(h types.HostsList) []string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(h)) {
		for _, addr := range h[name] {
			out = append(out, addr+" "+name)
		}
	}
	return out
}

// capabilities spells capabilities as the API wants them: CAP_X, each once.
func capabilities(names []string) []string {
	var out []string
	for _, n := range names {
		n = strings.ToUpper(n)
		if n != "ALL" && !strings.HasPrefix(n, "CAP_") {
			n = "CAP_" + n
		}
		out = append(out, n)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func ulimits(m map[string]*types.UlimitsConfig) []*container.Ulimit {
	var out []*container.Ulimit
	for _, name := range slices.Sorted(maps.Keys(m)) {
		u := m[name]
		soft, hard := int64(u.Soft), int64(u.Hard)
		if u.Single != 0 {
			soft, hard = int64(u.Single), int64(u.Single)
		}
		out = append(out, &units.Ulimit{Name: name, Soft: soft, Hard: hard})
	}
	return out
}

func logDriver(l *types.LoggingConfig) *swarm.Driver {
	if l == nil || l.Driver == "" && len(l.Options) == 0 {
		return nil
	}
	return &swarm.Driver{Name: l.Driver, Options: l.Options}
}

func dnsOf(at string, c types.ServiceConfig) (*swarm.DNSConfig, error) {
	if len(c.DNS) == 0 && len(c.DNSSearch) == 0 && len(c.DNSOpts) == 0 {
		return nil, nil //nolint:nilnil // nothing was asked for
	}
	out := &swarm.DNSConfig{Search: c.DNSSearch, Options: c.DNSOpts}
	for _, text := range c.DNS {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return nil, fmt.Errorf("%s.dns: %q is not an IP address", at, text)
		}
		out.Nameservers = append(out.Nameservers, addr)
	}
	return out, nil
}

func healthOf(at string, h *types.HealthCheckConfig) (*container.HealthConfig, error) {
	if h == nil {
		return nil, nil //nolint:nilnil // nothing was asked for
	}
	if h.Disable {
		if len(h.Test) > 0 {
			return nil, fmt.Errorf("%s.healthcheck: test and disable exclude each other", at)
		}
		return &container.HealthConfig{Test: []string{"NONE"}}, nil
	}
	out := &container.HealthConfig{Test: h.Test}
	for field, value := range map[*time.Duration]*types.Duration{
		&out.Interval: h.Interval, &out.Timeout: h.Timeout, &out.StartPeriod: h.StartPeriod, &out.StartInterval: h.StartInterval,
	} {
		if value != nil {
			*field = time.Duration(*value)
		}
	}
	if h.Retries != nil {
		out.Retries = int(*h.Retries)
	}
	return out, nil
}

// privilegesOf honours the security options that the API of services has.
func privilegesOf(at string, options []string) (*swarm.Privileges, error) {
	if len(options) == 0 {
		return nil, nil //nolint:nilnil // nothing was asked for
	}
	out := &swarm.Privileges{}
	for _, o := range options {
		switch strings.ReplaceAll(o, "=", ":") {
		case "no-new-privileges", "no-new-privileges:true":
			out.NoNewPrivileges = true
		case "no-new-privileges:false":
		case "seccomp:unconfined":
			out.Seccomp = &swarm.SeccompOpts{Mode: swarm.SeccompModeUnconfined}
		case "apparmor:unconfined":
			out.AppArmor = &swarm.AppArmorOpts{Mode: swarm.AppArmorModeDisabled}
		default:
			return nil, fmt.Errorf("%s.security_opt: %q is not supported: no-new-privileges, seccomp:unconfined and apparmor:unconfined are", at, o)
		}
	}
	return out, nil
}

func resourcesOf(at string, c types.ServiceConfig, d *types.DeployConfig) (*swarm.ResourceRequirements, error) {
	limits := swarm.Limit{NanoCPUs: nano(c.CPUS), MemoryBytes: int64(c.MemLimit), Pids: c.PidsLimit}
	reservations := swarm.Resources{MemoryBytes: int64(c.MemReservation)}
	if l := d.Resources.Limits; l != nil {
		limits = swarm.Limit{NanoCPUs: nano(l.NanoCPUs.Value()), MemoryBytes: int64(l.MemoryBytes), Pids: l.Pids}
	}
	if r := d.Resources.Reservations; r != nil {
		reservations.NanoCPUs, reservations.MemoryBytes = nano(r.NanoCPUs.Value()), int64(r.MemoryBytes)
		for _, g := range r.GenericResources {
			if g.DiscreteResourceSpec == nil {
				return nil, fmt.Errorf("%s.deploy.resources.reservations.generic_resources: only discrete_resource_spec is supported", at)
			}
			reservations.GenericResources = append(reservations.GenericResources, swarm.GenericResource{
				DiscreteResourceSpec: &swarm.DiscreteGenericResource{Kind: g.DiscreteResourceSpec.Kind, Value: g.DiscreteResourceSpec.Value},
			})
		}
	}
	out := &swarm.ResourceRequirements{}
	if limits != (swarm.Limit{}) {
		out.Limits = &limits
	}
	if reservations.NanoCPUs != 0 || reservations.MemoryBytes != 0 || len(reservations.GenericResources) > 0 {
		out.Reservations = &reservations
	}
	if c.MemSwapLimit != 0 {
		swap := int64(c.MemSwapLimit)
		if swap > 0 {
			if swap -= limits.MemoryBytes; limits.MemoryBytes == 0 || swap < 0 {
				return nil, fmt.Errorf("%s.memswap_limit: it counts memory and swap, so it needs a memory limit below it", at)
			}
		}
		out.SwapBytes = &swap
	}
	if c.MemSwappiness != 0 {
		swappiness := int64(c.MemSwappiness)
		out.MemorySwappiness = &swappiness
	}
	if out.Limits == nil && out.Reservations == nil && out.SwapBytes == nil && out.MemorySwappiness == nil {
		return nil, nil //nolint:nilnil // nothing was asked for
	}
	return out, nil
}

// nano converts CPUs; the specification has them as 32-bit floats, so it rounds to
// thousandths, which is what people write.
func nano(cpus float32) int64 { return int64(float64(cpus)*1000+0.5) * 1_000_000 }

func restartOf(at string, c types.ServiceConfig, d *types.DeployConfig) (*swarm.RestartPolicy, error) {
	if r := d.RestartPolicy; r != nil {
		out := &swarm.RestartPolicy{Delay: duration(r.Delay), MaxAttempts: r.MaxAttempts, Window: duration(r.Window)}
		switch r.Condition {
		case "", "any", "always", "unless-stopped":
			out.Condition = swarm.RestartPolicyConditionAny
		case "on-failure":
			out.Condition = swarm.RestartPolicyConditionOnFailure
		case "none", "no":
			out.Condition = swarm.RestartPolicyConditionNone
		default:
			return nil, fmt.Errorf("%s.deploy.restart_policy.condition: %q is none of none, on-failure, any", at, r.Condition)
		}
		return out, nil
	}
	name, attempts, counted := strings.Cut(c.Restart, ":")
	out := &swarm.RestartPolicy{}
	switch name {
	case "":
		return nil, nil //nolint:nilnil // nothing was asked for
	case types.RestartPolicyNo:
		out.Condition = swarm.RestartPolicyConditionNone
	case types.RestartPolicyAlways, types.RestartPolicyUnlessStopped:
		out.Condition = swarm.RestartPolicyConditionAny
	case types.RestartPolicyOnFailure:
		out.Condition = swarm.RestartPolicyConditionOnFailure
	default:
		return nil, fmt.Errorf("%s.restart: %q is none of no, always, on-failure[:N], unless-stopped", at, c.Restart)
	}
	if counted {
		n, err := strconv.ParseUint(attempts, 10, 64)
		if err != nil || name != types.RestartPolicyOnFailure {
			return nil, fmt.Errorf("%s.restart: %q is none of no, always, on-failure[:N], unless-stopped", at, c.Restart)
		}
		out.MaxAttempts = &n
	}
	return out, nil
}

func modeOf(at string, c types.ServiceConfig, d *types.DeployConfig) (swarm.ServiceMode, error) {
	replicas := uint64(1)
	given := c.Scale != nil || d.Replicas != nil
	if given {
		n := c.GetScale()
		if n < 0 {
			return swarm.ServiceMode{}, fmt.Errorf("%s.deploy.replicas: %d is negative", at, n)
		}
		replicas = uint64(n)
	}
	switch d.Mode {
	case "", "replicated":
		return swarm.ServiceMode{Replicated: &swarm.ReplicatedService{Replicas: &replicas}}, nil
	case "replicated-job":
		return swarm.ServiceMode{ReplicatedJob: &swarm.ReplicatedJob{MaxConcurrent: &replicas, TotalCompletions: &replicas}}, nil
	}
	if d.Replicas != nil {
		return swarm.ServiceMode{}, fmt.Errorf("%s.deploy.replicas: a %s service has one task on each node", at, d.Mode)
	}
	switch d.Mode {
	case "global":
		return swarm.ServiceMode{Global: &swarm.GlobalService{}}, nil
	case "global-job":
		return swarm.ServiceMode{GlobalJob: &swarm.GlobalJob{}}, nil
	default:
		return swarm.ServiceMode{}, fmt.Errorf("%s.deploy.mode: %q is none of replicated, global, replicated-job, global-job", at, d.Mode)
	}
}

func placementOf(at string, c types.ServiceConfig, d *types.DeployConfig) (*swarm.Placement, error) {
	out := &swarm.Placement{Constraints: orNil(d.Placement.Constraints), MaxReplicas: d.Placement.MaxReplicas}
	for _, p := range d.Placement.Preferences {
		out.Preferences = append(out.Preferences, swarm.PlacementPreference{Spread: &swarm.SpreadOver{SpreadDescriptor: p.Spread}})
	}
	if c.Platform != "" {
		parts := strings.Split(c.Platform, "/")
		if len(parts) < 2 || len(parts) > 3 {
			return nil, fmt.Errorf("%s.platform: %q is not os/architecture", at, c.Platform)
		}
		out.Platforms = []swarm.Platform{{OS: parts[0], Architecture: parts[1]}}
	}
	if len(out.Constraints) == 0 && len(out.Preferences) == 0 && out.MaxReplicas == 0 && len(out.Platforms) == 0 {
		return nil, nil //nolint:nilnil // nothing was asked for
	}
	return out, nil
}

func portsOf(at string, c types.ServiceConfig) ([]swarm.PortConfig, error) {
	var out []swarm.PortConfig
	for i, p := range c.Ports {
		here := fmt.Sprintf("%s.ports[%d]", at, i)
		mode := swarm.PortConfigPublishMode(p.Mode)
		switch mode {
		case "":
			mode = swarm.PortConfigPublishModeIngress
		case swarm.PortConfigPublishModeIngress, swarm.PortConfigPublishModeHost:
		default:
			return nil, fmt.Errorf("%s.mode: %q is neither ingress nor host", here, p.Mode)
		}
		published := uint64(0)
		if p.Published != "" {
			var err error
			if published, err = strconv.ParseUint(p.Published, 10, 16); err != nil {
				return nil, fmt.Errorf("%s.published: %q is not one port", here, p.Published)
			}
		}
		protocol := network.IPProtocol(strings.ToLower(p.Protocol))
		switch protocol {
		case "":
			protocol = network.TCP
		case network.TCP, network.UDP, network.SCTP:
		default:
			return nil, fmt.Errorf("%s.protocol: %q is none of tcp, udp, sctp", here, p.Protocol)
		}
		out = append(out, swarm.PortConfig{
			Name: p.Name, Protocol: protocol, TargetPort: p.Target, PublishedPort: uint32(published), PublishMode: mode,
		})
	}
	slices.SortFunc(out, swarm.PortConfig.Compare)
	return out, nil
}

func endpointOf(at string, d *types.DeployConfig, ports []swarm.PortConfig) (*swarm.EndpointSpec, error) {
	switch d.EndpointMode {
	case "", "vip", "dnsrr":
	default:
		return nil, fmt.Errorf("%s.deploy.endpoint_mode: %q is neither vip nor dnsrr", at, d.EndpointMode)
	}
	if d.EndpointMode == "" && len(ports) == 0 {
		return nil, nil //nolint:nilnil // nothing was asked for
	}
	mode := swarm.ResolutionModeVIP
	if d.EndpointMode == "dnsrr" {
		mode = swarm.ResolutionModeDNSRR
	}
	return &swarm.EndpointSpec{Mode: mode, Ports: ports}, nil
}

func updateOf(at string, u *types.UpdateConfig) (*swarm.UpdateConfig, error) {
	if u == nil {
		return nil, nil //nolint:nilnil // nothing was asked for
	}
	out := &swarm.UpdateConfig{
		Parallelism: 1, Delay: time.Duration(u.Delay), FailureAction: swarm.FailureAction(u.FailureAction), Monitor: time.Duration(u.Monitor),
		MaxFailureRatio: u.MaxFailureRatio, Order: swarm.UpdateOrder(u.Order),
	}
	if u.Parallelism != nil {
		out.Parallelism = *u.Parallelism
	}
	switch out.FailureAction {
	case "", swarm.UpdateFailureActionPause, swarm.UpdateFailureActionContinue, swarm.UpdateFailureActionRollback:
	default:
		return nil, fmt.Errorf("%s.failure_action: %q is none of pause, continue, rollback", at, u.FailureAction)
	}
	switch out.Order {
	case "", swarm.UpdateOrderStopFirst, swarm.UpdateOrderStartFirst:
	default:
		return nil, fmt.Errorf("%s.order: %q is neither stop-first nor start-first", at, u.Order)
	}
	return out, nil
}

// afterOf returns the services that this one depends on.
func afterOf(at string, c types.ServiceConfig) ([]string, error) {
	var out []string
	for _, key := range slices.Sorted(maps.Keys(c.DependsOn)) {
		switch condition := c.DependsOn[key].Condition; condition {
		// A task with a health check counts as running only when it is healthy.
		case types.ServiceConditionStarted, types.ServiceConditionHealthy, types.ServiceConditionCompletedSuccessfully, "":
			out = append(out, key)
		default:
			return nil, fmt.Errorf("%s.depends_on.%s.condition: %q is not known", at, key, condition)
		}
	}
	return out, nil
}
