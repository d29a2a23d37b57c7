package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/skep-dev/skep/e2e/testimage"
)

// TestEdge takes what single nodes offer to the docker and skep commands through its paces
// on a manager and a worker: the details of logs, containers that are no tasks on networks
// of the swarm, the check of networks, and the oldest docker client that is supported.
func TestEdge(t *testing.T) {
	s := newSwarm(t, 1, 1)
	s.loadImages(t)
	for _, step := range []struct {
		name string
		run  func(*testing.T, *swarm)
	}{
		{"Details", testDetails},
		{"Interrupt", testInterrupt},
		{"Attach", testAttach},
		{"Connect", testConnect},
		{"Bridges", testBridges},
		{"NetCheck", testNetCheck},
		{"OldClient", testOldClient},
	} {
		if !t.Run(step.name, func(t *testing.T) { step.run(t, s) }) {
			t.Logf("step %s failed; going on, later steps may fail because of it", step.name)
		}
	}
}

// testDetails asks for the attributes that log options put beside each line.
func testDetails(t *testing.T, s *swarm) {
	options := []string{
		"--log-opt", "labels=tier,none", "--log-opt", "env-regex=^STAGE", "--label", "tier=a b", "--env", "STAGE=x,y", "--env", "OTHER=1",
	}
	s.docker(t, "m1", append(append([]string{"run", "-d", "--name", "talk"}, options...), "--log-opt", "tag={{.Name}}/{{.ImageName}}", testimage.V1, "log", "2")...)
	eventually(t, 20*time.Second, "the details of a container's log", func() string {
		out := s.docker(t, "m1", "logs", "--details", "--tail", "1", "talk")
		if want := "STAGE=x%2Cy,tag=talk%2Fskep.test%2Fapp%3A1,tier=a+b "; !strings.HasPrefix(out, want) {
			return out
		}
		return ""
	})
	s.docker(t, "m1", "rm", "-f", "talk")
	s.docker(t, "m1", "service", "create", "--no-resolve-image", "-d", "--name", "talks", "--log-opt", "labels=tier", "--container-label", "tier=front", testimage.V1, "log", "2")
	eventually(t, 30*time.Second, "the details of a service's log", func() string {
		out := s.docker(t, "m1", "service", "logs", "--details", "--tail", "1", "talks")
		if !strings.Contains(out, "tier=front ") {
			return out
		}
		return ""
	})
	for option, want := range map[string]string{
		"colour=red": "unknown log opt 'colour' for json-file log driver", "compress=true": "log opt compress=true is not implemented by skep",
		"mode=non-blocking": "not implemented by skep", "labels-regex=(": "labels-regex", "tag={{.Nope}}": "tag",
	} {
		s.wantRefused(t, "m1", want, "create", "--log-opt", option, testimage.V1)
	}
}

// testInterrupt ends `skep logs -f` as Ctrl-C does.
func testInterrupt(t *testing.T, s *swarm) {
	for _, args := range [][]string{{"logs", "-f", "talks"}, {"logs", "-f", "--raw", "talks"}} {
		cmd := exec.CommandContext(t.Context(), skepBinary(t), append([]string{"-H", "unix://" + s.node(t, "m1").Socket}, args...)...)
		began := make(chan struct{})
		cmd.Stdout = &firstWrite{began: began}
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-began:
		case <-time.After(20 * time.Second):
			t.Error("no line of the log came")
		}
		_ = cmd.Process.Signal(syscall.SIGINT)
		if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 130 || strings.Contains(stderr.String(), "skep: ") {
			t.Errorf("skep %s after an interrupt: %v, %q", strings.Join(args, " "), err, stderr.String())
		}
	}
	s.docker(t, "m1", "service", "rm", "talks")
}

// firstWrite closes a channel at the first write.
type firstWrite struct {
	began chan struct{}
	done  bool
}

func (f *firstWrite) Write(b []byte) (int, error) {
	if !f.done {
		f.done = true
		close(f.began)
	}
	return len(b), nil
}

// in runs a command in a container and returns what it printed, or its error's text.
func (s *swarm) in(t *testing.T, node, container string, command ...string) string {
	t.Helper()
	out, err := s.tryDocker(t, 20*time.Second, node, append([]string{"exec", container}, command...)...)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(out)
}

// wantGet waits until a container gets the answer of another one, by a name.
func (s *swarm) wantGet(t *testing.T, node, container, name, answer string) {
	t.Helper()
	eventually(t, 15*time.Second, container+" on "+node+" reaches "+name, func() string {
		if out := s.in(t, node, container, "/bin/testapp", "get", "http://"+name+"/"); !strings.HasPrefix(out, answer) {
			return out
		}
		return ""
	})
}

