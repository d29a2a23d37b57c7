package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/skep-dev/skep/e2e/testimage"
)

// TestSwarm takes one swarm of three managers and two workers through the life that its
// users lead, with the docker client. The order matters: each step leaves a whole swarm.
func TestSwarm(t *testing.T) {
	s := newSwarm(t, 3, 2)
	managers, workers := s.byRole("manager"), s.byRole("worker")
	if len(managers) != 3 || len(workers) != 2 {
		t.Fatalf("want 3 managers and 2 workers, got %v and %v", managers, workers)
	}
	m := managers[0]
	s.loadImages(t)
	steps := []struct {
		name string
		run  func(*testing.T, *swarm, string)
	}{
		{"NodesJoined", testNodesJoined},
		{"AnyManagerServes", testAnyManagerServes},
		{"WorkerRefuses", testWorkerRefuses},
		{"CreateAndScale", testCreateAndScale},
		{"Global", testGlobal},
		{"RollingUpdate", testRollingUpdate},
		{"FailingUpdateRollsBack", testFailingUpdateRollsBack},
		{"ManualRollback", testManualRollback},
		{"RestartPolicy", testRestartPolicy},
		{"Explains", testExplains},
		{"HostPort", testHostPort},
		{"ExecAndLogs", testExecAndLogs},
		{"Secrets", testSecrets},
		{"Drain", testDrain},
		{"DaemonKilled", testDaemonKilled},
		{"WorkerLost", testWorkerLost},
		{"CutAndHeal", testCutAndHeal},
		{"LeaderKilled", testLeaderKilled},
		{"PromoteDemote", testPromoteDemote},
		{"QuorumLost", testQuorumLost},
		{"LeaveAndRemove", testLeaveAndRemove},
	}
	for _, step := range steps {
		if !t.Run(step.name, func(t *testing.T) { step.run(t, s, m) }) {
			t.Logf("step %s failed; going on, later steps may fail because of it", step.name)
		}
	}
}

func testNodesJoined(t *testing.T, s *swarm, m string) {
	eventually(t, 30*time.Second, "five ready nodes", func() string {
		out := s.docker(t, m, "node", "ls", "--format", "{{.Hostname}} {{.Status}} {{.Availability}}")
		if n := strings.Count(out, " Ready Active"); n != 5 {
			return out
		}
		return ""
	})
	info := s.docker(t, m, "info", "--format", "{{.Swarm.Managers}} {{.Swarm.Nodes}} {{.Swarm.LocalNodeState}}")
	if info != "3 5 active" {
		t.Errorf("docker info says %q, want 3 managers, 5 nodes, active", info)
	}
}

func testAnyManagerServes(t *testing.T, s *swarm, _ string) {
	for i, m := range s.byRole("manager") {
		name := fmt.Sprintf("any%d", i)
		s.docker(t, m, "service", "create", "--detach", "--name", name, testimage.V1)
		s.wantRunning(t, m, name, 1, 30*time.Second)
		s.docker(t, m, "service", "rm", name)
	}
}

func testWorkerRefuses(t *testing.T, s *swarm, _ string) {
	out, err := s.tryDocker(t, 20*time.Second, s.byRole("worker")[0], "service", "ls")
	if err == nil || !strings.Contains(out, "Worker nodes can't be used to view or modify cluster state") {
		t.Errorf("a worker answered service ls with %q, %v", out, err)
	}
}

