package e2e

import (
	"context"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/e2e/testimage"
)

// testapp returns the program of the test images, for use outside of containers.
func testapp(t *testing.T) string {
	t.Helper()
	app := filepath.Join(t.TempDir(), "testapp")
	if err := testimage.Build(t.Context(), app); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(app, 0o755); err != nil {
		t.Fatal(err)
	}
	return app
}

// answer is one line of a whois server: who answered, and the client that it saw.
type answer struct{ host, client, port string }

// ask runs testapp who on a node.
func (s *swarm) ask(t *testing.T, app, node, network string, port int, servers ...string) ([]answer, error) {
	t.Helper()
	args := append([]string{"dev", "exec", "--name", s.name, node, "--", app, "who", network, fmt.Sprint(port)}, servers...)
	return asked(try(t, time.Minute, skepBinary(t), args...))
}

// asked reads what testapp who prints.
func asked(out string, err error) ([]answer, error) {
	if err != nil {
		return nil, err
	}
	var answers []answer
	for line := range strings.Lines(out) {
		host, from, _ := strings.Cut(strings.TrimSpace(line), " ")
		client, port, err := net.SplitHostPort(from)
		if err != nil {
			return nil, fmt.Errorf("answer %q: %w", line, err)
		}
		answers = append(answers, answer{host, client, port})
	}
	return answers, nil
}

// TestMesh takes published ports of three nodes through what their users ask of them.
func TestMesh(t *testing.T) {
	s := newSwarm(t, 1, 2)
	m := s.byRole("manager")[0]
	s.loadImages(t)
	app := testapp(t)
	for _, step := range []struct {
		name string
		run  func(*testing.T, *swarm, string, string)
	}{
		{"ClientAddress", testClientAddress},
		{"Ports", testPorts},
		{"HeldPorts", testHeldPorts},
		{"Firewall", testFirewall},
		{"SCTP", testSCTP},
		{"SameLAN", testSameLAN},
		{"IPv6", testIPv6},
	} {
		if !t.Run(step.name, func(t *testing.T) { step.run(t, s, m, app) }) {
			t.Logf("step %s failed; going on, later steps may fail because of it", step.name)
		}
	}
}

// testClientAddress: tasks see who their clients are, by TCP and UDP, through each node,
// on the same node and others, through several at once from one port.
func testClientAddress(t *testing.T, s *swarm, m, app string) {
	worker := s.byRole("worker")[0]
	s.docker(t, m, "service", "create", "--name", "who", "--constraint", "node.hostname=="+worker, "--publish", "8081:80/tcp", "--publish", "8081:80/udp",
		testimage.V1, "whois", ":80")
	s.wantRunning(t, m, "who", 1, 30*time.Second)
	var all []string
	for _, n := range s.nodes {
		all = append(all, n.Addr+":8081")
	}
	for _, network := range []string{"tcp", "udp"} {
		for _, from := range s.nodes {
			for _, to := range s.nodes {
				eventually(t, 20*time.Second, fmt.Sprintf("%s from %s through %s shows the client", network, from.Name, to.Name), func() string {
					answers, err := s.ask(t, app, from.Name, network, 0, to.Addr+":8081")
					if err != nil {
						return err.Error()
					}
					for _, a := range answers {
						if (a.client == from.Addr) != (from.Addr != to.Addr) { // its own node is the mesh's own address
							return fmt.Sprint(a)
						}
					}
					return ""
				})
			}
		}
		answers, err := s.ask(t, app, m, network, 20000, all[1:]...)
		if err != nil || len(answers) != 10 {
			t.Errorf("one %s port through two nodes at once: %v, %v", network, answers, err)
		}
		for _, a := range answers {
			if a.client != s.node(t, m).Addr {
				t.Errorf("one %s port through two nodes at once: %v", network, a)
			}
		}
		client := network + " " + s.node(t, m).Addr + ":"
		eventually(t, 10*time.Second, "the task's log shows its client", func() string {
			if out := s.docker(t, m, "service", "logs", "--raw", "who"); !strings.Contains(out, client) {
				return out
			}
			return ""
		})
	}
	// A service may ask for the entry node's address instead.
	s.docker(t, m, "service", "update", "--detach", "--label-add", "skep.mesh.source=masquerade", "who")
	eventually(t, 10*time.Second, "the task sees the entry node", func() string {
		answers, err := s.ask(t, app, m, "tcp", 0, all[2])
		if err != nil || answers[0].client == s.node(t, m).Addr {
			return fmt.Sprint(answers, err)
		}
		return ""
	})
	if _, err := s.tryDocker(t, 20*time.Second, m, "service", "update", "--detach", "--label-add", "skep.mesh.source=perhaps", "who"); err == nil || !strings.Contains(err.Error(), "must be keep") {
		t.Errorf("a source that there is not: %v", err)
	}
	s.docker(t, m, "service", "rm", "who")
}

