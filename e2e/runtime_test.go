package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/skep-dev/skep/e2e/testimage"
)

// TestRuntime runs plain containers on one node as a person does with the docker client.
func TestRuntime(t *testing.T) {
	s := newSwarm(t, 1, 0)
	s.loadImages(t)
	m := s.byRole("manager")[0]
	for _, c := range []struct {
		name string
		run  func(*testing.T, *swarm, string)
	}{
		{"run", testRun},
		{"options", testRunOptions},
		{"failed starts", testFailedStarts},
		{"exec, top and stats", testExecTop},
		{"life", testContainerLife},
		{"logs", testContainerLogs},
		{"copy", testCopy},
		{"images", testImages},
		{"health and restarts", testHealthAndRestarts},
		{"daemon killed", testContainersOutliveDaemon},
	} {
		if !t.Run(c.name, func(t *testing.T) { c.run(t, s, m) }) {
			return
		}
	}
}

// sh returns the arguments that run a shell script in the test image.
func sh(options ...string) []string {
	script := options[len(options)-1]
	args := append([]string{"run", "--entrypoint", "sh"}, options[:len(options)-1]...)
	return append(args, testimage.V1, "-c", script)
}

func testRun(t *testing.T, s *swarm, m string) {
	for _, c := range []struct {
		name string
		args []string
		want string
		code string
	}{
		{"output", sh("--rm", "echo hi"), "hi", ""},
		{"exit code", sh("--rm", "exit 7"), "", "exit status 7"},
		{"no network", sh("--rm", "--network", "none", "ls /sys/class/net"), "lo", ""},
	} {
		out, err := s.tryDocker(t, time.Minute, m, c.args...)
		if c.code == "" && (err != nil || strings.TrimSpace(out) != c.want) || c.code != "" && (err == nil || !strings.Contains(err.Error(), c.code)) {
			t.Errorf("%s: %q, %v", c.name, out, err)
		}
	}
	if left := s.docker(t, m, "ps", "-aq"); left != "" {
		t.Errorf("--rm left %s", left)
	}
}

func testRunOptions(t *testing.T, s *swarm, m string) {
	host := t.TempDir()
	if err := os.WriteFile(filepath.Join(host, "f"), []byte("host"), 0o644); err != nil {
		t.Fatal(err)
	}
	got := s.docker(t, m, sh("--rm", "-e", "A=1", "--hostname", "hive", "--user", "1000:1000", "-w", "/tmp", "-v", host+":/h:ro", "-v", "comb:/v",
		"--tmpfs", "/t:size=1m", "--memory", "32m", "--pids-limit", "50", "--cpus", "0.5", "--ulimit", "nofile=99", "--cap-drop", "ALL",
		"--security-opt", "no-new-privileges", "--add-host", "bees:10.9.8.7", "--dns", "9.9.9.9", "--sysctl", "net.core.somaxconn=77", "--oom-score-adj", "300", "--init", "--read-only",
		`busybox printf '%s ' $A $(hostname) $(id -u) $PWD $(cat /h/f) $(ulimit -n) $(cat /proc/self/oom_score_adj) $(cat /proc/sys/net/core/somaxconn) $(cat /proc/1/comm)
		busybox grep -o 10.9.8.7 /etc/hosts; busybox grep -o 9.9.9.9 /etc/resolv.conf; touch /x 2>/dev/null || echo read-only; touch /h/g 2>/dev/null || echo bind-read-only; touch /t/x && echo tmpfs`)...)
	const want = "1 hive 1000 /tmp host 99 300 77 docker-init 10.9.8.7\n9.9.9.9\nread-only\nbind-read-only\ntmpfs"
	if got != want {
		t.Errorf("got %q\nwant %q", got, want)
	}
	s.docker(t, m, "volume", "rm", "comb")
}

func testFailedStarts(t *testing.T, s *swarm, m string) {
	for _, c := range []struct{ name, entrypoint, want string }{
		{"program that is not there", "/nope", "exit status 127"},
		{"program that is a directory", "/etc", "exit status 126"},
	} {
		if out, err := s.tryDocker(t, time.Minute, m, "run", "--rm", "--entrypoint", c.entrypoint, testimage.V1); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %s, %v", c.name, out, err)
		}
	}
	if out, err := s.tryDocker(t, time.Minute, m, "run", "--rm", "--pull", "never", "absent:1"); err == nil || !strings.Contains(err.Error(), "No such image: absent:1") {
		t.Errorf("%s, %v", out, err)
	}
	eventually(t, 10*time.Second, "what did not start removes itself", func() string { return s.docker(t, m, "ps", "-aq") })
}

