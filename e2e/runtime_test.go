package e2e

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"golang.org/x/sys/unix"

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
		{"registry", testRegistry},
		{"archives", testArchives},
		{"terminal", testTerminal},
		{"mounts", testMounts},
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
	testLogSelection(t, s, m)
	if got := s.docker(t, m, "logs", "--since", "2100-01-01T00:00:00Z", "talk"); got != "" {
		t.Errorf("since: %q", got)
	}
	if got := s.docker(t, m, "logs", "--until", "2000-01-01T00:00:00Z", "talk"); got != "" {
		t.Errorf("until: %q", got)
	}
}

// testLogSelection reads parts of a log by time.
func testLogSelection(t *testing.T, s *swarm, m string) {
	t.Helper()
	s.docker(t, m, sh("--name", "says", "-d", "for i in 1 2 3; do echo $i; sleep 0.3; done; sleep 1000")...)
	defer s.docker(t, m, "rm", "-f", "says")
	eventually(t, 20*time.Second, "it has spoken", func() string {
		return strings.TrimPrefix(s.docker(t, m, "logs", "says"), "1\n2\n3")
	})
	var stamps []string
	for line := range strings.Lines(s.docker(t, m, "logs", "-t", "says")) {
		stamp, _, _ := strings.Cut(line, " ")
		stamps = append(stamps, stamp)
	}
	if len(stamps) != 3 {
		t.Fatalf("times %q", stamps)
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--since", stamps[1]}, "2\n3"},
		{[]string{"--until", stamps[1]}, "1\n2"},
		{[]string{"--since", stamps[1], "--until", stamps[1]}, "2"},
		{[]string{"--since", stamps[1], "--tail", "1"}, "3"},
		{[]string{"--tail", "0"}, ""},
		{[]string{"-f", "--until", stamps[2]}, "1\n2\n3"},
	} {
		if got := s.docker(t, m, append(append([]string{"logs"}, c.args...), "says")...); got != c.want {
			t.Errorf("logs %q: %q, want %q", c.args, got, c.want)
		}
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
	if out, err := s.tryDocker(t, time.Minute, m, "rmi", "mine:1"); err == nil || !strings.Contains(out, "No such image: mine:1") {
		t.Errorf("rmi of what is gone: %s, %v", out, err)
	}
	if out := s.docker(t, m, "image", "inspect", "-f", "{{.Os}}", testimage.V1); out != "linux" {
		t.Errorf("inspect: %s", out)
	}
}

func testHealthAndRestarts(t *testing.T, s *swarm, m string) {
	s.docker(t, m, "run", "-d", "--name", "well", "--health-cmd", "true", "--health-interval", "200ms", testimage.V1)
	defer s.docker(t, m, "rm", "-f", "well")
	// Failures in the start period do not count, and looks in it come at their own interval.
	s.docker(t, m, sh("-d", "--name", "late", "--health-cmd", "test -e /tmp/ok", "--health-interval", "1h", "--health-retries", "1", "--health-start-period", "1h",
		"--health-start-interval", "100ms", "sleep 1; touch /tmp/ok; sleep 1000")...)
	defer s.docker(t, m, "rm", "-f", "late")
	eventually(t, 20*time.Second, "healthy after failures in the start period", func() string {
		got := s.docker(t, m, "inspect", "-f", "{{.State.Health.Status}}{{range .State.Health.Log}} {{.ExitCode}}{{end}}", "late")
		if strings.HasPrefix(got, "unhealthy") {
			t.Fatalf("failures in the start period counted: %s", got)
		}
		if strings.HasPrefix(got, "healthy 1") && strings.HasSuffix(got, " 0") {
			return ""
		}
		return got
	})
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
	for name, policy := range map[string]string{"always": "always", "unless": "unless-stopped", "wants": "unless-stopped"} {
		s.docker(t, m, sh("-d", "--name", name, "--restart", policy, "trap 'exit 0' TERM; while :; do sleep 0.1; done")...)
	}
	s.docker(t, m, "stop", "always", "unless")
	s.docker(t, m, sh("-d", "--name", "once", "--rm", "sleep 1")...)
	pid := s.docker(t, m, "inspect", "-f", "{{.State.Pid}}", "lasts")
	kept := s.docker(t, m, "inspect", "-f", "{{.State.Pid}}", "wants")
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
	eventually(t, 20*time.Second, "policies hold", func() string {
		got := s.docker(t, m, "inspect", "-f", "{{.State.Status}}", "always", "unless", "wants")
		if left := s.docker(t, m, "ps", "-aqf", "name=once"); left != "" {
			got += " and once"
		}
		return strings.TrimPrefix(got, "running\nexited\nrunning")
	})
	if now := s.docker(t, m, "inspect", "-f", "{{.State.Pid}}", "wants"); now != kept {
		t.Errorf("process %s was replaced by %s", kept, now)
	}
	s.docker(t, m, "rm", "-f", "lasts", "ends", "always", "unless", "wants")
}

// testRegistry pulls from a registry on the node's loopback that wants a password, by hand
// and for a service.
func testRegistry(t *testing.T, s *swarm, m string) {
	addr := nodeRegistry(t, s, m)
	ref := addr + "/hive/app"
	if out, err := s.tryDocker(t, time.Minute, m, "pull", ref+":1"); err == nil || !strings.Contains(out, "pull access denied for "+ref) {
		t.Errorf("pull without a password: %s, %v", out, err)
	}
	config := t.TempDir()
	docker := func(args ...string) string {
		t.Helper()
		return strings.TrimSpace(run(t, "docker", append([]string{"--config", config, "-H", "unix://" + s.node(t, m).Socket}, args...)...))
	}
	auth := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, addr, base64.StdEncoding.EncodeToString([]byte("bee:honey")))
	if err := os.WriteFile(filepath.Join(config, "config.json"), []byte(auth), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := docker("pull", ref+":1"); !strings.Contains(out, "Downloaded newer image for "+ref+":1") {
		t.Errorf("pull by tag: %s", out)
	}
	byDigest := docker("image", "inspect", "-f", "{{index .RepoDigests 0}}", ref+":1")
	if !strings.HasPrefix(byDigest, ref+"@sha256:") {
		t.Fatalf("digest %s", byDigest)
	}
	docker("rmi", ref+":1")
	docker("pull", byDigest)
	if out := docker("image", "inspect", "-f", "{{.Config.Labels.ref}} {{.RepoTags}}", byDigest); out != "pulled []" {
		t.Errorf("pulled by digest: %s", out)
	}
	if out, err := s.tryDocker(t, time.Minute, m, "run", "--rm", "--pull", "always", "--entrypoint", "true", byDigest); err == nil {
		t.Errorf("pull always without a password: %s", out)
	}
	docker("rmi", byDigest)
	docker("service", "create", "--quiet", "--name", "pulled", "--with-registry-auth", ref+":1")
	up := s.wantRunning(t, m, "pulled", 1, time.Minute)
	if got := docker("service", "inspect", "-f", "{{.Spec.TaskTemplate.ContainerSpec.Image}}", "pulled"); got != ref+":1@"+strings.TrimPrefix(byDigest, ref+"@") {
		t.Errorf("the service %s is pinned to %s", up[0].Image, got)
	}
	docker("service", "rm", "pulled")
	eventually(t, 30*time.Second, "its container goes", func() string { return docker("ps", "-aqf", "name=pulled") })
	docker("rmi", byDigest)
}

// testArchives loads an OCI layout, and what was saved from one image and from several.
func testArchives(t *testing.T, s *swarm, m string) {
	dir := t.TempDir()
	s.docker(t, m, "save", "-o", filepath.Join(dir, "saved.tar"), testimage.V1)
	img, err := tarball.ImageFromPath(filepath.Join(dir, "saved.tar"), nil)
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	if id := s.docker(t, m, "image", "inspect", "-f", "{{.Id}}", testimage.V1); id != config.String() {
		t.Errorf("saved %s as %s", id, config)
	}
	lay, err := layout.Write(filepath.Join(dir, "oci"), empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := lay.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "laid.test/out:3"})); err != nil {
		t.Fatal(err)
	}
	run(t, "tar", "-C", filepath.Join(dir, "oci"), "-cf", filepath.Join(dir, "oci.tar"), ".")
	if out := s.docker(t, m, "load", "-i", filepath.Join(dir, "oci.tar")); out != "Loaded image: laid.test/out:3" {
		t.Errorf("load of an OCI layout: %s", out)
	}
	if out := s.docker(t, m, "run", "--rm", "--entrypoint", "echo", "laid.test/out:3", "laid"); out != "laid" {
		t.Errorf("run of it: %s", out)
	}
	// Through a pipe, two images at a time, as people move them between machines.
	s.docker(t, m, "tag", "laid.test/out:3", "piped:1")
	docker := "docker -H unix://" + s.node(t, m).Socket
	out := run(t, "sh", "-c", fmt.Sprintf("%[1]s save laid.test/out:3 piped:1 | gzip > %[2]s/two.tgz && %[1]s rmi laid.test/out:3 piped:1 >/dev/null && %[1]s load < %[2]s/two.tgz", docker, dir))
	if !strings.Contains(out, "Loaded image: laid.test/out:3\n") || !strings.Contains(out, "Loaded image: piped:1\n") {
		t.Errorf("load from a pipe: %s", out)
	}
	if id := s.docker(t, m, "image", "inspect", "-f", "{{.Id}}", "piped:1"); id != config.String() {
		t.Errorf("%s came back as %s", config, id)
	}
	s.docker(t, m, "rmi", "laid.test/out:3", "piped:1")
}