// testPorts: ranges and automatic ports, from nodes, their loopback and containers.
func testPorts(t *testing.T, s *swarm, m, app string) {
	s.docker(t, m, "service", "create", "--name", "many", "--publish", "9000-9002:80-82", "--publish", "9000-9002:80-82/udp", "--publish", "90", testimage.V1, "whois", ":80", ":81", ":82", ":90")
	one := s.wantRunning(t, m, "many", 1, 30*time.Second)[0]
	chosen := s.docker(t, m, "service", "inspect", "--format", "{{range .Endpoint.Ports}}{{if eq .TargetPort 90}}{{.PublishedPort}}{{end}}{{end}}", "many")
	if n, err := strconv.Atoi(chosen); err != nil || n < 30000 || n > 32767 {
		t.Errorf("the port chosen is %q", chosen)
	}
	for _, from := range s.nodes {
		servers := []string{"127.0.0.1:9001"}
		for _, port := range []string{"9000", "9001", "9002", chosen} {
			for _, to := range s.nodes {
				servers = append(servers, to.Addr+":"+port)
			}
		}
		for _, network := range []string{"tcp", "udp"} {
			servers := servers
			if network == "udp" { // the automatic ones come last
				servers = servers[:len(servers)-len(s.nodes)]
			}
			eventually(t, 20*time.Second, fmt.Sprintf("%s reaches all ports by %s", from.Name, network), func() string {
				answers, err := s.ask(t, app, from.Name, network, 0, servers...)
				if err != nil || len(answers) != 5*len(servers) {
					return fmt.Sprint(answers, err)
				}
				return ""
			})
		}
		// A container, which may be on the node of the task.
		args := append([]string{"run", "--rm", testimage.V1, "who", "tcp", "0"}, servers[1:]...)
		if out, err := s.tryDocker(t, time.Minute, from.Name, args...); err != nil || strings.Count(out, "\n") != 5*len(servers[1:]) {
			t.Errorf("a container on %s: %v\n%s", from.Name, err, out)
		}
	}
	// The task itself, through its own node and another.
	for _, to := range s.nodes {
		if out, err := s.exec(t, one.Node, "many", "/bin/testapp", "who", "tcp", "0", to.Addr+":9000"); err != nil {
			t.Errorf("the task through %s: %v\n%s", to.Name, err, out)
		}
	}
	s.docker(t, m, "service", "rm", "many")
}

// testHeldPorts: a published port cannot be taken by a process of a node, and one that has
// it keeps it and is named.
func testHeldPorts(t *testing.T, s *swarm, m, app string) {
	w := s.node(t, s.byRole("worker")[0])
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	own := exec.CommandContext(ctx, skepBinary(t), "dev", "exec", "--name", s.name, w.Name, "--", app, "whois", ":9100")
	own.Cancel = func() error { return own.Process.Signal(os.Interrupt) }
	own.WaitDelay = 5 * time.Second
	if err := own.Start(); err != nil {
		t.Fatal(err)
	}
	at := w.Addr + ":9100"
	eventually(t, 10*time.Second, "the process listens", func() string {
		_, err := s.ask(t, app, m, "tcp", 0, at)
		return errText(err)
	})
	s.docker(t, m, "service", "create", "--name", "held", "--publish", "9100:80", testimage.V1, "whois", ":80")
	s.wantRunning(t, m, "held", 1, 30*time.Second)
	hosts := func(addr string) map[string]bool {
		answers, err := s.ask(t, app, m, "tcp", 0, addr)
		if err != nil {
			return map[string]bool{err.Error(): true}
		}
		seen := map[string]bool{}
		for _, a := range answers {
			seen[a.host] = true
		}
		return seen
	}
	var task map[string]bool
	eventually(t, 10*time.Second, "the other node leads to the task", func() string {
		task = hosts(s.node(t, s.byRole("worker")[1]).Addr + ":9100")
		if len(task) != 1 || maps.Equal(task, hosts(at)) {
			return fmt.Sprint(task)
		}
		return ""
	})
	log, err := os.ReadFile(filepath.Join(w.Dir, "daemon.log"))
	if err != nil || !strings.Contains(string(log), "not published on this node") || !strings.Contains(string(log), "testapp (process ") {
		t.Errorf("the log of %s does not say who has the port: %v", w.Name, err)
	}
	stop()
	_ = own.Wait() // it was interrupted
	eventually(t, 30*time.Second, "the port leads to the task once the process is gone", func() string {
		if now := hosts(at); !maps.Equal(now, task) {
			return fmt.Sprint(now)
		}
		return ""
	})
	if out, err := try(t, 20*time.Second, skepBinary(t), "dev", "exec", "--name", s.name, w.Name, "--", app, "whois", ":9100"); err == nil || !strings.Contains(out, "address already in use") {
		t.Errorf("a process took a published port: %v\n%s", err, out)
	}
	s.docker(t, m, "service", "rm", "held")
}

