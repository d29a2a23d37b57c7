package netmap

import (
	"fmt"
	"iter"
	"maps"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
)

// records is a store for tests.
type records struct {
	nodes    map[string]*api.Node
	services map[string]*api.Service
	networks map[string]*api.Network
	tasks    map[string]*api.Task
}

func newRecords() *records {
	return &records{map[string]*api.Node{}, map[string]*api.Service{}, map[string]*api.Network{}, map[string]*api.Task{}}
}

func (r *records) Nodes() iter.Seq[*api.Node]       { return maps.Values(r.nodes) }
func (r *records) Services() iter.Seq[*api.Service] { return maps.Values(r.services) }
func (r *records) Networks() iter.Seq[*api.Network] { return maps.Values(r.networks) }
func (r *records) Tasks() iter.Seq[*api.Task]       { return maps.Values(r.tasks) }
func (r *records) Cluster() *api.Cluster            { return nil }

func event(table model.Table, old, updated model.Object) model.Event {
	e := model.Event{Kind: model.Update, Table: table}
	if old != nil {
		e.Old = old
	} else {
		e.Kind = model.Create
	}
	if updated != nil {
		e.New = updated
	} else {
		e.Kind = model.Remove
	}
	return e
}

func put[T model.Object](m map[string]T, table model.Table, o T) model.Event {
	old, ok := m[o.GetId()]
	m[o.GetId()] = o
	if !ok {
		return event(table, nil, o)
	}
	return event(table, old, o)
}

func drop[T model.Object](m map[string]T, table model.Table, id string) model.Event {
	old := m[id]
	delete(m, id)
	return event(table, old, nil)
}

func testNetwork(i int, ingress bool) *api.Network {
	return &api.Network{
		Id:          fmt.Sprintf("net%d", i),
		Spec:        &api.NetworkSpec{Annotations: &api.Annotations{Name: fmt.Sprintf("n%d", i)}, Ingress: ingress},
		DriverState: &api.Driver{Name: "overlay", Options: map[string]string{vniOption: fmt.Sprint(4096 + i)}},
		Ipam:        &api.IPAMOptions{Driver: &api.Driver{}, Configs: []*api.IPAMConfig{{Subnet: fmt.Sprintf("10.0.%d.0/24", i), Gateway: fmt.Sprintf("10.0.%d.1", i)}}},
	}
}

func testNode(i int, state api.NodeStatus_State) *api.Node {
	return &api.Node{Id: fmt.Sprintf("node%d", i), Status: &api.NodeStatus{State: state, Addr: fmt.Sprintf("192.0.2.%d", i+1)}}
}

func testTask(id, service, nodeID string, networks []*api.Network, state, desired api.TaskState) *api.Task {
	t := &api.Task{
		Id: id, ServiceId: service, NodeId: nodeID, Slot: 1, DesiredState: desired,
		ServiceAnnotations: &api.Annotations{Name: service}, Status: &api.TaskStatus{State: state},
	}
	for i, n := range networks {
		t.Networks = append(t.Networks, &api.NetworkAttachment{Network: n, Addresses: []string{fmt.Sprintf("10.0.%d.%d/24", i, 2+len(id))}})
	}
	return t
}

func testService(id string, mesh bool, networks ...*api.Network) *api.Service {
	s := &api.Service{Id: id, Spec: &api.ServiceSpec{Annotations: &api.Annotations{Name: id}, Task: &api.TaskSpec{}}, Endpoint: &api.Endpoint{}}
	for i, n := range networks {
		s.Spec.Task.Networks = append(s.Spec.Task.Networks, &api.NetworkAttachmentConfig{Target: n.GetId()})
		s.Endpoint.VirtualIps = append(s.Endpoint.VirtualIps, &api.Endpoint_VirtualIP{NetworkId: n.GetId(), Addr: fmt.Sprintf("10.0.%d.200/24", i)})
	}
	if mesh {
		s.Endpoint.Ports = []*api.PortConfig{{TargetPort: 80, PublishedPort: 8080}}
	}
	return s
}