// testTerminal uses a terminal of its own: an exec follows its size and gives its exit code.
func testTerminal(t *testing.T, s *swarm, m string) {
	s.docker(t, m, sh("-d", "--name", "term", "sleep 1000")...)
	defer s.docker(t, m, "rm", "-f", "term")
	docker := "docker -H unix://" + s.node(t, m).Socket
	// script(1) makes the terminal; its size changes once the exec runs.
	const inner = `busybox stty size; touch /tmp/seen; n=0; while [ $n -lt 300 ] && ! busybox stty size | busybox grep -q "50 120"; do sleep 0.1; n=$((n+1)); done; busybox stty size; exit 6`
	outer := fmt.Sprintf("stty rows 33 cols 77; (until %[1]s exec term ls /tmp/seen >/dev/null 2>&1; do sleep 0.1; done; stty rows 50 cols 120 </dev/tty) & %[1]s exec -it term sh -c '%[2]s'; echo code $?; wait", docker, inner)
	out := run(t, "script", "-qec", outer, "/dev/null")
	for _, want := range []string{"50 120", "code 6"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in the terminal's output %q", want, out)
		}
	}
}

// testMounts gives volumes and tmpfs mounts their options.
func testMounts(t *testing.T, s *swarm, m string) {
	s.docker(t, m, "volume", "create", "--label", "kind=test", "jar")
	if got := s.docker(t, m, "volume", "inspect", "-f", "{{.Driver}} {{.Labels.kind}} {{.Scope}}", "jar"); got != "local test local" {
		t.Errorf("volume: %s", got)
	}
	got := s.docker(t, m, sh("--rm", "--read-only", "--mount", "type=volume,source=jar,target=/w", "--mount", "type=volume,source=jar,target=/r,readonly",
		"--mount", "type=tmpfs,target=/t,tmpfs-size=2m,tmpfs-mode=1750", "--mount", "type=volume,target=/anon,volume-nocopy",
		"--ulimit", "nofile=64:128", "--ulimit", "core=0", "--shm-size", "3m", "--group-add", "4321", "--domainname", "example.org",
		"--dns", "9.9.9.9", "--dns-search", "hive.test", "--dns-option", "ndots:3", "--add-host", "comb:10.1.2.3", "--add-host", "six:fd00::1", "--sysctl", "net.ipv4.ip_local_port_range=2000 3000",
		`echo kept > /w/f; busybox cat /r/f; touch /r/g 2>/dev/null || echo volume-read-only; busybox stat -c %a /t; busybox df -k /t | busybox tail -n1 | busybox awk '{print $2}'; touch /anon/x && echo anonymous
		echo $(ulimit -n) $(ulimit -Hn) $(ulimit -c); busybox df -k /dev/shm | busybox tail -n1 | busybox awk '{print $2}'; id -G; cat /proc/sys/kernel/domainname
		busybox grep -v '^#' /etc/resolv.conf; busybox grep -E 'comb|six' /etc/hosts | busybox tr '\t' ' '; busybox tr '\t' ' ' < /proc/sys/net/ipv4/ip_local_port_range; touch /x 2>/dev/null || echo read-only`)...)
	const want = "kept\nvolume-read-only\n1750\n2048\nanonymous\n64 128 0\n3072\n0 4321\nexample.org\nnameserver 9.9.9.9\nsearch hive.test\noptions ndots:3\n10.1.2.3 comb\nfd00::1 six\n2000 3000\nread-only"
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if left := s.docker(t, m, "volume", "ls", "-q"); left != "jar" {
		t.Errorf("volumes after --rm: %q", left)
	}
	s.docker(t, m, "volume", "rm", "jar")
}