func testExecTop(t *testing.T, s *swarm, m string) {
	s.docker(t, m, "run", "-d", "--name", "busy", testimage.V1)
	defer s.docker(t, m, "rm", "-f", "busy")
	if out, err := s.tryDocker(t, time.Minute, m, "exec", "-e", "B=2", "busy", "sh", "-c", "echo $B; exit 5"); err == nil || !strings.Contains(err.Error(), "exit status 5") || strings.TrimSpace(out) != "2" {
		t.Errorf("exec: %q, %v", out, err)
	}
	if out := s.docker(t, m, "exec", "-t", "busy", "busybox", "tty"); out != "/dev/pts/0" {
		t.Errorf("terminal: %q", out)
	}
	if out := s.docker(t, m, "top", "busy"); !strings.Contains(out, "/bin/testapp") {
		t.Errorf("top: %s", out)
	}
	if out := s.docker(t, m, "stats", "--no-stream", "--format", "{{.Name}} {{.PIDs}}", "busy"); !strings.HasPrefix(out, "busy ") || out == "busy 0" {
		t.Errorf("stats: %s", out)
	}
}

func testContainerLife(t *testing.T, s *swarm, m string) {
	status := func(want string) {
		t.Helper()
		if got := s.docker(t, m, "inspect", "-f", "{{.State.Status}}", "one"); got != want {
			t.Errorf("status %s instead of %s", got, want)
		}
	}
	s.docker(t, m, "create", "--name", "one", testimage.V1)
	status("created")
	s.docker(t, m, "start", "one")
	s.docker(t, m, "pause", "one")
	status("paused")
	s.docker(t, m, "unpause", "one")
	s.docker(t, m, "update", "--memory", "50m", "--memory-swap", "50m", "one")
	s.docker(t, m, "restart", "one")
	status("running")
	s.docker(t, m, "rename", "one", "two")
	s.docker(t, m, "rename", "two", "one")
	s.docker(t, m, "stop", "one")
	if got := s.docker(t, m, "wait", "one"); got != "0" {
		t.Errorf("exit code %s", got)
	}
	status("exited")
	s.docker(t, m, "start", "one")
	s.docker(t, m, "kill", "one")
	if got := s.docker(t, m, "wait", "one"); got != "137" {
		t.Errorf("exit code %s", got)
	}
	s.docker(t, m, "rm", "one")
	s.docker(t, m, sh("--name", "oom", "-d", "--memory", "16m", "--memory-swap", "16m", "busybox head -c 100m /dev/zero | busybox tail -n1")...)
	defer s.docker(t, m, "rm", "-f", "oom")
	s.docker(t, m, "wait", "oom")
	eventually(t, 10*time.Second, "lack of memory is told", func() string {
		return strings.TrimPrefix(s.docker(t, m, "inspect", "-f", "{{.State.OOMKilled}}", "oom"), "true")
	})
}

func testContainerLogs(t *testing.T, s *swarm, m string) {
	s.docker(t, m, sh("--name", "talk", "-d", "--log-opt", "max-size=20k", "--log-opt", "max-file=2", "busybox seq 1 3000; echo bad >&2")...)
	defer s.docker(t, m, "rm", "-f", "talk")
	if got := s.docker(t, m, "logs", "-f", "talk"); !strings.HasSuffix(got, "\n3000") {
		t.Errorf("follow: %.200q", got)
	}
	// Two files of at most 20 kB at some 70 bytes a line.
	if n := strings.Count(s.docker(t, m, "logs", "talk"), "\n"); n < 100 || n > 600 {
		t.Errorf("%d lines were kept", n)
	}
	if got := s.docker(t, m, "logs", "--tail", "3", "talk"); !strings.HasSuffix(got, "2999\n3000") {
		t.Errorf("tail: %q", got)
	}
	stamped := s.docker(t, m, "logs", "--tail", "2", "--timestamps", "talk")
	stamp, _, _ := strings.Cut(stamped, " ")
	if _, err := time.Parse(time.RFC3339Nano, stamp); err != nil {
		t.Errorf("timestamps: %q", stamped)
	}
	if got := s.docker(t, m, "logs", "--since", "2100-01-01T00:00:00Z", "talk"); got != "" {
		t.Errorf("since: %q", got)
	}
	if got := s.docker(t, m, "logs", "--until", "2000-01-01T00:00:00Z", "talk"); got != "" {
		t.Errorf("until: %q", got)
	}
}

