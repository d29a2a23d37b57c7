package e2e

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/skep-dev/skep/e2e/testimage"
)

// TestNetwork takes the networks of a swarm of three managers and two workers through what
// their users ask of them.
func TestNetwork(t *testing.T) {
	s := newSwarm(t, 3, 2)
	m := s.byRole("manager")[0]
	s.loadImages(t)
	s.docker(t, m, "network", "create", "-d", "overlay", "--attachable", "back")
	steps := []struct {
		name string
		run  func(*testing.T, *swarm, string)
	}{
		{"Refusals", testNetworkRefusals},
		{"NamesAndAddresses", testNames},
		{"Mesh", testMesh},
		{"NoRequestLost", testNoRequestLost},
		{"Isolation", testIsolation},
		{"Removal", testNetworkRemoval},
	}
	for _, step := range steps {
		if !t.Run(step.name, func(t *testing.T) { step.run(t, s, m) }) {
			t.Logf("step %s failed; going on, later steps may fail because of it", step.name)
		}
	}
}

func testNetworkRefusals(t *testing.T, s *swarm, m string) {
	for _, c := range []struct{ args, want string }{
		{"network create -d overlay back", "already exists"},
		{"network create -d overlay --subnet 10.9.0.0/24 --gateway 10.8.0.1 odd", "gateway"},
		{"network rm ingress-of-nobody", "not found"},
		{"service create -d --name n --network nowhere " + testimage.V1, "not found"},
		{"service create -d --name n --network ingress " + testimage.V1, "ingress"},
	} {
		out, err := s.tryDocker(t, 20*time.Second, m, strings.Fields(c.args)...)
		if err == nil || !strings.Contains(out+err.Error(), c.want) {
			t.Errorf("docker %s: %v: %s; want a refusal that says %q", c.args, err, out, c.want)
		}
	}
}

// wantGone removes a network once its tasks have left it, within a time.
func (s *swarm) wantGone(t *testing.T, manager, network string, within time.Duration) {
	t.Helper()
	eventually(t, within, "network "+network+" can be removed", func() string {
		_, err := s.tryDocker(t, 20*time.Second, manager, "network", "rm", network)
		return errText(err)
	})
}

// exec runs a command in the container of a service's only task on a node.
func (s *swarm) exec(t *testing.T, node, service string, command ...string) (string, error) {
	t.Helper()
	id := s.docker(t, node, "ps", "-q", "--filter", "name="+service+".")
	if len(strings.Fields(id)) != 1 {
		t.Fatalf("containers of %s on %s: %q", service, node, id)
	}
	out, err := s.tryDocker(t, 20*time.Second, node, append([]string{"exec", id}, command...)...)
	return strings.TrimSpace(out), err
}

func testNames(t *testing.T, s *swarm, m string) {
	s.docker(t, m, "service", "create", "--name", "api", "--mode", "global", "--network", "back", testimage.V1, "serve", ":80")
	s.docker(t, m, "service", "create", "--name", "probe", "--mode", "global", "--network", "name=back,alias=seeker", testimage.V1)
	hosts := map[string]bool{}
	for _, n := range s.nodes {
		for _, one := range s.nodes { // every task answers from every node, by its own name and address
			name := ""
			for _, task := range s.wantRunning(t, m, "api", len(s.nodes), 30*time.Second) {
				if task.Node == one.Name {
					name = fmt.Sprintf("api.%s.%s", s.nodeID(t, m, one.Name), task.ID)
				}
			}
			out, err := s.exec(t, n.Name, "probe", "/bin/testapp", "get", "http://"+name+"/")
			if err != nil {
				t.Errorf("%s does not reach %s: %v", n.Name, name, err)
			}
			hosts[strings.Fields(out + " ?")[0]] = true
		}
		seen := map[string]bool{}
		for range 20 {
			out, err := s.exec(t, n.Name, "probe", "/bin/testapp", "get", "http://api/")
			if err != nil {
				t.Fatalf("%s does not reach the service address: %v", n.Name, err)
			}
			seen[strings.Fields(out + " ?")[0]] = true
		}
		if len(seen) < 2 {
			t.Errorf("twenty requests from %s all went to %v", n.Name, seen)
		}
		for name, want := range map[string]int{"api": 1, "seeker": 1, "tasks.api": len(s.nodes)} {
			out, err := s.exec(t, n.Name, "probe", "/bin/testapp", "resolve", name)
			if got := len(strings.Fields(out)); err != nil || got != want {
				t.Errorf("%s: %s has %d addresses, want %d: %v\n%s", n.Name, name, got, want, err, out)
			}
			if name != "api" {
				continue
			}
			if out, err := s.exec(t, n.Name, "probe", "busybox", "ping", "-c", "1", "-W", "3", out); err != nil {
				t.Errorf("%s: the service address does not answer ping: %v %s", n.Name, err, out)
			}
		}
	}
	if len(hosts) != len(s.nodes) {
		t.Errorf("%d tasks answered by name, want %d: %v", len(hosts), len(s.nodes), hosts)
	}
}

