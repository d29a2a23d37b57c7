package alloc

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

func ipam(configs ...*api.IPAMConfig) *api.IPAMOptions { return &api.IPAMOptions{Configs: configs} }

func attach(ids ...string) *api.ServiceSpec {
	spec := &api.ServiceSpec{Task: &api.TaskSpec{}}
	for _, id := range ids {
		spec.Task.Networks = append(spec.Task.Networks, &api.NetworkAttachmentConfig{Target: id})
	}
	return spec
}

func (w *world) service(spec *api.ServiceSpec) *api.Service {
	s := &api.Service{Id: w.id("svc"), Spec: spec}
	w.store(s)
	if err := w.serve(s); err != nil {
		w.fatalf("serve: %v", err)
	}
	return w.services[s.GetId()]
}

func addrs(t *api.Task) []string {
	var out []string
	for _, a := range t.GetNetworks() {
		out = append(out, a.GetAddresses()...)
	}
	return out
}

func wantBlocked(t *testing.T, err error, on string, words ...string) {
	t.Helper()
	b, ok := errors.AsType[*BlockedError](err)
	if !ok || b.On != on {
		t.Errorf("got %v, want to wait for %q", err, on)
		return
	}
	for _, word := range words {
		if !strings.Contains(b.Text, word) {
			t.Errorf("%q does not say %q", b.Text, word)
		}
	}
}

