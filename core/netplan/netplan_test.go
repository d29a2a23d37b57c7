package netplan

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
)

func ep(network, task, service, node string, last int, routable bool) *skepv1.OverlayEndpoint {
	third := network[len(network)-1] - '0'
	return &skepv1.OverlayEndpoint{
		Key: &skepv1.EndpointKey{NetworkId: network, TaskId: task}, ServiceId: service, Name: service + "." + task, NodeId: node,
		NodeAddr:  "192.0.2." + node[len(node)-1:],
		Addresses: []string{fmt.Sprintf("10.0.%d.%d/24", third, last), fmt.Sprintf("fd00:%d::%d/64", third, last)},
		Aliases:   []string{service + "-too"}, Routable: routable,
	}
}

func network(i int) *skepv1.OverlayNetwork {
	return &skepv1.OverlayNetwork{
		Id: fmt.Sprintf("n%d", i), Name: fmt.Sprintf("net%d", i), Ingress: i == 0,
		Subnets: []*skepv1.OverlaySubnet{{Subnet: fmt.Sprintf("10.0.%d.0/24", i), Vni: uint32(4096 + i)}, {Subnet: fmt.Sprintf("fd00:%d::/64", i)}},
	}
}

func service(id string, virtual bool, networks ...int) *skepv1.BalancedService {
	v := &skepv1.BalancedService{Id: id, Name: id, Virtual: virtual, Ports: []*skepv1.MeshPort{{Protocol: 6, Target: 80, Published: 8000 + uint32(id[1]-'0')}}}
	for _, n := range networks {
		v.Vips = append(v.Vips, &skepv1.VirtualAddress{NetworkId: fmt.Sprintf("n%d", n), Addr: fmt.Sprintf("10.0.%d.%d/24", n, 200+int(id[1]-'0'))})
	}
	return v
}

func start() *State {
	s := NewNames()
	s.Merge(&skepv1.NetworkUpdate{
		Complete: true, Version: 1, Node: &skepv1.LocalNode{Id: "node1", DataAddr: "192.0.2.1", IngressAddr: "10.0.0.250/24"},
		Networks: []*skepv1.OverlayNetwork{network(0), network(1)},
		Services: []*skepv1.BalancedService{service("s1", true, 0, 1), service("s2", false)},
		Endpoints: []*skepv1.OverlayEndpoint{
			ep("n1", "a", "s1", "node1", 3, true), ep("n1", "b", "s1", "node2", 4, true), ep("n1", "c", "s1", "node3", 5, false),
			ep("n0", "b", "s1", "node2", 4, true), ep("n1", "d", "s2", "node2", 6, true), ep("n1", "e", "s2", "node3", 7, true),
		},
	})
	return s
}

