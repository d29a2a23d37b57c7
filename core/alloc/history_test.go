package alloc

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// world is a store and the State that follows it.
type world struct {
	fatalf   func(string, ...any)
	state    *State
	cluster  *api.Cluster
	networks map[string]*api.Network
	services map[string]*api.Service
	nodes    map[string]*api.Node
	tasks    map[string]*api.Task
	next     int
}

func newWorld(fatalf func(string, ...any), pool string, size uint32) *world {
	w := &world{
		fatalf: fatalf, cluster: &api.Cluster{Id: "c", DefaultAddressPool: []string{pool}, SubnetSize: size},
		networks: map[string]*api.Network{}, services: map[string]*api.Service{}, nodes: map[string]*api.Node{}, tasks: map[string]*api.Task{},
	}
	w.state = w.rebuilt()
	return w
}

// values yields a map's values in the order of its keys.
func values[T any](m map[string]T) func(func(T) bool) {
	return func(yield func(T) bool) {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			if !yield(m[k]) {
				return
			}
		}
	}
}

func (w *world) rebuilt() *State {
	return New(w.cluster, values(w.networks), values(w.services), values(w.nodes), values(w.tasks))
}

func (w *world) id(kind string) string {
	w.next++
	return fmt.Sprintf("%s%04d", kind, w.next)
}

// store writes a record and tells the State, as an event does.
func (w *world) store(o model.Object) {
	switch o := o.(type) {
	case *api.Network:
		w.networks[o.GetId()] = o
	case *api.Service:
		w.services[o.GetId()] = o
	case *api.Node:
		w.nodes[o.GetId()] = o
	case *api.Task:
		w.tasks[o.GetId()] = o
	}
	w.state.Set(model.TableOf(o), o.GetId(), o)
}

func (w *world) remove(table model.Table, id string) {
	switch table { //nolint:exhaustive // the rest is not here
	case model.Networks:
		delete(w.networks, id)
	case model.Services:
		delete(w.services, id)
	case model.Nodes:
		delete(w.nodes, id)
	case model.Tasks:
		delete(w.tasks, id)
	}
	w.state.Set(table, id, nil)
}

func (w *world) check(err error) {
	if _, ok := errors.AsType[*BlockedError](err); err != nil && !ok {
		w.fatalf("error of another kind: %v", err)
	}
}

// network makes a network and allocates it; nil when it cannot be.
func (w *world) network(spec *api.NetworkSpec) (*api.Network, error) {
	n := &api.Network{Id: w.id("net"), Spec: spec}
	if spec.GetAnnotations() == nil {
		spec.Annotations = &api.Annotations{Name: n.GetId()}
	}
	w.store(n)
	edited, err := w.state.Network(n)
	w.check(err)
	if edited != nil {
		w.store(edited)
		n = edited
	}
	return n, err
}

// serve allocates a service as it is in the store.
func (w *world) serve(s *api.Service) error {
	edited, err := w.state.Service(s)
	w.check(err)
	if edited != nil {
		w.store(edited)
	}
	return err
}

// run makes a task of a service.
func (w *world) run(s *api.Service) (*api.Task, error) {
	t := &api.Task{
		Id: w.id("task"), ServiceId: s.GetId(), Spec: s.GetSpec().GetTask(), Status: &api.TaskStatus{}, DesiredState: api.TaskState_RUNNING,
	}
	_, unserved := w.state.Service(s)
	_, err := w.state.Task(t, s, unserved, time.Unix(0, 0))
	w.check(err)
	w.store(t)
	return t, err
}

// held says what of every pool is held, how often.
func (s *State) holdings() map[string]map[uint64]uint32 {
	out := map[string]map[uint64]uint32{"vnis": s.vnis.held, "ula": s.ula.held}
	for i, a := range s.auto {
		out[fmt.Sprint("auto", i)] = a.held
	}
	for protocol, p := range s.ports {
		out[protocol.String()] = p.held
	}
	for id, n := range s.networks {
		for _, sub := range n.subnets {
			out[id+" "+sub.prefix.String()] = sub.held
		}
	}
	for k, v := range out {
		if len(v) == 0 {
			delete(out, k)
		}
	}
	return out
}

