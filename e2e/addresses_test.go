package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/skep-dev/skep/e2e/testimage"
)

// TestAddresses takes a swarm with address pools, a data path address and a data path port
// of its own through what people ask of networks' addresses, and through a loss of power.
func TestAddresses(t *testing.T) {
	s := newSwarm(t, 1, 1)
	s.loadImages(t)
	s.docker(t, "w1", "swarm", "leave")
	s.docker(t, "m1", "swarm", "leave", "--force")
	s.plugData(t, "m1")
	s.plugData(t, "w1")
	addr := s.node(t, "m1").Addr
	s.docker(t, "m1", "swarm", "init", "--advertise-addr", addr, "--data-path-addr", dataAddr("m1"), "--data-path-port", "5789",
		"--default-addr-pool", "10.123.0.0/24", "--default-addr-pool-mask-length", "26")
	s.docker(t, "w1", "swarm", "join", "--advertise-addr", s.node(t, "w1").Addr, "--data-path-addr", dataAddr("w1"),
		"--token", s.docker(t, "m1", "swarm", "join-token", "-q", "worker"), addr+":2377")
	s.wantReady(t, "m1", "w1")
	for _, step := range []struct {
		name string
		run  func(*testing.T, *swarm)
	}{
		{"Pools", testPools},
		{"Options", testAddressOptions},
		{"Exhausted", testExhausted},
		{"HostNetwork", testHostNetwork},
		{"DataPath", testDataPath},
		{"PowerLoss", testNetworkAfterPowerLoss},
	} {
		if !t.Run(step.name, func(t *testing.T) { step.run(t, s) }) {
			t.Logf("step %s failed; going on, later steps may fail because of it", step.name)
		}
	}
}

// dataAddr is a node's second address, for encapsulated packets.
func dataAddr(node string) string {
	return map[string]string{"m1": "10.210.77.1", "w1": "10.210.77.2"}[node]
}

// plugData gives a node its second address.
func (s *swarm) plugData(t *testing.T, node string) {
	t.Helper()
	run(t, skepBinary(t), "dev", "exec", "--name", s.name, node, "--", "ip", "addr", "add", dataAddr(node)+"/24", "dev", "eth0")
}

// testPools: networks take subnets from the swarm's pools, in turn, until none is left, and
// give them back.
func testPools(t *testing.T, s *swarm) {
	pool := netip.MustParsePrefix("10.123.0.0/24")
	seen := map[string]bool{}
	subnet := func(name string) {
		t.Helper()
		out := s.docker(t, "m1", "network", "inspect", "--format", "{{range .IPAM.Config}}{{.Subnet}}{{end}}", name)
		p, err := netip.ParsePrefix(out)
		if err != nil || p.Bits() != 26 || !pool.Overlaps(p) || seen[out] {
			t.Errorf("network %s has subnet %q, %v; others have %v", name, out, err, seen)
		}
		seen[out] = true
	}
	subnet("ingress")
	for _, name := range []string{"a", "b", "c"} {
		s.docker(t, "m1", "network", "create", "-d", "overlay", "--label", "kind=pool", name)
		subnet(name)
	}
	s.docker(t, "m1", "network", "create", "-d", "overlay", "d")
	s.docker(t, "m1", "service", "create", "-d", "--name", "waiting", "--network", "d", testimage.V1)
	eventually(t, 20*time.Second, "the service says that no subnet is left", func() string {
		tasks, err := s.tasks(t, "m1", "waiting")
		if err != nil || len(tasks) != 1 || !strings.Contains(tasks[0].Error, "the swarm's address pools (10.123.0.0/24 in /26) have no free subnet left") {
			return fmt.Sprint(tasks, err)
		}
		return ""
	})
	if out := s.docker(t, "m1", "network", "prune", "-f", "--filter", "label=kind=pool"); len(strings.Fields(out)) != 5 { // Deleted Networks: a b c
		t.Errorf("pruned %q", out)
	}
	s.wantRunning(t, "m1", "waiting", 1, 20*time.Second)
	s.docker(t, "m1", "service", "rm", "waiting")
	s.docker(t, "m1", "network", "create", "-d", "overlay", "a")
}