// wantNoName waits until a name means nothing to a container any more.
func (s *swarm) wantNoName(t *testing.T, node, container, name string) {
	t.Helper()
	eventually(t, 15*time.Second, container+" on "+node+" knows no "+name, func() string {
		if out := s.in(t, node, container, "/bin/testapp", "resolve", name); !strings.Contains(out, "lookup "+name) {
			return out
		}
		return ""
	})
}

// testAttach runs plain containers on an attachable network, from a manager and a worker.
func testAttach(t *testing.T, s *swarm) {
	s.docker(t, "m1", "network", "create", "-d", "overlay", "--attachable", "--subnet", "10.77.0.0/24", "open")
	s.docker(t, "m1", "network", "create", "-d", "overlay", "closed")
	s.docker(t, "m1", "service", "create", "--no-resolve-image", "-q", "--name", "api", "--network", "open", "--mode", "global", testimage.V1, "serve", ":80")
	s.docker(t, "m1", "run", "-d", "--name", "box", "--hostname", "box", "--network", "open", "--network-alias", "crate", testimage.V1, "serve", ":80")
	s.docker(t, "w1", "run", "-d", "--name", "pin", "--hostname", "pin", "--network", "open", "--ip", "10.77.0.77", testimage.V1, "serve", ":80")
	s.wantGet(t, "w1", "pin", "box", "box  10.77.0.77:")
	s.wantGet(t, "w1", "pin", "crate", "box ")
	s.wantGet(t, "m1", "box", "pin", "pin ")
	s.wantGet(t, "m1", "box", "api", "")
	s.wantGet(t, "w1", "pin", "tasks.api", "")
	if out := s.in(t, "m1", "box", "/bin/testapp", "resolve", "pin"); out != "10.77.0.77" {
		t.Errorf("box finds pin at %q", out)
	}
	for _, node := range []string{"m1", "w1"} {
		s.wantRefused(t, node, "Could not attach to network closed: rpc error: code = PermissionDenied desc = network closed not manually attachable",
			"run", "--rm", "--network", "closed", testimage.V1)
		s.wantRefused(t, node, "network nowhere not found", "run", "--rm", "--network", "nowhere", testimage.V1)
	}
	s.wantRefused(t, "m1", "the requested address 10.77.0.77 is in use", "run", "--rm", "--network", "open", "--ip", "10.77.0.77", testimage.V1)
	s.wantRefused(t, "m1", "supported on user defined networks only", "run", "--rm", "--ip", "172.17.0.9", testimage.V1)
	s.wantRefused(t, "m1", "is in use by", "network", "rm", "open")

	// It keeps its place over a daemon that is killed, and over its own restart.
	s.dev(t, "kill", "w1")
	s.wantGet(t, "m1", "box", "pin", "pin ")
	s.dev(t, "start", "w1")
	s.refresh(t)
	s.wantReady(t, "m1", "w1")
	s.wantGet(t, "w1", "pin", "api", "")
	s.wantGet(t, "m1", "box", "pin", "pin ")
	s.docker(t, "w1", "restart", "-t", "1", "pin")
	s.wantGet(t, "m1", "box", "pin", "pin ")
	s.wantGet(t, "w1", "pin", "box", "box ")

	// Its new name leads to it from everywhere, also after it was started again, and the old one no more.
	s.docker(t, "w1", "run", "-d", "--name", "pen", "--network", "open", "--network-alias", "nib", testimage.V1, "serve", ":80")
	s.wantGet(t, "m1", "box", "pen", "")
	s.docker(t, "w1", "rename", "pen", "quill")
	for node, container := range map[string]string{"m1": "box", "w1": "pin"} {
		s.wantGet(t, node, container, "quill", "")
		s.wantGet(t, node, container, "nib", "")
		s.wantNoName(t, node, container, "pen")
	}
	s.docker(t, "w1", "restart", "-t", "1", "quill")
	s.wantGet(t, "m1", "box", "quill", "")
	s.wantNoName(t, "m1", "box", "pen")
	s.docker(t, "w1", "rm", "-f", "quill")

	// And gives it back when it ends.
	s.docker(t, "w1", "stop", "-t", "1", "pin")
	s.wantNoName(t, "m1", "box", "pin")
	eventually(t, 15*time.Second, "the address of a stopped container is free", func() string {
		out, err := s.tryDocker(t, 30*time.Second, "m1", "run", "--rm", "--network", "open", "--ip", "10.77.0.77", testimage.V1, "exit", "0")
		return out + text(err)
	})
	s.docker(t, "w1", "rm", "pin")
}

