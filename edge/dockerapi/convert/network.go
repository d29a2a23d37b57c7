package convert

import (
	"cmp"
	"maps"

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
		out.IPAM.Config = append(out.IPAM.Config, network.IPAMConfig{Subnet: prefix(c.GetSubnet()), IPRange: prefix(c.GetRange()), Gateway: addr(c.GetGateway())})
	}
	return out
}