// testFirewall: tables that somebody removes come back, those of others stay as they are.
func testFirewall(t *testing.T, s *swarm, m, app string) {
	nft, err := exec.LookPath("nft")
	if err != nil {
		t.Skip("needs the nft command")
	}
	s.docker(t, m, "service", "create", "--name", "wall", "--publish", "9200:80", testimage.V1, "whois", ":80")
	s.wantRunning(t, m, "wall", 1, 30*time.Second)
	w := s.node(t, s.byRole("worker")[1])
	on := func(args ...string) string {
		t.Helper()
		return run(t, skepBinary(t), append([]string{"dev", "exec", "--name", s.name, w.Name, "--", nft}, args...)...)
	}
	const theirs = "table inet theirs { chain input { type filter hook input priority 0; policy accept; tcp dport 1 drop; }; }"
	on(theirs)
	before := on("list", "table", "inet", "theirs")
	for range 2 {
		removed := 0
		for line := range strings.Lines(on("list", "tables")) {
			if fields := strings.Fields(line); len(fields) == 3 && fields[2] != "theirs" {
				on("delete", "table", fields[1], fields[2])
				removed++
			}
		}
		if removed == 0 {
			t.Error("there was no table to remove")
		}
		eventually(t, 5*time.Second, "the port leads to the task again", func() string {
			_, err := s.ask(t, app, m, "tcp", 0, w.Addr+":9200")
			return errText(err)
		})
	}
	if after := on("list", "table", "inet", "theirs"); after != before {
		t.Errorf("somebody else's table is now\n%s", after)
	}
	on("delete", "table", "inet", "theirs")
	s.docker(t, m, "service", "rm", "wall")
}

// testSCTP: it is published where the kernel has it, and refused by name elsewhere.
func testSCTP(t *testing.T, s *swarm, m, _ string) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_SCTP)
	if err == nil {
		_ = unix.Close(fd)
	}
	s.docker(t, m, "service", "create", "-d", "--name", "streams", "--restart-condition", "none", "--publish", "9300:80/sctp", testimage.V1)
	defer s.docker(t, m, "service", "rm", "streams")
	if err == nil {
		s.wantRunning(t, m, "streams", 1, 30*time.Second)
		return
	}
	eventually(t, 20*time.Second, "the task says that there is no SCTP", func() string {
		tasks, err := s.tasks(t, m, "streams")
		if err != nil || len(tasks) == 0 || !strings.Contains(tasks[0].Error, "port 80/sctp cannot be served: the kernel of this node has no SCTP") {
			return fmt.Sprint(tasks, err)
		}
		return ""
	})
}

// testSameLAN: the nodes' LAN has the ingress network's subnet, and each node's address there
// is another's in the ingress network.
func testSameLAN(t *testing.T, s *swarm, m, app string) {
	s.docker(t, m, "service", "create", "--name", "lan", "--constraint", "node.hostname=="+s.byRole("worker")[0], "--publish", "9350:80/tcp", "--publish", "9350:80/udp",
		testimage.V1, "whois", ":80")
	s.wantRunning(t, m, "lan", 1, 30*time.Second)
	var legs []string
	for _, n := range s.nodes {
		fields := strings.Fields(run(t, "nsenter", "--net="+filepath.Join(s.execRoot(t, n.Name), "netns", ".mesh"), "ip", "-o", "-4", "addr", "show", "dev", "ingress"))
		if len(fields) < 4 || !strings.HasPrefix(fields[3], "10.0.0.") {
			t.Fatalf("%s has no leg into the ingress network: %v", n.Name, fields)
		}
		legs = append(legs, strings.TrimSuffix(fields[3], "/24"))
	}
	lan := func(i int) string { return legs[(i+1)%len(legs)] }
	for i, n := range s.nodes {
		addr := func(what string) {
			script := "ip addr " + what + " " + lan(i) + "/24 dev $(ip -o -4 addr show to " + n.Addr + " | awk '{print $2}')"
			run(t, skepBinary(t), "dev", "exec", "--name", s.name, n.Name, "--", "sh", "-c", script)
		}
		addr("add")
		defer addr("del")
	}
	for _, network := range []string{"tcp", "udp"} {
		for _, from := range s.nodes {
			for i := range s.nodes {
				eventually(t, 20*time.Second, fmt.Sprintf("%s from %s to %s is served", network, from.Name, lan(i)), func() string {
					answers, err := s.ask(t, app, from.Name, network, 0, lan(i)+":9350")
					if err != nil || answers[0].client != legs[i] {
						return fmt.Sprint(answers, err)
					}
					return ""
				})
			}
		}
	}
	s.docker(t, m, "service", "rm", "lan")
}

