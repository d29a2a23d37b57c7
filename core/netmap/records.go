package netmap

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
)

// DataAddrLabel is the engine label by which a node tells the address that its encapsulated
// packets go to, where it is not the one that it is known by.
const DataAddrLabel = "skep.data-path-addr"

// meshSource is what the labels of a service or of the ingress network say.
func meshSource(labels map[string]string) skepv1.MeshSource {
	switch labels[model.MeshSourceLabel] {
	case model.MeshSourceKeep:
		return skepv1.MeshSource_MESH_SOURCE_KEEP
	case model.MeshSourceMasquerade:
		return skepv1.MeshSource_MESH_SOURCE_MASQUERADE
	}
	return skepv1.MeshSource_MESH_SOURCE_UNSPECIFIED
}

// Keys of the driver options that matter to nodes.
const (
	vniOption = "com.docker.network.driver.overlay.vxlanid_list"
	mtuOption = "com.docker.network.driver.mtu"
)

// networkRecord is what nodes know of a network. Its IPv4 subnets carry the VXLAN
// identifiers of the driver state, in order.
func networkRecord(n *api.Network) *skepv1.OverlayNetwork {
	options := n.GetDriverState().GetOptions()
	how, port := model.Encryption(n)
	r := &skepv1.OverlayNetwork{
		Id: n.GetId(), Name: n.GetSpec().GetAnnotations().GetName(), Internal: n.GetSpec().GetInternal(),
		Ingress: model.Ingress(n), Attachable: n.GetSpec().GetAttachable(),
		Encrypted: model.Encrypted(n), Encryption: how, EncryptionPort: uint32(port),
	}
	if mtu, err := strconv.ParseUint(options[mtuOption], 10, 16); err == nil {
		r.Mtu = uint32(mtu)
	}
	if r.GetIngress() {
		r.MeshSource = meshSource(n.GetSpec().GetAnnotations().GetLabels())
	}
	ids := strings.Split(options[vniOption], ",")
	for _, c := range n.GetIpam().GetConfigs() {
		s := &skepv1.OverlaySubnet{Subnet: c.GetSubnet(), Gateway: c.GetGateway()}
		if c.GetFamily() != api.IPAMConfig_IPV6 && !strings.Contains(c.GetSubnet(), ":") && len(ids) > 0 {
			if vni, err := strconv.ParseUint(ids[0], 10, 24); err == nil {
				s.Vni = uint32(vni)
			}
			ids = ids[1:]
		}
		r.Subnets = append(r.Subnets, s)
	}
	return r
}

// here reports whether a task has its endpoints: it is on a node and has not ended.
func here(t *api.Task) bool {
	state := t.GetStatus().GetState()
	return t.GetNodeId() != "" && state >= api.TaskState_ASSIGNED && state <= api.TaskState_RUNNING
}

// routable reports whether a task may get new connections.
func routable(t *api.Task) bool {
	return t.GetStatus().GetState() == api.TaskState_RUNNING && t.GetDesiredState() <= api.TaskState_RUNNING
}

// endpoints are the records of a task, by network.
func endpoints(t *api.Task, n *node) map[string]*skepv1.OverlayEndpoint {
	if !here(t) {
		return nil
	}
	out := make(map[string]*skepv1.OverlayEndpoint)
	for _, a := range t.GetNetworks() {
		if !model.Overlay(a.GetNetwork()) || len(a.GetAddresses()) == 0 {
			continue
		}
		out[a.GetNetwork().GetId()] = &skepv1.OverlayEndpoint{
			Key:       &skepv1.EndpointKey{NetworkId: a.GetNetwork().GetId(), TaskId: t.GetId()},
			ServiceId: t.GetServiceId(), Name: model.TaskName(t), NodeId: t.GetNodeId(), NodeAddr: n.addr(),
			Addresses: a.GetAddresses(), Aliases: a.GetAliases(), Routable: routable(t) && n.alive(),
			KeepsSource: model.Ingress(a.GetNetwork()) && n.keepsSource(),
		}
	}
	return out
}