// told is a node that applies what it hears.
type heard struct {
	local     *skepv1.LocalNode
	networks  map[string]*skepv1.OverlayNetwork
	endpoints map[[2]string]*skepv1.OverlayEndpoint
	services  map[string]*skepv1.BalancedService
}

func (h *heard) apply(u *skepv1.NetworkUpdate) {
	if u.GetComplete() {
		*h = heard{networks: map[string]*skepv1.OverlayNetwork{}, endpoints: map[[2]string]*skepv1.OverlayEndpoint{}, services: map[string]*skepv1.BalancedService{}}
	}
	if u.GetNode() != nil {
		h.local = u.GetNode()
	}
	for _, n := range u.GetNetworks() {
		h.networks[n.GetId()] = n
	}
	for _, e := range u.GetEndpoints() {
		h.endpoints[[2]string{e.GetKey().GetNetworkId(), e.GetKey().GetTaskId()}] = e
	}
	for _, s := range u.GetServices() {
		h.services[s.GetId()] = s
	}
	for _, k := range u.GetRemovedEndpoints() {
		delete(h.endpoints, [2]string{k.GetNetworkId(), k.GetTaskId()})
	}
	for _, id := range u.GetRemovedServices() {
		delete(h.services, id)
	}
	for _, id := range u.GetRemovedNetworks() {
		delete(h.networks, id)
		maps.DeleteFunc(h.endpoints, func(k [2]string, _ *skepv1.OverlayEndpoint) bool { return k[0] == id })
	}
}

// TestIncrementsEqualCompleteUpdates plays random histories: what nodes gather from
// increments, however many changes each holds, is what a complete update would say, and the
// map that followed the changes is the one built from what is stored at the end.
func TestIncrementsEqualCompleteUpdates(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		store := newRecords()
		networks := []*api.Network{testNetwork(0, true), testNetwork(1, false), testNetwork(2, false)}
		for _, n := range networks {
			store.networks[n.GetId()] = n
		}
		for i := range 3 {
			n := testNode(i, api.NodeStatus_READY)
			store.nodes[n.GetId()] = n
		}
		m := New(store)
		hears, told, keys := map[string]*heard{}, map[string]*Told{}, map[string][]Key{}
		for id := range store.nodes {
			h := new(heard)
			u, known := m.Complete(id)
			h.apply(u)
			hears[id], told[id] = h, known
		}
		subset := func(label string) []*api.Network {
			var out []*api.Network
			for i, n := range networks {
				if rapid.Bool().Draw(t, fmt.Sprint(label, i)) && store.networks[n.GetId()] != nil {
					out = append(out, n)
				}
			}
			return out
		}
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			var e model.Event
			switch rapid.IntRange(0, 5).Draw(t, "what") {
			case 0, 1:
				id := fmt.Sprintf("task%d", rapid.IntRange(0, 5).Draw(t, "task"))
				if old := store.tasks[id]; old != nil {
					task := model.Clone(old)
					task.Status.State = rapid.SampledFrom([]api.TaskState{api.TaskState_ASSIGNED, api.TaskState_RUNNING, api.TaskState_FAILED}).Draw(t, "state")
					task.DesiredState = rapid.SampledFrom([]api.TaskState{api.TaskState_RUNNING, api.TaskState_SHUTDOWN}).Draw(t, "desired")
					e = put(store.tasks, model.Tasks, task)
				} else {
					e = put(store.tasks, model.Tasks, testTask(id, "svc0", fmt.Sprintf("node%d", rapid.IntRange(0, 2).Draw(t, "node")), subset("in"), api.TaskState_ASSIGNED, api.TaskState_RUNNING))
				}
			case 2:
				if len(store.tasks) == 0 {
					continue
				}
				e = drop(store.tasks, model.Tasks, rapid.SampledFrom(slices.Sorted(maps.Keys(store.tasks))).Draw(t, "gone"))
			case 3:
				n := testNode(rapid.IntRange(0, 2).Draw(t, "node"), rapid.SampledFrom([]api.NodeStatus_State{api.NodeStatus_READY, api.NodeStatus_DOWN}).Draw(t, "status"))
				n.Status.Addr = rapid.SampledFrom([]string{n.GetStatus().GetAddr(), "198.51.100.1"}).Draw(t, "addr")
				e = put(store.nodes, model.Nodes, n)
			case 4:
				id := fmt.Sprintf("svc%d", rapid.IntRange(0, 2).Draw(t, "service"))
				if store.services[id] != nil && rapid.Bool().Draw(t, "remove") {
					e = drop(store.services, model.Services, id)
				} else {
					e = put(store.services, model.Services, testService(id, rapid.Bool().Draw(t, "mesh"), subset("of")...))
				}
			case 5:
				n := rapid.SampledFrom(networks).Draw(t, "network")
				used := slices.ContainsFunc(slices.Collect(maps.Values(store.services)), func(s *api.Service) bool {
					return slices.ContainsFunc(s.GetSpec().GetTask().GetNetworks(), func(a *api.NetworkAttachmentConfig) bool { return a.GetTarget() == n.GetId() })
				}) || slices.ContainsFunc(slices.Collect(maps.Values(store.tasks)), func(t *api.Task) bool {
					return here(t) && slices.ContainsFunc(t.GetNetworks(), func(a *api.NetworkAttachment) bool { return a.GetNetwork().GetId() == n.GetId() })
				})
				switch {
				case store.networks[n.GetId()] == nil:
					e = put(store.networks, model.Networks, n)
				case used:
					continue
				default:
					e = drop(store.networks, model.Networks, n.GetId())
				}
			}
			for _, notice := range m.Apply(e) {
				keys[notice.NodeID] = append(keys[notice.NodeID], notice.Key)
			}
			for _, id := range slices.Sorted(maps.Keys(hears)) {
				if rapid.Bool().Draw(t, "hears "+id) {
					hears[id].apply(m.Update(id, told[id], keys[id]))
					keys[id] = nil
				}
			}
		}
		again := New(store)
		for id, h := range hears {
			h.apply(m.Update(id, told[id], keys[id]))
			var followed, built heard
			u, _ := m.Complete(id)
			followed.apply(u)
			u, _ = again.Complete(id)
			built.apply(u)
			opts := cmp.Options{protocmp.Transform(), cmp.AllowUnexported(heard{})}
			if diff := cmp.Diff(&followed, h, opts); diff != "" {
				t.Fatalf("%s gathered something else than a complete update says (-complete +gathered):\n%s", id, diff)
			}
			if diff := cmp.Diff(&built, &followed, opts); diff != "" {
				t.Fatalf("%s: the map that followed differs from the one built anew (-built +followed):\n%s", id, diff)
			}
		}
	})
}