// TestOneChange reads like the plan for it.
func TestOneChange(t *testing.T) {
	for name, c := range map[string]struct {
		update *skepv1.NetworkUpdate
		want   string
	}{
		"a task appears elsewhere, not routable yet": {
			&skepv1.NetworkUpdate{Endpoints: []*skepv1.OverlayEndpoint{ep("n1", "f", "s1", "node2", 8, false)}},
			"route 10.0.1.8 to 192.0.2.2",
		},
		"a task becomes routable": {
			&skepv1.NetworkUpdate{Endpoints: []*skepv1.OverlayEndpoint{ep("n1", "c", "s1", "node3", 5, true)}},
			"balance 10.0.1.201 [10.0.1.3 10.0.1.4 10.0.1.5]",
		},
		"a task drains": {
			&skepv1.NetworkUpdate{Endpoints: []*skepv1.OverlayEndpoint{ep("n1", "b", "s1", "node2", 4, false)}},
			"leave n1/b; balance 10.0.1.201 [10.0.1.3]",
		},
		"a task goes": {
			&skepv1.NetworkUpdate{RemovedEndpoints: []*skepv1.EndpointKey{{NetworkId: "n1", TaskId: "b"}}},
			"remove n1/b; balance 10.0.1.201 [10.0.1.3]; end 10.0.1.4; end fd00:1::4; unroute 10.0.1.4",
		},
		"a task of the mesh goes": {
			&skepv1.NetworkUpdate{RemovedEndpoints: []*skepv1.EndpointKey{{NetworkId: "n0", TaskId: "b"}}},
			"remove n0/b; balance 10.0.0.201 []; publish 8001 []; end 10.0.0.4; end fd00:0::4; unroute 10.0.0.4",
		},
		"an address moves": {
			&skepv1.NetworkUpdate{Endpoints: []*skepv1.OverlayEndpoint{ep("n1", "b", "s1", "node3", 9, true)}},
			"remove n1/b; route 10.0.1.9 to 192.0.2.3; balance 10.0.1.201 [10.0.1.3 10.0.1.9]; end 10.0.1.4; end fd00:1::4; unroute 10.0.1.4",
		},
		"a service goes": {
			&skepv1.NetworkUpdate{RemovedServices: []string{"s1"}},
			"balance 10.0.0.201 gone; balance 10.0.1.201 gone; publish 8001 gone",
		},
		"a network goes": {
			&skepv1.NetworkUpdate{RemovedNetworks: []string{"n0"}},
			"remove n0/b; balance 10.0.0.201 []; publish 8001 gone; publish 8002 gone; end 10.0.0.4; end fd00:0::4; unroute 10.0.0.4",
		},
		"others to gossip with": {
			&skepv1.NetworkUpdate{Node: &skepv1.LocalNode{Id: "node1", DataAddr: "192.0.2.1", IngressAddr: "10.0.0.250/24", GossipPeers: []string{"192.0.2.9"}}}, "",
		},
		"nothing new":     {&skepv1.NetworkUpdate{Endpoints: []*skepv1.OverlayEndpoint{ep("n1", "a", "s1", "node1", 3, true)}}, ""},
		"unknown removed": {&skepv1.NetworkUpdate{RemovedServices: []string{"x"}, RemovedEndpoints: []*skepv1.EndpointKey{{NetworkId: "y"}}}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := start()
			p := s.Merge(c.update)
			if diff := cmp.Diff(c.want, text(p)); diff != "" {
				t.Error(diff)
			}
			if again := text(s.Merge(c.update)); again != "" {
				t.Errorf("the same update again: %s", again)
			}
		})
	}
}

// text writes a plan in the order of its execution.
func text(p Plan) string {
	var out []string
	say := func(format string, args ...any) { out = append(out, strings.TrimSpace(fmt.Sprintf(format, args...))) }
	for _, k := range p.Leaving.GetRemovedEndpoints() {
		say("remove %s/%s", k.GetNetworkId(), k.GetTaskId())
	}
	for _, e := range p.Leaving.GetEndpoints() {
		say("leave %s/%s", e.GetKey().GetNetworkId(), e.GetKey().GetTaskId())
	}
	for _, f := range p.Route {
		say("route %s to %s", f.Addr, f.Node)
	}
	for _, b := range p.Balance {
		if b.Gone {
			say("balance %s gone", b.VIP)
			continue
		}
		say("balance %s %v", b.VIP, b.Backends)
	}
	for _, m := range p.Publish {
		if m.Gone {
			say("publish %d gone", m.Published)
			continue
		}
		say("publish %d %v", m.Published, m.Backends)
	}
	for _, e := range p.End {
		say("end %s", strings.Replace(e.Addr.String(), "fd00::4", "fd00:0::4", 1))
	}
	for _, f := range p.Unroute {
		say("unroute %s", f.Addr)
	}
	return strings.Join(out, "; ")
}