func testCopy(t *testing.T, s *swarm, m string) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("copied"), 0o644); err != nil {
		t.Fatal(err)
	}
	s.docker(t, m, "run", "-d", "--name", "box", testimage.V1)
	defer s.docker(t, m, "rm", "-f", "box")
	s.docker(t, m, "cp", dir+"/f", "box:/tmp/g")
	if got := s.docker(t, m, "exec", "box", "cat", "/tmp/g"); got != "copied" {
		t.Errorf("in: %q", got)
	}
	s.docker(t, m, "stop", "box")
	s.docker(t, m, "cp", "box:/tmp", dir+"/out")
	if got, err := os.ReadFile(dir + "/out/g"); err != nil || string(got) != "copied" {
		t.Errorf("out: %q, %v", got, err)
	}
	if got := s.docker(t, m, "diff", "box"); !strings.Contains(got, "A /tmp/g") {
		t.Errorf("diff: %q", got)
	}
	s.docker(t, m, "export", "-o", dir+"/all.tar", "box")
	if got := run(t, "tar", "tf", dir+"/all.tar"); !strings.Contains(got, "tmp/g\n") {
		t.Errorf("export: %s", got)
	}
}

func testImages(t *testing.T, s *swarm, m string) {
	archive := filepath.Join(t.TempDir(), "saved.tar")
	s.docker(t, m, "tag", testimage.V1, "mine:1")
	s.docker(t, m, "save", "-o", archive, "mine:1")
	s.docker(t, m, "rmi", "mine:1")
	if out := s.docker(t, m, "load", "-i", archive); out != "Loaded image: mine:1" {
		t.Errorf("load: %s", out)
	}
	if out := s.docker(t, m, "images", "-q", "mine"); out == "" {
		t.Error("the image is not listed")
	}
	s.docker(t, m, "rmi", "mine:1")
	s.docker(t, m, "image", "prune", "-f")
	if out := s.docker(t, m, "image", "inspect", "-f", "{{.Os}}", testimage.V1); out != "linux" {
		t.Errorf("inspect: %s", out)
	}
}

func testHealthAndRestarts(t *testing.T, s *swarm, m string) {
	s.docker(t, m, "run", "-d", "--name", "well", "--health-cmd", "true", "--health-interval", "200ms", testimage.V1)
	defer s.docker(t, m, "rm", "-f", "well")
	s.docker(t, m, sh("-d", "--name", "falls", "--restart", "on-failure:2", "exit 3")...)
	defer s.docker(t, m, "rm", "-f", "falls")
	eventually(t, 20*time.Second, "healthy", func() string {
		return strings.TrimPrefix(s.docker(t, m, "inspect", "-f", "{{.State.Health.Status}}", "well"), "healthy")
	})
	eventually(t, 20*time.Second, "given up after two restarts", func() string {
		return strings.TrimPrefix(s.docker(t, m, "inspect", "-f", "{{.RestartCount}} {{.State.Status}} {{.State.ExitCode}}", "falls"), "2 exited 3")
	})
}

func testContainersOutliveDaemon(t *testing.T, s *swarm, m string) {
	s.docker(t, m, sh("-d", "--name", "lasts", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done")...)
	s.docker(t, m, sh("-d", "--name", "ends", "sleep 1; exit 42")...)
	pid := s.docker(t, m, "inspect", "-f", "{{.State.Pid}}", "lasts")
	s.dev(t, "kill", m)
	s.dev(t, "start", m)
	eventually(t, 30*time.Second, "the daemon finds its containers", func() string {
		out, err := s.tryDocker(t, 10*time.Second, m, "inspect", "-f", "{{.State.Pid}}", "lasts")
		if err != nil || strings.TrimSpace(out) != pid {
			return fmt.Sprintf("pid %s, %v; before %s", out, err, pid)
		}
		return ""
	})
	if got := s.docker(t, m, "wait", "ends"); got != "42" {
		t.Errorf("exit code %s", got)
	}
	s.docker(t, m, "kill", "lasts")
	for i, line := range strings.Fields(s.docker(t, m, "logs", "lasts")) {
		if line != fmt.Sprint(i+1) {
			t.Fatalf("line %d of the log is %s", i+1, line)
		}
	}
	s.docker(t, m, "rm", "lasts", "ends")
}