// TestOnlyMembersHear: a change in one network is no business of nodes outside it.
func TestOnlyMembersHear(t *testing.T) {
	store := newRecords()
	one, two := testNetwork(1, false), testNetwork(2, false)
	store.networks[one.GetId()], store.networks[two.GetId()] = one, two
	for i := range 3 {
		n := testNode(i, api.NodeStatus_READY)
		store.nodes[n.GetId()] = n
	}
	m := New(store)
	for i, n := range []*api.Network{one, one, two} {
		m.Apply(put(store.tasks, model.Tasks, testTask(fmt.Sprint("t", i), "svc", fmt.Sprint("node", i), []*api.Network{n}, api.TaskState_RUNNING, api.TaskState_RUNNING)))
	}
	stop := model.Clone(store.tasks["t0"])
	stop.DesiredState = api.TaskState_SHUTDOWN
	got := map[string]bool{}
	for _, n := range m.Apply(put(store.tasks, model.Tasks, stop)) {
		got[n.NodeID] = true
	}
	if diff := cmp.Diff(map[string]bool{"node0": true, "node1": true}, got); diff != "" {
		t.Errorf("who hears (-want +got):\n%s", diff)
	}
	if !m.ToStop("t0") || m.ToStop("t1") {
		t.Errorf("to stop: t0 %v, t1 %v", m.ToStop("t0"), m.ToStop("t1"))
	}
	if diff := cmp.Diff([]string{"t0"}, m.LeavingOn("node0")); diff != "" {
		t.Errorf("leaving (-want +got):\n%s", diff)
	}
}

