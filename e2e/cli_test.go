package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"

	"github.com/skep-dev/skep/platform/process"
)

// machine is where a person types skep commands: a network namespace with nothing in it,
// directories of its own, and a docker configuration of its own.
type machine struct {
	dir    string // short, for sockets lie below it
	holder *exec.Cmd
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	skep := skepBinary(t)
	if _, err := os.Stat("../bin/hello.tar"); err != nil {
		t.Skip("bin/hello.tar is not built: run make build")
	}
	dir, err := os.MkdirTemp("/tmp", "skm") //nolint:usetesting // t.TempDir is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{dir: dir, holder: exec.Command("unshare", "-n", "--", "sh", "-c", "ip link set lo up && echo up && exec sleep 600")}
	out, err := m.holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := m.holder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			if data, err := os.ReadFile(m.path("data", "skep.log")); err == nil {
				t.Logf("--- log\n%s", data[max(0, len(data)-6000):])
			}
		}
		if out, err := exec.Command(skep, "down", "--data-root", m.path("data"), "--exec-root", m.path("x"), "--keep-data=false").CombinedOutput(); err != nil {
			t.Errorf("skep down: %v\n%s", err, out)
		}
		if t.Failed() { // whatever went wrong, nothing of it stays
			ctx := context.WithoutCancel(t.Context())
			ours := func(e process.Entry) bool { return strings.Contains(strings.Join(e.Args, " "), dir+"/") }
			if err := errors.Join(process.KillAll(ctx, ours), process.UnmountBelow(dir)); err != nil {
				t.Error(err)
			}
			_ = process.RemoveCgroups("/" + filepath.Base(dir))
		}
		_ = m.holder.Process.Kill()
		_ = m.holder.Wait()
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatalf("make a network namespace: %q, %v", line, err)
	}
	return m
}

func (m *machine) path(parts ...string) string {
	return filepath.Join(append([]string{m.dir}, parts...)...)
}