// serviceRecord is what nodes know of a service, with the networks it is in.
func serviceRecord(s *api.Service) (*skepv1.BalancedService, []string) {
	r := &skepv1.BalancedService{
		Id: s.GetId(), Name: s.GetSpec().GetAnnotations().GetName(),
		Virtual: s.GetSpec().GetEndpoint().GetMode() == api.EndpointSpec_VIP,
	}
	r.MeshSource = meshSource(s.GetSpec().GetAnnotations().GetLabels())
	var networks []string
	for _, v := range s.GetEndpoint().GetVirtualIps() {
		if v.GetAddr() == "" {
			continue
		}
		r.Vips = append(r.Vips, &skepv1.VirtualAddress{NetworkId: v.GetNetworkId(), Addr: v.GetAddr()})
		networks = append(networks, v.GetNetworkId())
	}
	for _, list := range [][]*api.NetworkAttachmentConfig{s.GetSpec().GetTask().GetNetworks(), s.GetSpec().GetNetworks()} { //nolint:staticcheck // old clients put them there
		for _, a := range list {
			networks = append(networks, a.GetTarget())
		}
	}
	for _, p := range s.GetEndpoint().GetPorts() {
		if p.GetPublishMode() == api.PortConfig_INGRESS && p.GetPublishedPort() != 0 {
			r.Ports = append(r.Ports, &skepv1.MeshPort{Protocol: ipProtocol(p.GetProtocol()), Target: p.GetTargetPort(), Published: p.GetPublishedPort()})
		}
	}
	slices.Sort(networks)
	return r, slices.Compact(networks)
}

func ipProtocol(p api.PortConfig_Protocol) uint32 {
	switch p {
	case api.PortConfig_UDP:
		return 17
	case api.PortConfig_SCTP:
		return 132
	default:
		return 6
	}
}

// ownEndpoints are a node's own endpoints, by network. From that in the ingress network it
// leads connections to its published ports to tasks, which answer to it; a Docker Engine leads
// them to service addresses as well, from one in each of its networks. They have the node's id
// for a task's, and no names.
func ownEndpoints(n *api.Node) map[string]*skepv1.OverlayEndpoint {
	out := map[string]*skepv1.OverlayEndpoint{}
	foreign := model.Foreign(n.GetDescription())
	for _, a := range ownAttachments(n) {
		id := a.GetNetwork().GetId()
		if out[id] == nil {
			out[id] = &skepv1.OverlayEndpoint{
				Key: &skepv1.EndpointKey{NetworkId: id, TaskId: n.GetId()}, NodeId: n.GetId(), NodeAddr: dataAddr(n), Addresses: a.GetAddresses(),
				LeadsToPublished: foreign && model.Ingress(a.GetNetwork()),
			}
		}
	}
	return out
}

// ownAttachments are a node's attachments that have an address.
func ownAttachments(n *api.Node) []*api.NetworkAttachment {
	attachments := n.GetAttachments()
	if n.GetAttachment() != nil { //nolint:staticcheck // the only one that old managers write
		attachments = append(slices.Clip(attachments), n.GetAttachment()) //nolint:staticcheck // as above
	}
	return slices.DeleteFunc(slices.Clone(attachments), func(a *api.NetworkAttachment) bool {
		return !model.Overlay(a.GetNetwork()) || len(a.GetAddresses()) == 0
	})
}

// localRecord is what a node must know of itself.
func (m *Map) localRecord(n *api.Node) *skepv1.LocalNode {
	r := &skepv1.LocalNode{
		Id: n.GetId(), DataAddr: dataAddr(n), VxlanPort: m.port, Gossip: len(m.foreign) > 0, GossipPeers: m.gossipers,
	}
	for _, a := range ownAttachments(n) {
		if !model.Ingress(a.GetNetwork()) {
			continue
		}
		for _, addr := range a.GetAddresses() {
			if strings.Contains(addr, ":") {
				r.IngressAddr6 = addr
			} else {
				r.IngressAddr = addr
			}
		}
	}
	return r
}

// dataAddr is where a node gets encapsulated packets: what it says itself, else the address
// it has its session from, else the one it is reached at as a manager.
func dataAddr(n *api.Node) string {
	if a := n.GetDescription().GetEngine().GetLabels()[DataAddrLabel]; a != "" {
		return a
	}
	if a := n.GetStatus().GetAddr(); a != "" && a != "0.0.0.0" && a != "@" {
		return a
	}
	at, err := netip.ParseAddrPort(n.GetManagerStatus().GetAddr())
	if err != nil {
		return ""
	}
	return at.Addr().String()
}