// TestLostNodeGetsNothing: nobody is led to the tasks of a node that is down.
func TestLostNodeGetsNothing(t *testing.T) {
	store := newRecords()
	n := testNetwork(1, false)
	store.networks[n.GetId()] = n
	for i := range 2 {
		node := testNode(i, api.NodeStatus_READY)
		store.nodes[node.GetId()] = node
		task := testTask(fmt.Sprint("t", i), "svc", node.GetId(), []*api.Network{n}, api.TaskState_RUNNING, api.TaskState_RUNNING)
		store.tasks[task.GetId()] = task
	}
	m := New(store)
	routable := func() (out []string) {
		u, _ := m.Complete("node0")
		for _, e := range u.GetEndpoints() {
			if e.GetRoutable() {
				out = append(out, e.GetKey().GetTaskId())
			}
		}
		return out
	}
	if diff := cmp.Diff([]string{"t0", "t1"}, routable()); diff != "" {
		t.Errorf("before (-want +got):\n%s", diff)
	}
	m.Apply(put(store.nodes, model.Nodes, testNode(1, api.NodeStatus_DOWN)))
	if diff := cmp.Diff([]string{"t0"}, routable()); diff != "" {
		t.Errorf("after the node was lost (-want +got):\n%s", diff)
	}
	m.Apply(put(store.nodes, model.Nodes, testNode(1, api.NodeStatus_UNKNOWN)))
	if diff := cmp.Diff([]string{"t0", "t1"}, routable()); diff != "" {
		t.Errorf("after a change of leaders (-want +got):\n%s", diff)
	}
}

func BenchmarkChange(b *testing.B) {
	for _, size := range []int{100, 5000} {
		b.Run(fmt.Sprintf("endpoints=%d", size), func(b *testing.B) {
			store := newRecords()
			for i := range size / 10 {
				n := testNetwork(i, false)
				store.networks[n.GetId()] = n
				for j := range 10 {
					id := fmt.Sprintf("t%d-%d", i, j)
					store.tasks[id] = testTask(id, "svc", fmt.Sprintf("node%d", j), []*api.Network{n}, api.TaskState_RUNNING, api.TaskState_RUNNING)
				}
			}
			m := New(store)
			up := store.tasks["t0-0"]
			down := model.Clone(up)
			down.DesiredState = api.TaskState_SHUTDOWN
			for b.Loop() {
				m.Apply(event(model.Tasks, up, down))
				m.Apply(event(model.Tasks, down, up))
			}
		})
	}
}

// TestMeshSource: labels of services, of the ingress network and of nodes reach those who
// lead connections to tasks.
func TestMeshSource(t *testing.T) {
	keep := func() map[string]string { return map[string]string{model.MeshSourceLabel: model.MeshSourceKeep} }
	r := newRecords()
	ingress := testNetwork(0, true)
	ingress.Spec.Annotations.Labels = map[string]string{model.MeshSourceLabel: model.MeshSourceMasquerade}
	r.networks[ingress.GetId()] = ingress
	r.nodes["node0"], r.nodes["node1"] = testNode(0, api.NodeStatus_READY), testNode(1, api.NodeStatus_READY)
	r.nodes["node1"].Description = &api.NodeDescription{Engine: &api.EngineDescription{Labels: keep()}}
	r.services["s"] = testService("s", true, ingress)
	r.services["s"].Spec.Annotations.Labels = keep()
	for i, node := range []string{"node0", "node1"} {
		id := fmt.Sprint("t", i)
		r.tasks[id] = testTask(id, "s", node, []*api.Network{ingress}, api.TaskState_RUNNING, api.TaskState_RUNNING)
	}
	m := New(r)
	u, _ := m.Complete("node0")
	if u.GetNetworks()[0].GetMeshSource() != skepv1.MeshSource_MESH_SOURCE_MASQUERADE || u.GetServices()[0].GetMeshSource() != skepv1.MeshSource_MESH_SOURCE_KEEP {
		t.Errorf("network %v, service %v", u.GetNetworks()[0], u.GetServices()[0])
	}
	if e := u.GetEndpoints(); e[0].GetKeepsSource() || !e[1].GetKeepsSource() {
		t.Errorf("endpoints: %v", e)
	}
	// A node that tells of its kernel only later changes its tasks' endpoints.
	upgraded := model.Clone(r.nodes["node0"])
	upgraded.Description = model.Clone(r.nodes["node1"].GetDescription())
	if len(m.Apply(put(r.nodes, model.Nodes, upgraded))) == 0 {
		t.Error("nobody hears of it")
	}
	if u, _ := m.Complete("node1"); !u.GetEndpoints()[0].GetKeepsSource() {
		t.Errorf("endpoints: %v", u.GetEndpoints())
	}
}