func TestNames(t *testing.T) {
	s := start()
	s.SetLocal("n1", Local{Addr: netip.MustParseAddr("10.0.1.3"), Names: []string{"Host-A", "0123456789ab"}})
	for name, c := range map[string]struct {
		name  string
		in    []string
		known bool
		addrs string
	}{
		"service address":              {"s1", []string{"n1"}, true, "[10.0.1.201]"},
		"not of the ingress network":   {"s1", []string{"n0", "n1"}, true, "[10.0.1.201]"},
		"of the first that knows it":   {"s1", []string{"n2", "n1"}, true, "[10.0.1.201]"},
		"any case, with a dot":         {"S1.", []string{"n1"}, true, "[10.0.1.201]"},
		"with the network's name":      {"s1.net1", []string{"n0", "n1"}, true, "[10.0.1.201]"},
		"not on the network":           {"s1", []string{"n2"}, false, "[]"},
		"round robin":                  {"s2", []string{"n1"}, true, "[10.0.1.6 10.0.1.7 fd00:1::6 fd00:1::7]"},
		"tasks of a service":           {"tasks.s1", []string{"n1"}, true, "[10.0.1.3 10.0.1.4 fd00:1::3 fd00:1::4]"},
		"tasks of an alias":            {"tasks.s2-too", []string{"n1"}, true, "[10.0.1.6 10.0.1.7 fd00:1::6 fd00:1::7]"},
		"alias leads to the address":   {"s1-too", []string{"n1"}, true, "[10.0.1.201]"},
		"alias of round robin":         {"s2-too", []string{"n1"}, true, "[10.0.1.6 10.0.1.7 fd00:1::6 fd00:1::7]"},
		"task by name":                 {"s1.b", []string{"n1"}, true, "[10.0.1.4 fd00:1::4]"},
		"task by id":                   {"b", []string{"n1"}, true, "[10.0.1.4 fd00:1::4]"},
		"task that is not routable":    {"s1.c", []string{"n1"}, true, "[]"},
		"host name of a container":     {"host-a", []string{"n1"}, true, "[10.0.1.3 fd00:1::3]"},
		"its short id":                 {"0123456789ab", []string{"n1"}, true, "[10.0.1.3 fd00:1::3]"},
		"a name of the outside":        {"example.org", []string{"n1"}, false, "[]"},
		"tasks of a service elsewhere": {"tasks.s2", []string{"n0"}, false, "[]"},
	} {
		t.Run(name, func(t *testing.T) {
			a := s.Lookup(c.in, c.name)
			if a.Known != c.known || fmt.Sprint(a.Addrs) != c.addrs {
				t.Errorf("%s in %v: %v, want %v %s", c.name, c.in, a, c.known, c.addrs)
			}
		})
	}
	for addr, want := range map[string]string{"10.0.1.4": "s1.b.net1 true", "10.0.1.201": "s1.net1 true", "10.0.1.77": " true", "192.0.2.1": " false", "fd00:1::4": "s1.b.net1 true"} {
		name, ours := s.Reverse([]string{"n1"}, netip.MustParseAddr(addr))
		if got := fmt.Sprint(name, " ", ours); got != want {
			t.Errorf("reverse of %s: %q, want %q", addr, got, want)
		}
	}
}

func TestLocalsAreNotForwarded(t *testing.T) {
	s := start()
	at := netip.MustParseAddr("10.0.1.4")
	moved := s.SetLocal("n1", Local{Addr: at})
	if len(moved) != 1 || moved[0].Addr != at {
		t.Errorf("taking over %s moved %v", at, moved)
	}
	if f := s.Forwards("n1"); slices.ContainsFunc(f, func(f Forward) bool { return f.Addr == at }) {
		t.Errorf("what is here is forwarded: %v", f)
	}
	if got := s.Stale(moved[0]); len(got) != 3 {
		t.Errorf("stale after the move: %v", got)
	}
	if back := s.UnsetLocal("n1", at); len(back) != 1 || back[0] != moved[0] {
		t.Errorf("giving up %s moved %v", at, back)
	}
}

func TestDiff(t *testing.T) {
	f := Forward{Network: "n", VNI: 1, Addr: netip.MustParseAddr("10.0.1.4"), Node: netip.MustParseAddr("192.0.2.2")}
	g := f
	g.Node = netip.MustParseAddr("192.0.2.3")
	h := Forward{Network: "n", VNI: 1, Addr: netip.MustParseAddr("10.0.1.5"), Node: f.Node}
	entries := func(list ...Forward) (out []Entry) {
		for _, f := range list {
			out = slices.AppendSeq(out, f.Entries())
		}
		return out
	}
	put, remove := Diff(entries(f), entries(g, h))
	if len(put) != 1 || put[0].Node != f.Node || len(remove) != 2 || remove[0].MAC != MAC(h.Addr) {
		t.Errorf("put %v, remove %v", put, remove)
	}
	if put, remove := Diff(entries(f), entries(f)); len(put)+len(remove) != 0 {
		t.Errorf("nothing differs, but put %v, remove %v", put, remove)
	}
}

