package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/skep-dev/skep/e2e/testimage"
)

// TestInteropMixed has Skep's nodes and a Docker Engine share overlay networks. The engine's
// kernel has no IPVS here, so what it balances itself is left out: service addresses in its
// containers, and published ports on its host.
func TestInteropMixed(t *testing.T) {
	s := newSwarm(t, 1, 1)
	d := s.addDocker(t, "d1")
	s.loadImages(t)
	s.join(t, "d1", "m1", "worker")
	s.docker(t, "m1", "network", "create", "--driver", "overlay", "--attachable", "net")
	s.greet(t, "every", "--mode", "global", "--endpoint-mode", "dnsrr", "--network", "name=net,alias=nick")
	for _, step := range []struct {
		name string
		run  func(t *testing.T, s *swarm, d *dockerEngine)
	}{
		{"EachOther", mixedEachOther},
		{"ServiceAddress", mixedServiceAddress},
		{"TaskMoves", mixedTaskMoves},
		{"PublishedPorts", mixedPublishedPorts},
		{"Containers", mixedContainers},
		{"Refused", mixedRefused},
		{"Killed", mixedKilled},
		{"NothingLeft", mixedNothingLeft},
	} {
		if !t.Run(step.name, func(t *testing.T) { step.run(t, s, d) }) {
			t.FailNow()
		}
	}
}

// greet makes a service whose tasks answer with the name of their node.
func (s *swarm) greet(t *testing.T, name string, flags ...string) {
	t.Helper()
	s.create(t, "m1", name, append([]string{"--detach", "--quiet", "--env", "GREETING={{.Node.Hostname}}"}, flags...), "serve")
}

// survey asks from the container of service every on a node.
func (s *swarm) survey(t *testing.T, node string, what ...string) ([][]string, error) {
	t.Helper()
	out, err := s.exec(t, node, "every", append([]string{"/bin/testapp", "survey"}, what...)...)
	var lines [][]string
	for line := range strings.Lines(out) {
		lines = append(lines, strings.Fields(line))
	}
	if err == nil && len(lines) != len(what) {
		err = fmt.Errorf("the survey says %q", out)
	}
	return lines, err
}

// resolve returns the addresses that a name has in the container of service every on a node.
func (s *swarm) resolve(t *testing.T, node, name string) ([]string, error) {
	t.Helper()
	out, err := s.exec(t, node, "every", "/bin/testapp", "resolve", name)
	return strings.Fields(out), err
}

// wantTasks waits until a name means just the tasks on some nodes to one of them, and all of
// these answer it.
func (s *swarm) wantTasks(t *testing.T, from, name string, nodes ...string) {
	t.Helper()
	slices.Sort(nodes)
	eventually(t, 30*time.Second, fmt.Sprintf("%s reaches %s on %v", from, name, nodes), func() string {
		addrs, err := s.resolve(t, from, name)
		if err != nil || len(addrs) != len(nodes) {
			return fmt.Sprint(addrs, err)
		}
		var servers []string
		for _, a := range addrs {
			servers = append(servers, a+":80")
		}
		lines, err := s.survey(t, from, servers...)
		if err != nil {
			return err.Error()
		}
		var answers []string
		for _, l := range lines {
			answers = append(answers, l[1])
		}
		if slices.Sort(answers); !slices.Equal(answers, nodes) {
			return fmt.Sprint(lines)
		}
		return ""
	})
}

func mixedEachOther(t *testing.T, s *swarm, _ *dockerEngine) {
	s.wantRunning(t, "m1", "every", 3, time.Minute)
	for _, from := range []string{"m1", "w1", "d1"} {
		for _, name := range []string{"every", "tasks.every", "nick", "tasks.nick"} {
			s.wantTasks(t, from, name, "m1", "w1", "d1")
		}
		s.wantLarge(t, from)
	}
	s.wantNetCheckClean(t, "m1")
}

// wantLarge pings all tasks from a node with packets that must be cut into several.
func (s *swarm) wantLarge(t *testing.T, from string) {
	t.Helper()
	addrs, err := s.resolve(t, from, "every")
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if out, err := s.exec(t, from, "every", "busybox", "ping", "-c", "1", "-W", "3", "-s", "4000", a); err != nil {
			t.Errorf("%s pings %s: %v %s", from, a, err, out)
		}
	}
}

