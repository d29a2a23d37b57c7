package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/skep-dev/skep/e2e/testimage"
)

// The tests of this file, `make interop`, have a real Docker Engine take part: as a worker
// of a Skep swarm, and as the manager of a Skep node. Both workers must pass the same tests.

// interopStep is one step of a test with manager m and a worker w that is not its kind.
type interopStep struct {
	name string
	run  func(t *testing.T, s *swarm, m, w string)
}

// workerSteps are what a worker must do whoever manages it.
func workerSteps() []interopStep {
	return []interopStep{
		{"Tasks", interopTasks},
		{"Logs", interopLogs},
		{"Restart", interopRestart},
		{"Job", interopJob},
		{"GlobalHostPort", interopGlobalHostPort},
		{"Update", interopUpdate},
		{"Drain", interopDrain},
	}
}

func runSteps(t *testing.T, s *swarm, m, w string, steps []interopStep) {
	t.Helper()
	for _, step := range steps {
		if !t.Run(step.name, func(t *testing.T) { step.run(t, s, m, w) }) {
			t.FailNow()
		}
	}
}

// TestInteropDockerWorker has a Docker Engine join a Skep swarm.
func TestInteropDockerWorker(t *testing.T) {
	s := newSwarm(t, 1, 1)
	s.addDocker(t, "d1")
	s.loadImages(t)
	runSteps(t, s, "m1", "d1", slices.Concat([]interopStep{
		{"ManagerTokenRefused", interopDockerManagerRefused},
		{"Join", func(t *testing.T, s *swarm, m, w string) { s.join(t, w, m, "worker") }},
	}, workerSteps(), []interopStep{
		{"RotateCA", interopRotateCA},
		{"PromoteRefused", interopPromoteDocker},
		{"TokensRotate", interopTokens},
		{"LeaveAndRemove", interopLeave},
	}))
}

// TestInteropSkepWorker has a Skep node join a swarm that a Docker Engine manages.
func TestInteropSkepWorker(t *testing.T) {
	s := newSwarm(t, 1, 0)
	s.addDocker(t, "d1")
	s.loadImages(t)
	s.docker(t, "m1", "swarm", "leave", "--force")
	s.docker(t, "d1", "swarm", "init", "--advertise-addr", s.node(t, "d1").Addr)
	runSteps(t, s, "d1", "m1", slices.Concat([]interopStep{
		{"ManagerTokenRefused", interopSkepManagerRefused},
		{"Join", func(t *testing.T, s *swarm, m, w string) { s.join(t, w, m, "worker") }},
	}, workerSteps(), []interopStep{
		{"OverlayRefused", interopOverlayOnSkep},
		{"Quiet", interopQuiet},
		{"RotateCA", interopRotateCA},
		{"TokensRotate", interopTokens},
		{"PromoteRefused", interopPromoteSkep},
		{"LeaveAndRemove", interopLeave},
	}))
}

