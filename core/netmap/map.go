package netmap

import (
	"iter"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
)

// Kind says what a Key names.
type Kind int

// The kinds of records, in the order in which a node is told.
const (
	Local Kind = iota // the node itself
	Network
	Endpoint
	Service
	Peer
)

// Key names one record. Network is set for Network, Endpoint and Peer, ID for Endpoint (the
// task's), Service, and Peer (the node's; without one all nodes of the network).
type Key struct {
	Kind        Kind
	Network, ID string
}

// Notice says that a node must hear of a record.
type Notice struct {
	NodeID string
	Key    Key
}

// View is what a Map is built from: the stored records.
type View interface {
	Nodes() iter.Seq[*api.Node]
	Services() iter.Seq[*api.Service]
	Networks() iter.Seq[*api.Network]
	Tasks() iter.Seq[*api.Task]
	Cluster() *api.Cluster
}

type node struct {
	stored *api.Node // nil while only its tasks are known
	tasks  map[string]*api.Task
	// end is what espEnd returns, once endKnown is set.
	end      *espEnd
	endKnown bool
}

func (n *node) addr() string { return dataAddr(n.stored) }

// keepsSource reports whether the node can answer clients whose address was kept.
func (n *node) keepsSource() bool {
	return n.stored.GetDescription().GetEngine().GetLabels()[model.MeshSourceLabel] == model.MeshSourceKeep
}

// alive is false for a node that is known to be lost: nobody is led to its tasks.
func (n *node) alive() bool { return n.stored.GetStatus().GetState() != api.NodeStatus_DOWN }

type network struct {
	record    *skepv1.OverlayNetwork
	endpoints map[string]*skepv1.OverlayEndpoint // by task
	members   map[string]int                     // endpoints by node
	services  map[string]bool
	gone      bool // removed from the store
}

type service struct {
	record   *skepv1.BalancedService
	networks []string
}

// Map is what is known of all networks. It is not safe for concurrent use.
type Map struct {
	nodes   map[string]*node
	hosts   map[string]map[string]bool // nodes by address
	foreign map[string]engine          // nodes that are Docker Engines, by id
	// gossipers are what gossipPeers says of them; never changed.
	gossipers []string
	networks  map[string]*network
	services  map[string]*service
	tasks     map[string]map[string]*skepv1.OverlayEndpoint // by task and network
	port      uint32
	keys      []*api.EncryptionKey // what keys of nodes are derived from, newest first
	secrets   []espSecret          // of keys
	// derived are the keys for ESP between the node that an update is made for and others: the
	// same in all their networks. Nil before the first in an update.
	derived map[string][]*skepv1.EspKey
}

// New returns the map of a stored state.
func New(v View) *Map {
	m := &Map{
		nodes: map[string]*node{}, hosts: map[string]map[string]bool{}, foreign: map[string]engine{}, networks: map[string]*network{}, services: map[string]*service{},
		tasks: map[string]map[string]*skepv1.OverlayEndpoint{}, port: v.Cluster().GetVXLANUDPPort(),
	}
	m.setKeys(v.Cluster())
	for n := range v.Networks() {
		m.putNetwork(n)
	}
	for n := range v.Nodes() {
		m.putNode(n.GetId(), n)
	}
	for s := range v.Services() {
		m.putService(s.GetId(), s)
	}
	for t := range v.Tasks() {
		m.putTask(t.GetId(), nil, t)
	}
	return m
}

// Apply takes a change over and returns who must hear of what.
func (m *Map) Apply(e model.Event) []Notice {
	switch e.Table { //nolint:exhaustive // the others do not concern networks
	case model.Networks:
		if n, ok := e.New.(*api.Network); ok && n != nil {
			return m.putNetwork(n)
		}
		return m.dropNetwork(e.ID())
	case model.Nodes:
		n, _ := e.New.(*api.Node)
		return m.putNode(e.ID(), n)
	case model.Services:
		s, _ := e.New.(*api.Service)
		return m.putService(e.ID(), s)
	case model.Tasks:
		old, _ := e.Old.(*api.Task)
		t, _ := e.New.(*api.Task)
		return m.putTask(e.ID(), old, t)
	case model.Clusters:
		c, _ := e.New.(*api.Cluster)
		return m.putCluster(c)
	}
	return nil
}

func (m *Map) putCluster(c *api.Cluster) []Notice {
	if c == nil {
		return nil
	}
	var out []Notice
	if c.GetVXLANUDPPort() != m.port {
		m.port = c.GetVXLANUDPPort()
		out = m.toAll()
	}
	if m.setKeys(c) {
		out = append(out, m.Rekey()...)
	}
	return out
}