func TestNetworkIsAllocatedAsDockerDoes(t *testing.T) {
	w := newWorld(t.Fatalf, "10.0.0.0/8", 24)
	mesh, err := w.network(&api.NetworkSpec{Ingress: true, Annotations: &api.Annotations{Name: "ingress"}})
	if err != nil {
		t.Fatal(err)
	}
	want := &api.Network{
		Id: mesh.GetId(), Spec: mesh.GetSpec(),
		DriverState: &api.Driver{Name: "overlay", Options: map[string]string{vniOption: "4096"}},
		Ipam: &api.IPAMOptions{Driver: &api.Driver{Name: "default"}, Configs: []*api.IPAMConfig{
			{Family: api.IPAMConfig_IPV4, Subnet: "10.0.0.0/24", Gateway: "10.0.0.1"},
		}},
	}
	if diff := cmp.Diff(want, mesh, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	user, err := w.network(&api.NetworkSpec{
		DriverConfig: &api.Driver{Options: map[string]string{"com.docker.network.driver.mtu": "1400"}},
		Ipam: ipam(
			&api.IPAMConfig{Subnet: "192.168.0.0/16", Range: "192.168.5.0/24"},
			&api.IPAMConfig{Subnet: "192.169.0.0/16", Gateway: "192.169.7.7", Reserved: map[string]string{"printer": "192.169.0.1"}},
		),
	})
	if err != nil {
		t.Fatal(err)
	}
	if o := user.GetDriverState().GetOptions(); o[vniOption] != "4097,4098" || o["com.docker.network.driver.mtu"] != "1400" {
		t.Errorf("options %v", o)
	}
	if g := user.GetIpam().GetConfigs(); g[0].GetGateway() != "192.168.5.0" || g[1].GetGateway() != "192.169.7.7" {
		t.Errorf("gateways %v", g)
	}
	auto, _ := w.network(&api.NetworkSpec{})
	if s := auto.GetIpam().GetConfigs()[0].GetSubnet(); s != "10.0.1.0/24" {
		t.Errorf("the next network has %s", s)
	}
	again, err := w.state.Network(auto)
	if again != nil || err != nil {
		t.Errorf("allocated twice: %v %v", again, err)
	}
}

func TestRemovedNetworksRest(t *testing.T) {
	w := newWorld(t.Fatalf, "10.0.0.0/22", 24)
	first, _ := w.network(&api.NetworkSpec{})
	w.remove(model.Networks, first.GetId())
	second, _ := w.network(&api.NetworkSpec{})
	if s := second.GetIpam().GetConfigs()[0].GetSubnet(); s != "10.0.1.0/24" {
		t.Errorf("after 10.0.0.0/24 came %s", s)
	}
	if v := vnisOf(second); v[0] != 4097 {
		t.Errorf("after 4096 came %d", v[0])
	}
	// A new leader remembers what tasks still have.
	task, err := w.run(w.service(attach(second.GetId())))
	if err != nil {
		t.Fatal(err)
	}
	w.remove(model.Services, task.GetServiceId())
	w.remove(model.Networks, second.GetId())
	w.state = w.rebuilt()
	third, _ := w.network(&api.NetworkSpec{})
	if s, v := third.GetIpam().GetConfigs()[0].GetSubnet(), vnisOf(third); s != "10.0.2.0/24" || v[0] != 4098 {
		t.Errorf("a new leader gave %s and %d", s, v[0])
	}
	w.network(&api.NetworkSpec{})
	last, err := w.network(&api.NetworkSpec{})
	if err != nil || last.GetIpam().GetConfigs()[0].GetSubnet() == "" {
		t.Fatalf("rested subnets come again when there are no others: %v", err)
	}
	w.network(&api.NetworkSpec{})
	n, err := w.network(&api.NetworkSpec{})
	wantBlocked(t, err, Subnets, "10.0.0.0/22 in /24", "--subnet")
	w.state.Released()
	_, err = w.run(&api.Service{Id: "s", Spec: attach(n.GetId())})
	wantBlocked(t, err, n.GetId(), "10.0.0.0/22 in /24")
	w.remove(model.Networks, last.GetId())
	if r := w.state.Released(); !r[Subnets] || !r[last.GetId()] || !r[AnyNetwork] {
		t.Errorf("released %v", r)
	}
}

func TestTaskIsAttached(t *testing.T) {
	w := newWorld(t.Fatalf, "10.0.0.0/8", 24)
	mesh, _ := w.network(&api.NetworkSpec{Ingress: true})
	front, _ := w.network(&api.NetworkSpec{Annotations: &api.Annotations{Name: "front"}, Ipv6Enabled: true, Ipam: ipam(&api.IPAMConfig{Subnet: "fd00:1::/64"})})
	host := Predefined(&api.Network{Id: "host", Spec: &api.NetworkSpec{Annotations: &api.Annotations{Name: "host"}, DriverConfig: &api.Driver{Name: "host"}}})
	w.store(host)
	spec := attach("FRONT", "host", front.GetId())
	spec.Task.Networks[0].Aliases = []string{"a"}
	spec.Task.Networks[2].Aliases = []string{"b"}
	spec.Endpoint = &api.EndpointSpec{Ports: []*api.PortConfig{{TargetPort: 80}}}
	s := w.service(spec)
	wantVIPs := []*api.Endpoint_VirtualIP{
		{NetworkId: mesh.GetId(), Addr: "10.0.0.2/24"},
		{NetworkId: front.GetId(), Addr: "10.0.1.2/24"},
		{NetworkId: front.GetId(), Addr: "fd00:1::2/64"},
	}
	if diff := cmp.Diff(wantVIPs, s.GetEndpoint().GetVirtualIps(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	task, err := w.run(s)
	if err != nil {
		t.Fatal(err)
	}
	want := []*api.NetworkAttachment{
		{Network: mesh, Addresses: []string{"10.0.0.3/24"}},
		{Network: front, Addresses: []string{"10.0.1.3/24", "fd00:1::3/64"}, Aliases: []string{"a", "b"}},
		{Network: host},
	}
	if diff := cmp.Diff(want, task.GetNetworks(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if task.GetStatus().GetState() != api.TaskState_PENDING || !cmp.Equal(task.GetEndpoint(), s.GetEndpoint(), protocmp.Transform()) {
		t.Errorf("task %v", task)
	}
	dnsrr := attach(front.GetId())
	dnsrr.Endpoint = &api.EndpointSpec{Mode: api.EndpointSpec_DNSRR}
	if v := w.service(dnsrr).GetEndpoint().GetVirtualIps(); v != nil {
		t.Errorf("DNS round robin has %v", v)
	}
}

func TestUniqueLocalSubnet(t *testing.T) {
	w := newWorld(t.Fatalf, "10.0.0.0/8", 24)
	a, _ := w.network(&api.NetworkSpec{Ipv6Enabled: true})
	b, _ := w.network(&api.NetworkSpec{Ipv6Enabled: true})
	for _, n := range []*api.Network{a, b} {
		c := n.GetIpam().GetConfigs()
		if len(c) != 2 || c[1].GetFamily() != api.IPAMConfig_IPV6 || !strings.HasPrefix(c[1].GetSubnet(), "fd") || !strings.HasSuffix(c[1].GetSubnet(), "/64") {
			t.Errorf("subnets %v", c)
		}
		if len(vnisOf(n)) != 1 {
			t.Errorf("identifiers %v", vnisOf(n))
		}
	}
	if a.GetIpam().GetConfigs()[1].GetSubnet() == b.GetIpam().GetConfigs()[1].GetSubnet() {
		t.Error("two networks share a subnet")
	}
}

func TestReleasedAddressesRest(t *testing.T) {
	w := newWorld(t.Fatalf, "10.0.0.0/8", 29) // .1 is the gateway, .2 to .6 remain
	n, _ := w.network(&api.NetworkSpec{})
	s := w.service(func() *api.ServiceSpec {
		spec := attach(n.GetId())
		spec.Endpoint = &api.EndpointSpec{Mode: api.EndpointSpec_DNSRR}
		return spec
	}())
	var got []string
	var running []*api.Task
	for range 3 {
		task, _ := w.run(s)
		running = append(running, task)
		got = append(got, addrs(task)...)
	}
	stop := func(i int) {
		task := model.Clone(running[i])
		task.DesiredState, task.Status.State = api.TaskState_SHUTDOWN, api.TaskState_SHUTDOWN
		w.store(task)
	}
	stop(1)
	stop(0)
	for range 4 { // two that were never used, then the one that rested longest
		task, _ := w.run(s)
		got = append(got, addrs(task)...)
	}
	want := []string{"10.0.0.2/29", "10.0.0.3/29", "10.0.0.4/29", "10.0.0.5/29", "10.0.0.6/29", "10.0.0.3/29", "10.0.0.2/29"}
	if !slices.Equal(want, got) {
		t.Errorf("got %v\nwant %v", got, want)
	}
	task, err := w.run(s)
	wantBlocked(t, err, n.GetId(), "no free address left in 10.0.0.0/29 (6 in use)", "--subnet")
	if task.GetStatus().GetState() != api.TaskState_NEW || task.GetStatus().GetErr() != err.Error() {
		t.Errorf("status %v", task.GetStatus())
	}
	w.state.Released()
	stop(2)
	if r := w.state.Released(); !r[n.GetId()] {
		t.Errorf("released %v", r)
	}
	if again, err := w.run(s); err != nil || addrs(again)[0] != "10.0.0.4/29" {
		t.Errorf("got %v %v", addrs(again), err)
	}
}

func TestRequestedAddress(t *testing.T) {
	w := newWorld(t.Fatalf, "10.0.0.0/8", 24)
	n, _ := w.network(&api.NetworkSpec{Annotations: &api.Annotations{Name: "front"}})
	ask := func(a string) (string, error) {
		task := &api.Task{Id: w.id("task"), Status: &api.TaskStatus{}, Spec: &api.TaskSpec{Networks: []*api.NetworkAttachmentConfig{{Target: n.GetId(), Addresses: []string{a}}}}}
		_, err := w.state.Task(task, nil, nil, time.Unix(0, 0))
		w.check(err)
		w.store(task)
		return strings.Join(addrs(task), ","), err
	}
	for _, tt := range []struct{ ask, got, text string }{
		{"10.0.0.9", "10.0.0.9/24", ""},
		{"10.0.0.9", "", "10.0.0.9 is in use"},
		{"10.0.0.10/24", "10.0.0.10/24", ""},
		{"10.0.0.1", "", "10.0.0.1 is in use"},
		{"10.0.0.0", "", "belongs to the subnet itself"},
		{"10.0.0.255", "", "belongs to the subnet itself"},
		{"10.0.1.9", "", "in none of its subnets"},
		{"nine", "", `"nine" is no IP address`},
	} {
		got, err := ask(tt.ask)
		if got != tt.got || (err == nil) != (tt.text == "") || err != nil && !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: got %q %v", tt.ask, got, err)
		}
	}
	w.state = w.rebuilt()
	if _, err := ask("10.0.0.9"); err == nil {
		t.Error("a new leader gave it again")
	}
}

func TestPorts(t *testing.T) {
	w := newWorld(t.Fatalf, "10.0.0.0/8", 24)
	publish := func(ports ...*api.PortConfig) *api.ServiceSpec {
		return &api.ServiceSpec{Endpoint: &api.EndpointSpec{Ports: ports}}
	}
	s := &api.Service{Id: "none", Spec: publish(&api.PortConfig{TargetPort: 80})}
	_, err := w.state.Service(s)
	wantBlocked(t, err, AnyNetwork, "no ingress network")
	w.network(&api.NetworkSpec{Ingress: true})
	numbers := func(s *api.Service) string {
		var out []uint32
		for _, p := range s.GetEndpoint().GetPorts() {
			out = append(out, p.GetPublishedPort())
		}
		return fmt.Sprint(out)
	}
	a := w.service(publish(&api.PortConfig{TargetPort: 80}, &api.PortConfig{TargetPort: 81, PublishedPort: 30000}, &api.PortConfig{TargetPort: 80, Protocol: api.PortConfig_UDP}))
	if got := numbers(a); got != "[30001 30000 30000]" {
		t.Errorf("got %s", got)
	}
	hosted := w.service(publish(&api.PortConfig{TargetPort: 80, PublishMode: api.PortConfig_HOST}, &api.PortConfig{TargetPort: 80, PublishMode: api.PortConfig_HOST, PublishedPort: 30002}))
	if got := numbers(hosted); got != "[0 30002]" {
		t.Errorf("host mode has %s", got)
	}
	b := w.service(publish(&api.PortConfig{TargetPort: 80}))
	if got := numbers(b); got != "[30003]" {
		t.Errorf("next to host mode: %s", got)
	}
	// An update keeps the port, wherever it stands now.
	a = model.Clone(a)
	a.Spec = publish(&api.PortConfig{TargetPort: 9}, &api.PortConfig{TargetPort: 80})
	w.store(a)
	w.serve(a)
	if got := numbers(w.services[a.GetId()]); got != "[30004 30001]" {
		t.Errorf("after the update: %s", got)
	}
	taken := &api.Service{Id: "taken", Spec: publish(&api.PortConfig{TargetPort: 1, PublishedPort: 30003})}
	w.store(taken)
	wantBlocked(t, w.serve(taken), Ports, "30003/tcp is published by another service")
	w.state.Released()
	w.remove(model.Services, b.GetId())
	if !w.state.Released()[Ports] {
		t.Error("nobody is told that a port is free")
	}
	if err := w.serve(taken); err != nil {
		t.Error(err)
	}
	w.verify()
}

func TestPortsRunOut(t *testing.T) {
	w := newWorld(t.Fatalf, "10.0.0.0/8", 16)
	w.network(&api.NetworkSpec{Ingress: true})
	all := &api.ServiceSpec{Endpoint: &api.EndpointSpec{}}
	for i := range lastDynam - firstDynamic + 1 {
		all.Endpoint.Ports = append(all.Endpoint.Ports, &api.PortConfig{TargetPort: uint32(i + 1)})
	}
	w.service(all)
	one := &api.Service{Id: "one", Spec: &api.ServiceSpec{Endpoint: &api.EndpointSpec{Ports: []*api.PortConfig{{TargetPort: 1}}}}}
	w.store(one)
	wantBlocked(t, w.serve(one), Ports, "all ports from 30000 to 32767 are published for tcp")
}

func TestIdentifiersOfTheUser(t *testing.T) {
	w := newWorld(t.Fatalf, "10.0.0.0/8", 24)
	with := func(list string) *api.NetworkSpec {
		return &api.NetworkSpec{DriverConfig: &api.Driver{Options: map[string]string{vniOption: list}}}
	}
	n, err := w.network(with("4096"))
	if err != nil || vnisOf(n)[0] != 4096 {
		t.Fatalf("got %v %v", n, err)
	}
	next, _ := w.network(&api.NetworkSpec{})
	if vnisOf(next)[0] != 4097 {
		t.Errorf("got %v", vnisOf(next))
	}
	_, err = w.network(with("4097"))
	wantBlocked(t, err, VNIs, "4097 is in use")
	if err := Conflict(with("4097"), values(w.networks)); model.KindOf(err) != model.Invalid {
		t.Errorf("conflict: %v", err)
	}
	for _, list := range []string{"0", "16777216", "5,5", "x", ""} {
		if err := CheckVNIs(with(list)); model.KindOf(err) != model.Invalid {
			t.Errorf("%q: %v", list, err)
		}
	}
}

func TestNodeAttachments(t *testing.T) {
	w := newWorld(t.Fatalf, "10.0.0.0/8", 30) // one address besides the gateway
	mesh, _ := w.network(&api.NetworkSpec{Ingress: true})
	a, b := &api.Node{Id: "a"}, &api.Node{Id: "b"}
	w.store(a)
	w.store(b)
	edited, err := w.state.Node(a)
	want := &api.NetworkAttachment{Network: mesh, Addresses: []string{"10.0.0.2/30"}}
	if err != nil || !cmp.Equal(edited.GetAttachments(), []*api.NetworkAttachment{want}, protocmp.Transform()) ||
		!cmp.Equal(edited.GetAttachment(), want, protocmp.Transform()) { //nolint:staticcheck // Docker Engines fall back to it
		t.Fatalf("got %v %v", edited, err)
	}
	w.store(edited)
	none, err := w.state.Node(b)
	if none != nil {
		t.Errorf("got %v", none)
	}
	wantBlocked(t, err, mesh.GetId(), "no free address")
	w.remove(model.Networks, mesh.GetId())
	bare, err := w.state.Node(edited)
	if err != nil || bare.GetAttachments() != nil || bare.GetAttachment() != nil { //nolint:staticcheck // as above
		t.Errorf("without ingress network: %v %v", bare, err)
	}
}

func dockerNode(id string) *api.Node {
	return &api.Node{Id: id, Status: &api.NodeStatus{State: api.NodeStatus_READY}, Description: &api.NodeDescription{
		Engine: &api.EngineDescription{Plugins: []*api.PluginDescription{{Type: "Network", Name: "overlay"}}},
	}}
}

// TestDockerEngineAttachments gives a Docker Engine an address in each network of its tasks,
// takes it back with the last of them, and has it stay out of networks that it cannot be in.
func TestDockerEngineAttachments(t *testing.T) {
	w := newWorld(t.Fatalf, "10.0.0.0/8", 24)
	mesh, _ := w.network(&api.NetworkSpec{Annotations: &api.Annotations{Name: "mesh"}, Ingress: true})
	front, _ := w.network(&api.NetworkSpec{Annotations: &api.Annotations{Name: "front"}})
	sealed, _ := w.network(encryptedSpec("sealed"))
	dual, _ := w.network(&api.NetworkSpec{Annotations: &api.Annotations{Name: "dual"}, Ipv6Enabled: true})
	n := dockerNode("d")
	w.store(n)
	var err error
	want := func(ids []string, networks ...*api.Network) {
		t.Helper()
		var edited *api.Node
		if edited, err = w.state.Node(n, ids...); err != nil || edited == nil {
			t.Fatalf("with %q: %v, %v", ids, edited, err)
		}
		n = edited
		w.store(n)
		if again, err := w.state.Node(n, ids...); again != nil || err != nil {
			t.Errorf("again: %v, %v", again, err)
		}
		var got, wanted []string
		for _, a := range n.GetAttachments() {
			got = append(got, a.GetNetwork().GetId()+" "+a.GetAddresses()[0])
		}
		for i, v := range networks {
			wanted = append(wanted, fmt.Sprintf("%s 10.0.%d.2/24", v.GetId(), i))
		}
		if !slices.Equal(got, wanted) {
			t.Errorf("attached to %q, want %q", got, wanted)
		}
	}
	// The ingress network's is there anyway, and its tasks name it as well.
	want([]string{front.GetId(), mesh.GetId(), sealed.GetId(), dual.GetId(), "unknown"}, mesh, front)
	want(nil, mesh)
	if held := w.state.networks[front.GetId()].subnets[0].held; len(held) != 1 { // the gateway's
		t.Errorf("the front network still has %v", held)
	}
}

func TestCheck(t *testing.T) {
	for _, tt := range []struct {
		config *api.IPAMConfig
		want   string
	}{
		{&api.IPAMConfig{Subnet: "10.5.0.0/24", Range: "10.5.0.128/25", Gateway: "10.5.0.1"}, ""},
		{&api.IPAMConfig{}, ""},
		{&api.IPAMConfig{Subnet: "10.5.0.0/24", Gateway: "10.6.0.1"}, "invalid gateway 10.6.0.1: parent subnet 10.5.0.0/24 doesn't contain this address"},
		{&api.IPAMConfig{Subnet: "10.5.0.1/24"}, "invalid subnet 10.5.0.1/24: it should be 10.5.0.0/24"},
		{&api.IPAMConfig{Subnet: "10.5.0.0/24", Range: "10.0.0.0/8"}, "invalid ip-range 10.0.0.0/8: CIDR block is bigger than its parent subnet 10.5.0.0/24"},
		{&api.IPAMConfig{Subnet: "10.5.0.0/24", Range: "10.6.0.0/25"}, "invalid ip-range 10.6.0.0/25: parent subnet 10.5.0.0/24 doesn't contain ip-range"},
		{&api.IPAMConfig{Subnet: "10.5.0.0/24", Range: "10.5.0.1/25"}, "invalid ip-range 10.5.0.1/25: it should be 10.5.0.0/25"},
		{&api.IPAMConfig{Subnet: "10.5.0.0/24", Reserved: map[string]string{"x": "1.1.1.1"}}, "invalid auxiliary address 1.1.1.1: parent subnet 10.5.0.0/24 doesn't contain this address"},
		{&api.IPAMConfig{Subnet: "10.5.0.0/31"}, "invalid subnet 10.5.0.0/31: it has no room for a gateway and a task"},
		{&api.IPAMConfig{Gateway: "10.5.0.1"}, "invalid subnet : invalid CIDR block notation"},
	} {
		err := Check(&api.NetworkSpec{Ipam: ipam(tt.config)})
		if tt.want == "" && err != nil || tt.want != "" && (model.KindOf(err) != model.Invalid || err.Error() != "invalid network config:\n"+tt.want) {
			t.Errorf("%v: got %v, want %q", tt.config, err, tt.want)
		}
	}
	overlapping := &api.NetworkSpec{Ipam: ipam(&api.IPAMConfig{Subnet: "10.5.0.0/24"}, &api.IPAMConfig{Subnet: "10.5.0.0/16"})}
	if err := Check(overlapping); err == nil {
		t.Error("overlapping subnets of one network pass")
	}
}

// BenchmarkTask shows that one task costs the same among many.
func BenchmarkTask(b *testing.B) {
	for _, n := range []int{100, 50000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			w := newWorld(b.Fatalf, "10.0.0.0/8", 12)
			net, _ := w.network(&api.NetworkSpec{})
			s := w.service(attach(net.GetId()))
			for range n {
				w.run(s)
			}
			for b.Loop() {
				task, _ := w.run(s)
				w.remove(model.Tasks, task.GetId())
			}
		})
	}
}

// FuzzNetwork allocates what people ask for: what Check and CheckVNIs let through either
// gets subnets, gateways and identifiers that fit, or says why not.
func FuzzNetwork(f *testing.F) {
	f.Add("10.5.0.0/24", "10.5.0.128/25", "10.5.0.1", "10.5.0.9", "4096,5", true)
	f.Add("fd00::/64", "", "", "", "1", true)
	f.Add("0.0.0.0/0", "", "", "", "x,", false)
	f.Add("10.0.0.0/30", "10.0.0.3/32", "", "10.0.0.2", "16777215", false)
	f.Fuzz(func(t *testing.T, subnet, part, gateway, reserved, vnis string, v6 bool) {
		spec := &api.NetworkSpec{
			Ipv6Enabled: v6, DriverConfig: &api.Driver{Options: map[string]string{vniOption: vnis}},
			Ipam: ipam(&api.IPAMConfig{Subnet: subnet, Range: part, Gateway: gateway, Reserved: map[string]string{"x": reserved}}),
		}
		if Check(spec) != nil || CheckVNIs(spec) != nil {
			return
		}
		w := newWorld(t.Fatalf, "172.16.0.0/12", 24)
		n, err := w.network(spec)
		if err != nil {
			return
		}
		for _, c := range n.GetIpam().GetConfigs() {
			p := netip.MustParsePrefix(c.GetSubnet())
			if g := netip.MustParseAddr(c.GetGateway()); !p.Contains(g) {
				t.Errorf("gateway %s is not in %s", g, p)
			}
		}
		if len(vnisOf(n)) == 0 {
			t.Errorf("no identifiers: %v", n.GetDriverState())
		}
		w.verify()
	})
}