// TestInteropLeaderKilled kills leaders of a Skep swarm, and then the Docker Engine in it.
func TestInteropLeaderKilled(t *testing.T) {
	s := newSwarm(t, 3, 0)
	d := s.addDocker(t, "d1")
	s.loadImages(t)
	leader, err := s.leader(t, "m1")
	if err != nil {
		t.Fatal(err)
	}
	follower := "m1"
	if leader == follower {
		follower = "m2"
	}
	// What a node is reaches the leader through a follower, too.
	token := s.docker(t, follower, "swarm", "join-token", "-q", "manager")
	s.refused(t, "d1", "a Docker Engine can be a worker of a Skep swarm but not a manager", "swarm", "join", "--token", token, s.node(t, follower).Addr+":2377")
	s.join(t, "d1", follower, "worker")
	s.create(t, "m1", "steady", append(on("d1"), "--replicas", "3"), "log")
	s.wantRunning(t, "m1", "steady", 3, time.Minute)
	containers := func() string { return sortLines(s.docker(t, "d1", "ps", "--quiet", "--no-trunc")) }
	before := containers()
	for round := range 2 {
		leader, err := s.leader(t, "m1")
		if err != nil {
			t.Fatal(err)
		}
		alive := s.byRole("manager")
		alive = slices.DeleteFunc(alive, func(m string) bool { return m == leader })
		s.dev(t, "kill", leader)
		replicas := 4 + round
		eventually(t, 30*time.Second, "a change is accepted", func() string {
			out, err := s.tryDocker(t, 20*time.Second, alive[0], "service", "scale", "--detach", fmt.Sprintf("steady=%d", replicas))
			if err != nil {
				return out
			}
			return ""
		})
		s.wantRunning(t, alive[0], "steady", replicas, time.Minute) // the Docker member has a session again
		s.wantNode(t, alive[0], "d1", "Ready", "Active")
		after := containers()
		for id := range strings.Lines(before) {
			if !strings.Contains(after, strings.TrimSpace(id)) {
				t.Errorf("container %s ended with the leader", id)
			}
		}
		before = after
		s.dev(t, "start", leader)
		s.wantNode(t, alive[0], leader, "Ready", "Active")
	}
	out := s.docker(t, "m1", "service", "logs", "--raw", "--tail", "1", "steady")
	if !strings.Contains(out, "line") {
		t.Errorf("no logs after the leaders' deaths: %q", out)
	}
	if err := d.kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.wantNode(t, "m1", "d1", "Down", "Active")
	d.start(t, engineFiles(t))
	s.wantNode(t, "m1", "d1", "Ready", "Active")
	s.wantRunning(t, "m1", "steady", 5, time.Minute)
}