// command makes a command that runs on the machine.
func (m *machine) command(t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	netns := fmt.Sprintf("--net=/proc/%d/ns/net", m.holder.Process.Pid)
	cmd := exec.CommandContext(t.Context(), "nsenter", append([]string{netns, "--", name}, args...)...)
	cmd.Env = append(os.Environ(), "DOCKER_CONFIG="+m.path("docker"), "DOCKER_HOST=", "DOCKER_CONTEXT=", "SKEP_HOST=unix://"+m.path("s"))
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// typed is what came of a command.
type typed struct {
	line     string
	out, err string
	code     int
}

func (m *machine) run(t *testing.T, line string, cmd *exec.Cmd) typed {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		t.Fatalf("%s: %v", line, err)
	}
	return typed{line, stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// skep runs a command whose output goes into files; onTerminal one that has a terminal.
func (m *machine) skep(t *testing.T, args ...string) typed {
	t.Helper()
	return m.run(t, "skep "+strings.Join(args, " "), m.command(t, skepBinary(t), args...))
}

func (m *machine) onTerminal(t *testing.T, args ...string) typed {
	t.Helper()
	line := skepBinary(t) + " " + strings.Join(args, " ")
	return m.run(t, line, m.command(t, "script", "-qec", line, "/dev/null"))
}

// says wants a command to have succeeded, with all of these on standard output.
func (r typed) says(t *testing.T, wants ...string) {
	t.Helper()
	if r.code != 0 || r.err != "" {
		t.Fatalf("%s: exit code %d, standard error %q, output:\n%s", r.line, r.code, r.err, r.out)
	}
	for _, want := range wants {
		if !strings.Contains(r.out, want) {
			t.Errorf("%s: no %q in:\n%s", r.line, want, r.out)
		}
	}
}

// fails wants a command to have failed with this on standard error and nothing else.
func (r typed) fails(t *testing.T, code int, want string) {
	t.Helper()
	if r.code != code || r.out != "" || !strings.HasPrefix(r.err, "skep: ") || !strings.Contains(r.err, want) {
		t.Errorf("%s: exit code %d, want %d; error %q, want %q; output %q", r.line, r.code, code, r.err, want, r.out)
	}
}

// decode wants one JSON value of a type and nothing else.
func decode[T any](t *testing.T, r typed) T {
	t.Helper()
	r.says(t)
	var v T
	if err := json.Unmarshal([]byte(r.out), &v); err != nil {
		t.Fatalf("%s: %v in:\n%s", r.line, err, r.out)
	}
	return v
}

func (m *machine) up(t *testing.T, more ...string) typed {
	t.Helper()
	return m.skep(t, append([]string{
		"up", "--data-root", m.path("data"), "--exec-root", m.path("x"), "-H", "unix://" + m.path("s"),
		"--cgroup-parent", "/" + filepath.Base(m.dir), "--advertise-addr", "127.0.0.1",
	}, more...)...)
}

// TestCommandLine is a person's first hour: up, deploy, look, scale, ask why, remove, down.
func TestCommandLine(t *testing.T) {
	m := newMachine(t)
	m.skep(t, "status").fails(t, 1, "no daemon answers at unix://"+m.path("s")+": is it running? start one with `skep up`")
	m.up(t).says(t, "starting the node in the background", "beginning a swarm", "manager ", "is up at unix://"+m.path("s"), "to add a machine: skep token worker")
	m.up(t).says(t, "the node is up already")
	m.up(t, "--label", "a=b").fails(t, 1, "the node is up with other flags")
	m.skep(t, "status").says(t, "Managers   1 of 1 reachable", "No services yet: skep deploy compose.yaml", "Nothing is wrong.")
	t.Run("refusals", func(t *testing.T) { refusals(t, m) })
	m.onTerminal(t, "deploy", "--load", "../bin/hello.tar", "--wait", "../examples/hello/compose.yaml").
		says(t, "Loaded image: skep.example/hello:1", "created service hello_web", "\x1b[2A\x1b[2Khello_ticker: ", "hello_web: 1/1 running (converged)")
	answers(t, m)
	m.skep(t, "deploy", "--resolve-image", "never", "--wait", "../examples/hello/compose.yaml").says(t, "hello_web: 1/1 running (converged)")
	t.Run("looking", func(t *testing.T) { looking(t, m) })
	t.Run("scaling", func(t *testing.T) { scaling(t, m) })
	t.Run("following logs", func(t *testing.T) { following(t, m) })

	m.skep(t, "down", "--data-root", m.path("data")).says(t, "stopping the node and its tasks", "the node is down; its data are in "+m.path("data"))
	m.nothingLeft(t)
	m.up(t).says(t, "is up at")
	eventually(t, 30*time.Second, "the services are back", func() string {
		if r := m.skep(t, "ls"); !strings.Contains(r.out, "3/3") || !strings.Contains(r.out, "1/1") {
			return r.out + r.err
		}
		return ""
	})
	answers(t, m)
	m.onTerminal(t, "rm", "hello").says(t, "removed service hello_web", "removed service hello_ticker")
	m.skep(t, "rm", "hello").fails(t, 1, "there is no stack hello")
	m.skep(t, "ls").says(t, "no services: deploy some")
	m.onTerminal(t, "down", "--data-root", m.path("data"), "--keep-data=false").says(t, "leaving the swarm", "the node is down and "+m.path("data")+" is empty")
	m.nothingLeft(t)
	if entries, err := os.ReadDir(m.path("data")); err != nil || len(entries) > 0 {
		t.Errorf("the data directory holds %v, %v", entries, err)
	}
	m.skep(t, "down", "--data-root", m.path("data"), "--exec-root", m.path("x")).says(t, "no node is up here")
}

// refusals are mistakes that a person makes.
func refusals(t *testing.T, m *machine) {
	bad := m.path("bad.yaml")
	text := "services:\n  web:\n    image: skep.example/hello:1\n    build: .\n"
	if err := os.WriteFile(bad, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	m.skep(t, "deploy", bad).fails(t, 1, "services.web.build: nodes run images, they do not build them")
	m.skep(t, "deploy", m.path("none.yaml")).fails(t, 1, "none.yaml")
	m.skep(t, "nosuch").fails(t, 1, `unknown command "nosuch"`)
	m.skep(t, "ps", "--nosuch").fails(t, 1, "unknown flag: --nosuch: see `skep ps --help`")
	m.skep(t, "scale").fails(t, 1, "wrong number of arguments: usage: skep scale SERVICE=N")
	m.skep(t, "scale", "nosuch=2").fails(t, 1, "service nosuch not found")
	m.skep(t, "ps", "nosuch").fails(t, 1, "service nosuch not found")
	m.skep(t, "ls", "nosuch").fails(t, 1, "there is no stack nosuch")
	m.skep(t, "logs", "nosuch").fails(t, 1, "there is no service or task nosuch")
	m.skep(t, "explain", "nosuch").fails(t, 1, "nosuch")
	m.skep(t, "down", "--data-root", m.path("elsewhere"), "--exec-root", m.path("x")).fails(t, 1, "is a daemon that `skep up` did not start with these directories")
}

// answers wants examples/hello on its published port.
func answers(t *testing.T, m *machine) {
	t.Helper()
	eventually(t, 20*time.Second, "hello answers", func() string {
		r := m.run(t, "curl", m.command(t, "curl", "-sS", "--max-time", "2", "http://127.0.0.1:8080/"))
		if !strings.HasPrefix(r.out, "Hello from task hello_web.1.") {
			return r.out + r.err
		}
		return ""
	})
}

func looking(t *testing.T, m *machine) {
	m.skep(t, "ls").says(t, "hello_ticker   replicated   2/2", "hello_web      replicated   1/1", "its node:8080->8080/tcp")
	m.onTerminal(t, "ls", "hello").says(t, "hello_web      replicated   1/1")
	m.skep(t, "ps", "hello_web").says(t, "hello_web.1 ", "running   "+"running")
	m.skep(t, "nodes").says(t, "leader   ready   active         127.0.0.1")
	m.onTerminal(t, "status").says(t, "hello_ticker   replicated   2/2", "Nothing is wrong.\r\n")
	m.skep(t, "explain", "hello_web").says(t, "running, wanted running")
	m.skep(t, "token").says(t, "skep up --join SWMTKN-1-", " 127.0.0.1:2377")
	m.run(t, "docker", m.command(t, "docker", "--context", "skep", "service", "ls", "--format", "{{.Name}} {{.Replicas}}")).says(t, "hello_ticker 2/2", "hello_web 1/1")

	services := decode[[]struct{ Spec struct{ Name string } }](t, m.skep(t, "ls", "--json"))
	if len(services) != 2 || services[0].Spec.Name != "hello_ticker" || services[1].Spec.Name != "hello_web" {
		t.Errorf("ls --json lists %+v", services)
	}
	if tasks := decode[[]struct{ DesiredState string }](t, m.skep(t, "ps", "--json")); len(tasks) != 3 || tasks[0].DesiredState != "running" {
		t.Errorf("ps --json lists %+v", tasks)
	}
	status := decode[struct {
		Managers struct{ Total, Reachable int }
		Problems []string
	}](t, m.skep(t, "status", "--json"))
	if status.Managers.Total != 1 || status.Managers.Reachable != 1 || len(status.Problems) > 0 {
		t.Errorf("status --json says %+v", status)
	}
	token := decode[struct{ Role, Token, Addr string }](t, m.skep(t, "token", "manager", "--json"))
	if token.Role != "manager" || !strings.HasPrefix(token.Token, "SWMTKN-1-") || token.Addr != "127.0.0.1:2377" {
		t.Errorf("token --json says %+v", token)
	}
	if nodes := decode[[]struct{ ID string }](t, m.skep(t, "nodes", "--json")); len(nodes) != 1 || nodes[0].ID == "" {
		t.Errorf("nodes --json lists %+v", nodes)
	}
	again := decode[struct{ Context, State string }](t, m.up(t, "--json"))
	if again.Context != "skep" || again.State != "active" {
		t.Errorf("up --json says %+v", again)
	}
}

func scaling(t *testing.T, m *machine) {
	m.skep(t, "scale", "hello_ticker=3").says(t, "hello_ticker: 3/3 running (converged)")
	m.onTerminal(t, "scale", "hello_ticker=3").says(t, "\x1b[2Khello_ticker: 3/3 running")
	m.skep(t, "scale", "hello_web=2", "-d").says(t)
	const why = "no suitable node (host-mode port already in use on 1 node)"
	eventually(t, 20*time.Second, "the second task waits", func() string {
		if r := m.skep(t, "explain", "hello_web"); !strings.Contains(r.out, "1 of 2 tasks run: "+why) {
			return r.out + r.err
		}
		return ""
	})
	m.onTerminal(t, "explain", "hello_web").says(t, "no node: pending, wanted running", "HostPort refused 1 node: host-mode port already in use on 1 node: ")
	m.skep(t, "status").says(t, "service hello_web runs 1 of 2 tasks: "+why)
	explained := decode[struct {
		Tasks []struct {
			State    string
			Refusals []struct{ Filter string }
		}
	}](t, m.skep(t, "explain", "--json", "hello_web"))
	if n := len(explained.Tasks); n != 2 || explained.Tasks[1].State != "pending" || len(explained.Tasks[1].Refusals) != 1 || explained.Tasks[1].Refusals[0].Filter != "HostPort" {
		t.Errorf("explain --json says %+v", explained)
	}
	m.skep(t, "scale", "hello_web=1").says(t, "hello_web: 1/1 running (converged)")
}

// following reads the past of a log and then what comes.
func following(t *testing.T, m *machine) {
	m.skep(t, "logs", "--tail", "1", "hello_ticker").says(t, "hello_ticker.1@", "from task hello_ticker.")
	cmd := m.command(t, skepBinary(t), "logs", "-f", "hello_ticker")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || !strings.Contains(line, "| tick ") {
		t.Errorf("the first line is %q, %v", line, err)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

// nothingLeft wants no trace of the node but its data.
func (m *machine) nothingLeft(t *testing.T) {
	t.Helper()
	if left, err := os.ReadDir(m.path("x")); err == nil && len(left) > 0 {
		t.Errorf("the exec directory holds %v", left)
	}
	if _, err := os.Lstat(m.path("s")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is there: %v", err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, m.dir+"/") {
			t.Errorf("mounted: %s", line)
		}
	}
	processes, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range processes {
		if line, err := os.ReadFile(path); err == nil && bytes.Contains(line, []byte(m.dir+"/")) {
			t.Errorf("%s runs: %s", path, bytes.ReplaceAll(line, []byte{0}, []byte{' '}))
		}
	}
	// The cgroup is gone only when the tasks' processes are.
	err = filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && d.Name() == filepath.Base(m.dir) {
			t.Errorf("cgroup %s is there", path)
		}
		return nil // others' cgroups come and go meanwhile
	})
	if err != nil {
		t.Error(err)
	}
	m.networkEmpty(t)
	if contexts, err := filepath.Glob(m.path("docker", "contexts", "meta", "*")); err != nil || len(contexts) > 0 {
		t.Errorf("docker contexts: %v, %v", contexts, err)
	}
}

// networkEmpty wants the machine's network as it was: loopback, and no rules.
func (m *machine) networkEmpty(t *testing.T) {
	t.Helper()
	links, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/dev", m.holder.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, line := range strings.Split(string(links), "\n")[2:] {
		if name, _, ok := strings.Cut(line, ":"); ok {
			names = append(names, strings.TrimSpace(name))
		}
	}
	if !slices.Equal(names, []string{"lo"}) {
		t.Errorf("links: %v", names)
	}
	netns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", m.holder.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	defer netns.Close()
	rules, err := nftables.New(nftables.WithNetNSFd(int(netns.Fd())))
	if err != nil {
		t.Fatal(err)
	}
	tables, err := rules.ListTables()
	if err != nil || len(tables) > 0 {
		t.Errorf("%d tables of rules: %v", len(tables), err)
	}
}