func testCreateAndScale(t *testing.T, s *swarm, m string) {
	out := s.docker(t, m, "service", "create", "--name", "web", "--replicas", "2", testimage.V1)
	if !strings.Contains(out, "onverged") {
		t.Errorf("service create did not show convergence: %q", out)
	}
	s.docker(t, m, "service", "scale", "--detach", "web=50")
	up := s.wantRunning(t, m, "web", 50, 90*time.Second)
	per := map[string]int{}
	for _, one := range up {
		per[one.Node]++
	}
	if len(per) != 5 {
		t.Errorf("50 tasks are spread as %v, want all five nodes", per)
	}
	if ls := s.docker(t, m, "service", "ls", "--filter", "name=web", "--format", "{{.Replicas}}"); ls != "50/50" {
		t.Errorf("service ls shows %q", ls)
	}
	s.docker(t, m, "service", "scale", "--detach", "web=5")
	s.wantRunning(t, m, "web", 5, 60*time.Second)
	if _, err := s.tryDocker(t, 20*time.Second, m, "service", "create", "--detach", "--name", "WEB", testimage.V1); err == nil || !strings.Contains(err.Error(), "already exists") {
		t.Errorf("a second service of the same name: %v", err)
	}
}

func testGlobal(t *testing.T, s *swarm, m string) {
	s.docker(t, m, "service", "create", "--name", "everywhere", "--mode", "global", testimage.V1)
	s.wantRunning(t, m, "everywhere", 5, 30*time.Second)
	s.docker(t, m, "service", "rm", "everywhere")
	workers := s.byRole("worker")
	s.docker(t, m, "service", "create", "--name", "onworkers", "--mode", "global", "--constraint", "node.role==worker", testimage.V1)
	for _, one := range s.wantRunning(t, m, "onworkers", 2, 30*time.Second) {
		if !slices.Contains(workers, one.Node) {
			t.Errorf("task %s runs on %s, which is no worker", one.Name, one.Node)
		}
	}
	s.docker(t, m, "service", "rm", "onworkers")
}

func testRollingUpdate(t *testing.T, s *swarm, m string) {
	s.docker(t, m, "service", "update", "--image", testimage.V2, "--update-parallelism", "2", "--update-monitor", "1s", "web")
	for _, one := range s.wantRunning(t, m, "web", 5, 60*time.Second) {
		if one.Image != testimage.V2 {
			t.Errorf("task %s still runs %s", one.Name, one.Image)
		}
	}
	if state := s.docker(t, m, "service", "inspect", "--format", "{{.UpdateStatus.State}}", "web"); state != "completed" {
		t.Errorf("update state is %q", state)
	}
	before := s.wantRunning(t, m, "web", 5, 10*time.Second)
	s.docker(t, m, "service", "update", "--force", "--update-order", "start-first", "--update-parallelism", "0", "web")
	after := s.wantRunning(t, m, "web", 5, 60*time.Second)
	for _, one := range after {
		if slices.ContainsFunc(before, func(b task) bool { return b.ID == one.ID }) {
			t.Errorf("task %s was not replaced by --force", one.Name)
		}
	}
}

func testFailingUpdateRollsBack(t *testing.T, s *swarm, m string) {
	out, err := s.tryDocker(t, 2*time.Minute, m, "service", "update", "--args", "exit 3", "--update-failure-action", "rollback",
		"--update-parallelism", "1", "--update-monitor", "3s", "--update-order", "stop-first", "web")
	t.Logf("docker said %v: %s", err, lastLine(out))
	eventually(t, 90*time.Second, "the rollback completes", func() string {
		if state := s.docker(t, m, "service", "inspect", "--format", "{{.UpdateStatus.State}}", "web"); state != "rollback_completed" {
			return state
		}
		return ""
	})
	s.wantRunning(t, m, "web", 5, 60*time.Second)
	if args := s.docker(t, m, "service", "inspect", "--format", "{{.Spec.TaskTemplate.ContainerSpec.Args}}", "web"); args != "[]" {
		t.Errorf("after the rollback the args are %s", args)
	}
}

func testManualRollback(t *testing.T, s *swarm, m string) {
	s.docker(t, m, "service", "update", "--env-add", "GREETING=hi", "--update-parallelism", "0", "web")
	s.docker(t, m, "service", "rollback", "web")
	if env := s.docker(t, m, "service", "inspect", "--format", "{{.Spec.TaskTemplate.ContainerSpec.Env}}", "web"); env != "[]" {
		t.Errorf("after the rollback the environment is %s", env)
	}
	s.wantRunning(t, m, "web", 5, 60*time.Second)
}