// fillRegistry puts an image of its own into a registry as hive/app:1.
func fillRegistry(t *testing.T, s *swarm, m string, inner http.Handler) {
	t.Helper()
	saved := filepath.Join(t.TempDir(), "saved.tar")
	s.docker(t, m, "save", "-o", saved, testimage.V1)
	img, err := tarball.ImageFromPath(saved, nil)
	if err != nil {
		t.Fatal(err)
	}
	f, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	f = f.DeepCopy()
	f.Config.Labels["ref"] = "pulled"
	if img, err = mutate.ConfigFile(img, f); err != nil {
		t.Fatal(err)
	}
	door := httptest.NewServer(inner)
	defer door.Close()
	tag, err := name.NewTag(strings.TrimPrefix(door.URL, "http://") + "/hive/app:1")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(tag, img); err != nil {
		t.Fatal(err)
	}
}

// nodeRegistry serves a registry with one image on the loopback of a node's network namespace, over
// plain HTTP, to user bee with password honey. It returns its address.
func nodeRegistry(t *testing.T, s *swarm, m string) string {
	t.Helper()
	l, err := listenInside(t.Context(), s.node(t, m).PID)
	if err != nil {
		t.Fatal(err)
	}
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	fillRegistry(t, s, m, inner)
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "bee" || password != "honey" {
			w.Header().Set("WWW-Authenticate", `Basic realm="hive"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		inner.ServeHTTP(w, r)
	})}
	done := make(chan struct{})
	go func() {
		_ = server.Serve(l) // until the test closes it
		close(done)
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-done
	})
	return l.Addr().String()
}

// listenInside listens on loopback in the network namespace of a process.
func listenInside(ctx context.Context, pid int) (net.Listener, error) {
	runtime.LockOSThread() // its namespace is another for a while
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, err
	}
	defer own.Close()
	its, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return nil, err
	}
	defer its.Close()
	if err := unix.Setns(int(its.Fd()), unix.CLONE_NEWNET); err != nil {
		return nil, err
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if back := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); back != nil {
		return nil, back // the thread stays locked and ends with its goroutine
	}
	runtime.UnlockOSThread()
	return l, err
}
