package netmap

import (
	"cmp"
	"slices"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
)

// Told is what one node was told so far. The zero value is a node that knows nothing.
type Told struct {
	networks map[string]map[string]bool // with the tasks of the endpoints told
	services map[string]bool
	peers    map[string]map[string]bool // nodes told, by encrypted network
}

// Complete returns everything that a node must know, and what it then was told.
func (m *Map) Complete(nodeID string) (*skepv1.NetworkUpdate, *Told) {
	m.derived = nil
	told := &Told{networks: map[string]map[string]bool{}, services: map[string]bool{}, peers: map[string]map[string]bool{}}
	u := &skepv1.NetworkUpdate{Complete: true, Node: m.localRecord(m.node(nodeID).stored)}
	if u.GetNode().GetId() == "" {
		u.Node.Id = nodeID
	}
	var ids []string
	for id := range m.networks {
		if m.concerns(id, nodeID) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	for _, id := range ids {
		m.tellNetwork(u, told, id, nodeID)
	}
	return u, told
}

// tellNetwork adds a network with everything in it. What the node was told while it was in
// the network before, and is not there any more, is taken back.
func (m *Map) tellNetwork(u *skepv1.NetworkUpdate, told *Told, id, to string) {
	n := m.networks[id]
	u.Networks = append(u.Networks, n.record)
	for _, taskID := range sortedKeys(told.networks[id]) {
		if n.endpoints[taskID] == nil {
			u.RemovedEndpoints = append(u.RemovedEndpoints, &skepv1.EndpointKey{NetworkId: id, TaskId: taskID})
		}
	}
	tasks := make(map[string]bool, len(n.endpoints))
	told.networks[id] = tasks
	for _, taskID := range sortedKeys(n.endpoints) {
		tasks[taskID] = true
		u.Endpoints = append(u.Endpoints, n.endpoints[taskID])
	}
	if n.record.GetEncrypted() {
		if told.peers[id] == nil {
			told.peers[id] = map[string]bool{}
		}
		m.tellPeer(u, told, Key{Kind: Peer, Network: id}, to)
	}
	for _, serviceID := range sortedKeys(n.services) {
		m.tellService(u, told, serviceID)
	}
}

// Update returns what keys mean for a node that was told before.
func (m *Map) Update(nodeID string, told *Told, keys []Key) *skepv1.NetworkUpdate {
	m.derived = nil
	u := new(skepv1.NetworkUpdate)
	keys = slices.Clone(keys)
	slices.SortFunc(keys, func(a, b Key) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Network, b.Network), cmp.Compare(a.ID, b.ID))
	})
	fresh, all := map[string]bool{}, map[string]bool{} // networks that this update tells whole, and all nodes of
	for _, k := range slices.Compact(keys) {
		switch k.Kind {
		case Local:
			if n := m.nodes[nodeID]; n != nil && n.stored != nil {
				u.Node = m.localRecord(n.stored)
			}
		case Network:
			switch {
			case m.concerns(k.Network, nodeID):
				fresh[k.Network] = true
				m.tellNetwork(u, told, k.Network, nodeID)
			case told.networks[k.Network] != nil:
				delete(told.networks, k.Network)
				delete(told.peers, k.Network)
				u.RemovedNetworks = append(u.RemovedNetworks, k.Network)
			}
		case Endpoint:
			if tasks := told.networks[k.Network]; tasks != nil && !fresh[k.Network] {
				m.tellEndpoint(u, tasks, k)
			}
		case Service:
			m.tellService(u, told, k.ID)
		case Peer:
			if !fresh[k.Network] && !all[k.Network] {
				m.tellPeer(u, told, k, nodeID)
			}
			all[k.Network] = all[k.Network] || k.ID == ""
		}
	}
	if len(fresh)+len(u.GetRemovedNetworks()) > 0 {
		m.forgetServices(u, told)
	}
	return u
}

func (m *Map) tellEndpoint(u *skepv1.NetworkUpdate, tasks map[string]bool, k Key) {
	if n := m.networks[k.Network]; n != nil && n.endpoints[k.ID] != nil {
		tasks[k.ID] = true
		u.Endpoints = append(u.Endpoints, n.endpoints[k.ID])
		return
	}
	if !tasks[k.ID] {
		return
	}
	delete(tasks, k.ID)
	u.RemovedEndpoints = append(u.RemovedEndpoints, &skepv1.EndpointKey{NetworkId: k.Network, TaskId: k.ID})
}

func (m *Map) tellService(u *skepv1.NetworkUpdate, told *Told, id string) {
	if s := m.services[id]; s != nil && slices.ContainsFunc(s.networks, func(n string) bool { return told.networks[n] != nil }) {
		if !slices.Contains(u.GetServices(), s.record) {
			u.Services = append(u.Services, s.record)
		}
		told.services[id] = true
		return
	}
	if told.services[id] {
		delete(told.services, id)
		u.RemovedServices = append(u.RemovedServices, id)
	}
}

// forgetServices withdraws the services that a node knew through networks that it left, or
// that are gone since it was last in them.
func (m *Map) forgetServices(u *skepv1.NetworkUpdate, told *Told) {
	for _, id := range sortedKeys(told.services) {
		s := m.services[id]
		if s == nil || !slices.ContainsFunc(s.networks, func(n string) bool { return told.networks[n] != nil }) {
			delete(told.services, id)
			u.RemovedServices = append(u.RemovedServices, id)
		}
	}
}

// Audience returns the nodes that may lead connections to a task: those that know one of
// its networks.
func (m *Map) Audience(taskID string) map[string]bool {
	out := map[string]bool{}
	for id := range m.tasks[taskID] {
		for _, n := range m.toMembers(id, Key{}) {
			out[n.NodeID] = true
		}
	}
	return out
}

// ToStop reports whether a task is wanted to stop and still has endpoints.
func (m *Map) ToStop(taskID string) bool {
	for _, e := range m.tasks[taskID] {
		t := m.nodes[e.GetNodeId()].tasks[taskID]
		return t.GetDesiredState() > api.TaskState_RUNNING
	}
	return false
}

// NodeOf returns the node of a task that has endpoints.
func (m *Map) NodeOf(taskID string) string {
	for _, e := range m.tasks[taskID] {
		return e.GetNodeId()
	}
	return ""
}

// LeavingOn lists the tasks of a node that are to stop and still have endpoints, sorted.
func (m *Map) LeavingOn(nodeID string) []string {
	var out []string
	if n := m.nodes[nodeID]; n != nil {
		for id, t := range n.tasks {
			if len(m.tasks[id]) > 0 && t.GetDesiredState() > api.TaskState_RUNNING {
				out = append(out, id)
			}
		}
	}
	slices.Sort(out)
	return out
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