// testConnect changes the networks of running containers. It follows testAttach.
func testConnect(t *testing.T, s *swarm) {
	s.docker(t, "w1", "run", "-d", "--name", "plain", "--hostname", "plain", testimage.V1, "serve", ":80")
	s.docker(t, "w1", "network", "connect", "--alias", "late", "open", "plain")
	s.wantGet(t, "m1", "box", "plain", "plain ")
	s.wantGet(t, "m1", "box", "late", "plain ")
	s.wantGet(t, "w1", "plain", "box", "box  10.77.0.")
	s.wantRefused(t, "w1", "is already attached to network open", "network", "connect", "open", "plain")
	s.wantRefused(t, "w1", "not manually attachable", "network", "connect", "closed", "plain")
	if out := s.docker(t, "w1", "inspect", "--format", "{{range $name, $_ := .NetworkSettings.Networks}}{{$name}} {{end}}", "plain"); out != "bridge open" {
		t.Errorf("networks of a connected container: %q", out)
	}
	s.docker(t, "w1", "network", "disconnect", "bridge", "plain")
	s.wantGet(t, "m1", "box", "plain", "plain ")
	s.docker(t, "w1", "network", "connect", "bridge", "plain")
	s.docker(t, "w1", "network", "disconnect", "open", "plain")
	s.wantNoName(t, "m1", "box", "plain")
	if out := s.in(t, "w1", "plain", "busybox", "ip", "-o", "-4", "addr"); strings.Contains(out, "10.77.0.") || !strings.Contains(out, "eth") {
		t.Errorf("addresses of a disconnected container:\n%s", out)
	}
	s.wantRefused(t, "w1", "is not connected to network", "network", "disconnect", "open", "plain")
	s.docker(t, "w1", "rm", "-f", "plain")
}

// testBridges makes a network of one node, as people without a swarm do.
func testBridges(t *testing.T, s *swarm) {
	s.docker(t, "w1", "network", "create", "--label", "kind=own", "--subnet", "10.66.0.0/24", "own")
	s.wantRefused(t, "w1", "network with name own already exists", "network", "create", "own")
	s.wantRefused(t, "w1", "not implemented by skep", "network", "create", "-o", "com.docker.network.bridge.name=br9", "odd")
	s.docker(t, "w1", "run", "-d", "--name", "left", "--hostname", "left", "--network", "own", testimage.V1, "serve", ":80")
	s.docker(t, "w1", "run", "-d", "--name", "right", "--hostname", "right", "--network", "own", "--ip", "10.66.0.9", "--network-alias", "r", "-p", "9066:80", testimage.V1, "serve", ":80")
	s.wantGet(t, "w1", "left", "right", "right ")
	s.wantGet(t, "w1", "left", "r.own", "right ")
	s.wantGet(t, "w1", "right", "left", "left  10.66.0.9:")
	s.docker(t, "w1", "run", "-d", "--name", "third", "--network", "own", testimage.V1, "serve", ":80")
	s.wantGet(t, "w1", "left", "third", "")
	s.docker(t, "w1", "rename", "third", "fourth")
	s.wantGet(t, "w1", "left", "fourth", "")
	s.wantNoName(t, "w1", "left", "third")
	s.docker(t, "w1", "rm", "-f", "fourth")
	out, err := try(t, 20*time.Second, skepBinary(t), "dev", "exec", "--name", s.name, "w1", "--", "curl", "-sS", "--max-time", "3", "http://127.0.0.1:9066/")
	if err != nil || !strings.HasPrefix(out, "right ") {
		t.Errorf("a published port of a container on a network of its own: %q, %v", out, err)
	}
	if out := s.docker(t, "w1", "network", "inspect", "--format", "{{.Driver}} {{.Scope}} {{len .Containers}} {{(index .IPAM.Config 0).Gateway}}", "own"); out != "bridge local 2 10.66.0.1" {
		t.Errorf("the network of one node: %s", out)
	}
	s.docker(t, "w1", "network", "connect", "open", "left")
	s.wantGet(t, "m1", "box", "left", "left ")
	s.wantGet(t, "w1", "left", "right", "right ")
	s.docker(t, "w1", "network", "disconnect", "own", "left")
	if out := s.in(t, "w1", "left", "/bin/testapp", "resolve", "right"); !strings.Contains(out, "lookup right") {
		t.Errorf("a disconnected container still finds its neighbour: %s", out)
	}
	s.wantRefused(t, "w1", "has active endpoints", "network", "rm", "own")
	s.dev(t, "kill", "w1")
	s.dev(t, "start", "w1")
	s.refresh(t)
	s.wantReady(t, "m1", "w1")
	s.docker(t, "w1", "network", "connect", "own", "left")
	s.wantGet(t, "w1", "left", "right", "right ")
	s.docker(t, "w1", "rm", "-f", "left", "right")
	if out := s.docker(t, "w1", "network", "prune", "-f", "--filter", "label=kind=own"); !strings.Contains(out, "own") {
		t.Errorf("the unused network was not pruned: %s", out)
	}
}

