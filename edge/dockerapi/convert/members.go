package convert

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/network"

	"github.com/skep-dev/skep/api"
)

// Members are the nodes and tasks that take part in a network of the swarm.
type Members struct {
	// Peers are the nodes, by id.
	Peers []network.PeerInfo

	id    string
	tasks []*api.Task
	nodes map[string]*api.Node
}

// NetworkMembers finds who takes part in a network: nodes with running tasks that are
// attached to it, and for the ingress network all that are ready.
func NetworkMembers(id string, ingress bool, nodes []*api.Node, tasks []*api.Task) Members {
	m := Members{id: id, nodes: make(map[string]*api.Node, len(nodes))}
	for _, n := range nodes {
		m.nodes[n.GetId()] = n
	}
	used := make(map[string]bool)
	for _, t := range tasks {
		if t.GetStatus().GetState() == api.TaskState_RUNNING && attached(t, id).IsValid() {
			m.tasks = append(m.tasks, t)
			used[t.GetNodeId()] = true
		}
	}
	for _, n := range nodes {
		a, err := netip.ParseAddr(n.GetStatus().GetAddr())
		if err == nil && (used[n.GetId()] || ingress && n.GetStatus().GetState() == api.NodeStatus_READY) {
			m.Peers = append(m.Peers, network.PeerInfo{Name: n.GetId()[:min(12, len(n.GetId()))], IP: a})
		}
	}
	slices.SortFunc(m.Peers, func(a, b network.PeerInfo) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(m.tasks, func(a, b *api.Task) int {
		return cmp.Or(cmp.Compare(a.GetSlot(), b.GetSlot()), cmp.Compare(a.GetId(), b.GetId()))
	})
	return m
}

// attached returns a task's first address in a network.
func attached(t *api.Task, id string) netip.Addr {
	for _, a := range t.GetNetworks() {
		if a.GetNetwork().GetId() == id && len(a.GetAddresses()) > 0 {
			return addr(a.GetAddresses()[0])
		}
	}
	return netip.Addr{}
}

// Services returns those of the given services that have tasks in the network.
func (m *Members) Services(services []*api.Service) map[string]network.ServiceInfo {
	out := make(map[string]network.ServiceInfo)
	for _, s := range services {
		info := network.ServiceInfo{Ports: []string{}}
		for _, t := range m.tasks {
			if t.GetServiceId() != s.GetId() {
				continue
			}
			place := fmt.Sprint(t.GetSlot())
			if t.GetSlot() == 0 {
				place = t.GetNodeId()
			}
			info.Tasks = append(info.Tasks, network.Task{
				Name: fmt.Sprintf("%s.%s.%s", s.GetSpec().GetAnnotations().GetName(), place, t.GetId()), EndpointID: t.GetId(),
				EndpointIP: attached(t, m.id), Info: map[string]string{"Host IP": m.nodes[t.GetNodeId()].GetStatus().GetAddr()},
			})
		}
		if len(info.Tasks) == 0 {
			continue
		}
		for _, v := range s.GetEndpoint().GetVirtualIps() {
			if v.GetNetworkId() == m.id && !info.VIP.IsValid() {
				info.VIP = addr(v.GetAddr())
			}
		}
		for _, p := range s.GetEndpoint().GetPorts() {
			info.Ports = append(info.Ports, fmt.Sprintf("Target: %d, Publish: %d, Protocol: %s, Mode: %s", p.GetTargetPort(), p.GetPublishedPort(),
				strings.ToLower(p.GetProtocol().String()), strings.ToLower(p.GetPublishMode().String())))
		}
		out[s.GetSpec().GetAnnotations().GetName()] = info
	}
	return out
}