func testRestartPolicy(t *testing.T, s *swarm, m string) {
	s.docker(t, m, "service", "create", "--detach", "--name", "flaky", "--restart-condition", "on-failure",
		"--restart-max-attempts", "2", "--restart-delay", "200ms", testimage.V1, "exit", "4", "300ms")
	defer s.docker(t, m, "service", "rm", "flaky")
	eventually(t, 60*time.Second, "three failed attempts and no more", func() string {
		all, err := s.tasks(t, m, "flaky")
		if err != nil {
			return err.Error()
		}
		failed := 0
		for _, one := range all {
			if strings.HasPrefix(one.CurrentState, "Failed") && strings.Contains(one.Error, "non-zero exit (4)") {
				failed++
			}
		}
		if failed != 3 || len(all) != 3 {
			return fmt.Sprintf("%d of %d tasks failed", failed, len(all))
		}
		return ""
	})
	time.Sleep(2 * time.Second) // a fourth attempt would show by now
	if all, err := s.tasks(t, m, "flaky"); err != nil || len(all) != 3 {
		t.Errorf("after max attempts there are %d tasks, %v", len(all), err)
	}
}

func testExplains(t *testing.T, s *swarm, m string) {
	s.docker(t, m, "service", "create", "--detach", "--name", "nowhere", "--constraint", "node.labels.zone==mars", testimage.V1)
	defer s.docker(t, m, "service", "rm", "nowhere")
	const want = "scheduling constraints not satisfied on 5 nodes"
	eventually(t, 20*time.Second, "the task says why it is pending", func() string {
		all, err := s.tasks(t, m, "nowhere")
		if err != nil || len(all) != 1 || !strings.Contains(all[0].Error, want) {
			return fmt.Sprint(all, err)
		}
		return ""
	})
	out := run(t, skepBinary(t), "-H", "unix://"+s.node(t, m).Socket, "explain", "nowhere")
	if !strings.Contains(out, "mars") && !strings.Contains(out, "constraint") {
		t.Errorf("skep explain said %q", out)
	}
}

func testHostPort(t *testing.T, s *swarm, m string) {
	s.docker(t, m, "service", "create", "--name", "port", "--mode", "global", "--constraint", "node.role==worker",
		"--publish", "mode=host,published=8088,target=80", testimage.V1, "serve", ":80")
	defer s.docker(t, m, "service", "rm", "port")
	for _, w := range s.byRole("worker") {
		out := run(t, skepBinary(t), "dev", "exec", "--name", s.name, m, "--", "curl", "-sS", "--max-time", "5", "http://"+s.node(t, w).Addr+":8088/")
		if strings.TrimSpace(out) == "" {
			t.Errorf("nothing answered on %s:8088", w)
		}
	}
}

func testExecAndLogs(t *testing.T, s *swarm, m string) {
	s.docker(t, m, "service", "create", "--name", "talk", "--replicas", "3", testimage.V1, "log")
	defer s.docker(t, m, "service", "rm", "talk")
	for _, from := range s.byRole("manager") {
		out := s.docker(t, from, "service", "logs", "--tail", "2", "talk")
		if !strings.Contains(out, "talk.1.") || !strings.Contains(out, "line ") {
			t.Errorf("service logs from %s: %q", from, out)
		}
	}
	for _, one := range s.wantRunning(t, m, "talk", 3, 10*time.Second) {
		container := s.docker(t, one.Node, "ps", "-q", "--filter", "label=com.docker.swarm.task.id="+one.ID)
		if container == "" {
			t.Fatalf("docker ps on %s does not show task %s", one.Node, one.ID)
		}
		if out := s.docker(t, one.Node, "exec", container, "echo", "hello from inside"); out != "hello from inside" {
			t.Errorf("exec on %s said %q", one.Node, out)
		}
		if _, err := s.tryDocker(t, 20*time.Second, one.Node, "exec", container, "sh", "-c", "exit 7"); err == nil || !strings.Contains(err.Error(), "exit status 7") {
			t.Errorf("exec that exits 7 said %v", err)
		}
		if out := s.docker(t, one.Node, "logs", "--tail", "2", container); !strings.Contains(out, "line") {
			t.Errorf("docker logs said %q", out)
		}
		if out := s.docker(t, one.Node, "top", container); !strings.Contains(out, "testapp") {
			t.Errorf("docker top said %q", out)
		}
	}
}

