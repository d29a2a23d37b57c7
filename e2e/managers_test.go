package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/skep-dev/skep/e2e/testimage"
)

// TestManagers lets a swarm grow from one manager to seven and shrink back to one, by
// promotion, joining, demotion, leaving and removal, while a service runs untouched.
func TestManagers(t *testing.T) {
	s := newSwarm(t, 1, 6)
	s.loadImages(t)
	m := s.byRole("manager")[0]
	workers := s.byRole("worker")
	s.wantRefused(t, m, "attempting to demote the last manager of the swarm", "node", "demote", m)
	s.wantRefused(t, m, "Removing the last manager erases all current state", "swarm", "leave")
	s.docker(t, m, "service", "create", "--name", "steady", "--replicas", "3", "--constraint", "node.hostname=="+workers[2],
		"--update-monitor", "1s", testimage.V1)
	before := s.wantRunning(t, m, "steady", 3, 30*time.Second)
	for i, w := range workers {
		if i%2 == 0 {
			s.docker(t, m, "node", "promote", w)
		} else {
			s.rejoin(t, m, w, "manager")
		}
		s.wantManagers(t, i+2, append([]string{m}, workers[:i+1]...))
	}
	s.wantRefused(t, m, "is a cluster manager and is a member of the raft cluster. It must be demoted to worker before removal",
		"node", "rm", "--force", s.nodeID(t, m, workers[0]))
	s.wantRefused(t, workers[1], "participating as a manager", "swarm", "leave")
	// Any of the seven writes and reads.
	for i, w := range workers {
		s.docker(t, w, "service", "update", "--detach", "--label-add", fmt.Sprintf("w%d=yes", i), "steady")
	}
	if labels := s.docker(t, m, "service", "inspect", "--format", "{{len .Spec.Labels}}", "steady"); labels != "6" {
		t.Errorf("the service has %s labels, want one from each manager", labels)
	}
	// Three of seven are lost, and writes go on.
	lost := workers[3:]
	for _, w := range lost {
		s.dev(t, "kill", w, "--containers")
	}
	eventually(t, 30*time.Second, "the other four go on", func() string {
		_, err := s.tryDocker(t, 20*time.Second, m, "service", "update", "--detach", "--label-add", "four=yes", "steady")
		return text(err)
	})
	s.wantStatus(t, m, "Unreachable", lost)
	s.wantRefused(t, m, "can't remove member from the raft: this would result in a loss of quorum", "node", "demote", workers[0])
	for _, w := range lost {
		s.docker(t, m, "node", "demote", w)
	}
	s.wantManagers(t, 4, append([]string{m}, workers[:3]...))
	for _, w := range lost {
		eventually(t, 40*time.Second, w+" is down and can be removed", func() string {
			_, err := s.tryDocker(t, 20*time.Second, m, "node", "rm", w)
			return text(err)
		})
	}
	// The first manager, which leads now or not, goes like the others; the last one stays.
	for i, gone := range []string{m, workers[0], workers[1]} {
		last := workers[2]
		s.docker(t, last, "node", "demote", gone)
		s.wantManagers(t, 3-i, append([]string{m}, workers[:3]...)[i+1:])
		s.wantWorker(t, gone)
		s.docker(t, gone, "swarm", "leave")
		eventually(t, 40*time.Second, gone+" is down and can be removed", func() string {
			_, err := s.tryDocker(t, 20*time.Second, last, "node", "rm", gone)
			return text(err)
		})
	}
	if out := s.docker(t, workers[2], "node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}"); out != workers[2]+" Leader" {
		t.Errorf("the last node sees %q", out)
	}
	for _, one := range s.wantRunning(t, workers[2], "steady", 3, 10*time.Second) {
		if !slices.ContainsFunc(before, func(b task) bool { return b.ID == one.ID }) {
			t.Errorf("task %s is new: its node only changed its role", one.Name)
		}
	}
}

// rejoin lets a worker leave and join again with another role's token.
func (s *swarm) rejoin(t *testing.T, m, w, role string) {
	t.Helper()
	old := s.nodeID(t, m, w)
	s.docker(t, w, "swarm", "leave")
	eventually(t, 40*time.Second, w+" is down and can be removed", func() string {
		_, err := s.tryDocker(t, 20*time.Second, m, "node", "rm", old)
		return text(err)
	})
	s.docker(t, w, "swarm", "join", "--token", s.docker(t, m, "swarm", "join-token", "-q", role), s.node(t, m).Addr+":2377")
}

func (s *swarm) nodeID(t *testing.T, m, hostname string) string {
	t.Helper()
	return s.docker(t, m, "node", "inspect", "--format", "{{.ID}}", hostname)
}

// wantManagers waits until each of the managers named sees n managers, one of them leading.
func (s *swarm) wantManagers(t *testing.T, n int, names []string) {
	t.Helper()
	for _, name := range names {
		eventually(t, 60*time.Second, fmt.Sprintf("%s sees %d managers", name, n), func() string {
			out, err := s.tryDocker(t, 20*time.Second, name, "node", "ls", "--filter", "role=manager", "--format", "{{.Hostname}} {{.ManagerStatus}}")
			if err != nil {
				return err.Error()
			}
			if strings.Count(out, " Leader") != 1 || strings.Count(out, " Reachable")+1 != n || strings.Count(out, "\n") != n {
				return out
			}
			return ""
		})
	}
}

// wantStatus waits until exactly the nodes named have a manager status.
func (s *swarm) wantStatus(t *testing.T, m, status string, names []string) {
	t.Helper()
	eventually(t, 30*time.Second, fmt.Sprintf("%v are %s", names, status), func() string {
		out := s.docker(t, m, "node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}")
		var have []string
		for line := range strings.Lines(out) {
			if host, ok := strings.CutSuffix(strings.TrimSpace(line), " "+status); ok {
				have = append(have, host)
			}
		}
		slices.Sort(have)
		if !slices.Equal(have, names) {
			return out
		}
		return ""
	})
}

func (s *swarm) wantWorker(t *testing.T, name string) {
	t.Helper()
	eventually(t, 60*time.Second, name+" is a worker", func() string {
		out, err := s.tryDocker(t, 10*time.Second, name, "info", "--format", "{{.Swarm.ControlAvailable}} {{.Swarm.LocalNodeState}}")
		if err != nil || strings.TrimSpace(out) != "false active" {
			return fmt.Sprint(out, err)
		}
		return ""
	})
}

// wantRefused runs a docker command that must fail with a text.
func (s *swarm) wantRefused(t *testing.T, node, text string, args ...string) {
	t.Helper()
	out, err := s.tryDocker(t, 30*time.Second, node, args...)
	if err == nil || !strings.Contains(err.Error(), text) {
		t.Errorf("docker %s on %s: %q, %v; want %q", strings.Join(args, " "), node, out, err, text)
	}
}

// text is an error's, "" for none.
func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
