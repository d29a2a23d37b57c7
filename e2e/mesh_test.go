package e2e

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

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
	out, err := try(t, time.Minute, skepBinary(t), args...)
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
		answers, err := s.ask(t, app, m, network, 40000, all[1:]...)
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