// testIPv6: addresses, names and published ports of networks with both families.
func testIPv6(t *testing.T, s *swarm, m, app string) {
	if _, err := os.Stat("/proc/net/if_inet6"); err != nil {
		t.Skip("the kernel has no IPv6")
	}
	six := map[string]string{}
	for i, n := range s.nodes {
		six[n.Name] = fmt.Sprintf("fd00:99::%d", i+1)
		script := "set -e; sysctl -qw net.ipv6.conf.all.disable_ipv6=0 || true; dev=$(ip -o -4 addr show to " + n.Addr + " | awk '{print $2}'); " +
			"ip -6 addr add " + six[n.Name] + "/64 dev $dev nodad"
		run(t, skepBinary(t), "dev", "exec", "--name", s.name, n.Name, "--", "sh", "-c", script)
	}
	// The mesh has IPv6 if the ingress network does.
	run(t, "curl", "-sS", "--fail", "--max-time", "20", "--unix-socket", s.node(t, m).Socket, "-X", "DELETE", "http://localhost/networks/ingress")
	s.docker(t, m, "network", "create", "-d", "overlay", "--ingress", "--ipv6", "--subnet", "10.70.0.0/24", "--subnet", "fd00:70::/64", "ingress")
	s.docker(t, m, "network", "create", "-d", "overlay", "--ipv6", "--subnet", "10.71.0.0/24", "--subnet", "fd00:71::/64", "six")
	s.docker(t, m, "service", "create", "--name", "both", "--mode", "global", "--network", "six", "--publish", "9400:80/tcp", "--publish", "9400:80/udp", testimage.V1, "whois", ":80")
	s.wantRunning(t, m, "both", len(s.nodes), 30*time.Second)
	for _, from := range s.nodes {
		for name, want := range map[string]int{"both": 2, "tasks.both": 2 * len(s.nodes)} { // an address of each family
			out, err := s.exec(t, from.Name, "both", "/bin/testapp", "resolve", name)
			if n := len(strings.Fields(out)); err != nil || n != want || strings.Count(out, "fd00:71::") != want/2 {
				t.Errorf("%s: %s is %q, %v", from.Name, name, out, err)
			}
			for addr := range strings.FieldsSeq(out) {
				for _, network := range []string{"tcp", "udp"} {
					if out, err := s.exec(t, from.Name, "both", "/bin/testapp", "who", network, "0", net.JoinHostPort(addr, "80")); err != nil {
						t.Errorf("%s to %s by %s: %v %s", from.Name, addr, network, err, out)
					}
				}
			}
		}
		for _, network := range []string{"tcp", "udp"} {
			eventually(t, 20*time.Second, from.Name+" through its own loopback by "+network, func() string {
				if answers, err := s.ask(t, app, from.Name, network, 0, "[::1]:9400", "127.0.0.1:9400"); err != nil || len(answers) != 10 {
					return fmt.Sprint(answers, err)
				}
				return ""
			})
		}
		for _, to := range s.nodes {
			for _, network := range []string{"tcp", "udp"} {
				eventually(t, 20*time.Second, fmt.Sprintf("%s through %s by %s and IPv6", from.Name, to.Name, network), func() string {
					answers, err := s.ask(t, app, from.Name, network, 0, net.JoinHostPort(six[to.Name], "9400"), to.Addr+":9400")
					if err != nil || len(answers) != 10 {
						return fmt.Sprint(answers, err)
					}
					if from.Name != to.Name && network == "tcp" && answers[0].client != six[from.Name] {
						return fmt.Sprint("the task sees ", answers[0].client)
					}
					return ""
				})
			}
		}
	}
	s.docker(t, m, "service", "rm", "both")
	s.wantGone(t, m, "six", 30*time.Second)
}