// drawUpdate draws any update over few networks, services and tasks.
func drawUpdate(t *rapid.T, version uint64) *skepv1.NetworkUpdate {
	u := &skepv1.NetworkUpdate{Version: version, Complete: rapid.IntRange(0, 9).Draw(t, "complete") == 0}
	if u.GetComplete() || rapid.IntRange(0, 9).Draw(t, "node") == 0 {
		u.Node = &skepv1.LocalNode{Id: "node1", DataAddr: "192.0.2.1", IngressAddr: "10.0.0.250/24"}
	}
	for i := range 3 {
		switch rapid.IntRange(0, 5).Draw(t, "network") {
		case 0:
			n := network(i)
			n.MeshSource = skepv1.MeshSource(rapid.IntRange(0, 2).Draw(t, "source"))
			u.Networks = append(u.Networks, n)
		case 1:
			u.RemovedNetworks = append(u.RemovedNetworks, fmt.Sprintf("n%d", i))
		}
	}
	for i := range 3 {
		id := fmt.Sprintf("s%d", i)
		switch rapid.IntRange(0, 5).Draw(t, "service") {
		case 0:
			v := service(id, rapid.Bool().Draw(t, "virtual"), 0, 1)
			v.MeshSource = skepv1.MeshSource(rapid.IntRange(0, 2).Draw(t, "source"))
			u.Services = append(u.Services, v)
		case 1:
			u.RemovedServices = append(u.RemovedServices, id)
		}
	}
	drawn := map[Key]bool{}
	for range rapid.IntRange(0, 6).Draw(t, "endpoints") {
		net := fmt.Sprintf("n%d", rapid.IntRange(0, 2).Draw(t, "of"))
		task := fmt.Sprintf("t%d", rapid.IntRange(0, 5).Draw(t, "task"))
		if drawn[Key{net, task}] { // nothing is named twice in one update
			continue
		}
		drawn[Key{net, task}] = true
		if rapid.IntRange(0, 3).Draw(t, "gone") == 0 {
			u.RemovedEndpoints = append(u.RemovedEndpoints, &skepv1.EndpointKey{NetworkId: net, TaskId: task})
			continue
		}
		e := ep(net, task, fmt.Sprintf("s%d", rapid.IntRange(0, 2).Draw(t, "its")),
			fmt.Sprintf("node%d", rapid.IntRange(1, 3).Draw(t, "at")), rapid.IntRange(2, 8).Draw(t, "addr"), rapid.Bool().Draw(t, "routable"))
		e.KeepsSource = rapid.Bool().Draw(t, "keeps")
		u.Endpoints = append(u.Endpoints, e)
	}
	return u
}

// kernel is what a node that executes plans would hold.
type kernel struct {
	entries  map[place]Entry
	balances map[vipKey]string
	ports    map[portKey]string
	keepers  map[netip.Addr]bool
}

func newKernel() *kernel {
	return &kernel{map[place]Entry{}, map[vipKey]string{}, map[portKey]string{}, map[netip.Addr]bool{}}
}

func (k *kernel) execute(s *State, p Plan) {
	for _, f := range p.Route {
		for e := range f.Entries() {
			k.entries[e.place()] = e
		}
	}
	for _, b := range p.Balance {
		k.balances[vipKey{b.Network, b.VIP}] = fmt.Sprint(b.Backends)
		if b.Gone {
			delete(k.balances, vipKey{b.Network, b.VIP})
		}
	}
	for _, m := range p.Publish {
		k.ports[portKey{m.Protocol, m.Published}] = fmt.Sprint(m.Target, m.Backends, m.Backends6)
		if m.Gone {
			delete(k.ports, portKey{m.Protocol, m.Published})
		}
	}
	for _, a := range p.Keep {
		k.keepers[a.Addr] = true
		if a.Gone {
			delete(k.keepers, a.Addr)
		}
	}
	for _, f := range p.Unroute {
		for _, e := range s.Stale(f) {
			delete(k.entries, e.place())
		}
	}
}