// addresses returns the addresses that records hold in a network, with their holders.
func (w *world) addresses(id string) map[string][]string {
	out := map[string][]string{}
	for _, c := range w.networks[id].GetIpam().GetConfigs() {
		out[c.GetGateway()] = append(out[c.GetGateway()], "gateway")
	}
	note := func(cidr, by string) {
		a := netip.MustParsePrefix(cidr).Addr().String()
		out[a] = append(out[a], by)
	}
	attachments := func(list []*api.NetworkAttachment, by string) {
		for _, a := range list {
			if a.GetNetwork().GetId() == id {
				for _, cidr := range a.GetAddresses() {
					note(cidr, by)
				}
			}
		}
	}
	for _, s := range w.services {
		for _, v := range s.GetEndpoint().GetVirtualIps() {
			if v.GetNetworkId() == id {
				note(v.GetAddr(), s.GetId())
			}
		}
	}
	for _, t := range w.tasks {
		if !ended(t) {
			attachments(t.GetNetworks(), t.GetId())
		}
	}
	for _, n := range w.nodes {
		attachments(n.GetAttachments(), n.GetId())
	}
	return out
}

// verify checks what must always hold.
func (w *world) verify() {
	if diff := cmp.Diff(w.rebuilt().holdings(), w.state.holdings()); diff != "" {
		w.fatalf("the state differs from one made anew (-anew +kept):\n%s", diff)
	}
	var subnets []netip.Prefix
	vnis := map[uint64]string{}
	for id, n := range w.networks {
		for _, c := range n.GetIpam().GetConfigs() {
			p := netip.MustParsePrefix(c.GetSubnet())
			for _, other := range subnets {
				if other.Overlaps(p) {
					w.fatalf("subnets %s and %s overlap", other, p)
				}
			}
			subnets = append(subnets, p)
		}
		for _, v := range vnisOf(n) {
			if vnis[v] != "" {
				w.fatalf("networks %s and %s have identifier %d", vnis[v], id, v)
			}
			vnis[v] = id
		}
		for a, holders := range w.addresses(id) {
			if len(holders) > 1 {
				w.fatalf("network %s: %s is held by %v", id, a, holders)
			}
		}
	}
	ports := map[string]string{}
	for _, s := range w.services {
		for _, p := range s.GetEndpoint().GetPorts() {
			if p.GetPublishMode() != api.PortConfig_INGRESS { // may be shared between nodes
				continue
			}
			key := fmt.Sprint(p.GetProtocol(), p.GetPublishedPort())
			if ports[key] != "" {
				w.fatalf("services %s and %s publish %s", ports[key], s.GetId(), key)
			}
			ports[key] = s.GetId()
		}
	}
}

// pick draws one of a map's keys, "" when it is empty.
func pick[T any](t *rapid.T, m map[string]T, label string) string {
	if len(m) == 0 {
		return ""
	}
	return rapid.SampledFrom(slices.Sorted(maps.Keys(m))).Draw(t, label)
}

// aService draws a spec on existing networks.
func (w *world) aService(t *rapid.T) *api.ServiceSpec {
	spec := &api.ServiceSpec{Task: &api.TaskSpec{}, Endpoint: &api.EndpointSpec{Mode: rapid.SampledFrom([]api.EndpointSpec_ResolutionMode{api.EndpointSpec_VIP, api.EndpointSpec_VIP, api.EndpointSpec_DNSRR}).Draw(t, "mode")}}
	for range rapid.IntRange(0, 2).Draw(t, "attachments") {
		if id := pick(t, w.networks, "network"); id != "" && id != w.state.ingress {
			spec.Task.Networks = append(spec.Task.Networks, &api.NetworkAttachmentConfig{Target: id})
		}
	}
	for i := range rapid.IntRange(0, 2).Draw(t, "ports") {
		p := &api.PortConfig{TargetPort: uint32(80 + i), PublishMode: api.PortConfig_PublishMode(rapid.IntRange(0, 1).Draw(t, "publish"))}
		if rapid.Bool().Draw(t, "explicit") {
			p.PublishedPort = uint32(30000 + 2*i + rapid.IntRange(0, 1).Draw(t, "port"))
		}
		spec.Endpoint.Ports = append(spec.Endpoint.Ports, p)
	}
	return spec
}