func testSecrets(t *testing.T, s *swarm, m string) {
	run(t, "sh", "-c", fmt.Sprintf("printf canary-of-the-secret | docker -H unix://%s secret create password -", s.node(t, m).Socket))
	s.docker(t, m, "service", "create", "--name", "vault", "--secret", "password", testimage.V1)
	up := s.wantRunning(t, m, "vault", 1, 30*time.Second)
	container := s.docker(t, up[0].Node, "ps", "-q", "--filter", "label=com.docker.swarm.task.id="+up[0].ID)
	if out := s.docker(t, up[0].Node, "exec", container, "cat", "/run/secrets/password"); out != "canary-of-the-secret" {
		t.Errorf("the secret reads %q", out)
	}
	if _, err := s.tryDocker(t, 20*time.Second, m, "secret", "rm", "password"); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("removing a secret in use: %v", err)
	}
	s.docker(t, m, "service", "rm", "vault")
	s.docker(t, m, "secret", "rm", "password")
}

func testDrain(t *testing.T, s *swarm, m string) {
	w := s.byRole("worker")[0]
	s.docker(t, m, "node", "update", "--availability", "drain", w)
	defer s.docker(t, m, "node", "update", "--availability", "active", w)
	eventually(t, 60*time.Second, "nothing runs on the drained node", func() string {
		up, err := s.running(t, m, "web")
		if err != nil || len(up) != 5 {
			return fmt.Sprint(len(up), " running, ", err)
		}
		for _, one := range up {
			if one.Node == w {
				return one.Name + " is still there"
			}
		}
		if left := s.docker(t, w, "ps", "-q"); left != "" {
			return "containers left: " + left
		}
		return ""
	})
}

// testDaemonKilled kills the daemon alone: its tasks must not notice.
func testDaemonKilled(t *testing.T, s *swarm, m string) {
	w := s.byRole("worker")[1]
	s.docker(t, m, "service", "create", "--name", "steady", "--constraint", "node.hostname=="+w, testimage.V1, "log")
	defer s.docker(t, m, "service", "rm", "steady")
	before := s.wantRunning(t, m, "steady", 1, 30*time.Second)[0]
	container := s.docker(t, w, "ps", "-q", "--no-trunc", "--filter", "name=steady")
	started := s.docker(t, w, "inspect", "--format", "{{.State.Pid}} {{.State.StartedAt}}", container)
	s.dev(t, "kill", w)
	time.Sleep(500 * time.Millisecond) // well within the patience of the managers, also on a busy machine
	s.dev(t, "start", w)
	eventually(t, 30*time.Second, "the daemon is back with its container", func() string {
		out, err := s.tryDocker(t, 10*time.Second, w, "inspect", "--format", "{{.State.Pid}} {{.State.StartedAt}}", container)
		if err != nil || strings.TrimSpace(out) != started {
			return fmt.Sprintf("%s, %v; before %s", out, err, started)
		}
		return ""
	})
	eventually(t, 30*time.Second, "the same task runs", func() string {
		up, err := s.running(t, m, "steady")
		if err != nil || len(up) != 1 || up[0].ID != before.ID {
			return fmt.Sprint(up, err)
		}
		return ""
	})
	lines := func() int { return strings.Count(s.docker(t, w, "logs", container), "\n") }
	n := lines()
	eventually(t, 10*time.Second, "the log goes on", func() string {
		if lines() > n {
			return ""
		}
		return "no new line"
	})
}