// TestGossip: all nodes hear when the first Docker Engine comes and when the last one goes.
func TestGossip(t *testing.T) {
	r := newRecords()
	put(r.nodes, model.Nodes, testNode(1, api.NodeStatus_READY))
	m := New(r)
	engine := func(i int) *api.Node {
		n := testNode(i, api.NodeStatus_READY)
		n.Description = &api.NodeDescription{Engine: &api.EngineDescription{EngineVersion: "20.10.24"}}
		return n
	}
	for _, step := range []struct {
		event model.Event
		told  bool // whether the Skep node hears of itself
		want  bool // whether it takes part in gossip
	}{
		{put(r.nodes, model.Nodes, engine(2)), true, true},
		{put(r.nodes, model.Nodes, engine(2)), false, true},
		{put(r.nodes, model.Nodes, engine(3)), true, true},
		{drop(r.nodes, model.Nodes, "node2"), true, true},
		{drop(r.nodes, model.Nodes, "node3"), true, false},
	} {
		notices := m.Apply(step.event)
		if told := slices.Contains(notices, Notice{"node1", Key{Kind: Local}}); told != step.told {
			t.Errorf("%s: node1 hears of itself: %t", step.event.ID(), told)
		}
		u, _ := m.Complete("node1")
		if u.GetNode().GetGossip() != step.want || (len(u.GetNode().GetGossipPeers()) > 0) != step.want {
			t.Errorf("%s: gossip is %t with %v", step.event.ID(), u.GetNode().GetGossip(), u.GetNode().GetGossipPeers())
		}
	}
}

// TestDockerEngineLeadsFromItsAddresses tells Skep's nodes of the addresses from which a Docker
// Engine leads connections: else they would not answer it.
func TestDockerEngineLeadsFromItsAddresses(t *testing.T) {
	r := newRecords()
	mesh, front := testNetwork(0, true), testNetwork(1, false)
	for _, n := range []*api.Network{mesh, front} {
		put(r.networks, model.Networks, n)
	}
	skep, docker := testNode(0, api.NodeStatus_READY), testNode(1, api.NodeStatus_READY)
	docker.Description = &api.NodeDescription{Engine: &api.EngineDescription{Plugins: []*api.PluginDescription{{Type: "Network", Name: "overlay"}}}}
	for i, n := range []*api.Node{skep, docker} {
		n.Attachments = []*api.NetworkAttachment{{Network: mesh, Addresses: []string{fmt.Sprintf("10.0.0.%d/24", 100+i)}}}
		put(r.nodes, model.Nodes, n)
	}
	put(r.tasks, model.Tasks, testTask("a", "s", skep.GetId(), []*api.Network{front}, api.TaskState_RUNNING, api.TaskState_RUNNING))
	m := New(r)
	u, told := m.Complete(skep.GetId())
	leads := func(u *skepv1.NetworkUpdate) string {
		var out []string
		for _, e := range u.GetEndpoints() {
			if e.GetKey().GetTaskId() == e.GetNodeId() {
				out = append(out, fmt.Sprint(e.GetNodeId(), " ", e.GetKey().GetNetworkId(), " ", e.GetAddresses(), " ", e.GetNodeAddr(), " published:", e.GetLeadsToPublished(), " routable:", e.GetRoutable(), e.GetName()))
			}
		}
		return fmt.Sprint(out)
	}
	if got, want := leads(u), "[node0 net0 [10.0.0.100/24] 192.0.2.1 published:false routable:false node1 net0 [10.0.0.101/24] 192.0.2.2 published:true routable:false]"; got != want {
		t.Errorf("told %s, want %s", got, want)
	}
	if got := u.GetNode().GetIngressAddr(); got != "10.0.0.100/24" {
		t.Errorf("its own address is %s", got)
	}
	// It gets a task of the network, and loses it again.
	with := model.Clone(docker)
	with.Attachments = append(with.Attachments, &api.NetworkAttachment{Network: front, Addresses: []string{"10.0.1.101/24"}})
	change := func(n *api.Node) *skepv1.NetworkUpdate {
		var keys []Key
		for _, notice := range m.Apply(put(r.nodes, model.Nodes, n)) {
			if notice.NodeID == skep.GetId() {
				keys = append(keys, notice.Key)
			}
		}
		return m.Update(skep.GetId(), told, keys)
	}
	if got, want := leads(change(with)), "[node1 net1 [10.0.1.101/24] 192.0.2.2 published:false routable:false]"; got != want {
		t.Errorf("told %s, want %s", got, want)
	}
	gone := change(docker).GetRemovedEndpoints()
	if len(gone) != 1 || gone[0].GetNetworkId() != front.GetId() || gone[0].GetTaskId() != docker.GetId() {
		t.Errorf("told that %v are gone", gone)
	}
}

