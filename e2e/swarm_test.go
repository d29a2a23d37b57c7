// Package e2e runs real daemons in network namespaces with real containers and drives
// them with the stock docker client, as a person would. It needs root and the binaries
// that `make build` leaves in bin.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/skep-dev/skep/e2e/testimage"
)

// swarm is a `skep dev` swarm under test.
type swarm struct {
	name    string
	nodes   []devNode
	engines []*dockerEngine // Docker's among the nodes
}

// devNode is one line of `skep dev ls --json`.
type devNode struct {
	Name   string `json:"name"`
	Role   string `json:"role"`
	Socket string `json:"socket"`
	Addr   string `json:"addr"`
	PID    int    `json:"pid"`
	State  string `json:"state"`
	Dir    string `json:"dir"`
}

func skepBinary(t *testing.T) string {
	t.Helper()
	path, err := filepath.Abs("../bin/skep")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Skip("bin/skep is not built: run make build")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root for namespaces and containers")
	}
	return path
}

// run executes a command and returns its standard output; it fails the test on an error.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := try(t, 3*time.Minute, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// try is run that hands the error to the caller; output then holds standard error too.
func try(t *testing.T, timeout time.Duration, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "DOCKER_CONFIG="+os.TempDir(), "DOCKER_HOST=", "DOCKER_CONTEXT=")
	cmd.WaitDelay = 5 * time.Second
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String() + stderr.String(), fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// newSwarm brings up managers and workers and removes every trace of them afterwards.
func newSwarm(t *testing.T, managers, workers int, more ...string) *swarm {
	t.Helper()
	skep := skepBinary(t)
	s := &swarm{name: fmt.Sprintf("e2e%d", os.Getpid()%10000)}
	t.Cleanup(func() {
		if t.Failed() {
			s.dumpLogs(t)
		}
		cmd := exec.Command(skep, "dev", "down", "--name", s.name)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("dev down: %v\n%s", err, out)
		}
	})
	run(t, skep, append([]string{"dev", "up", "--name", s.name, "--managers", fmt.Sprint(managers), "--workers", fmt.Sprint(workers)}, more...)...)
	s.refresh(t)
	return s
}

func (s *swarm) refresh(t *testing.T) {
	t.Helper()
	out := run(t, skepBinary(t), "dev", "ls", "--name", s.name, "--json")
	s.nodes = nil
	if err := json.Unmarshal([]byte(out), &s.nodes); err != nil {
		t.Fatalf("dev ls: %v in %s", err, out)
	}
	for _, e := range s.engines {
		s.nodes = append(s.nodes, e.node)
	}
}

func (s *swarm) dumpLogs(t *testing.T) {
	t.Helper()
	for _, n := range s.nodes {
		data, err := os.ReadFile(filepath.Join(n.Dir, "daemon.log"))
		if err != nil {
			continue
		}
		lines := strings.Split(string(data), "\n")
		t.Logf("--- %s\n%s", n.Name, strings.Join(lines[max(0, len(lines)-40):], "\n"))
	}
}

func (s *swarm) dev(t *testing.T, command, node string, more ...string) {
	t.Helper()
	run(t, skepBinary(t), append([]string{"dev", command, "--name", s.name, node}, more...)...)
}

func (s *swarm) node(t *testing.T, name string) devNode {
	t.Helper()
	for _, n := range s.nodes {
		if n.Name == name {
			return n
		}
	}
	t.Fatalf("no node %s in %v", name, s.nodes)
	return devNode{}
}

// byRole returns the names of the nodes that were made with a role.
func (s *swarm) byRole(role string) []string {
	var names []string
	for _, n := range s.nodes {
		if n.Role == role {
			names = append(names, n.Name)
		}
	}
	return names
}

// docker runs the docker client against a node's own socket.
func (s *swarm) docker(t *testing.T, node string, args ...string) string {
	t.Helper()
	return strings.TrimSpace(run(t, "docker", append([]string{"-H", "unix://" + s.node(t, node).Socket}, args...)...))
}

func (s *swarm) tryDocker(t *testing.T, timeout time.Duration, node string, args ...string) (string, error) {
	t.Helper()
	return try(t, timeout, "docker", append([]string{"-H", "unix://" + s.node(t, node).Socket}, args...)...)
}

// loadImages puts the test images on every node.
func (s *swarm) loadImages(t *testing.T) {
	t.Helper()
	archive := guestImages
	if _, err := os.Stat(archive); err != nil { // no guest
		archive = filepath.Join(t.TempDir(), "images.tar")
		if err := testimage.Write(t.Context(), archive); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range s.nodes {
		s.docker(t, n.Name, "load", "-i", archive)
	}
}

// eventually waits until ok returns "" and fails with its last answer after timeout.
func eventually(t *testing.T, timeout time.Duration, what string, ok func() string) {
	t.Helper()
	begin := time.Now()
	last := ""
	for time.Since(begin) < timeout {
		if last = ok(); last == "" {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatalf("%s: not within %s: %s", what, timeout, last)
}

// task is one line of `docker service ps`.
type task struct{ ID, Name, Image, Node, DesiredState, CurrentState, Error string }

func (s *swarm) tasks(t *testing.T, manager, service string) ([]task, error) {
	t.Helper()
	out, err := s.tryDocker(t, 20*time.Second, manager, "service", "ps", "--no-trunc", "--format", "{{json .}}", service)
	if err != nil {
		return nil, err
	}
	var tasks []task
	for line := range strings.Lines(out) {
		var one task
		if err := json.Unmarshal([]byte(line), &one); err != nil {
			return nil, err
		}
		tasks = append(tasks, one)
	}
	return tasks, nil
}

// running returns the tasks that are and shall be running.
func (s *swarm) running(t *testing.T, manager, service string) ([]task, error) {
	t.Helper()
	all, err := s.tasks(t, manager, service)
	var up []task
	for _, one := range all {
		if strings.HasPrefix(one.CurrentState, "Running") && one.DesiredState == "Running" {
			up = append(up, one)
		}
	}
	return up, err
}

// wantRunning waits for exactly n running tasks and returns them.
func (s *swarm) wantRunning(t *testing.T, manager, service string, n int, timeout time.Duration) []task {
	t.Helper()
	var up []task
	eventually(t, timeout, fmt.Sprintf("%s has %d running tasks", service, n), func() string {
		var err error
		up, err = s.running(t, manager, service)
		if err != nil {
			return err.Error()
		}
		if len(up) != n {
			return fmt.Sprintf("%d are running", len(up))
		}
		return ""
	})
	return up
}

// leader returns the name of the managers' leader as the node `from` sees it.
func (s *swarm) leader(t *testing.T, from string) (string, error) {
	t.Helper()
	out, err := s.tryDocker(t, 20*time.Second, from, "node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if host, ok := strings.CutSuffix(strings.TrimSpace(line), " Leader"); ok {
			return host, nil
		}
	}
	return "", fmt.Errorf("no leader in %q", out)
}