// testNetCheck breaks a node's network and asks what is wrong. It follows testAttach.
func testNetCheck(t *testing.T, s *swarm) {
	check := func(args ...string) (string, int) {
		t.Helper()
		out, err := try(t, time.Minute, skepBinary(t), append([]string{"-H", "unix://" + s.node(t, "m1").Socket}, args...)...)
		exit := new(exec.ExitError)
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		if err == nil {
			return out, 0
		}
		return out, exit.ExitCode()
	}
	eventually(t, 20*time.Second, "the networks are as they should be", func() string {
		out, code := check("net", "check")
		if code != 0 || strings.Count(out, ": as it should be") != 2 {
			return out
		}
		return ""
	})
	s.refresh(t)
	namespace := "--net=" + filepath.Join(s.execRoot(t, "w1"), "netns", ".switch")
	links := run(t, "nsenter", namespace, "ip", "-o", "link")
	broken := ""
	for line := range strings.Lines(links) {
		if fields := strings.Fields(line); len(fields) > 1 && strings.HasPrefix(fields[1], "vx") {
			broken, _, _ = strings.Cut(strings.TrimSuffix(fields[1], ":"), "@")
			run(t, "nsenter", namespace, "ip", "link", "del", broken)
		}
	}
	if broken == "" {
		t.Fatalf("no network to break in\n%s", links)
	}
	// The node's own check may be first: then there is nothing left to find here.
	out, code := check("net", "check")
	if code == 0 && !strings.Contains(s.daemonLog(t, "w1"), "device is missing") || code != 0 && (!strings.Contains(out, "w1: ") || !strings.Contains(out, "device is missing, mended") || strings.Contains(out, "NOT")) {
		t.Errorf("after its VXLAN devices were removed (exit code %d):\n%s", code, out)
	}
	if out, code := check("net", "check", "open"); code != 0 {
		t.Errorf("of one network, after it was mended:\n%s", out)
	}
	if out, code := check("--json", "net", "check", "api"); code != 0 || !json.Valid([]byte(out)) {
		t.Errorf("of a service, as JSON (exit code %d):\n%s", code, out)
	}
	if out, code := check("net", "check", "nowhere"); code != 1 || !strings.Contains(out, "there is no network or service nowhere") {
		t.Errorf("of what is not there (exit code %d):\n%s", code, out)
	}
	s.wantGet(t, "m1", "box", "api", "")
	s.docker(t, "m1", "rm", "-f", "box")
	s.docker(t, "m1", "service", "rm", "api")
	s.wantGone(t, "m1", "open", 20*time.Second)
}

// execRoot reads a node's --exec-root off its process.
func (s *swarm) execRoot(t *testing.T, node string) string {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", s.node(t, node).PID))
	if err != nil {
		t.Fatal(err)
	}
	args := strings.Split(string(data), "\x00")
	if i := slices.Index(args, "--exec-root"); i >= 0 && i+1 < len(args) {
		return args[i+1]
	}
	t.Fatalf("no exec root in %q", args)
	return ""
}