// testAddressOptions: subnet, gateway, range and MTU of a network, and a service on two
// networks with DNS round robin and DNS options.
func testAddressOptions(t *testing.T, s *swarm) {
	s.docker(t, "m1", "network", "create", "-d", "overlay", "--subnet", "10.50.0.0/24", "--gateway", "10.50.0.254", "--ip-range", "10.50.0.128/28",
		"--label", "tier=x", "--opt", "com.docker.network.driver.mtu=1300", "wide")
	got := s.docker(t, "m1", "network", "inspect", "--format", "{{.Labels}} {{range .IPAM.Config}}{{.Subnet}} {{.Gateway}} {{.IPRange}}{{end}} {{.Scope}} {{.Driver}}", "wide")
	if want := "map[tier:x] 10.50.0.0/24 10.50.0.254 10.50.0.128/28 swarm overlay"; got != want {
		t.Errorf("the network is %q, want %q", got, want)
	}
	s.docker(t, "m1", "service", "create", "--name", "rr", "--mode", "global", "--endpoint-mode", "dnsrr", "--network", "name=wide,alias=other", "--network", "a",
		"--dns", "192.0.2.1", "--dns-search", "example.test", "--dns-option", "ndots:1", "--host", "printer:192.0.2.9", "--hostname", "{{.Service.Name}}-{{.Node.Hostname}}",
		testimage.V1, "serve", ":80")
	s.wantRunning(t, "m1", "rr", 2, 30*time.Second)
	in := netip.MustParsePrefix("10.50.0.128/28")
	for _, n := range s.nodes {
		for _, name := range []string{"rr.wide", "tasks.rr.wide", "other."} {
			out, err := s.exec(t, n.Name, "rr", "/bin/testapp", "resolve", name)
			addrs := strings.Fields(out)
			if err != nil || len(addrs) != 2 {
				t.Errorf("%s: %s is %q, %v", n.Name, name, out, err)
			}
			for _, a := range addrs {
				if addr, err := netip.ParseAddr(a); err != nil || !in.Contains(addr) {
					t.Errorf("%s: %s has the address %s, which is not in the range", n.Name, name, a)
				}
			}
		}
		if out, err := s.exec(t, n.Name, "rr", "sh", "-c", "dev=$(ip -o -4 addr show to 10.50.0.0/24 | awk '{print $2}'); cat /sys/class/net/$dev/mtu /etc/hostname"); err != nil || out != "1300\nrr-"+n.Name {
			t.Errorf("%s: MTU and name are %q, %v", n.Name, out, err)
		}
		out, err := s.exec(t, n.Name, "rr", "busybox", "cat", "/etc/resolv.conf", "/etc/hosts")
		for _, want := range []string{"nameserver 127.0.0.11", "search example.test", "options ndots:1", "192.0.2.9\tprinter"} {
			if err != nil || !strings.Contains(out, want) {
				t.Errorf("%s: %v; no %q in\n%s", n.Name, err, want, out)
			}
		}
		if out, err := s.exec(t, n.Name, "rr", "/bin/testapp", "get", "http://tasks.rr.wide/"); err != nil {
			t.Errorf("%s does not reach the tasks: %v %s", n.Name, err, out)
		}
	}
	s.docker(t, "m1", "service", "rm", "rr")
}

// testExhausted: tasks that no address is left for say so, and get one when there is.
func testExhausted(t *testing.T, s *swarm) {
	s.docker(t, "m1", "network", "create", "-d", "overlay", "--subnet", "10.51.0.0/29", "tiny") // a gateway, a service address, four tasks
	s.docker(t, "m1", "service", "create", "-d", "--name", "crowd", "--replicas", "6", "--network", "tiny", testimage.V1)
	s.wantRunning(t, "m1", "crowd", 4, 30*time.Second)
	eventually(t, 20*time.Second, "two tasks say why they wait", func() string {
		tasks, err := s.tasks(t, "m1", "crowd")
		if err != nil {
			return err.Error()
		}
		said := 0
		for _, one := range tasks {
			if strings.Contains(one.Error, "10.51.0.0/29") && strings.Contains(one.Error, "no free address") {
				said++
			}
		}
		if said != 2 {
			return fmt.Sprint(tasks)
		}
		return ""
	})
	s.docker(t, "m1", "service", "scale", "-d", "crowd=4")
	s.docker(t, "m1", "service", "update", "--quiet", "--force", "--update-monitor", "100ms", "--update-parallelism", "4", "crowd")
	s.wantRunning(t, "m1", "crowd", 4, 30*time.Second)
	s.docker(t, "m1", "service", "rm", "crowd")
	s.wantGone(t, "m1", "tiny", 30*time.Second)
}

// testHostNetwork: a service on the nodes' own network.
func testHostNetwork(t *testing.T, s *swarm) {
	s.docker(t, "m1", "service", "create", "--name", "raw", "--mode", "global", "--network", "host", testimage.V1, "serve", ":8099")
	s.wantRunning(t, "m1", "raw", 2, 30*time.Second)
	for _, n := range s.nodes {
		eventually(t, 10*time.Second, "the service answers on "+n.Name, func() string {
			out, err := try(t, 20*time.Second, skepBinary(t), "dev", "exec", "--name", s.name, "m1", "--", "curl", "-sS", "--max-time", "3", "http://"+n.Addr+":8099/")
			if err != nil || !strings.HasPrefix(out, n.Name+" ") { // it has the node's host name
				return fmt.Sprint(out, err)
			}
			return ""
		})
	}
	s.docker(t, "m1", "service", "rm", "raw")
}