// setKeys takes the cluster's keys over and reports whether they are others than before.
func (m *Map) setKeys(c *api.Cluster) bool {
	keys := pki.NetworkKeys(c, pki.OverlayKeys)
	if slices.EqualFunc(keys, m.keys, func(a, b *api.EncryptionKey) bool { return proto.Equal(a, b) }) {
		return false
	}
	m.keys, m.secrets = keys, espSecrets(keys)
	return true
}

// toAll tells all nodes of themselves.
func (m *Map) toAll() []Notice {
	out := make([]Notice, 0, len(m.nodes))
	for id := range m.nodes {
		out = append(out, Notice{id, Key{Kind: Local}})
	}
	return out
}

// putForeign notes whether a node is a Docker Engine. All nodes hear when that changes whom
// they gossip with.
func (m *Map) putForeign(id string, stored *api.Node) []Notice {
	was, known := m.foreign[id]
	is := engine{stored.GetStatus().GetAddr(), stored.GetStatus().GetState() == api.NodeStatus_READY}
	if foreign := model.Foreign(stored.GetDescription()); !foreign && !known || foreign && known && was == is {
		return nil
	}
	some, before := len(m.foreign) > 0, m.gossipers
	if model.Foreign(stored.GetDescription()) {
		m.foreign[id] = is
	} else {
		delete(m.foreign, id)
	}
	m.gossipers = m.gossipPeers()
	if some == (len(m.foreign) > 0) && slices.Equal(before, m.gossipers) {
		return nil
	}
	return m.toAll()
}

// engine is where a Docker Engine is, and whether it is there.
type engine struct {
	addr  string
	ready bool
}

// maxGossipPeers is how many Docker Engines nodes are told of; those tell of the others.
const maxGossipPeers = 16

// gossipPeers are the addresses of some Docker Engines, rather of such that are there, sorted.
func (m *Map) gossipPeers() []string {
	var ready, lost []string
	for _, e := range m.foreign {
		switch {
		case e.addr == "":
		case e.ready:
			ready = append(ready, e.addr)
		default:
			lost = append(lost, e.addr)
		}
	}
	slices.Sort(ready)
	slices.Sort(lost)
	all := append(ready, lost...)
	all = all[:min(len(all), maxGossipPeers)]
	slices.Sort(all)
	return all
}

// Rekey says who must hear when all keys change.
func (m *Map) Rekey() []Notice {
	var out []Notice
	for id, n := range m.networks {
		if n.record.GetEncrypted() {
			out = append(out, m.toMembers(id, Key{Kind: Peer, Network: id})...)
		}
	}
	return out
}

// Encrypts reports whether a node is there, not lost, and encrypts.
func (m *Map) Encrypts(nodeID string) bool {
	n := m.nodes[nodeID]
	return n != nil && n.alive() && n.stored.GetDescription().GetEngine().GetLabels()[model.EncryptionLabel] != ""
}

// at returns a network, made if it is unknown.
func (m *Map) at(id string) *network {
	n := m.networks[id]
	if n == nil {
		n = &network{endpoints: map[string]*skepv1.OverlayEndpoint{}, members: map[string]int{}, services: map[string]bool{}}
		m.networks[id] = n
	}
	return n
}

// putNetwork takes a network over. All its members hear of it; of the ingress network, all nodes.
func (m *Map) putNetwork(n *api.Network) []Notice {
	if !model.Overlay(n) {
		return nil
	}
	record, known := networkRecord(n), m.at(n.GetId())
	if proto.Equal(known.record, record) {
		return nil
	}
	known.record, known.gone = record, false
	return m.toMembers(n.GetId(), Key{Kind: Network, Network: n.GetId()})
}

// dropNetwork forgets a network that was removed, once the tasks that are ending have left it.
func (m *Map) dropNetwork(id string) []Notice {
	n := m.networks[id]
	if n == nil || n.record == nil {
		return nil
	}
	n.gone = true
	if n.record.GetIngress() {
		out := m.toMembers(id, Key{Kind: Network, Network: id})
		m.forget(id)
		return out
	}
	m.forget(id)
	return nil
}

// forget deletes a removed network that nothing is left in; of the ingress network, at once.
func (m *Map) forget(id string) {
	n := m.networks[id]
	if n == nil || !n.gone {
		return
	}
	if n.record.GetIngress() {
		n.record = nil
	}
	if len(n.endpoints) == 0 && len(n.services) == 0 {
		delete(m.networks, id)
	}
}

// concerns reports whether a node must know a network.
func (m *Map) concerns(networkID, nodeID string) bool {
	n := m.networks[networkID]
	return n != nil && n.record != nil && (n.members[nodeID] > 0 || n.record.GetIngress())
}

// toMembers addresses a key to all nodes that must know a network.
func (m *Map) toMembers(networkID string, k Key) []Notice {
	n := m.networks[networkID]
	var out []Notice
	if n.record.GetIngress() {
		for id := range m.nodes {
			out = append(out, Notice{id, k})
		}
		return out
	}
	for id := range n.members {
		out = append(out, Notice{id, k})
	}
	return out
}