func (s *swarm) daemonLog(t *testing.T, node string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(s.node(t, node).Dir, "daemon.log"))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// testOldClient is the tour with Debian's docker client 20.10.
func testOldClient(t *testing.T, s *swarm) {
	root, err := filepath.Abs("../bin/docker-engine")
	if err != nil {
		t.Fatal(err)
	}
	run(t, "../tools/docker-engine.sh", root)
	docker := func(node string, args ...string) (string, error) {
		t.Helper()
		return try(t, time.Minute, filepath.Join(root, "usr/bin/docker"), append([]string{"-H", "unix://" + s.node(t, node).Socket}, args...)...)
	}
	if version := run(t, filepath.Join(root, "usr/bin/docker"), "--version"); !strings.Contains(version, "20.10.") {
		t.Fatalf("the old client is %s", version)
	}
	for _, c := range []struct {
		node, args, want string // want is part of what it prints, or of its error after a "!"
	}{
		{"m1", "version --format {{.Server.APIVersion}}", "1."},
		{"m1", "info --format {{.Swarm.LocalNodeState}}", "active"},
		{"m1", "node ls", "Leader"},
		{"m1", "node update --label-add rack=a w1", "w1"},
		{"m1", "node inspect --pretty w1", "rack=a"},
		{"m1", "network create -d overlay --attachable --label old=1 tour", ""},
		{"m1", "network ls --filter label=old", "tour"},
		{"m1", "service create --no-resolve-image --name tour --replicas 2 --network tour --label a=1 --update-monitor 1s --rollback-monitor 1s --publish 8099:80 skep.test/app:1 serve :80", "Service converged"},
		{"m1", "service ls", "2/2"},
		{"m1", "service ps --no-trunc tour", "Running"},
		{"m1", "service inspect --pretty tour", "PublishedPort = 8099"},
		{"m1", "service scale tour=3", "Service converged"},
		{"m1", "service update --image skep.test/app:2 --no-resolve-image --update-delay 0s --update-parallelism 2 tour", "Service converged"},
		{"m1", "service rollback tour", "Service converged"},
		{"m1", "service update --args exit --update-failure-action rollback tour", "rolled back"},
		{"m1", "service logs --tail 1 tour", ""},
		{"w1", "run --name old --network tour -d -p 9099:80 skep.test/app:1 serve :80", ""},
		{"w1", "exec old /bin/testapp get http://tour/", "10."},
		{"w1", "ps --filter name=old", "0.0.0.0:9099->80/tcp"},
		{"w1", "inspect --format {{.State.Running}} old", "true"},
		{"w1", "top old", "testapp"},
		{"w1", "stats --no-stream old", "old"},
		{"w1", "network disconnect tour old", ""},
		{"w1", "stop -t 1 old", "old"},
		{"w1", "start old", "old"},
		{"w1", "logs old", ""},
		{"w1", "rm -f old", "old"},
		{"w1", "images", "skep.test/app"},
		{"w1", "tag skep.test/app:1 skep.test/old:1", ""},
		{"w1", "rmi skep.test/old:1", "Untagged"},
		{"w1", "volume create tour", "tour"},
		{"w1", "volume ls", "tour"},
		{"w1", "volume rm tour", "tour"},
		{"w1", "system df", "Images"},
		{"w1", "node ls", "!This node is not a swarm manager"},
		{"m1", "config ls", "NAME"},
		{"m1", "secret ls", "NAME"},
		{"m1", "events --since 1h --until 0s --filter type=service", "service"},
		{"m1", "service rm tour", "tour"},
		{"m1", "system prune -f", "Total reclaimed space"},
	} {
		out, err := docker(c.node, strings.Fields(c.args)...)
		wanted, fails := strings.CutPrefix(c.want, "!")
		if (err != nil) != fails || !strings.Contains(out+text(err), wanted) {
			t.Errorf("docker 20.10 on %s: %s: %v\n%s\nwant %q", c.node, c.args, err, out, c.want)
		}
	}
	staleVersion(t, s.node(t, "m1").Socket)
}

// staleVersion updates a service from a version that it does not have any more.
func staleVersion(t *testing.T, socket string) {
	t.Helper()
	api := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	call := func(method, path string, body any) (int, map[string]any) {
		t.Helper()
		data, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		req, err := http.NewRequestWithContext(t.Context(), method, "http://docker/v1.41"+path, bytes.NewReader(data))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		resp, err := api.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var answer map[string]any
		_ = json.NewDecoder(resp.Body).Decode(&answer) // empty for some
		return resp.StatusCode, answer
	}
	spec := map[string]any{"Name": "stale", "TaskTemplate": map[string]any{"ContainerSpec": map[string]any{"Image": testimage.V1}}}
	if code, answer := call("POST", "/services/create", spec); code != 201 {
		t.Fatalf("create: %d %v", code, answer)
	}
	code, answer := call("POST", "/services/stale/update?version=1", spec)
	if message, _ := answer["message"].(string); code != 500 || message != "rpc error: code = Unknown desc = update out of sequence" {
		t.Errorf("an update from an old version: %d %v", code, answer)
	}
	if code, answer := call("DELETE", "/services/stale", nil); code != 200 {
		t.Errorf("remove: %d %v", code, answer)
	}
}