func testWorkerLost(t *testing.T, s *swarm, m string) {
	w := s.byRole("worker")[0]
	s.docker(t, m, "service", "scale", "--detach", "web=10")
	s.wantRunning(t, m, "web", 10, 60*time.Second)
	begin := time.Now()
	s.dev(t, "kill", w, "--containers")
	eventually(t, 40*time.Second, "ten tasks run elsewhere", func() string {
		up, err := s.running(t, m, "web")
		if err != nil || len(up) != 10 {
			return fmt.Sprint(len(up), " running, ", err)
		}
		for _, one := range up {
			if one.Node == w {
				return one.Name + " is said to run on the lost node"
			}
		}
		return ""
	})
	t.Logf("replaced after %s", time.Since(begin).Round(100*time.Millisecond))
	s.dev(t, "start", w)
	s.wantReady(t, m, w)
	s.docker(t, m, "service", "scale", "--detach", "web=5")
	s.wantRunning(t, m, "web", 5, 60*time.Second)
}

func (s *swarm) wantReady(t *testing.T, m, node string) {
	t.Helper()
	eventually(t, 60*time.Second, node+" is ready", func() string {
		out, err := s.tryDocker(t, 10*time.Second, m, "node", "ls", "--format", "{{.Hostname}} {{.Status}}")
		if err != nil {
			return err.Error()
		}
		if !strings.Contains(out, node+" Ready") {
			return out
		}
		return ""
	})
}

func testCutAndHeal(t *testing.T, s *swarm, m string) {
	w := s.byRole("worker")[1]
	s.dev(t, "cut", w)
	eventually(t, 40*time.Second, "the cut node is down and its tasks run elsewhere", func() string {
		up, err := s.running(t, m, "web")
		if err != nil || len(up) != 5 || slices.ContainsFunc(up, func(o task) bool { return o.Node == w }) {
			return fmt.Sprint(up, err)
		}
		return ""
	})
	s.dev(t, "heal", w)
	s.wantReady(t, m, w)
	eventually(t, 60*time.Second, "the healed node stopped its old tasks", func() string {
		up, err := s.running(t, m, "web")
		if err != nil {
			return err.Error()
		}
		here := 0
		for _, one := range up {
			if one.Node == w {
				here++
			}
		}
		if n := len(strings.Fields(s.docker(t, w, "ps", "-q", "--filter", "name=web."))); n != here || len(up) != 5 {
			return fmt.Sprintf("%d containers, %d tasks here, %d in all", n, here, len(up))
		}
		return ""
	})
}

func testLeaderKilled(t *testing.T, s *swarm, m string) {
	old, err := s.leader(t, m)
	if err != nil {
		t.Fatal(err)
	}
	before := s.wantRunning(t, m, "web", 5, 30*time.Second)
	var other string
	for _, name := range s.byRole("manager") {
		if name != old {
			other = name
		}
	}
	begin := time.Now()
	s.dev(t, "kill", old)
	eventually(t, 20*time.Second, "another manager accepts a write", func() string {
		_, err := s.tryDocker(t, 10*time.Second, other, "service", "update", "--detach", "--label-add", fmt.Sprintf("t=%d", time.Now().UnixNano()), "web")
		if err != nil {
			return err.Error()
		}
		return ""
	})
	t.Logf("a write was accepted after %s", time.Since(begin).Round(10*time.Millisecond))
	s.dev(t, "start", old)
	s.wantReady(t, other, old)
	eventually(t, 30*time.Second, "no task noticed", func() string {
		after, err := s.running(t, other, "web")
		if err != nil || len(after) != 5 {
			return fmt.Sprint(len(after), err)
		}
		for _, one := range before {
			if !slices.ContainsFunc(after, func(a task) bool { return a.ID == one.ID }) {
				return "task " + one.Name + " was replaced"
			}
		}
		return ""
	})
}