func testMesh(t *testing.T, s *swarm, m string) {
	// It has no check and begins to listen late: nobody must be led to it before.
	s.docker(t, m, "service", "create", "--name", "web", "--replicas", "4", "--network", "back", "--publish", "8080:80", testimage.V1, "serve", ":80", "1s")
	s.wantRunning(t, m, "web", 4, 30*time.Second)
	for _, n := range s.nodes {
		seen := map[string]bool{}
		eventually(t, 10*time.Second, "the port of "+n.Name+" leads to two tasks or more", func() string {
			out, err := try(t, 20*time.Second, skepBinary(t), "dev", "exec", "--name", s.name, m, "--", "curl", "-sS", "--max-time", "3", "http://"+n.Addr+":8080/")
			if err != nil {
				return err.Error()
			}
			seen[strings.Fields(out + " ?")[0]] = true
			if len(seen) < 2 {
				return fmt.Sprint(seen)
			}
			return ""
		})
	}
	if _, err := s.tryDocker(t, 20*time.Second, m, "service", "create", "-d", "--name", "thief", "--publish", "8080:80", testimage.V1); err == nil || !strings.Contains(err.Error(), "already in use by service 'web'") {
		t.Errorf("a second service with the same port: %v", err)
	}
}

// testNoRequestLost asks a service at 500 requests a second, by its name from inside and by
// its port from outside, while it is updated, scaled and moved, and a daemon and the leader
// are killed.
func testNoRequestLost(t *testing.T, s *swarm, m string) {
	app := testapp(t)
	w := s.byRole("worker")
	leader, err := s.leader(t, m)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range s.byRole("manager") { // this one goes on while the leader dies
		if n != leader {
			m = n
		}
	}
	const length = "45s"
	var group sync.WaitGroup
	results := make([]string, 2)
	group.Go(func() {
		out, err := try(t, 2*time.Minute, skepBinary(t), "dev", "exec", "--name", s.name, m, "--", app, "load", "http://"+s.node(t, w[0]).Addr+":8080/", length, "500")
		results[0] = fmt.Sprint("port: ", out, errText(err))
	})
	probe := s.docker(t, m, "ps", "-q", "--filter", "name=probe.")
	group.Go(func() {
		out, err := s.tryDocker(t, 2*time.Minute, m, "exec", probe, "/bin/testapp", "load", "http://web/", length, "500")
		results[1] = fmt.Sprint("name: ", out, errText(err))
	})
	begin := time.Now()
	say := func(what string) { t.Logf("%s %s", time.Now().Format("15:04:05.000"), what) }
	say("update, stop first")
	s.docker(t, m, "service", "update", "--force", "--update-parallelism", "1", "--update-monitor", "500ms", "--update-order", "stop-first", "web")
	say("update, start first")
	s.docker(t, m, "service", "update", "--force", "--update-order", "start-first", "web")
	say("scale")
	s.docker(t, m, "service", "scale", "web=2")
	s.docker(t, m, "service", "scale", "web=4")
	say("drain")
	s.docker(t, m, "node", "update", "--availability", "drain", w[1])
	s.wantRunning(t, m, "web", 4, 30*time.Second)
	s.docker(t, m, "node", "update", "--availability", "active", w[1])
	say("kill a daemon")
	s.dev(t, "kill", w[0])
	time.Sleep(500 * time.Millisecond)
	s.dev(t, "start", w[0])
	say("kill the leader's daemon")
	s.dev(t, "kill", leader)
	time.Sleep(2 * time.Second)
	s.dev(t, "start", leader)
	say("done")
	if took := time.Since(begin); took > 44*time.Second {
		t.Errorf("the changes took %s, longer than the load", took)
	}
	group.Wait()
	for _, r := range results {
		if !strings.Contains(r, " requests, 0 failed") {
			t.Errorf("requests were lost: %s", r)
		}
		t.Log(strings.TrimSpace(r))
	}
	for _, n := range s.byRole("manager") {
		s.wantReady(t, n, leader)
	}
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// testIsolation: two networks with one subnet do not meet.
func testIsolation(t *testing.T, s *swarm, m string) {
	s.docker(t, m, "network", "create", "-d", "overlay", "--internal", "closed")
	s.docker(t, m, "service", "create", "--name", "hermit", "--network", "closed", testimage.V1, "serve", ":80")
	one := s.wantRunning(t, m, "hermit", 1, 30*time.Second)[0]
	if out, err := s.exec(t, m, "probe", "/bin/testapp", "get", "http://hermit/"); err == nil {
		t.Errorf("a name of another network resolved: %s", out)
	}
	if out, err := s.exec(t, one.Node, "hermit", "/bin/testapp", "get", "http://api/"); err == nil {
		t.Errorf("a name of another network resolved: %s", out)
	}
	if out, _ := s.exec(t, one.Node, "hermit", "ip", "route"); strings.Contains(out, "default") {
		t.Errorf("an internal network has a way out: %s", out)
	}
	s.docker(t, m, "service", "rm", "hermit")
}

func testNetworkRemoval(t *testing.T, s *swarm, m string) {
	if _, err := s.tryDocker(t, 20*time.Second, m, "network", "rm", "back"); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("removing a network in use: %v", err)
	}
	s.docker(t, m, "service", "rm", "api", "probe", "web")
	s.docker(t, m, "network", "rm", "back", "closed")
	for _, n := range s.nodes {
		eventually(t, 30*time.Second, "nothing of the networks is left on "+n.Name, func() string {
			if left := s.docker(t, n.Name, "ps", "-aq"); left != "" {
				return "containers " + left
			}
			if left := s.docker(t, n.Name, "network", "ls", "-q", "--filter", "name=back"); left != "" {
				return "network " + left
			}
			return ""
		})
	}
}
