package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/skep-dev/skep/e2e/testimage"
)

// TestEncryption takes an encrypted network of three nodes through what it promises: names,
// addresses and balancing as on any other, and no clear packet out or in, whatever ends.
func TestEncryption(t *testing.T) {
	s := newSwarm(t, 1, 2)
	m := s.byRole("manager")[0]
	s.loadImages(t)
	s.docker(t, m, "network", "create", "-d", "overlay", "--attachable", "--opt", "encrypted", "sealed")
	s.docker(t, m, "service", "create", "-d", "--name", "api", "--mode", "global", "--network", "sealed", testimage.V1, "serve", ":80")
	s.docker(t, m, "service", "create", "-d", "--name", "probe", "--mode", "global", "--network", "sealed", testimage.V1)
	s.wantRunning(t, m, "api", 3, 60*time.Second)
	s.wantRunning(t, m, "probe", 3, 60*time.Second)
	steps := []struct {
		name string
		run  func(*testing.T, *swarm, string)
	}{
		{"Reach", testSealedReach},
		{"DaemonKilled", testSealedDaemonKilled},
		{"NothingLeft", testSealedNothingLeft},
	}
	for _, step := range steps {
		if !t.Run(step.name, func(t *testing.T) { step.run(t, s, m) }) {
			t.Logf("step %s failed; going on, later steps may fail because of it", step.name)
		}
	}
}

// wantAllReached waits until a node's probe gets answers from all n tasks of api by name.
func (s *swarm) wantAllReached(t *testing.T, node string, n int) {
	t.Helper()
	eventually(t, 30*time.Second, fmt.Sprintf("%s reaches %d tasks", node, n), func() string {
		out, err := s.exec(t, node, "probe", "/bin/testapp", "resolve", "tasks.api")
		addresses := strings.Fields(out)
		if err != nil || len(addresses) != n {
			return fmt.Sprintf("tasks.api is %v: %v", addresses, err)
		}
		for _, a := range addresses {
			if out, err := s.exec(t, node, "probe", "/bin/testapp", "get", "http://"+a+"/"); err != nil {
				return fmt.Sprintf("%s: %v %s", a, err, out)
			}
		}
		return ""
	})
}

func testSealedReach(t *testing.T, s *swarm, m string) {
	if got := s.docker(t, m, "network", "inspect", "--format", `{{index .Options "skep.encryption"}}`, "sealed"); got != "wireguard" && got != "esp" {
		t.Errorf("the network is encrypted by %q", got)
	}
	for _, n := range s.nodes {
		s.wantAllReached(t, n.Name, 3)
		seen := map[string]bool{}
		for range 12 {
			out, err := s.exec(t, n.Name, "probe", "/bin/testapp", "get", "http://api/")
			if err != nil {
				t.Fatalf("%s does not reach the service address: %v", n.Name, err)
			}
			seen[strings.Fields(out + " ?")[0]] = true
		}
		if len(seen) < 2 {
			t.Errorf("twelve requests from %s all went to %v", n.Name, seen)
		}
		if out, err := s.exec(t, n.Name, "probe", "busybox", "ping", "-c", "1", "-W", "3", s.address(t, n.Name, "api")); err != nil {
			t.Errorf("%s: the service address does not answer ping: %v %s", n.Name, err, out)
		}
	}
}

// address resolves a name in the probe of a node.
func (s *swarm) address(t *testing.T, node, name string) string {
	t.Helper()
	out, err := s.exec(t, node, "probe", "/bin/testapp", "resolve", name)
	if err != nil {
		t.Fatalf("%s: resolve %s: %v", node, name, err)
	}
	return strings.Fields(out)[0]
}

// devices returns the processes that are WireGuard devices of a node.
func devices(t *testing.T, node devNode) []string {
	t.Helper()
	var pids []string
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range all {
		data, err := os.ReadFile(path)
		args := strings.Split(string(data), "\x00")
		if err == nil && len(args) > 3 && args[1] == "wireguard" && strings.Contains(args[2], "/"+node.Name+"/") {
			pids = append(pids, filepath.Base(filepath.Dir(path)))
		}
	}
	slices.Sort(pids)
	return pids
}

// testSealedDaemonKilled kills a daemon under load: its containers' traffic goes on, and the
// daemon finds the device again when it is back.
func testSealedDaemonKilled(t *testing.T, s *swarm, _ string) {
	w, other := s.byRole("worker")[0], s.byRole("worker")[1]
	before := devices(t, s.node(t, w))
	far := s.own(t, w, "api")
	done := make(chan string, 1)
	go func() {
		out, err := s.exec(t, other, "probe", "/bin/testapp", "load", "http://"+far+"/", "6s", "100")
		done <- fmt.Sprint(out, " ", errText(err))
	}()
	s.dev(t, "kill", w)
	s.dev(t, "start", w)
	if out := <-done; !strings.Contains(out, " 0 failed") {
		t.Errorf("load while the daemon was killed: %s", out)
	}
	s.wantAllReached(t, other, 3)
	if after := devices(t, s.node(t, w)); len(before) != 1 || !slices.Equal(before, after) {
		t.Errorf("devices of %s: %v, before the daemon was killed %v", w, after, before)
	}
}

// own returns the address in the network sealed of a service's task on a node.
func (s *swarm) own(t *testing.T, node, service string) string {
	t.Helper()
	id := s.docker(t, node, "ps", "-q", "--filter", "name="+service+".")
	return s.docker(t, node, "inspect", "--format", "{{.NetworkSettings.Networks.sealed.IPAddress}}", id)
}

func testSealedNothingLeft(t *testing.T, s *swarm, m string) {
	s.docker(t, m, "service", "rm", "api", "probe")
	for _, n := range s.nodes {
		eventually(t, 30*time.Second, "the devices of "+n.Name+" end", func() string { return strings.Join(devices(t, n), " ") })
	}
	eventually(t, 30*time.Second, "the network is removed", func() string {
		_, err := s.tryDocker(t, 20*time.Second, m, "network", "rm", "sealed")
		return errText(err)
	})
}