// mixedServiceAddress: a service address in Skep's containers leads to tasks on the engine.
func mixedServiceAddress(t *testing.T, s *swarm, d *dockerEngine) {
	s.greet(t, "back", append(on("d1"), "--replicas", "2", "--network", "net")...)
	s.wantRunning(t, "m1", "back", 2, time.Minute)
	for _, from := range []string{"m1", "w1"} {
		eventually(t, 20*time.Second, from+" reaches the service address", func() string {
			lines, err := s.survey(t, from, "back")
			if err != nil {
				return err.Error()
			}
			if l := lines[0]; strings.Contains(l[1], ",") || strings.Count(l[2], ",") != 1 || l[3] != "d1" {
				return fmt.Sprint(l)
			}
			return ""
		})
	}
	s.wantTasks(t, "d1", "tasks.back", "d1", "d1")
	s.docker(t, "m1", "service", "rm", "back")
	// The engine's IPVS would lead its containers to tasks of Skep's from its address in the network.
	addrs, err := s.resolve(t, "w1", "every")
	if err != nil {
		t.Fatal(err)
	}
	var answers []string
	for _, a := range addrs {
		out, err := d.inside(t, "lb_"+s.docker(t, "m1", "network", "inspect", "--format", "{{.Id}}", "net")[:9], "curl", "-sS", "--max-time", "5", "http://"+a+"/")
		if err != nil {
			t.Errorf("%s from the address of the engine: %v, %s", a, err, out)
		}
		answers = append(answers, strings.Fields(out + " ? ?")[1])
	}
	if slices.Sort(answers); !slices.Equal(answers, []string{"d1", "m1", "w1"}) {
		t.Errorf("the address of the engine gets answers from %v", answers)
	}
}

// mixedTaskMoves: the name follows a task from a node of one kind to one of the other, on all.
func mixedTaskMoves(t *testing.T, s *swarm, _ *dockerEngine) {
	s.greet(t, "mover", append(on("d1"), "--endpoint-mode", "dnsrr", "--network", "net")...)
	at := "d1"
	for _, next := range []string{"w1", "d1", ""} {
		for _, from := range []string{"m1", "w1", "d1"} {
			s.wantTasks(t, from, "mover", at)
		}
		if next != "" {
			s.docker(t, "m1", "service", "update", "--detach", "--no-resolve-image",
				"--constraint-rm", "node.hostname=="+at, "--constraint-add", "node.hostname=="+next, "mover")
		}
		at = next
	}
	s.docker(t, "m1", "service", "rm", "mover")
}

// mixedPublishedPorts: a port of Skep's nodes leads to a task on the engine, and what the
// engine's IPVS would lead to a task of Skep's arrives.
func mixedPublishedPorts(t *testing.T, s *swarm, d *dockerEngine) {
	s.greet(t, "outer", append(on("d1"), "--publish", "8080:80")...)
	s.greet(t, "inner", append(on("w1"), "--publish", "8081:80")...)
	s.wantRunning(t, "m1", "outer", 1, time.Minute)
	inner := s.wantRunning(t, "m1", "inner", 1, time.Minute)[0]
	for port, at := range map[string]string{"8080": "d1", "8081": "w1"} {
		for _, entry := range []string{"m1", "w1"} {
			eventually(t, 20*time.Second, "port "+port+" of "+entry+" leads to "+at, func() string {
				out, err := s.fetchOn(t, "m1", "http://"+s.node(t, entry).Addr+":"+port+"/")
				if err != nil || !strings.Contains(out, " "+at+" ") {
					return fmt.Sprint(out, err)
				}
				return ""
			})
		}
	}
	// IPVS would keep the published port, and put the address of this namespace in the client's place.
	prefix := s.docker(t, "m1", "inspect", "--format", "{{range .NetworksAttachments}}{{index .Addresses 0}}{{end}}", inner.ID)
	addr, _, _ := strings.Cut(prefix, "/")
	eventually(t, 20*time.Second, "the engine leads to the task on w1", func() string {
		out, err := d.inside(t, "ingress_sbox", "curl", "-sS", "--max-time", "5", "http://"+addr+":8081/")
		if err != nil || !strings.Contains(out, " w1 10.0.0.") {
			return fmt.Sprint(out, err)
		}
		return ""
	})
	s.docker(t, "m1", "service", "rm", "outer", "inner")
}

// inside runs a command in a namespace of the engine's, which only its own mounts show.
func (e *dockerEngine) inside(t *testing.T, ns string, command ...string) (string, error) {
	t.Helper()
	unshare := strconv.Itoa(e.cmd.Process.Pid)
	children, err := os.ReadFile(filepath.Join("/proc", unshare, "task", unshare, "children"))
	pids := strings.Fields(string(children))
	if err != nil || len(pids) == 0 {
		t.Fatalf("find Docker Engine's process: %v", err)
	}
	args := []string{"--mount", "--target", pids[0], "nsenter", "--net=" + filepath.Join(e.node.Dir, "run", "netns", ns)}
	return try(t, 20*time.Second, "nsenter", append(args, command...)...)
}

