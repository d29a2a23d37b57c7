package convert

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"github.com/moby/moby/api/types/swarm"

	"github.com/skep-dev/skep/api"
)

// StoreNodeSpec returns what is stored of a node spec.
func StoreNodeSpec(s swarm.NodeSpec) (*api.NodeSpec, error) {
	role, err := enum[api.NodeRole](api.NodeRole_value, string(s.Role), "Role")
	if err != nil {
		return nil, err
	}
	availability, err := StoreAvailability(s.Availability)
	if err != nil {
		return nil, err
	}
	return &api.NodeSpec{
		Annotations: storeAnnotations(s.Annotations), DesiredRole: role,
		Membership: api.NodeSpec_ACCEPTED, Availability: availability,
	}, nil
}

// StoreAvailability returns a node's stored availability; empty is active.
func StoreAvailability(a swarm.NodeAvailability) (api.NodeSpec_Availability, error) {
	return enum[api.NodeSpec_Availability](api.NodeSpec_Availability_value, string(a), "Availability")
}

// DockerNode returns what clients read of a node.
func DockerNode(n *api.Node) swarm.Node {
	out := swarm.Node{
		ID: n.GetId(), Meta: meta(n.GetMeta()),
		Spec: swarm.NodeSpec{
			Annotations:  dockerAnnotations(n.GetSpec().GetAnnotations()),
			Role:         swarm.NodeRole(word(n.GetSpec().GetDesiredRole())),
			Availability: swarm.NodeAvailability(word(n.GetSpec().GetAvailability())),
		},
		Description: description(n.GetDescription()),
		Status: swarm.NodeStatus{
			State:   swarm.NodeState(word(n.GetStatus().GetState())),
			Message: n.GetStatus().GetMessage(), Addr: n.GetStatus().GetAddr(),
		},
	}
	if m := n.GetManagerStatus(); m != nil {
		out.ManagerStatus = &swarm.ManagerStatus{
			Leader: m.GetLeader(), Reachability: swarm.Reachability(word(m.GetReachability())), Addr: m.GetAddr(),
		}
		if out.Status.Addr == "" { // its session is with itself and has no address
			if at, err := netip.ParseAddrPort(m.GetAddr()); err == nil {
				out.Status.Addr = at.Addr().String()
			}
		}
	}
	return out
}

func description(d *api.NodeDescription) swarm.NodeDescription {
	out := swarm.NodeDescription{
		Hostname: d.GetHostname(), Platform: dockerPlatform(d.GetPlatform()), Resources: dockerAmounts(d.GetResources()),
		Engine: swarm.EngineDescription{
			EngineVersion: d.GetEngine().GetEngineVersion(), Labels: maps.Clone(d.GetEngine().GetLabels()),
			Plugins: each(d.GetEngine().GetPlugins(), func(p *api.PluginDescription) swarm.PluginDescription {
				return swarm.PluginDescription{Type: p.GetType(), Name: p.GetName()}
			}),
		},
		TLSInfo: swarm.TLSInfo{
			TrustRoot:           string(d.GetTlsInfo().GetTrustRoot()),
			CertIssuerSubject:   slices.Clone(d.GetTlsInfo().GetCertIssuerSubject()),
			CertIssuerPublicKey: slices.Clone(d.GetTlsInfo().GetCertIssuerPublicKey()),
		},
		CSIInfo: each(d.GetCsiInfo(), func(c *api.NodeCSIInfo) swarm.NodeCSIInfo {
			info := swarm.NodeCSIInfo{PluginName: c.GetPluginName(), NodeID: c.GetNodeId(), MaxVolumesPerNode: c.GetMaxVolumesPerNode()}
			if t := c.GetAccessibleTopology(); t != nil {
				info.AccessibleTopology = &swarm.Topology{Segments: maps.Clone(t.GetSegments())}
			}
			return info
		}),
	}
	slices.SortFunc(out.Engine.Plugins, func(a, b swarm.PluginDescription) int {
		return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.Name, b.Name))
	})
	return out
}