// node returns a node, made if only its tasks are known.
func (m *Map) node(id string) *node {
	n := m.nodes[id]
	if n == nil {
		n = &node{tasks: map[string]*api.Task{}}
		m.nodes[id] = n
	}
	return n
}

// putNode takes a node over, nil for one that was removed.
func (m *Map) putNode(id string, stored *api.Node) []Notice {
	n := m.node(id)
	old := n.stored
	n.stored, n.endKnown = stored, false
	m.putHost(id, dataAddr(old), n.addr())
	out := m.putForeign(id, stored)
	if stored == nil && len(n.tasks) == 0 {
		out = append(out, m.setEndpoints(id, nil)...)
		out = append(out, m.twinsChanged(id, old, nil)...)
		delete(m.nodes, id)
		return out
	}
	out = append(out, m.setEndpoints(id, ownEndpoints(stored))...)
	if old == nil || !proto.Equal(m.localRecord(old), m.localRecord(stored)) {
		out = append(out, Notice{id, Key{Kind: Local}})
	}
	out = append(out, m.peerChanged(id, old, stored)...)
	out = append(out, m.twinsChanged(id, old, stored)...)
	was := &node{stored: old}
	if old == nil || was.addr() != n.addr() || was.alive() != n.alive() || was.keepsSource() != n.keepsSource() {
		for taskID, t := range n.tasks {
			out = append(out, m.setEndpoints(taskID, endpoints(t, n))...)
		}
	}
	return out
}

// putService takes a service over, nil for one that was removed.
func (m *Map) putService(id string, stored *api.Service) []Notice {
	known := m.services[id]
	var next *service
	if stored != nil {
		next = new(service)
		next.record, next.networks = serviceRecord(stored)
		if known != nil && proto.Equal(known.record, next.record) && slices.Equal(known.networks, next.networks) {
			return nil
		}
		m.services[id] = next
	} else {
		delete(m.services, id)
	}
	var out []Notice
	key := Key{Kind: Service, ID: id}
	if known != nil {
		for _, n := range known.networks {
			out = append(out, m.toMembers(n, key)...)
			delete(m.at(n).services, id)
			m.forget(n)
		}
	}
	if next != nil {
		for _, n := range next.networks {
			m.at(n).services[id] = true
			out = append(out, m.toMembers(n, key)...)
		}
	}
	return out
}

// putTask takes a task over, nil for one that was removed.
func (m *Map) putTask(id string, old, t *api.Task) []Notice {
	if t == nil {
		t = new(api.Task)
	}
	nodeID := t.GetNodeId()
	if nodeID == "" {
		nodeID = old.GetNodeId()
	}
	if nodeID == "" || len(t.GetNetworks()) == 0 && m.tasks[id] == nil {
		return nil
	}
	n := m.node(nodeID)
	if here(t) {
		n.tasks[id] = t
	} else {
		delete(n.tasks, id)
		if n.stored == nil && len(n.tasks) == 0 {
			delete(m.nodes, nodeID)
		}
	}
	return m.setEndpoints(id, endpoints(t, n))
}

// setEndpoints makes the endpoints of a task those given.
func (m *Map) setEndpoints(taskID string, want map[string]*skepv1.OverlayEndpoint) []Notice {
	have := m.tasks[taskID]
	var out []Notice
	for id, e := range have {
		if want[id] == nil {
			out = append(out, m.toMembers(id, Key{Kind: Endpoint, Network: id, ID: taskID})...)
			n := m.networks[id]
			delete(n.endpoints, taskID)
			if n.members[e.GetNodeId()]--; n.members[e.GetNodeId()] == 0 {
				delete(n.members, e.GetNodeId())
				out = append(out, Notice{e.GetNodeId(), Key{Kind: Network, Network: id}})
				out = append(out, m.toPeers(id, e.GetNodeId())...)
			}
			m.forget(id)
		}
	}
	for id, e := range want {
		n := m.at(id)
		switch known := have[id]; {
		case known == nil:
			if n.members[e.GetNodeId()]++; n.members[e.GetNodeId()] == 1 {
				out = append(out, Notice{e.GetNodeId(), Key{Kind: Network, Network: id}})
				out = append(out, m.toPeers(id, e.GetNodeId())...)
			}
		case proto.Equal(known, e):
			continue
		}
		n.endpoints[taskID] = e
		out = append(out, m.toMembers(id, Key{Kind: Endpoint, Network: id, ID: taskID})...)
	}
	if len(want) == 0 {
		delete(m.tasks, taskID)
	} else {
		m.tasks[taskID] = want
	}
	return out
}