// TestInteropTakeover starts Skep on the swarm directory of a locked Docker manager that is
// gone: the swarm goes on with its identity, secrets, services, tokens and workers.
func TestInteropTakeover(t *testing.T) {
	s := newSwarm(t, 1, 0)
	d := s.addDocker(t, "d1")
	s.addDocker(t, "d2")
	s.loadImages(t)
	m, addr := s.node(t, "m1"), s.node(t, "d1").Addr
	s.docker(t, "d1", "swarm", "init", "--advertise-addr", addr, "--autolock")
	s.join(t, "d2", "d1", "worker")
	file := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(file, []byte("canary"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.docker(t, "d1", "secret", "create", "key", file)
	s.docker(t, "d1", "network", "create", "--driver", "overlay", "net")
	s.create(t, "d1", "there", append(on("d2"), "--secret", "key", "--network", "net"), "serve")
	s.create(t, "d1", "here", []string{
		"--detach", "--quiet", "--constraint", "node.role==manager", "--network", "net", "--publish", "8080:80", "--secret", "key",
	}, "serve")
	s.wantRunning(t, "d1", "there", 1, time.Minute)
	s.wantRunning(t, "d1", "here", 1, time.Minute)
	// What must be the same afterwards, and is asked of whoever manages.
	facts := func(m string) string {
		return strings.Join([]string{
			s.docker(t, m, "node", "ls", "--quiet"), s.docker(t, m, "service", "ls", "--quiet"), s.docker(t, m, "secret", "ls", "--quiet"),
			s.docker(t, m, "swarm", "join-token", "-q", "worker"), s.docker(t, m, "swarm", "ca"),
			s.docker(t, "d2", "ps", "--quiet", "--no-trunc"),
		}, "\n")
	}
	before := sortLines(facts("d1"))
	key := s.docker(t, "d1", "swarm", "unlock-key", "-q")
	if err := d.kill(t.Context()); err != nil {
		t.Fatal(err)
	}

	// The machine with Skep becomes the machine that Docker ran on.
	s.dev(t, "kill", "m1")
	swarmDir := filepath.Join(m.Dir, "data", "swarm")
	if err := errors.Join(os.RemoveAll(swarmDir), os.CopyFS(swarmDir, os.DirFS(filepath.Join(d.node.Dir, "data", "swarm")))); err != nil {
		t.Fatal(err)
	}
	run(t, "ip", "-n", d.netns(), "link", "del", "eth0")
	run(t, "ip", "-n", "skep-"+s.name+"-m1", "addr", "add", addr+"/24", "dev", "eth0")
	s.dev(t, "start", "m1")
	if state := s.docker(t, "m1", "info", "--format", "{{.Swarm.LocalNodeState}}"); state != "locked" {
		t.Fatalf("the manager is %s", state)
	}
	unlock := exec.CommandContext(t.Context(), "docker", "-H", "unix://"+m.Socket, "swarm", "unlock")
	unlock.Stdin = strings.NewReader(key + "\n")
	if out, err := unlock.CombinedOutput(); err != nil {
		t.Fatalf("unlock with Docker's key: %v: %s", err, out)
	}
	s.wantNode(t, "m1", "m1", "Ready", "Active")
	s.wantNode(t, "m1", "d2", "Ready", "Active")
	s.wantRunning(t, "m1", "here", 1, time.Minute)
	if after := sortLines(facts("m1")); after != before {
		t.Errorf("there was\n%s\nand there is\n%s", before, after)
	}
	if got := s.execTask(t, "m1", "here", "cat /run/secrets/key"); got != "canary" {
		t.Errorf("the secret is %q", got)
	}
	eventually(t, 20*time.Second, "the published port answers", func() string {
		if out, err := s.fetchOn(t, "m1", "http://127.0.0.1:8080/"); err != nil {
			return out + err.Error()
		}
		return ""
	})
	// The network goes on between the two kinds of nodes, with the container that was there.
	reach := func(when string) {
		t.Helper()
		for from, to := range map[string]string{"m1": "there", "d2": "here"} {
			eventually(t, 90*time.Second, from+" reaches "+to+" "+when, func() string {
				id := strings.Fields(s.docker(t, from, "ps", "--quiet", "--filter", "label=com.docker.swarm.service.name="+map[string]string{"m1": "here", "d2": "there"}[from]))
				out, err := s.tryDocker(t, 20*time.Second, from, "exec", id[0], "/bin/testapp", "get", "http://tasks."+to+"/")
				if err != nil {
					return out + err.Error()
				}
				return ""
			})
		}
	}
	reach("after the takeover")
	s.docker(t, "m1", "service", "scale", "--detach", "there=2")
	s.wantRunning(t, "m1", "there", 2, time.Minute)
	reach("with another task")
}

// on returns the flags of a service whose tasks run on node w only.
func on(w string) []string {
	return []string{"--constraint", "node.hostname==" + w, "--detach", "--quiet"}
}

// create makes a service of the test image.
func (s *swarm) create(t *testing.T, m, name string, flags []string, args ...string) {
	t.Helper()
	s.docker(t, m, slices.Concat([]string{"service", "create", "--name", name, "--no-resolve-image"}, flags, []string{testimage.V1}, args)...)
}

// execTask runs a shell command in the container of the only task of a service on node w.
func (s *swarm) execTask(t *testing.T, w, service, command string) string {
	t.Helper()
	ids := strings.Fields(s.docker(t, w, "ps", "--quiet", "--filter", "label=com.docker.swarm.service.name="+service))
	if len(ids) != 1 {
		t.Fatalf("%s has %d containers on %s", service, len(ids), w)
	}
	return s.docker(t, w, "exec", ids[0], "sh", "-c", command)
}

func interopTasks(t *testing.T, s *swarm, m, w string) {
	file := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(file, []byte("canary"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.docker(t, m, "secret", "create", "key", file)
	s.docker(t, m, "config", "create", "conf", file)
	s.create(t, m, "full", append(on(w),
		"--secret", "source=key,target=the-key,uid=7,gid=8,mode=0440", "--config", "source=conf,target=/etc/conf,mode=0444",
		"--env", "PLAIN=value", "--env", "WHERE={{.Node.Hostname}} {{.Service.Name}} {{.Task.Slot}}", "--hostname", "h-{{.Task.Slot}}",
		"--mount", "type=tmpfs,target=/scratch", "--mount", "type=volume,source=vol,target=/vol",
		"--mount", "type=bind,source="+s.node(t, w).Dir+",target=/host,readonly",
		"--limit-memory", "64M", "--limit-cpu", "0.5", "--reserve-memory", "16M", "--user", "7:8", "--workdir", "/tmp",
		"--container-label", "kind=full", "--read-only", "--cap-drop", "NET_RAW", "--stop-grace-period", "3s",
	))
	s.wantRunning(t, m, "full", 1, time.Minute)
	got := s.execTask(t, w, "full", `cat /run/secrets/the-key /etc/conf; echo; ls -ln /run/secrets/the-key /etc/conf | while read mode n uid gid rest; do echo "$mode $uid $gid"; done
echo "$PLAIN|$WHERE"; hostname; id -u; id -g; pwd; grep -c ' /scratch tmpfs ' /proc/mounts; ls /host | grep -c daemon.log; touch /vol/x && echo written; touch /bad 2>/dev/null || echo read-only`)
	want := strings.Join([]string{
		"canarycanary", "-r--r--r-- 0 0", "-r--r----- 7 8", "value|" + w + " full 1", "h-1", "7", "8", "/tmp", "1", "1", "read-only",
	}, "\n")
	// The volume belongs to root, so that user 7 may not write there.
	if got = strings.ReplaceAll(got, "touch: /vol/x: Permission denied\n", ""); sortLines(got) != sortLines(want) {
		t.Errorf("the container says\n%s\nwant\n%s", got, want)
	}
	id := s.docker(t, w, "ps", "--quiet", "--filter", "label=com.docker.swarm.service.name=full")
	limits := s.docker(t, w, "inspect", "--format", "{{.HostConfig.Memory}} {{.HostConfig.NanoCpus}} {{.Config.Labels.kind}}", id)
	if limits != "67108864 500000000 full" {
		t.Errorf("limits and label are %s", limits)
	}
	s.docker(t, m, "service", "rm", "full")
	s.gone(t, w, "full")
	s.docker(t, m, "secret", "rm", "key")
	s.docker(t, m, "config", "rm", "conf")
}

func sortLines(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// gone waits until a service has no container on a node.
func (s *swarm) gone(t *testing.T, w, service string) {
	t.Helper()
	eventually(t, time.Minute, service+" is gone from "+w, func() string {
		out, err := s.tryDocker(t, 20*time.Second, w, "ps", "--all", "--quiet", "--filter", "label=com.docker.swarm.service.name="+service)
		if err != nil {
			return err.Error()
		}
		return out
	})
}

func interopLogs(t *testing.T, s *swarm, m, w string) {
	s.create(t, m, "talk", append(on(w), "--replicas", "2"), "log")
	s.wantRunning(t, m, "talk", 2, time.Minute)
	eventually(t, 30*time.Second, "both tasks are heard, on both streams", func() string {
		out, err := s.tryDocker(t, 20*time.Second, m, "service", "logs", "--raw", "talk")
		if err != nil {
			return err.Error()
		}
		lines := strings.Split(out, "\n")
		if n := count(lines, "line 3"); n != 2 {
			return out
		}
		return ""
	})
	out := s.docker(t, m, "service", "logs", "--tail", "3", "talk")
	if lines := strings.Split(out, "\n"); len(lines) > 6 || !strings.Contains(out, "@"+w) {
		t.Errorf("the last three lines of two tasks are\n%s", out)
	}
	s.docker(t, m, "service", "rm", "talk")
}

func count(lines []string, want string) int {
	n := 0
	for _, l := range lines {
		if strings.TrimSpace(l) == want {
			n++
		}
	}
	return n
}

func interopRestart(t *testing.T, s *swarm, m, w string) {
	s.create(t, m, "crash", append(on(w), "--restart-condition", "on-failure", "--restart-max-attempts", "2", "--restart-delay", "100ms"), "exit", "3")
	eventually(t, time.Minute, "the task fails three times and is given up", func() string {
		all, err := s.tasks(t, m, "crash")
		if err != nil {
			return err.Error()
		}
		failed := 0
		for _, one := range all {
			if strings.HasPrefix(one.CurrentState, "Failed") && strings.Contains(one.Error, "non-zero exit (3)") && one.Node == w {
				failed++
			}
		}
		if failed != 3 || len(all) != 3 {
			return fmt.Sprint(all)
		}
		return ""
	})
	s.docker(t, m, "service", "rm", "crash")
}

func interopJob(t *testing.T, s *swarm, m, w string) {
	s.create(t, m, "job", append(on(w), "--mode", "replicated-job", "--replicas", "3", "--max-concurrent", "2"), "exit", "0")
	eventually(t, time.Minute, "the job completes three times", func() string {
		all, err := s.tasks(t, m, "job")
		if err != nil {
			return err.Error()
		}
		complete := 0
		for _, one := range all {
			if strings.HasPrefix(one.CurrentState, "Complete") {
				complete++
			}
		}
		if complete != 3 {
			return fmt.Sprint(all)
		}
		return ""
	})
	s.docker(t, m, "service", "rm", "job")
}

func interopGlobalHostPort(t *testing.T, s *swarm, m, w string) {
	s.create(t, m, "everywhere", []string{
		"--mode", "global", "--detach", "--quiet", "--publish", "mode=host,target=80,published=8080", "--env", "GREETING={{.Node.Hostname}}",
	}, "serve")
	nodes := strings.Fields(s.docker(t, m, "node", "ls", "--format", "{{.Hostname}}"))
	s.wantRunning(t, m, "everywhere", len(nodes), time.Minute)
	for _, asker := range nodes {
		eventually(t, 20*time.Second, asker+" reaches the port of "+w, func() string {
			out, err := s.fetchOn(t, asker, "http://"+s.node(t, w).Addr+":8080/")
			if err != nil {
				return err.Error()
			}
			if !strings.Contains(out, " "+w+" ") {
				return out
			}
			return ""
		})
	}
	out := s.docker(t, m, "service", "ps", "--format", "{{.Node}} {{.Ports}}", "everywhere")
	if !strings.Contains(out, w+" *:8080->80/tcp") {
		t.Errorf("the port is not reported:\n%s", out)
	}
	s.docker(t, m, "service", "rm", "everywhere")
	s.gone(t, w, "everywhere")
}

func interopUpdate(t *testing.T, s *swarm, m, w string) {
	s.create(t, m, "roll", append(on(w), "--replicas", "2", "--update-delay", "0s", "--update-monitor", "500ms"), "serve")
	s.wantRunning(t, m, "roll", 2, time.Minute)
	s.docker(t, m, "service", "update", "--detach", "--no-resolve-image", "--image", testimage.V2, "--env-add", "NEW=1", "roll")
	eventually(t, time.Minute, "the update completes", func() string {
		out, err := s.tryDocker(t, 20*time.Second, m, "service", "inspect", "--format", "{{.UpdateStatus.State}}", "roll")
		if err != nil {
			return err.Error()
		}
		if strings.TrimSpace(out) != "completed" {
			return out
		}
		return ""
	})
	for _, one := range s.wantRunning(t, m, "roll", 2, time.Minute) {
		if one.Image != testimage.V2 || one.Node != w {
			t.Errorf("task %v after the update", one)
		}
	}
	s.docker(t, m, "service", "rm", "roll")
}

func interopDrain(t *testing.T, s *swarm, m, w string) {
	s.docker(t, m, "service", "create", "--name", "stay", "--no-resolve-image", "--detach", "--quiet", "--replicas", "4", testimage.V1)
	s.wantRunning(t, m, "stay", 4, time.Minute)
	s.docker(t, m, "node", "update", "--availability", "drain", w)
	s.wantNode(t, m, w, "Ready", "Drain")
	eventually(t, time.Minute, "all tasks run elsewhere", func() string {
		up, err := s.running(t, m, "stay")
		if err != nil {
			return err.Error()
		}
		here := slices.ContainsFunc(up, func(one task) bool { return one.Node == w })
		if len(up) != 4 || here {
			return fmt.Sprint(up)
		}
		return ""
	})
	s.gone(t, w, "nothing") // the node answers
	s.docker(t, m, "node", "update", "--availability", "active", w)
	s.wantNode(t, m, w, "Ready", "Active")
	s.docker(t, m, "service", "scale", "--detach", "stay=8")
	eventually(t, time.Minute, "tasks return to the node", func() string {
		up, err := s.running(t, m, "stay")
		if err != nil {
			return err.Error()
		}
		if len(up) != 8 || !slices.ContainsFunc(up, func(one task) bool { return one.Node == w }) {
			return fmt.Sprint(up)
		}
		return ""
	})
	s.docker(t, m, "service", "rm", "stay")
	s.gone(t, w, "stay")
}

// interopRotateCA replaces the root under a running task: the command ends when the worker,
// which is of another kind than the manager, has a certificate of the new root.
func interopRotateCA(t *testing.T, s *swarm, m, w string) {
	s.create(t, m, "steady", on(w))
	s.wantRunning(t, m, "steady", 1, time.Minute)
	before := s.docker(t, w, "ps", "--quiet", "--no-trunc")
	old := s.docker(t, m, "swarm", "ca")
	s.docker(t, m, "swarm", "ca", "--rotate", "--quiet")
	fresh := s.docker(t, m, "swarm", "ca")
	if fresh == old {
		t.Error("the root stayed the same")
	}
	eventually(t, 30*time.Second, "the worker trusts the new root alone", func() string {
		var found string
		for _, dir := range []string{"data/swarm/certificates", "run/swarm/certificates"} {
			data, err := os.ReadFile(filepath.Join(s.node(t, w).Dir, dir, "swarm-root-ca.crt"))
			if err == nil {
				found = strings.TrimSpace(string(data))
			}
		}
		if found != fresh {
			return found
		}
		return ""
	})
	s.wantNode(t, m, w, "Ready", "Active")
	s.docker(t, m, "service", "scale", "--detach", "steady=2")
	s.wantRunning(t, m, "steady", 2, time.Minute)
	if after := s.docker(t, w, "ps", "--quiet", "--no-trunc"); !strings.Contains(after, before) {
		t.Errorf("container %s became %s", before, after)
	}
	s.docker(t, m, "service", "rm", "steady")
	s.gone(t, w, "steady")
}

// wantPending waits until a service's task has no node, for a reason.
func (s *swarm) wantPending(t *testing.T, m, service, reason string) {
	t.Helper()
	eventually(t, time.Minute, service+" says why it is pending", func() string {
		all, err := s.tasks(t, m, service)
		if err != nil {
			return err.Error()
		}
		if len(all) != 1 || all[0].Node != "" || !strings.Contains(all[0].Error, reason) {
			return fmt.Sprint(all)
		}
		return ""
	})
}

func interopOverlayOnSkep(t *testing.T, s *swarm, m, w string) {
	s.docker(t, m, "network", "create", "--driver", "overlay", "net")
	s.create(t, m, "inside", append(on(w), "--network", "net"), "serve")
	s.create(t, m, "outside", append(on(w), "--publish", "9090:80"), "serve")
	s.wantPending(t, m, "inside", "missing plugin on 1 node")
	s.wantPending(t, m, "outside", "missing plugin on 1 node")
	s.docker(t, m, "service", "rm", "inside", "outside")
	s.docker(t, m, "network", "rm", "net")
}

func interopDockerManagerRefused(t *testing.T, s *swarm, m, w string) {
	token := s.docker(t, m, "swarm", "join-token", "-q", "manager")
	s.refused(t, w, "a Docker Engine can be a worker of a Skep swarm but not a manager", "swarm", "join", "--token", token, s.node(t, m).Addr+":2377")
	if out := s.docker(t, m, "node", "ls", "--quiet"); len(strings.Fields(out)) != 2 {
		t.Errorf("the attempt left a node:\n%s", out)
	}
}

func interopSkepManagerRefused(t *testing.T, s *swarm, m, w string) {
	token := s.docker(t, m, "swarm", "join-token", "-q", "manager")
	s.refused(t, w, "this swarm is managed by Docker Engine: a Skep node can be a worker of it but not a manager",
		"swarm", "join", "--token", token, s.node(t, m).Addr+":2377")
	for line := range strings.Lines(s.docker(t, m, "node", "ls", "--format", "{{.ID}} {{.Self}}")) {
		if id, self, _ := strings.Cut(strings.TrimSpace(line), " "); self == "false" {
			s.docker(t, m, "node", "rm", id) // as the refusal says
		}
	}
}

func interopPromoteDocker(t *testing.T, s *swarm, m, w string) {
	s.refused(t, m, "runs Docker Engine 20.10", "node", "promote", w)
	if role := s.docker(t, m, "node", "inspect", "--format", "{{.Spec.Role}}", w); role != "worker" {
		t.Errorf("%s is a %s", w, role)
	}
}

// interopPromoteSkep: Docker promotes without asking; the node stays a worker and says so.
func interopPromoteSkep(t *testing.T, s *swarm, m, w string) {
	s.create(t, m, "steady", on(w))
	s.wantRunning(t, m, "steady", 1, time.Minute)
	before := s.docker(t, w, "ps", "--quiet", "--no-trunc")
	s.docker(t, m, "node", "promote", w)
	eventually(t, 30*time.Second, "the node says that it is no manager", func() string {
		out, err := s.tryDocker(t, 20*time.Second, w, "info", "--format", "{{.Swarm.LocalNodeState}} {{.Swarm.ControlAvailable}} {{.Swarm.Error}}")
		if err != nil {
			return err.Error()
		}
		if !strings.HasPrefix(out, "active false this swarm is managed by Docker Engine") {
			return out
		}
		return ""
	})
	if out := s.docker(t, m, "node", "ls", "--filter", "name="+w, "--format", "{{.Status}} {{.ManagerStatus}}"); strings.TrimSpace(out) != "Ready" {
		t.Errorf("the manager calls the node %q", out)
	}
	s.wantRunning(t, m, "steady", 1, time.Minute)
	if after := s.docker(t, w, "ps", "--quiet", "--no-trunc"); after != before {
		t.Errorf("container %s became %s", before, after)
	}
	s.docker(t, m, "service", "rm", "steady")
	s.gone(t, w, "steady")
}

// interopTokens: a rotated token admits nobody any more, and does not touch who is in.
func interopTokens(t *testing.T, s *swarm, m, w string) {
	old := s.docker(t, m, "swarm", "join-token", "-q", "worker")
	fresh := s.docker(t, m, "swarm", "join-token", "-q", "--rotate", "worker")
	if old == fresh {
		t.Fatal("the token stayed the same")
	}
	s.wantNode(t, m, w, "Ready", "Active")
	s.docker(t, w, "swarm", "leave")
	s.wantNode(t, m, w, "Down", "Active")
	addr := s.node(t, m).Addr + ":2377"
	s.refused(t, w, "A valid join token is necessary to join this cluster", "swarm", "join", "--token", old, addr)
	s.docker(t, m, "node", "rm", w)
	s.docker(t, w, "swarm", "join", "--token", fresh, addr)
	s.wantNode(t, m, w, "Ready", "Active")
}

// interopQuiet: a manager that lacks Skep's services is no reason to open session after
// session.
func interopQuiet(t *testing.T, s *swarm, _, w string) {
	data, err := os.ReadFile(filepath.Join(s.node(t, w).Dir, "daemon.log"))
	if err != nil {
		t.Fatal(err)
	}
	joins := strings.Count(string(data), "joined swarm") + strings.Count(string(data), "swarm initialized")
	if sessions := strings.Count(string(data), "session with the swarm"); sessions > joins {
		t.Errorf("%d sessions for %d joins", sessions, joins)
	}
	if warnings := strings.Count(string(data), "level=WARN"); warnings > 20 {
		t.Errorf("%d warnings", warnings)
	}
}

func interopLeave(t *testing.T, s *swarm, m, w string) {
	s.create(t, m, "last", on(w))
	s.wantRunning(t, m, "last", 1, time.Minute)
	s.docker(t, w, "swarm", "leave")
	s.gone(t, w, "last")
	s.wantNode(t, m, w, "Down", "Active")
	s.docker(t, m, "node", "rm", w)
	if out := s.docker(t, m, "node", "ls", "--format", "{{.Hostname}}"); strings.Contains(out, w) {
		t.Errorf("the node is still there:\n%s", out)
	}
	s.docker(t, m, "service", "rm", "last")
}
