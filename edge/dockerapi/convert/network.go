package convert

import (
	"cmp"
	"maps"
	"net/netip"

	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/swarm"

	"github.com/skep-dev/skep/api"
)

// DockerNetwork returns what clients read of a network inside a task.
func DockerNetwork(n *api.Network) swarm.Network {
	spec := n.GetSpec()
	out := swarm.Network{
		ID: n.GetId(), Meta: meta(n.GetMeta()),
		Spec: swarm.NetworkSpec{
			Annotations: dockerAnnotations(spec.GetAnnotations()), DriverConfiguration: dockerDriver(spec.GetDriverConfig()),
			IPv6Enabled: spec.GetIpv6Enabled(), Internal: spec.GetInternal(), Attachable: spec.GetAttachable(), Ingress: spec.GetIngress(),
			IPAMOptions: dockerIPAM(spec.GetIpam()), Scope: "swarm",
		},
		IPAMOptions: dockerIPAM(n.GetIpam()),
	}
	if from := spec.GetNetwork(); from != "" {
		out.Spec.ConfigFrom = &network.ConfigReference{Network: from}
	}
	if d := dockerDriver(n.GetDriverState()); d != nil {
		out.DriverState = *d
	}
	return out
}

func dockerIPAM(i *api.IPAMOptions) *swarm.IPAMOptions {
	if i == nil {
		return nil
	}
	out := &swarm.IPAMOptions{Configs: each(i.GetConfigs(), func(c *api.IPAMConfig) swarm.IPAMConfig {
		return swarm.IPAMConfig{Subnet: prefix(c.GetSubnet()), Range: prefix(c.GetRange()), Gateway: addr(c.GetGateway())}
	})}
	if d := dockerDriver(i.GetDriver()); d != nil {
		out.Driver = *d
	}
	return out
}

// DockerSwarmNetwork returns what `GET /networks` says of a network of the swarm.
func DockerSwarmNetwork(n *api.Network) network.Network {
	spec := n.GetSpec()
	out := network.Network{
		Name: spec.GetAnnotations().GetName(), ID: n.GetId(), Created: instant(n.GetMeta().GetCreatedAt()), Scope: "swarm",
		Driver: n.GetDriverState().GetName(), EnableIPv4: true, EnableIPv6: spec.GetIpv6Enabled(), Internal: spec.GetInternal(),
		Attachable: spec.GetAttachable(), Ingress: spec.GetIngress(), Options: maps.Clone(n.GetDriverState().GetOptions()),
		Labels: maps.Clone(spec.GetAnnotations().GetLabels()), ConfigFrom: network.ConfigReference{Network: spec.GetNetwork()},
	}
	if out.Driver == "" {
		out.Driver = cmp.Or(spec.GetDriverConfig().GetName(), "overlay")
	}
	ipam := n.GetIpam()
	if ipam == nil {
		ipam = spec.GetIpam()
	}
	out.IPAM.Driver, out.IPAM.Options = ipam.GetDriver().GetName(), maps.Clone(ipam.GetDriver().GetOptions())
	for _, c := range ipam.GetConfigs() {
		config := network.IPAMConfig{Subnet: prefix(c.GetSubnet()), IPRange: prefix(c.GetRange()), Gateway: addr(c.GetGateway())}
		for name, a := range c.GetReserved() {
			if config.AuxAddress == nil {
				config.AuxAddress = make(map[string]netip.Addr)
			}
			config.AuxAddress[name] = addr(a)
		}
		out.IPAM.Config = append(out.IPAM.Config, config)
	}
	return out
}

// StoreNetworkSpec returns what is stored of a network that a client asks for.
func StoreNetworkSpec(req network.CreateRequest) *api.NetworkSpec {
	out := &api.NetworkSpec{
		Annotations:  &api.Annotations{Name: req.Name, Labels: maps.Clone(req.Labels)},
		DriverConfig: &api.Driver{Name: req.Driver, Options: maps.Clone(req.Options)},
		Ipv6Enabled:  req.EnableIPv6 != nil && *req.EnableIPv6, Internal: req.Internal, Attachable: req.Attachable, Ingress: req.Ingress,
	}
	if req.ConfigFrom != nil && req.ConfigFrom.Network != "" {
		out.ConfigFrom = &api.NetworkSpec_Network{Network: req.ConfigFrom.Network}
	}
	if req.IPAM == nil {
		return out
	}
	out.Ipam = &api.IPAMOptions{Driver: &api.Driver{Name: req.IPAM.Driver, Options: maps.Clone(req.IPAM.Options)}}
	for _, c := range req.IPAM.Config {
		config := &api.IPAMConfig{Subnet: text(c.Subnet), Range: text(c.IPRange), Gateway: text(c.Gateway)}
		for name, a := range c.AuxAddress {
			if config.Reserved == nil {
				config.Reserved = make(map[string]string)
			}
			config.Reserved[name] = text(a)
		}
		out.Ipam.Configs = append(out.Ipam.Configs, config)
	}
	return out
}

// text writes an address or prefix; what is not set becomes "".
func text[T interface {
	IsValid() bool
	String() string
}](v T) string {
	if !v.IsValid() {
		return ""
	}
	return v.String()
}