// TestIncrementsEqualFromScratch holds that executing plans one after the other leads to
// what the last state wants, and that the states themselves agree.
func TestIncrementsEqualFromScratch(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s, names := NewState(), NewNames()
		k := newKernel()
		for version := range uint64(rapid.IntRange(1, 12).Draw(t, "updates")) {
			u := drawUpdate(t, version+1)
			before := proto.CloneOf(u)
			p := s.Merge(u)
			if !proto.Equal(before, u) {
				t.Fatalf("merging changed the update")
			}
			names.MergeLeaving(p)
			for _, e := range p.Leaving.GetEndpoints() {
				if e.GetRoutable() {
					t.Fatalf("%v leaves and is routable", e)
				}
			}
			k.execute(s, p)
			names.MergeUpdate(p)
			if again := s.Merge(u); text(again) != "" {
				t.Fatalf("the same update again: %s", text(again))
			}
		}
		scratch := NewState()
		scratch.Merge(s.Snapshot())
		if diff := cmp.Diff(scratch.Snapshot(), s.Snapshot(), protocmp.Transform()); diff != "" {
			t.Fatal(diff)
		}
		names.version = s.version
		if diff := cmp.Diff(names.Snapshot(), s.Snapshot(), protocmp.Transform()); diff != "" {
			t.Fatalf("names differ: %s", diff)
		}
		want := newKernel()
		for _, id := range scratch.Networks() {
			for _, f := range scratch.Forwards(id) {
				for e := range f.Entries() {
					want.entries[e.place()] = e
				}
			}
			held := map[uint32]int{}
			for e := range scratch.Ways(id).Entries() {
				held[e.VNI]++
				if !s.Ways(id).Wants(e) {
					t.Fatalf("%v is not wanted", e)
				}
				other := e
				if other.MAC[0]++; s.Ways(id).Wants(other) {
					t.Fatalf("%v is wanted", other)
				}
				if other = e; !e.Addr.IsValid() {
					if other.Node = e.Node.Next(); s.Ways(id).Wants(other) {
						t.Fatalf("%v is wanted", other)
					}
				}
				if other = e; true {
					if other.VNI++; s.Ways(id).Wants(other) {
						t.Fatalf("%v is wanted", other)
					}
				}
			}
			for vni, n := range held {
				if got := s.Ways(id).Count(vni); got != n {
					t.Fatalf("VXLAN %d of %s: %d entries wanted, %d there", vni, id, n, got)
				}
			}
			for _, b := range scratch.Balances(id) {
				want.balances[vipKey{id, b.VIP}] = fmt.Sprint(b.Backends)
			}
		}
		for _, m := range scratch.Mesh() {
			want.ports[portKey{m.Protocol, m.Published}] = fmt.Sprint(m.Target, m.Backends, m.Backends6)
		}
		for _, a := range scratch.Keepers() {
			want.keepers[a] = true
		}
		// A network that is not known (any more) is not served, whatever stays of it.
		maps.DeleteFunc(k.balances, func(v vipKey, _ string) bool { return s.Network(v.network) == nil })
		if !maps.Equal(k.entries, want.entries) || !maps.Equal(k.balances, want.balances) ||
			!maps.Equal(k.ports, want.ports) || !maps.Equal(k.keepers, want.keepers) {
			t.Fatalf("kernel %v\nwant %v", k, want)
		}
	})
}

// TestNothingUnroutableIsOffered holds that neither names nor service addresses lead to a
// task that may not get connections.
func TestNothingUnroutableIsOffered(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := NewNames()
		for version := range uint64(rapid.IntRange(1, 6).Draw(t, "updates")) {
			s.Merge(drawUpdate(t, version+1))
		}
		usable := map[End]bool{}
		for e := range s.sorted() {
			if e.GetRoutable() {
				usable[End{e.key.Network, e.v4}], usable[End{e.key.Network, e.v6}] = true, true
			}
		}
		for _, id := range s.Networks() {
			for _, b := range s.Balances(id) {
				usable[End{id, b.VIP}] = true
				for _, a := range b.Backends {
					if !usable[End{id, a}] {
						t.Fatalf("%s leads to %s", b.VIP, a)
					}
				}
			}
			for _, name := range []string{"s0", "s1", "tasks.s2", "s1-too", "s0.t1", "t3"} {
				for _, a := range s.Lookup([]string{id}, name).Addrs {
					if !usable[End{id, a}] {
						t.Fatalf("%s leads to %s", name, a)
					}
				}
			}
		}
	})
}