func testPromoteDemote(t *testing.T, s *swarm, m string) {
	w := s.byRole("worker")[0]
	s.docker(t, m, "node", "promote", w)
	eventually(t, 60*time.Second, w+" serves as a manager", func() string {
		out, err := s.tryDocker(t, 10*time.Second, w, "node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}")
		if err != nil || !strings.Contains(out, w+" Reachable") {
			return fmt.Sprint(out, err)
		}
		return ""
	})
	s.docker(t, m, "node", "demote", w)
	eventually(t, 60*time.Second, w+" is a worker again", func() string {
		out, err := s.tryDocker(t, 10*time.Second, w, "info", "--format", "{{.Swarm.ControlAvailable}} {{.Swarm.LocalNodeState}}")
		if err != nil || strings.TrimSpace(out) != "false active" {
			return fmt.Sprint(out, err)
		}
		return ""
	})
	s.wantReady(t, m, w)
}

func testQuorumLost(t *testing.T, s *swarm, m string) {
	others := slices.DeleteFunc(s.byRole("manager"), func(n string) bool { return n == m })
	for _, n := range others {
		s.dev(t, "kill", n)
	}
	eventually(t, 60*time.Second, "writes are refused clearly", func() string {
		_, err := s.tryDocker(t, 40*time.Second, m, "service", "create", "--detach", "--name", "late", testimage.V1)
		if err == nil {
			t.Fatal("a write was accepted without a quorum")
		}
		if !strings.Contains(err.Error(), "The swarm does not have a leader") {
			return err.Error()
		}
		return ""
	})
	if out, err := s.tryDocker(t, 20*time.Second, m, "info", "--format", "{{.Swarm.Error}}"); err != nil || !strings.Contains(out, "does not have a leader") {
		t.Errorf("docker info without quorum: %q, %v", out, err)
	}
	if out, err := try(t, 20*time.Second, skepBinary(t), "-H", "unix://"+s.node(t, m).Socket, "status"); !strings.Contains(out, "quorum") && !strings.Contains(out, "leader") {
		t.Errorf("skep status without quorum: %q, %v", out, err)
	}
	s.dev(t, "start", others[0])
	eventually(t, 60*time.Second, "the swarm recovers with two of three", func() string {
		_, err := s.tryDocker(t, 20*time.Second, m, "service", "update", "--detach", "--label-add", "recovered=yes", "web")
		if err != nil {
			return err.Error()
		}
		return ""
	})
	s.dev(t, "start", others[1])
	s.wantReady(t, m, others[1])
	s.wantRunning(t, m, "web", 5, 60*time.Second)
}

func testLeaveAndRemove(t *testing.T, s *swarm, m string) {
	w := s.byRole("worker")[1]
	s.wantReady(t, m, w)
	if out, err := s.tryDocker(t, 20*time.Second, m, "node", "rm", w); err == nil {
		t.Errorf("a ready node was removed without force: %s", out)
	}
	s.docker(t, w, "swarm", "leave")
	if out := s.docker(t, w, "info", "--format", "{{.Swarm.LocalNodeState}}"); out != "inactive" {
		t.Errorf("after leave the node is %s", out)
	}
	if left := s.docker(t, w, "ps", "-aq"); left != "" {
		t.Errorf("after leave containers remain: %s", left)
	}
	eventually(t, 60*time.Second, "the node that left is down", func() string {
		out := s.docker(t, m, "node", "ls", "--format", "{{.Hostname}} {{.Status}}")
		if !strings.Contains(out, w+" Down") {
			return out
		}
		return ""
	})
	s.docker(t, m, "node", "rm", w)
	s.wantRunning(t, m, "web", 5, 60*time.Second)
	token := s.docker(t, m, "swarm", "join-token", "-q", "worker")
	s.docker(t, w, "swarm", "join", "--token", token, s.node(t, m).Addr+":2377")
	s.wantReady(t, m, w)
	s.docker(t, m, "service", "rm", "web")
	eventually(t, 60*time.Second, "everything of the service is gone", func() string {
		for _, n := range s.nodes {
			if left := s.docker(t, n.Name, "ps", "-a", "--no-trunc", "--filter", "name=web.", "--format", "{{.Names}} {{.Status}}"); left != "" {
				return n.Name + " has " + left
			}
		}
		return ""
	})
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}
