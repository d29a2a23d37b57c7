package cli

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/platform/process"
)

// playDaemon is what `skep up` starts in tests: a fake swarm on the given socket that
// ends on the signals of a daemon.
func playDaemon(args []string) int {
	f := &fakeSwarm{
		state: swarm.LocalNodeStateInactive, manager: true, services: map[string]*swarm.Service{},
		secrets: map[string]*swarm.Secret{}, configs: map[string]*swarm.Config{}, behave: allRun,
	}
	socket := ""
	for _, a := range args {
		if s, ok := strings.CutPrefix(a, "--host=unix://"); ok {
			socket = s
		}
		if a == "--label=broken=1" {
			println("this daemon is broken")
			return 1
		}
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		println(err.Error())
		return 1
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGUSR1)
	defer stop()
	go func() { _ = http.Serve(l, f) }()
	<-ctx.Done()
	return 0
}

// node returns a runner of commands for a node in directories of its own.
func node(t *testing.T) (dir string, run func(args ...string) (string, error)) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, as nodes do")
	}
	if systemdRuns() {
		t.Skip("systemd runs, and the test must not install a unit")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// A test's own directory has too long a name for the sockets below it.
	if dir, err = os.MkdirTemp("/tmp", "s"); err != nil { //nolint:usetesting // see above
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	run = func(args ...string) (string, error) {
		var out bytes.Buffer
		env := map[string]string{"DOCKER_CONFIG": filepath.Join(dir, "docker")}
		root := New(Env{
			In: strings.NewReader(""), Out: &out, Err: &out, Executable: exe, Getenv: func(k string) string { return env[k] }, Environ: os.Environ,
		})
		root.SetArgs(args)
		err := root.ExecuteContext(t.Context())
		return out.String(), err
	}
	t.Cleanup(func() {
		if p, err := process.ReadPIDFile(filepath.Join(dir, "run", "skep.pid")); err == nil {
			_ = p.Kill(context.Background())
		}
	})
	return dir, run
}

func TestUpAndDown(t *testing.T) {
	dir, run := node(t)
	socket := filepath.Join(dir, "s")
	flags := []string{"up", "--data-root=" + dir + "/data", "--exec-root=" + dir + "/run", "--host=unix://" + socket, "--cgroup-parent=/skep-cli-test"}
	out, err := run(flags...)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"starting the node in the background", "beginning a swarm", "manager n1 is up at unix://" + socket} {
		if !strings.Contains(out, want) {
			t.Errorf("want %q in\n%s", want, out)
		}
	}
	p, err := process.ReadPIDFile(filepath.Join(dir, "run", "skep.pid"))
	if err != nil {
		t.Fatal(err)
	}
	if out, err := run("--json", "status"); err == nil {
		t.Errorf("status found the node without its context: %s", out)
	}
	if err := os.WriteFile(filepath.Join(dir, "docker", "config.json"), []byte(`{"currentContext":"skep"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := run("status"); err != nil || !strings.Contains(out, "n1: manager") {
		t.Errorf("status through the context: %v\n%s", err, out)
	}
	if out, err := run(flags...); err != nil || !strings.Contains(out, "the node is up already") {
		t.Errorf("second up: %v\n%s", err, out)
	}
	if _, err := run(append(flags, "--label=a=b")...); err == nil || !strings.Contains(err.Error(), "with other flags") {
		t.Errorf("up with other flags: %v", err)
	}
	out, err = run("down", "--data-root="+dir+"/data")
	if err != nil || !strings.Contains(out, "its data are in") {
		t.Errorf("down: %v\n%s", err, out)
	}
	if p.Alive() {
		t.Error("the daemon is alive after down")
	}
	if entries, err := os.ReadDir(filepath.Join(dir, "run")); err != nil || len(entries) != 0 {
		t.Errorf("left in the exec root: %v, %v", entries, err)
	}
	if !exists(filepath.Join(dir, "data", "skep.log")) || len(contexts(t, filepath.Join(dir, "docker"))) != 0 {
		t.Error("down removed data, or left the context")
	}
	if _, err := run(flags...); err != nil {
		t.Fatalf("up after down: %v", err)
	}
	if out, err := run("down", "--data-root="+dir+"/data", "--keep-data=false"); err != nil || !strings.Contains(out, "leaving the swarm") {
		t.Errorf("down without data: %v\n%s", err, out)
	}
	if entries, err := os.ReadDir(filepath.Join(dir, "data")); err != nil || len(entries) != 0 {
		t.Errorf("left in the data root: %v, %v", entries, err)
	}
	if out, err := run("down", "--data-root="+dir+"/data", "--exec-root="+dir+"/run"); err != nil || !strings.Contains(out, "no node is up here") {
		t.Errorf("down of nothing: %v\n%s", err, out)
	}
}

// TestDownClearsWhatAForeignDaemonLeft ends the containerd of a daemon that nobody
// installed, and refuses to do so while that daemon runs.
func TestDownClearsWhatAForeignDaemonLeft(t *testing.T) {
	dir, run := node(t)
	if err := os.MkdirAll(filepath.Join(dir, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	play := func(name, text string) process.Process {
		t.Helper()
		p, err := process.Start(process.Command{Path: "/bin/bash", Args: []string{"-c", "exec -a " + name + " /bin/bash -c 'sleep 60; exit' x " + text}, Log: filepath.Join(dir, "log")})
		if errors.Is(err, os.ErrNotExist) {
			t.Skip("needs bash")
		} else if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = p.Kill(context.Background()) })
		return p
	}
	down := []string{"down", "--data-root=" + dir + "/data", "--exec-root=" + dir + "/run"}
	daemon := play("skep", "daemon --data-root "+dir+"/data")
	helper := play("containerd", "--config "+dir+"/data/containerd/config.toml")
	awaitArgs(t, helper)
	awaitArgs(t, daemon)
	if _, err := run(down...); err == nil || !strings.Contains(err.Error(), "stop it first") {
		t.Errorf("down beside a running daemon: %v", err)
	}
	if err := daemon.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if out, err := run(down...); err != nil || !strings.Contains(out, "removing what a daemon left") {
		t.Errorf("down: %v\n%s", err, out)
	}
	if helper.Alive() {
		t.Error("its containerd is alive")
	}
}

// awaitArgs waits until a shell has become what it plays.
func awaitArgs(t *testing.T, p process.Process) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		found, err := process.Select(func(e process.Entry) bool {
			return e.Process == p && len(e.Args) > 0 && filepath.Base(e.Args[0]) != "bash"
		})
		if err != nil {
			t.Fatal(err)
		}
		if len(found) > 0 {
			return
		}
	}
	t.Fatal("the shell does not become what it plays")
}

func TestUpShowsTheLogOfABrokenDaemon(t *testing.T) {
	dir, run := node(t)
	_, err := run("up", "--data-root="+dir+"/data", "--exec-root="+dir+"/run", "--host=unix://"+dir+"/s", "--label=broken=1", "--cgroup-parent=/skep-cli-test")
	if err == nil || !strings.Contains(err.Error(), "this daemon is broken") {
		t.Errorf("got %v", err)
	}
	if out, err := run("down", "--data-root="+dir+"/data"); err != nil {
		t.Errorf("down after a failed up: %v\n%s", err, out)
	}
}

func TestUpRefusesAForeignDaemon(t *testing.T) {
	dir, run := node(t)
	_, host := newFake(t)
	_, err := run("up", "--data-root="+dir+"/data", "--exec-root="+dir+"/run", "--host="+host)
	if err == nil || !strings.Contains(err.Error(), "did not start answers at") {
		t.Errorf("got %v", err)
	}
}

func TestUpJoins(t *testing.T) {
	dir, run := node(t)
	flags := []string{"up", "--data-root=" + dir + "/data", "--exec-root=" + dir + "/run", "--host=unix://" + dir + "/s", "--cgroup-parent=/skep-cli-test"}
	out, err := run(append(flags, "--join", "SWMTKN-1-x", "10.0.0.1")...)
	if err != nil || !strings.Contains(out, "joining the swarm at 10.0.0.1") {
		t.Errorf("join: %v\n%s", err, out)
	}
	if out, err := run(append(flags, "--join", "SWMTKN-1-x", "10.0.0.1")...); err != nil || !strings.Contains(out, "is in a swarm already") {
		t.Errorf("second join: %v\n%s", err, out)
	}
	if _, err := run("down", "--data-root="+dir+"/data"); err != nil {
		t.Error(err)
	}
}

func TestConvergeKeepsWatchingThroughALeaderChange(t *testing.T) {
	w := &watch{keep: time.Second, known: map[string]bool{}}
	s := swarm.Service{ID: "s", Spec: swarm.ServiceSpec{Annotations: swarm.Annotations{Name: "web"}, Mode: swarm.ServiceMode{Replicated: &swarm.ReplicatedService{}}}}
	now := time.Unix(1e9, 0)
	node := swarm.Node{ID: "n1", Status: swarm.NodeStatus{State: swarm.NodeStateReady}}
	if err := w.judge(s, allRun(&s), []swarm.Node{node}, now); err != nil || w.done || w.progress.state != "staying up" {
		t.Fatalf("%v %+v", err, w)
	}
	if err := w.patience(t.Context(), errors.New("refused")); err == nil {
		t.Error("an error that stays was passed over")
	}
	if err := w.judge(s, nil, []swarm.Node{node}, now.Add(time.Second)); err != nil || w.done || w.progress.running != 0 {
		t.Fatalf("%v %+v", err, w)
	}
	if err := w.judge(s, allRun(&s), []swarm.Node{node}, now.Add(2*time.Second)); err != nil || w.done {
		t.Fatalf("it counts as kept although it was interrupted: %v %+v", err, w)
	}
	if err := w.judge(s, allRun(&s), []swarm.Node{node}, now.Add(3*time.Second)); err != nil || !w.done {
		t.Fatalf("%v %+v", err, w)
	}
}

// TestDaemonOf: a daemon is found by either of its directories.
func TestDaemonOf(t *testing.T) {
	for line, want := range map[string]bool{
		"/bin/skep daemon --data-root=/d --exec-root=/x":    true,
		"/bin/skep daemon --data-root /d --exec-root /o":    true,
		"/bin/skep daemon --data-root /o --exec-root /x":    true,
		"/bin/skep daemon --exec-root=/x":                   true,
		"/bin/skep daemon --data-root=/d2 --exec-root=/x/y": false,
		"/bin/skep daemon":                 false,
		"/bin/skep down --data-root=/d":    false,
		"/bin/other daemon --data-root=/d": false,
	} {
		if got := daemonOf(process.Entry{Args: strings.Fields(line)}, "/d", "/x"); got != want {
			t.Errorf("%s: %v", line, got)
		}
	}
	if !daemonOf(process.Entry{Args: []string{"skep", "daemon"}}, DefaultDataRoot, "/x") {
		t.Error("a daemon with the default directories is not found")
	}
}