func BenchmarkOneChange(b *testing.B) {
	for _, n := range []int{100, 5000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s := NewState()
			u := &skepv1.NetworkUpdate{Complete: true, Networks: []*skepv1.OverlayNetwork{{Id: "n1", Name: "n1", Subnets: []*skepv1.OverlaySubnet{{Subnet: "10.1.0.0/16", Vni: 4096}}}}}
			for i := range n {
				e := ep("n1", fmt.Sprint("t", i), fmt.Sprint("s", i/10), "node2", 2, true)
				e.Addresses = []string{netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}).String() + "/16"}
				u.Endpoints = append(u.Endpoints, e)
			}
			s.Merge(u)
			change := proto.CloneOf(u.GetEndpoints()[0])
			for b.Loop() {
				change = proto.CloneOf(change)
				change.Routable = !change.GetRoutable()
				s.Merge(&skepv1.NetworkUpdate{Endpoints: []*skepv1.OverlayEndpoint{change}})
			}
		})
	}
}

// TestIngressHasNoNames: services that publish ports do not find each other through the
// ingress network, and find themselves in their own.
func TestIngressHasNoNames(t *testing.T) {
	ingress, own := network(0), network(1)
	ingress.Ingress = true
	s := NewNames()
	s.Merge(&skepv1.NetworkUpdate{
		Complete: true, Networks: []*skepv1.OverlayNetwork{ingress, own}, Services: []*skepv1.BalancedService{service("s0", true, 0, 1)},
		Endpoints: []*skepv1.OverlayEndpoint{ep("n0", "t0", "s0", "node2", 2, true), ep("n1", "t0", "s0", "node2", 2, true)},
	})
	for _, name := range []string{"s0", "tasks.s0", "t0", "s0.n0"} {
		if a := s.Lookup([]string{"n0"}, name); a.Known {
			t.Errorf("%s in the ingress network: %v", name, a)
		}
	}
	if a, b := s.Lookup([]string{"n0", "n1"}, "tasks.s0"), s.Lookup([]string{"n1"}, "tasks.s0"); len(a.Addrs) == 0 || !slices.Equal(a.Addrs, b.Addrs) {
		t.Errorf("beside the ingress network: %v, without it %v", a, b)
	}
}

// TestEngines: a task behind the mesh knows from where its published ports come as such.
func TestEngines(t *testing.T) {
	s := start()
	own, leg := ep("n0", "a", "s1", "node1", 3, true), ep("n0", "node2", "", "node2", 9, false)
	leg.Name, leg.LeadsToPublished = "", true
	p := s.Merge(&skepv1.NetworkUpdate{Endpoints: []*skepv1.OverlayEndpoint{own, leg}})
	engine := netip.MustParseAddr("10.0.0.9")
	if got := s.Engines(); !p.Engines || !slices.Equal(got, []netip.Addr{engine}) {
		t.Errorf("engines are %v, changed %v", got, p.Engines)
	}
	want := []Published{{Protocol: 6, Published: 8001, Target: 80}}
	if got := s.Arrivals(netip.MustParseAddr("10.0.0.3")); !cmp.Equal(got, want, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })) {
		t.Errorf("arrivals %v", got)
	}
	for _, other := range []string{"10.0.0.4", "10.0.1.3", "10.0.0.77"} { // elsewhere, another network, nobody
		if got := s.Arrivals(netip.MustParseAddr(other)); got != nil {
			t.Errorf("arrivals at %s: %v", other, got)
		}
	}
	if p := s.Merge(&skepv1.NetworkUpdate{Endpoints: []*skepv1.OverlayEndpoint{ep("n0", "z", "s1", "node3", 20, true)}}); p.Engines {
		t.Error("a task counts as an engine")
	}
	same := service("s1", true, 0, 1)
	same.Ports = []*skepv1.MeshPort{{Protocol: 6, Target: 80, Published: 80}, {Protocol: 17, Target: 53, Published: 70000}}
	s.Merge(&skepv1.NetworkUpdate{Services: []*skepv1.BalancedService{same}})
	if got := s.Arrivals(netip.MustParseAddr("10.0.0.3")); got != nil {
		t.Errorf("the same port: %v", got)
	}
	p = s.Merge(&skepv1.NetworkUpdate{RemovedEndpoints: []*skepv1.EndpointKey{{NetworkId: "n0", TaskId: "node2"}}})
	if got := s.Engines(); !p.Engines || len(got) != 0 {
		t.Errorf("engines are %v, changed %v", got, p.Engines)
	}
}