// TestDockerEngineTellsItsDataAddress: an engine with another data path address tells it by a label.
func TestDockerEngineTellsItsDataAddress(t *testing.T) {
	r := newRecords()
	front := testNetwork(1, false)
	put(r.networks, model.Networks, front)
	docker := testNode(1, api.NodeStatus_READY)
	docker.Description = &api.NodeDescription{Engine: &api.EngineDescription{Labels: map[string]string{DataAddrLabel: "198.51.100.7"}}}
	put(r.nodes, model.Nodes, docker)
	put(r.nodes, model.Nodes, testNode(0, api.NodeStatus_READY))
	put(r.tasks, model.Tasks, testTask("a", "s", "node0", []*api.Network{front}, api.TaskState_RUNNING, api.TaskState_RUNNING))
	put(r.tasks, model.Tasks, testTask("bb", "s", "node1", []*api.Network{front}, api.TaskState_RUNNING, api.TaskState_RUNNING))
	u, _ := New(r).Complete("node0")
	for _, e := range u.GetEndpoints() {
		if want := map[string]string{"node0": "192.0.2.1", "node1": "198.51.100.7"}[e.GetNodeId()]; e.GetNodeAddr() != want {
			t.Errorf("task %s is at %s, want %s", e.GetKey().GetTaskId(), e.GetNodeAddr(), want)
		}
	}
	if len(u.GetEndpoints()) != 2 {
		t.Errorf("told %v", u.GetEndpoints())
	}
}

// TestGossipPeersAreThere: nodes are told of engines that are there, rather than of lost ones.
func TestGossipPeersAreThere(t *testing.T) {
	r := newRecords()
	state := func(i int, s api.NodeStatus_State) *api.Node {
		n := testNode(i, s)
		n.Description = &api.NodeDescription{Engine: &api.EngineDescription{EngineVersion: "20.10.24"}}
		return n
	}
	put(r.nodes, model.Nodes, testNode(99, api.NodeStatus_READY))
	for i := range maxGossipPeers {
		put(r.nodes, model.Nodes, state(i, api.NodeStatus_READY))
	}
	m := New(r)
	if notices := m.Apply(put(r.nodes, model.Nodes, state(3, api.NodeStatus_DOWN))); slices.Contains(notices, Notice{"node99", Key{Kind: Local}}) {
		t.Error("nodes are told anew although all engines are named anyway")
	}
	last := state(90, api.NodeStatus_READY)
	if notices := m.Apply(put(r.nodes, model.Nodes, last)); !slices.Contains(notices, Notice{"node99", Key{Kind: Local}}) {
		t.Error("nodes are not told of one that takes a lost one's place")
	}
	u, _ := m.Complete("node99")
	if peers := u.GetNode().GetGossipPeers(); len(peers) != maxGossipPeers || !slices.IsSorted(peers) || slices.Contains(peers, "192.0.2.4") || !slices.Contains(peers, "192.0.2.91") {
		t.Errorf("told of %v", peers)
	}
}
