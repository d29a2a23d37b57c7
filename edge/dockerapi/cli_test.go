package dockerapi_test

import (
	"context"
	"log/slog"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/skep-dev/skep/edge/dockerapi"
	"github.com/skep-dev/skep/edge/dockerapi/local"
	"github.com/skep-dev/skep/worker/runtime/fake"
)

// docker runs the docker CLI against the server, without any configuration of its user.
type docker struct {
	t    *testing.T
	host string
	home string
}

func newDocker(t *testing.T, url string) docker {
	t.Helper()
	if _, err := exec.LookPath("docker"); err != nil {
		t.Skip("no docker CLI on PATH")
	}
	return docker{t: t, host: strings.Replace(url, "http://", "tcp://", 1), home: t.TempDir()}
}

func (d docker) try(args ...string) (string, error) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "docker", append([]string{"-H", d.host}, args...)...)
	cmd.Env = append(os.Environ(), "HOME="+d.home, "DOCKER_CONFIG="+d.home)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (d docker) run(args ...string) string {
	d.t.Helper()
	out, err := d.try(args...)
	if err != nil {
		d.t.Fatalf("docker %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func (d docker) fails(want string, args ...string) {
	d.t.Helper()
	out, err := d.try(args...)
	if err == nil {
		d.t.Fatalf("docker %s succeeded:\n%s", strings.Join(args, " "), out)
	}
	if !strings.Contains(out, want) {
		d.t.Errorf("docker %s says %q, want %q in it", strings.Join(args, " "), out, want)
	}
}

func wantAll(t *testing.T, out string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(out, part) {
			t.Errorf("no %q in:\n%s", part, out)
		}
	}
}

// TestTour takes the docker CLI through the life of a swarm.
func TestTour(t *testing.T) {
	d := newDocker(t, serve(t, newDaemon(t, true)).URL)
	wantAll(t, d.run("info"), "Swarm: inactive", "Docker Root Dir: /var/lib/skep")
	d.fails(`This node is not a swarm manager. Use "docker swarm init"`, "node", "ls")
	wantAll(t, d.run("swarm", "init"), "Swarm initialized", "docker swarm join --token SWMTKN-1-", "192.0.2.1:2377")
	d.fails("already part of a swarm", "swarm", "init")
	wantAll(t, d.run("info"), "Swarm: active", "Is Manager: true", "Managers: 1", "Nodes: 2", "Default Address Pool: 10.0.0.0/8", "Heartbeat Period: 5 seconds")
	wantAll(t, d.run("version"), "Server: Skep", "0.1.0-test")
	wantAll(t, d.run("node", "ls"), "m1", "w1", "Leader", "Ready")
	wantAll(t, d.run("node", "inspect", "self", "--pretty"), "Hostname:", "m1", "Manager Status:")

	wantAll(t, d.run("service", "create", "--name", "web", "--replicas", "3", "--update-monitor", "50ms",
		"--no-resolve-image", "--publish", "mode=host,published=8080,target=80", "busybox:1", "sleep", "1000"), "converged")
	wantAll(t, d.run("service", "ls"), "web", "replicated", "3/3", "busybox:1")
	wantAll(t, d.run("service", "ps", "web"), "web.1", "web.3", "Running")
	wantAll(t, d.run("service", "inspect", "--pretty", "web"), "Replicated", "Replicas:	3", "PublishedPort = 8080", "PublishMode = host")
	wantAll(t, d.run("service", "scale", "web=5"), "converged")
	wantAll(t, d.run("service", "update", "--image", "busybox:2", "--no-resolve-image", "web"), "converged")
	wantAll(t, d.run("service", "inspect", "web"), `"PreviousSpec"`, `"Image": "busybox:1"`, `"Image": "busybox:2"`)
	wantAll(t, d.run("service", "rollback", "web"), "converged")
	wantAll(t, d.run("service", "logs", "--details", "--timestamps", "web"), "2026-01-02T03:04:05.000000006Z", "hello", "oops")
	d.fails("only", "service", "create", "--no-resolve-image", "--mode", "nonsense", "busybox")
	d.fails("name conflicts with an existing object: service WEB already exists", "service", "create", "--name", "WEB", "--no-resolve-image", "-d", "busybox")
	d.fails("EndpointSpec: a service on the host network cannot publish", "service", "create", "--no-resolve-image", "-d", "--network", "host", "--publish", "9090:80", "busybox")
	d.fails("nope", "service", "create", "--no-resolve-image", "-d", "--network", "nope", "busybox")
	d.run("service", "create", "--name", "onhost", "--no-resolve-image", "-d", "--network", "host", "busybox")
	wantAll(t, d.run("node", "ps", "w1"), "web.1")
	d.run("node", "update", "--availability", "drain", "--label-add", "disk=ssd", "w1")
	wantAll(t, d.run("node", "inspect", "w1"), `"Availability": "drain"`, `"disk": "ssd"`)
	d.fails("attempting to demote the last manager of the swarm", "node", "demote", "m1")
	d.fails("is not down and can't be removed", "node", "rm", "w1")

	d.run("secret", "create", "s1", "/etc/hostname")
	d.run("config", "create", "c1", "/etc/hostname")
	d.run("service", "update", "--secret-add", "s1", "--config-add", "source=c1,target=/c", "--no-resolve-image", "-d", "web")
	d.fails("secret 's1' is in use by the following service: web", "secret", "rm", "s1")
	wantAll(t, d.run("secret", "ls"), "s1")
	wantAll(t, d.run("config", "inspect", "--pretty", "c1"), "Data:")

	before := d.run("swarm", "join-token", "-q", "worker")
	after := d.run("swarm", "join-token", "-q", "--rotate", "worker")
	if before == after || len(before) != len(after) {
		t.Errorf("join token %q was rotated to %q", before, after)
	}
	d.run("swarm", "update", "--task-history-limit", "3")
	wantAll(t, d.run("info"), "Task History Retention Limit: 3")
	d.fails("cannot rotate because autolock is not turned on", "swarm", "unlock-key", "--rotate")
	wantAll(t, d.run("swarm", "update", "--autolock"), "docker swarm unlock", unlockKey)
	wantAll(t, d.run("info"), "Autolock Managers: true")
	if got := strings.TrimSpace(d.run("swarm", "unlock-key", "-q", "--rotate")); got != unlockKey {
		t.Errorf("unlock key %q", got)
	}
	d.fails("swarm is not locked", "swarm", "unlock")
	d.run("swarm", "update", "--autolock=false")
	d.fails("no unlock key is set", "swarm", "unlock-key")
	wantAll(t, d.run("network", "ls"), "bridge", "host", "none")
	d.run("network", "create", "-d", "overlay", "--attachable", "--subnet", "10.9.0.0/16", "--ip-range", "10.9.4.0/24", "--gateway", "10.9.0.1", "--label", "a=b", "x")
	wantAll(t, d.run("network", "inspect", "x"), `"Subnet": "10.9.0.0/16"`, `"IPRange": "10.9.4.0/24"`, `"Gateway": "10.9.0.1"`, `"Attachable": true`, `"a": "b"`)
	d.fails("network with name x already exists", "network", "create", "-d", "overlay", "x")
	d.fails("Pool overlaps with other one on this address space", "network", "create", "-d", "overlay", "--subnet", "10.9.1.0/24", "y")
	d.run("network", "create", "-d", "overlay", "--opt", "encrypted", "sealed")
	d.fails("is neither esp nor wireguard", "network", "create", "-d", "overlay", "--opt", "encrypted", "--opt", "skep.encryption=rot13", "y")
	d.fails("is not a port", "network", "create", "-d", "overlay", "--opt", "encrypted", "--opt", "skep.encryption.port=22", "y")
	d.fails(`plugin "odd" not found`, "network", "create", "-d", "odd", "--scope", "swarm", "y")
	d.run("service", "create", "--name", "inside", "--no-resolve-image", "-d", "--network", "x", "--replicas", "0", "busybox")
	d.fails("is in use by service", "network", "rm", "x")
	if out := d.run("network", "prune", "-f", "--filter", "label=a"); strings.Contains(out, "x") {
		t.Errorf("pruned a network in use: %s", out)
	}
	d.run("service", "rm", "inside")
	wantAll(t, d.run("network", "prune", "-f", "--filter", "label=a"), "x")
	d.fails("not implemented by skep", "ps")

	wantAll(t, d.run("node", "rm", "--force", "w1"), "w1")
	wantAll(t, d.run("service", "rm", "web", "onhost"), "web")
	d.run("secret", "rm", "s1")
	d.run("config", "rm", "c1")
	if out := d.run("service", "ls", "-q"); out != "" {
		t.Errorf("services are left: %s", out)
	}
	d.fails("Removing the last manager erases all current state", "swarm", "leave")
	d.run("swarm", "leave", "--force")
	wantAll(t, d.run("info"), "Swarm: inactive")
}

// TestStack deploys a compose file twice, changes it and removes it.
func TestStack(t *testing.T) {
	d := newDocker(t, serve(t, newDaemon(t, true)).URL)
	file := filepath.Join(t.TempDir(), "stack.yml")
	write := func(image string) {
		t.Helper()
		text := `version: "3.8"
services:
  web:
    image: ` + image + `
    networks: [outside]
    secrets: [key]
    ports: [{mode: host, target: 80, published: 8080}]
    deploy: {replicas: 2}
networks: {outside: {external: true, name: host}}
secrets: {key: {file: ./stack.yml}}
`
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("busybox:1")
	d.fails("this node is not a swarm manager", "stack", "deploy", "-c", file, "st")
	d.run("swarm", "init")
	deploy := []string{"stack", "deploy", "--resolve-image", "never", "-c", file, "st"}
	d.run(deploy...)
	wait(t, func() bool { return strings.Contains(d.run("stack", "services", "st"), "2/2") })
	first := d.run("service", "ps", "-q", "st_web")
	out, err := d.try(deploy...)
	if err == nil { // the secret's file has not changed
		if again := d.run("service", "ps", "-q", "--filter", "desired-state=running", "st_web"); len(again) != len(first) {
			t.Errorf("an unchanged deploy changed tasks: %q, then %q", first, again)
		}
	} else {
		t.Errorf("second deploy: %v\n%s", err, out)
	}
	wantAll(t, d.run("stack", "ls"), "st")
	wantAll(t, d.run("stack", "ps", "st"), "st_web.1")
	d.run("stack", "rm", "st")
	if left := d.run("secret", "ls", "-q") + d.run("service", "ls", "-q"); left != "" {
		t.Errorf("left: %s", left)
	}
}

// TestWholeAPI runs commands that need the endpoints of the swarm and of the node.
func TestWholeAPI(t *testing.T) {
	engine := fake.New(fake.Config{})
	node := local.New(local.Config{Engine: engine, Log: slog.New(slog.DiscardHandler), DaemonID: "id", DaemonName: "m1"})
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = engine.Run(ctx) })
	running.Go(func() { _ = node.Run(ctx) })
	t.Cleanup(func() { stop(); running.Wait() })
	daemon := newDaemon(t, true)
	a := dockerapi.New(dockerapi.Config{Daemon: daemon, Swarm: daemon, Manager: daemon, Local: node, Log: slog.New(slog.DiscardHandler)})
	a.Register(node.Register)
	server := httptest.NewServer(a.Handler())
	t.Cleanup(server.Close)
	d := newDocker(t, server.URL)

	d.run("swarm", "init")
	d.fails("object: nothing", "inspect", "nothing")
	d.run("service", "create", "-d", "--name", "job", "--mode", "replicated-job", "--replicas", "3", "--max-concurrent", "2", "busybox:1")
	d.run("service", "create", "-d", "--name", "everywhere", "--mode", "global", "--constraint", "node.role==worker", "--limit-memory", "64m", "--health-cmd", "true", "busybox:1")
	wantAll(t, d.run("service", "ls", "--filter", "mode=global"), "everywhere", "global")
	wantAll(t, d.run("service", "ls"), "replicated job", "0/2 (0/3 completed)")
	wantAll(t, d.run("inspect", "everywhere"), `"Global": {}`, `"MemoryBytes": 67108864`, `"node.role==worker"`)
	d.fails("Must be at least 4MiB", "service", "update", "-d", "--limit-memory", "1", "everywhere")
	d.run("service", "update", "-d", "--force", "--env-add", "A=b", "--mount-add", "type=tmpfs,target=/t", "everywhere")
	wantAll(t, d.run("service", "inspect", "everywhere"), `"ForceUpdate": 1`, `"A=b"`, `"Target": "/t"`)
	d.run("service", "update", "-d", "--rollback", "everywhere")
	wantAll(t, d.run("node", "ps"), "ID")
	wantAll(t, d.run("events", "--since", "1m", "--until", "0s", "--filter", "type=service"), "")
	wantAll(t, d.run("pull", "busybox:2"), "busybox:2")
	wantAll(t, d.run("events", "--since", "1m", "--until=-1s"), "image pull") // whole seconds: until 0s would miss it
	wantAll(t, d.run("info"), "Swarm: active", "Images: ")
	wantAll(t, d.run("version"), "Server: Skep")
	d.run("ps", "-a")
	d.run("network", "ls", "--filter", "driver=bridge")
	d.run("system", "prune", "-f")
	d.run("system", "df")
	wantAll(t, d.run("plugin", "ls"), "ID")
}
