package manager

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

func (s *swarm) network(id string, subnet string) {
	s.Helper()
	s.update(func(tx *store.Tx) error {
		return tx.Create(&api.Network{Id: id, Spec: &api.NetworkSpec{
			Annotations: &api.Annotations{Name: id}, Ipam: &api.IPAMOptions{Configs: []*api.IPAMConfig{{Subnet: subnet}}},
		}})
	})
}

func onNetwork(id string, replicas uint64, ports ...*api.PortConfig) *api.Service {
	return &api.Service{Id: "web", SpecVersion: new(api.Version), Spec: &api.ServiceSpec{
		Annotations: &api.Annotations{Name: "web"},
		Task: &api.TaskSpec{
			Runtime:  &api.TaskSpec_Container{Container: &api.ContainerSpec{Image: "good"}},
			Networks: []*api.NetworkAttachmentConfig{{Target: id}},
		},
		Mode:     &api.ServiceSpec_Replicated{Replicated: &api.ReplicatedService{Replicas: replicas}},
		Endpoint: &api.EndpointSpec{Ports: ports},
	}}
}

// within waits until holds says nothing, at most for a while of the bubble's time.
func (s *swarm) within(d time.Duration, holds func(*store.Snapshot) string) {
	s.Helper()
	deadline := time.Now().Add(d)
	for {
		synctest.Wait()
		why := holds(s.state.View())
		if why == "" {
			return
		}
		if time.Now().After(deadline) {
			s.Fatal(why)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (s *swarm) runningIn(id string, n int) func(*store.Snapshot) string {
	return func(v *store.Snapshot) string {
		addrs := map[string]bool{}
		for t := range v.TasksByService("web") {
			for _, a := range t.GetNetworks() {
				if t.GetStatus().GetState() == api.TaskState_RUNNING && a.GetNetwork().GetId() == id {
					addrs[a.GetAddresses()[0]] = true
				}
			}
		}
		if len(addrs) == n {
			return ""
		}
		return fmt.Sprintf("%d tasks run in %s, want %d", len(addrs), id, n)
	}
}

// TestNetworks runs a published service on a network, over a change of leader.
func TestNetworks(t *testing.T) {
	run(t, 3, func(s *swarm) {
		s.create(&api.Network{Id: "mesh", Spec: &api.NetworkSpec{Annotations: &api.Annotations{Name: "ingress"}, Ingress: true}})
		s.network("front", "10.9.0.0/24")
		s.update(func(tx *store.Tx) error { return tx.Create(onNetwork("front", 3, &api.PortConfig{TargetPort: 80})) })
		s.within(10*time.Second, s.runningIn("front", 3))
		v := s.state.View()
		mesh := v.Network(v.IDByName(model.Networks, "ingress"))
		if got := mesh.GetIpam().GetConfigs()[0].GetSubnet(); got != "10.0.0.0/24" {
			t.Errorf("the ingress network has %s", got)
		}
		seen := map[string]bool{}
		for n := range v.Nodes() {
			a := n.GetAttachments()
			if len(a) != 1 || a[0].GetNetwork().GetId() != mesh.GetId() || seen[a[0].GetAddresses()[0]] {
				t.Errorf("node %s is attached to %v", n.GetId(), a)
				continue
			}
			seen[a[0].GetAddresses()[0]] = true
		}
		e := v.Service("web").GetEndpoint()
		if len(e.GetVirtualIps()) != 2 || e.GetPorts()[0].GetPublishedPort() != 30000 {
			t.Errorf("endpoint %v", e)
		}
		s.lead()
		s.update(func(tx *store.Tx) error {
			web := model.Clone(tx.Snapshot().Service("web"))
			web.Spec.GetReplicated().Replicas = 6
			return tx.Update(web)
		})
		s.within(10*time.Second, s.runningIn("front", 6))
	})
}

// TestExhaustedNetwork has tasks wait for addresses, say so, and go on when there are some.
func TestExhaustedNetwork(t *testing.T) {
	run(t, 3, func(s *swarm) {
		s.network("small", "10.9.0.0/29") // a gateway, a virtual and four other addresses
		s.update(func(tx *store.Tx) error { return tx.Create(onNetwork("small", 6)) })
		s.within(10*time.Second, s.runningIn("small", 4))
		s.within(10*time.Second, func(v *store.Snapshot) string {
			waiting := 0
			for task := range v.TasksByService("web") {
				if task.GetStatus().GetState() == api.TaskState_NEW && strings.Contains(task.GetStatus().GetErr(), "no free address left in 10.9.0.0/29") {
					waiting++
				}
			}
			if waiting != 2 {
				return fmt.Sprintf("%d tasks say why they wait, want 2", waiting)
			}
			return ""
		})
		for task := range s.state.View().TasksByService("web") {
			if task.GetStatus().GetState() == api.TaskState_RUNNING { // one makes room for another
				s.update(func(tx *store.Tx) error { return tx.Remove(model.Tasks, task.GetId()) })
				break
			}
		}
		s.within(30*time.Second, s.runningIn("small", 4))
	})
}

// TestSubnetComesFree has a network wait for the subnet of another one.
func TestSubnetComesFree(t *testing.T) {
	run(t, 1, func(s *swarm) {
		s.network("first", "10.9.0.0/24")
		s.network("second", "10.9.0.0/16")
		s.update(func(tx *store.Tx) error { return tx.Create(onNetwork("second", 1)) })
		s.within(10*time.Second, func(v *store.Snapshot) string {
			for task := range v.TasksByService("web") {
				if strings.Contains(task.GetStatus().GetErr(), "overlaps the subnet of another network") {
					return ""
				}
			}
			return "no task says what it waits for"
		})
		s.update(func(tx *store.Tx) error { return tx.Remove(model.Networks, "first") })
		s.within(10*time.Second, s.runningIn("second", 1))
	})
}

// TestFoundersMakeAnIngressNetwork checks that a new swarm has one.
func TestFoundersMakeAnIngressNetwork(t *testing.T) {
	run(t, 0, func(s *swarm) {
		s.within(time.Second, func(v *store.Snapshot) string {
			n := v.Network(v.IDByName(model.Networks, "ingress"))
			if c := n.GetIpam().GetConfigs(); len(c) != 1 || c[0].GetSubnet() != "10.0.0.0/24" {
				return fmt.Sprintf("the ingress network is %v", n)
			}
			return ""
		})
	})
}

// TestFoundersEncryptTheIngressNetwork: a swarm that encrypts all does so from the start.
func TestFoundersEncryptTheIngressNetwork(t *testing.T) {
	for value, want := range map[string]bool{"": false, model.EncryptAll: true} {
		state := replica.NewMemory(store.Empty())
		spec := &api.ClusterSpec{Annotations: &api.Annotations{Labels: map[string]string{model.EncryptLabel: value}}}
		m := New(Config{State: state, NodeID: "node00", Bootstrap: &Bootstrap{ClusterID: "cluster", RootCA: &api.RootCA{}, Spec: spec}})
		if err := m.bootstrap(t.Context()); err != nil {
			t.Fatal(err)
		}
		v := state.View()
		if n := v.Network(v.IDByName(model.Networks, "ingress")); n == nil || model.Encrypted(n) != want ||
			(n.GetSpec().GetDriverConfig().GetOptions()[model.EncryptionOption] == model.WireGuard) != want {
			t.Errorf("%s=%q: the ingress network is %v", model.EncryptLabel, value, n)
		}
	}
}

// TestDockerEngineBalancesInEachNetwork gives a Docker Engine an address in the networks of its
// tasks, from which it leads connections, while it has such tasks; Skep's nodes need none.
func TestDockerEngineBalancesInEachNetwork(t *testing.T) {
	run(t, 2, func(s *swarm) {
		docker, skep := nodeID(0), nodeID(1)
		s.deaf[docker], s.deaf[skep] = true, true
		for id, plugin := range map[string]string{docker: "overlay", skep: model.SkepOverlay} {
			s.editNode(id, func(n *api.Node) {
				n.Description.Engine = &api.EngineDescription{Plugins: []*api.PluginDescription{{Type: "Network", Name: plugin}}}
			})
		}
		s.network("front", "10.9.0.0/24")
		s.within(time.Second, func(v *store.Snapshot) string {
			if v.Network("front").GetDriverState() == nil {
				return "the network is not allocated"
			}
			return ""
		})
		attached := func(id string, n int) func(*store.Snapshot) string {
			return func(v *store.Snapshot) string {
				if got := v.Node(id).GetAttachments(); len(got) != n || n == 1 && got[0].GetNetwork().GetId() != "front" {
					return fmt.Sprintf("node %s is attached to %v, want %d", id, got, n)
				}
				return ""
			}
		}
		task := func(id, node string, last int) *api.Task {
			return &api.Task{
				Id: id, NodeId: node, Spec: taskSpec("good"), DesiredState: api.TaskState_RUNNING, Status: &api.TaskStatus{State: api.TaskState_RUNNING},
				Networks: []*api.NetworkAttachment{{Network: s.state.View().Network("front"), Addresses: []string{fmt.Sprintf("10.9.0.%d/24", last)}}},
			}
		}
		s.create(task("a", docker, 100))
		s.create(task("b", docker, 101))
		s.create(task("c", skep, 102))
		s.within(time.Second, attached(docker, 1))
		end := func(id string) {
			s.update(func(tx *store.Tx) error {
				ended := model.Clone(tx.Snapshot().Task(id))
				ended.DesiredState, ended.Status.State = api.TaskState_SHUTDOWN, api.TaskState_SHUTDOWN
				return tx.Update(ended)
			})
		}
		end("a")
		synctest.Wait()
		s.within(0, attached(docker, 1))
		s.within(0, attached(skep, 0))
		s.lead() // another leader, same answer
		end("b")
		s.within(time.Second, attached(docker, 0))
	})
}