// mixedContainers: containers that are no tasks take part as well.
func mixedContainers(t *testing.T, s *swarm, _ *dockerEngine) {
	for _, node := range []string{"m1", "d1"} {
		name := "guest-" + node
		s.docker(t, node, "run", "--detach", "--name", name, "--network", "net", "--env", "GREETING="+node, testimage.V1, "serve")
		addr := s.docker(t, node, "inspect", "--format", "{{.NetworkSettings.Networks.net.IPAddress}}", name)
		for _, from := range []string{"m1", "w1", "d1"} {
			eventually(t, 20*time.Second, from+" reaches "+name, func() string {
				lines, err := s.survey(t, from, addr+":80")
				if err != nil || lines[0][1] != node {
					return fmt.Sprint(lines, err)
				}
				return ""
			})
		}
		if addrs := strings.Fields(s.docker(t, node, "exec", name, "/bin/testapp", "resolve", "every")); len(addrs) != 3 {
			t.Errorf("%s is told that every has %q", name, addrs)
		}
		s.docker(t, node, "rm", "--force", name)
	}
}

// mixedRefused: what Docker Engines cannot take part in is said by name.
func mixedRefused(t *testing.T, s *swarm, _ *dockerEngine) {
	s.docker(t, "m1", "network", "create", "--driver", "overlay", "--attachable", "--opt", "encrypted", "sealed")
	s.docker(t, "m1", "network", "create", "--driver", "overlay", "--attachable", "--ipv6", "--subnet", "fd00:5::/64", "six")
	for network, why := range map[string]string{"sealed": "is encrypted", "six": "has IPv6"} {
		s.greet(t, "on-"+network, append(on("d1"), "--network", network)...)
		s.wantPending(t, "m1", "on-"+network, "network "+network+" "+why+" and does not reach 1 node with Docker Engine")
		s.docker(t, "m1", "service", "rm", "on-"+network)
		s.refused(t, "d1", "network "+network+" "+why+" and does not reach Docker Engine", "run", "--rm", "--network", network, testimage.V1, "exit", "0")
		s.wantGone(t, "m1", network, 30*time.Second)
	}
}

// mixedKilled: an engine that loses power is forgotten, and known again when it is back; a
// Skep daemon that is killed stays known.
func mixedKilled(t *testing.T, s *swarm, d *dockerEngine) {
	if err := d.kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.wantNode(t, "m1", "d1", "Down", "Active")
	for _, from := range []string{"m1", "w1"} {
		s.wantTasks(t, from, "every", "m1", "w1")
	}
	s.wantNetCheckClean(t, "m1")
	d.start(t, engineFiles(t))
	s.wantNode(t, "m1", "d1", "Ready", "Active")
	s.wantRunning(t, "m1", "every", 3, time.Minute)
	s.dev(t, "kill", "w1")
	s.dev(t, "start", "w1")
	s.wantNode(t, "m1", "w1", "Ready", "Active")
	for _, from := range []string{"m1", "w1", "d1"} {
		s.wantTasks(t, from, "every", "m1", "w1", "d1")
	}
}

// mixedNothingLeft: without services nobody keeps anything of the network.
func mixedNothingLeft(t *testing.T, s *swarm, _ *dockerEngine) {
	begin := time.Now()
	s.docker(t, "m1", "service", "rm", "every")
	for _, node := range []string{"m1", "w1", "d1"} {
		s.gone(t, node, "every")
	}
	if took := time.Since(begin); took > 15*time.Second { // nobody waits for the engine to report
		t.Errorf("the tasks took %s to stop", took)
	}
	eventually(t, 30*time.Second, "the engine has left the network", func() string {
		out, err := s.tryDocker(t, 20*time.Second, "d1", "network", "ls", "--format", "{{.Name}}")
		if err != nil || slices.Contains(strings.Fields(out), "net") {
			return fmt.Sprint(out, err)
		}
		return ""
	})
	s.wantNetCheckClean(t, "m1")
	s.wantGone(t, "m1", "net", 30*time.Second)
	if out := s.docker(t, "m1", "node", "inspect", "--format", "{{.Status.State}}", "d1"); out != "ready" {
		t.Errorf("the engine is %s", out)
	}
}