// testDataPath: containers' packets go between the data path addresses, to the data path port.
func testDataPath(t *testing.T, s *swarm) {
	s.docker(t, "m1", "service", "create", "--name", "pair", "--mode", "global", "--network", "a", testimage.V1, "serve", ":80")
	s.wantRunning(t, "m1", "pair", 2, 30*time.Second)
	s.refresh(t)
	from, to := netip.MustParseAddr(dataAddr("m1")).As4(), netip.MustParseAddr(dataAddr("w1")).As4()
	way := string(from[:]) + string(to[:])
	c := newCapture(t, s.node(t, "m1").PID, "needle-in-a-name", way)
	target := ""
	for _, one := range s.wantRunning(t, "m1", "pair", 2, 30*time.Second) {
		if one.Node == "w1" {
			target = fmt.Sprintf("pair.%s.%s", s.nodeID(t, "m1", "w1"), one.ID)
		}
	}
	if out, err := s.exec(t, "m1", "pair", "/bin/testapp", "get", "http://"+target+"/needle-in-a-name"); err != nil {
		t.Fatalf("no way to the other node: %v %s", err, out)
	}
	eventually(t, 10*time.Second, "packets between the data path addresses", func() string {
		with, all := c.count(way)
		needles, _ := c.count("needle-in-a-name")
		if with == 0 || needles == 0 {
			return fmt.Sprintf("%d of %d, %d with the request", with, all, needles)
		}
		return ""
	})
	out := run(t, skepBinary(t), "dev", "exec", "--name", s.name, "m1", "--", "cat", "/proc/net/udp")
	if !strings.Contains(out, fmt.Sprintf(":%04X ", 5789)) || strings.Contains(out, fmt.Sprintf(":%04X ", 4789)) {
		t.Errorf("the sockets are not those of port 5789:\n%s", out)
	}
}

// testNetworkAfterPowerLoss: when a node returns that lost all it had in memory, everybody
// reaches its new tasks and nobody is led to its old ones. Its data address comes late, as
// it may when a machine starts.
func testNetworkAfterPowerLoss(t *testing.T, s *swarm) {
	s.docker(t, "m1", "service", "create", "--name", "many", "--replicas", "6", "--network", "a", "--publish", "8087:80", testimage.V1, "serve", ":80")
	s.wantRunning(t, "m1", "many", 6, 30*time.Second)
	s.dev(t, "kill", "w1", "--containers")
	s.wantRunning(t, "m1", "many", 6, time.Minute)
	s.dev(t, "start", "w1")
	s.plugData(t, "w1")
	s.wantReady(t, "m1", "w1")
	s.wantRunning(t, "m1", "pair", 2, 30*time.Second)
	s.docker(t, "m1", "service", "update", "--quiet", "--force", "--update-parallelism", "0", "--update-monitor", "100ms", "many") // back onto both nodes
	up := map[string]bool{}
	for _, one := range s.wantRunning(t, "m1", "many", 6, 30*time.Second) {
		up[one.Node] = true
	}
	if len(up) != 2 {
		t.Errorf("the tasks are on %v", up)
	}
	for _, n := range s.nodes {
		eventually(t, 20*time.Second, n.Name+" knows all tasks and no others", func() string {
			for name, want := range map[string]int{"tasks.many": 6, "tasks.pair": 2} {
				out, err := s.exec(t, n.Name, "pair", "/bin/testapp", "resolve", name)
				if addrs := strings.Fields(out); err != nil || len(addrs) != want {
					return fmt.Sprint(name, " is ", out, err)
				}
				for addr := range strings.FieldsSeq(out) {
					if out, err := s.exec(t, n.Name, "pair", "/bin/testapp", "get", "http://"+addr+"/"); err != nil {
						return fmt.Sprint(addr, " of ", name, ": ", out, err)
					}
				}
			}
			return ""
		})
		for range 12 { // twice as many as there are tasks
			run(t, skepBinary(t), "dev", "exec", "--name", s.name, "m1", "--", "curl", "-sS", "--fail", "--max-time", "3", "http://"+n.Addr+":8087/")
		}
	}
	eventually(t, 30*time.Second, "the networks are as they should be", func() string {
		out, err := try(t, time.Minute, skepBinary(t), "-H", "unix://"+s.node(t, "m1").Socket, "net", "check")
		if err != nil || strings.Count(out, ": as it should be") != 2 {
			return fmt.Sprint(out, err)
		}
		return ""
	})
	s.docker(t, "m1", "service", "rm", "many", "pair")
	s.wantGone(t, "m1", "wide", 30*time.Second)
	s.wantGone(t, "m1", "a", 30*time.Second)
}