// TestHistories runs random histories in a small world: nothing is given twice, nothing
// leaks, and what is kept up to date equals what is made from the store.
func TestHistories(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t.Fatalf, "10.0.0.0/27", 29) // four subnets of five addresses
		steps := map[string]func(*rapid.T){
			"network": func(t *rapid.T) {
				spec := &api.NetworkSpec{
					Ingress:     w.state.ingress == "" && rapid.Bool().Draw(t, "ingress"),
					Ipv6Enabled: rapid.Bool().Draw(t, "v6"),
				}
				if rapid.Bool().Draw(t, "subnet") {
					spec.Ipam = &api.IPAMOptions{Configs: []*api.IPAMConfig{{Subnet: rapid.SampledFrom([]string{"10.0.0.8/30", "10.0.0.0/28", "172.16.0.0/29"}).Draw(t, "prefix")}}}
				}
				w.network(spec)
			},
			"network gone": func(t *rapid.T) {
				id := pick(t, w.networks, "network")
				for _, s := range w.services {
					for _, v := range s.GetEndpoint().GetVirtualIps() {
						if v.GetNetworkId() == id {
							return
						}
					}
				}
				w.remove(model.Networks, id)
			},
			"service": func(t *rapid.T) {
				s := &api.Service{Id: w.id("svc"), Spec: w.aService(t)}
				w.store(s)
				w.serve(s)
			},
			"service changed": func(t *rapid.T) {
				if id := pick(t, w.services, "service"); id != "" {
					s := model.Clone(w.services[id])
					s.Spec = w.aService(t)
					w.store(s)
					w.serve(s)
				}
			},
			"service gone": func(t *rapid.T) {
				if id := pick(t, w.services, "service"); id != "" {
					w.remove(model.Services, id)
				}
			},
			"task": func(t *rapid.T) {
				if id := pick(t, w.services, "service"); id != "" {
					w.serve(w.services[id])
					w.run(w.services[id])
				}
			},
			"task refused": func(t *rapid.T) {
				if id := pick(t, w.services, "service"); id != "" {
					task := &api.Task{Id: w.id("task"), Spec: w.services[id].GetSpec().GetTask(), Status: &api.TaskStatus{}}
					edited, unserved := w.state.Service(w.services[id])
					if edited == nil {
						edited = w.services[id]
					}
					w.state.Task(task, edited, unserved, time.Unix(0, 0))
					w.state.Set(model.Tasks, task.GetId(), nil)
					w.state.Set(model.Services, id, w.services[id])
				}
			},
			"task ended": func(t *rapid.T) {
				if id := pick(t, w.tasks, "task"); id != "" {
					task := model.Clone(w.tasks[id])
					task.DesiredState, task.Status.State = api.TaskState_SHUTDOWN, api.TaskState_FAILED
					w.store(task)
				}
			},
			"task gone": func(t *rapid.T) {
				if id := pick(t, w.tasks, "task"); id != "" {
					w.remove(model.Tasks, id)
				}
			},
			"node": func(*rapid.T) {
				n := &api.Node{Id: w.id("node")}
				w.store(n)
				edited, err := w.state.Node(n)
				w.check(err)
				if edited != nil {
					w.store(edited)
				}
			},
			"node again": func(t *rapid.T) {
				if id := pick(t, w.nodes, "node"); id != "" {
					edited, err := w.state.Node(w.nodes[id])
					w.check(err)
					if edited != nil {
						w.store(edited)
					}
					if again, _ := w.state.Node(w.nodes[id]); again != nil {
						w.fatalf("a node is not settled after one decision")
					}
				}
			},
			"node gone": func(t *rapid.T) {
				if id := pick(t, w.nodes, "node"); id != "" {
					w.remove(model.Nodes, id)
				}
			},
			"retry": func(t *rapid.T) {
				if id := pick(t, w.networks, "network"); id != "" {
					if edited, _ := w.state.Network(w.networks[id]); edited != nil {
						w.store(edited)
					}
				}
			},
			"new leader": func(*rapid.T) { w.state = w.rebuilt() },
			"":           func(*rapid.T) { w.verify() },
		}
		t.Repeat(steps)
		for id := range maps.Clone(w.tasks) {
			w.remove(model.Tasks, id)
		}
		for id := range maps.Clone(w.services) {
			w.remove(model.Services, id)
		}
		for id := range maps.Clone(w.nodes) {
			w.remove(model.Nodes, id)
		}
		for id := range maps.Clone(w.networks) {
			w.remove(model.Networks, id)
		}
		if left := w.state.holdings(); len(left) > 0 || len(w.state.claims) > 0 {
			t.Fatalf("leaked %v %v", left, w.state.claims)
		}
		if s := w.state.subnets; s.v4.below+s.v4.here+s.v6.below+s.v6.here != 0 || s.v4.next != [2]*branch{} {
			t.Fatal("leaked subnets")
		}
	})
}
