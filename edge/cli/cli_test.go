package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/swarm"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/skep-dev/skep/platform/process"
)

var update = flag.Bool("update", false, "rewrite the scripts' golden parts")

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "daemon" && filepath.Base(os.Args[0]) != "skep" {
		os.Exit(playDaemon(os.Args[2:]))
	}
	testscript.Main(m, map[string]func(){"skep": func() { os.Exit(program()) }})
}

// program is what cmd/skep does, with a daemon that prints its configuration.
func program() int {
	root := New(Env{
		In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Getenv: os.Getenv, Environ: os.Environ,
		Executable: os.Args[0], Version: "v0.0.0", Commit: "abc",
		Daemon: func(_ context.Context, d Daemon) error {
			fmt.Printf("%+v\n", d)
			return nil
		},
	})
	root.SetArgs(os.Args[1:])
	if err := root.Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "skep: "+err.Error())
		return 1
	}
	return 0
}

// TestScripts runs what needs no daemon: help, flags, refusals.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata/script", UpdateScripts: *update})
}

// skep runs one command against a fake swarm and returns what it printed.
func skep(t *testing.T, host string, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	root := New(Env{
		In: strings.NewReader(""), Out: &out, Err: &out, Getenv: func(string) string { return "" }, Environ: func() []string { return nil },
	})
	root.SetArgs(append([]string{"-H", host}, args...))
	err := root.ExecuteContext(t.Context())
	return out.String(), err
}

func must(t *testing.T, host string, args ...string) string {
	t.Helper()
	out, err := skep(t, host, args...)
	if err != nil {
		t.Fatalf("skep %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func write(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "compose.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

const shop = `name: shop
services:
  web:
    image: example.test/web
    secrets: [key]
    configs: [settings]
    depends_on: [db]
    deploy: {replicas: 2, update_config: {monitor: 1ms}}
  db:
    image: example.test/db
    deploy: {update_config: {monitor: 1ms}}
secrets: {key: {environment: KEY}}
configs: {settings: {content: "a=1"}}
`

func TestDeployAndRemove(t *testing.T) {
	f, host := newFake(t)
	t.Setenv("KEY", "unused: the program's own environment does not count")
	file := write(t, strings.ReplaceAll(shop, "environment: KEY", "file: key.txt"))
	if err := os.WriteFile(filepath.Join(filepath.Dir(file), "key.txt"), []byte("sesame"), 0o600); err != nil {
		t.Fatal(err)
	}
	out := must(t, host, "deploy", "--resolve-image=never", "--wait", file)
	want := "created network shop_default\ncreated secret shop_key\ncreated config shop_settings\ncreated service shop_db\nshop_db: 1/1 running (converged)\n" +
		"created service shop_web\nshop_db: 1/1 running (staying up)\nshop_web: 2/2 running (staying up)\nshop_db: 1/1 running (converged)\nshop_web: 2/2 running (converged)\n"
	if diff := cmp.Diff(want, out); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	web := f.find("shop_web").Spec.TaskTemplate.ContainerSpec
	if web.Secrets[0].SecretID != "id-shop_key" || web.Configs[0].ConfigID != "id-shop_settings" {
		t.Errorf("references without ids: %+v %+v", web.Secrets[0], web.Configs[0])
	}

	f.find("shop_web").Spec.TaskTemplate.ForceUpdate = 7
	f.conflicts = 2
	out = must(t, host, "deploy", "--resolve-image=never", file)
	if !strings.Contains(out, "updated service shop_web") || strings.Contains(out, "created") {
		t.Errorf("second deploy: %s", out)
	}
	if n := f.find("shop_web").Spec.TaskTemplate.ForceUpdate; n != 7 {
		t.Errorf("a redeploy reset ForceUpdate to %d, which restarts every task", n)
	}

	f.find("shop_db").Spec.TaskTemplate.ContainerSpec.Image = "example.test/db:latest@sha256:" + strings.Repeat("1", 64)
	for _, how := range []string{"never", "changed"} {
		must(t, host, "deploy", "--resolve-image="+how, file)
		if image := f.find("shop_db").Spec.TaskTemplate.ContainerSpec.Image; !strings.Contains(image, "@sha256:111") {
			t.Errorf("with --resolve-image=%s a redeploy dropped the digest: %s", how, image)
		}
	}
	f.mu.Lock()
	if slices.ContainsFunc(f.calls, func(c string) bool { return strings.Contains(c, "/distribution") }) {
		t.Error("the registry was asked")
	}
	f.mu.Unlock()

	less := write(t, "name: shop\nservices: {db: {image: example.test/db}}\n")
	must(t, host, "deploy", "--resolve-image=never", less)
	if f.find("shop_web") == nil {
		t.Error("a deploy without --prune removed a service")
	}
	out = must(t, host, "deploy", "--resolve-image=never", "--prune", less)
	if f.find("shop_web") != nil || !strings.Contains(out, "removed service shop_web") {
		t.Errorf("prune: %s", out)
	}

	changed := write(t, "name: shop\nservices: {db: {image: x, configs: [settings]}}\nconfigs: {settings: {content: \"a=2\"}}\n")
	if _, err := skep(t, host, "deploy", "--resolve-image=never", changed); err == nil || !strings.Contains(err.Error(), "give the new content a new name") {
		t.Errorf("a changed config: %v", err)
	}
	elsewhere := write(t, "name: shop\nservices: {db: {image: x, networks: [x]}}\nnetworks: {x: {external: true}}\n")
	if _, err := skep(t, host, "deploy", "--resolve-image=never", elsewhere); err == nil || !strings.Contains(err.Error(), "network x is declared external but does not exist") {
		t.Errorf("a missing external network: %v", err)
	}
	external := write(t, "name: shop\nservices: {db: {image: x, secrets: [x]}}\nsecrets: {x: {external: true}}\n")
	if _, err := skep(t, host, "deploy", "--resolve-image=never", external); err == nil || !strings.Contains(err.Error(), "secret x is declared external but does not exist") {
		t.Errorf("a missing external secret: %v", err)
	}

	out = must(t, host, "rm", "shop")
	if len(f.services)+len(f.secrets)+len(f.configs)+len(f.networks) != 0 {
		t.Errorf("left over: %v %v %v %v after %s", f.services, f.secrets, f.configs, f.networks, out)
	}
	if _, err := skep(t, host, "rm", "shop"); err == nil || !strings.Contains(err.Error(), "there is no stack shop") {
		t.Errorf("second rm: %v", err)
	}
}

func TestForeignServiceIsNotTakenOver(t *testing.T) {
	f, host := newFake(t)
	f.services["x"] = &swarm.Service{ID: "x", Spec: swarm.ServiceSpec{Annotations: swarm.Annotations{Name: "shop_db"}}}
	_, err := skep(t, host, "deploy", "--resolve-image=never", write(t, "name: shop\nservices: {db: {image: x}}\n"))
	if err == nil || !strings.Contains(err.Error(), "is not of the stack shop") {
		t.Errorf("got %v", err)
	}
	if _, err := skep(t, host, "rm", "shop_db"); err == nil || !strings.Contains(err.Error(), "shop_db is a service, not a stack") {
		t.Errorf("rm of a service: %v", err)
	}
}

func TestDependencyCycle(t *testing.T) {
	_, host := newFake(t)
	_, err := skep(t, host, "deploy", "--resolve-image=never", write(t, "name: s\nservices:\n  a: {image: x, depends_on: [b]}\n  b: {image: x, depends_on: [a]}\n"))
	if err == nil || !strings.Contains(err.Error(), "cycle") {
		t.Errorf("got %v", err)
	}
}

func TestWaitFailsWithTheReason(t *testing.T) {
	f, host := newFake(t)
	f.behave = func(s *swarm.Service) []swarm.Task {
		out := allRun(s)
		for i := range 3 {
			out = append(out, swarm.Task{
				ID: fmt.Sprint("bad", i), ServiceID: s.ID, Slot: 1, NodeID: "n1", DesiredState: swarm.TaskStateShutdown,
				Meta:   swarm.Meta{CreatedAt: time.Now()},
				Status: swarm.TaskStatus{State: swarm.TaskStateRejected, Err: "No such image: example.test/none:latest"},
			})
		}
		return out
	}
	_, err := skep(t, host, "deploy", "--resolve-image=never", "--wait", write(t, "name: s\nservices: {a: {image: example.test/none}}\n"))
	if err == nil || !strings.Contains(err.Error(), "service s_a: task rejected: No such image") || !strings.Contains(err.Error(), "skep explain s_a") {
		t.Errorf("got %v", err)
	}
}

func TestWaitTimesOutWithTheState(t *testing.T) {
	f, host := newFake(t)
	f.behave = func(s *swarm.Service) []swarm.Task {
		out := allRun(s)
		for i := range out {
			out[i].NodeID, out[i].Status = "", swarm.TaskStatus{State: swarm.TaskStatePending, Err: "no suitable node (1 node not available)"}
		}
		return out
	}
	_, err := skep(t, host, "deploy", "--resolve-image=never", "--wait", "--timeout=300ms", write(t, "name: s\nservices: {a: {image: x}}\n"))
	if err == nil || !strings.Contains(err.Error(), "s_a: 0/1 running (pending: no suitable node (1 node not available))") {
		t.Errorf("got %v", err)
	}
}

func TestScale(t *testing.T) {
	f, host := newFake(t)
	must(t, host, "deploy", "--resolve-image=never", write(t, "name: s\nservices: {a: {image: x, deploy: {update_config: {monitor: 1ms}}}, g: {image: x, deploy: {mode: global}}}\n"))
	f.conflicts = 1
	out := must(t, host, "scale", "s_a=3")
	if !strings.Contains(out, "s_a: 3/3 running") || *f.find("s_a").Spec.Mode.Replicated.Replicas != 3 {
		t.Errorf("scale: %s", out)
	}
	for args, want := range map[string]string{
		"s_g=3": "a global service has as many tasks", "s_a": "is not SERVICE=N", "s_a=many": "is not a number", "none=1": "not found",
	} {
		if _, err := skep(t, host, "scale", args); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("scale %s: %v", args, err)
		}
	}
}

func TestLists(t *testing.T) {
	f, host := newFake(t)
	if out := must(t, host, "ls"); !strings.Contains(out, "no services") {
		t.Errorf("empty ls: %s", out)
	}
	must(t, host, "deploy", "--resolve-image=never", write(t, "name: s\nservices: {a: {image: x, ports: [{target: 80, published: '8080', mode: host}]}}\n"))
	f.services["id-s_a"].ServiceStatus = &swarm.ServiceStatus{RunningTasks: 1, DesiredTasks: 1}
	f.tasks = append(f.tasks, swarm.Task{
		ID: "old", ServiceID: "id-s_a", Slot: 1, NodeID: "n1", DesiredState: swarm.TaskStateShutdown,
		Status: swarm.TaskStatus{State: swarm.TaskStateFailed, Err: "task: non-zero exit (1)"},
	})
	for args, want := range map[string]string{
		"ls":                 "ID       NAME   MODE         RUNNING   IMAGE      PORTS\nid-s_a   s_a    replicated   1/1       x:latest   its node:8080->80/tcp\n",
		"ls s":               "id-s_a   s_a ",
		"ps":                 "id-s_a-t1   s_a.1   n1     running",
		"ps -a s_a":          "old         s_a.1   n1     failed    shutdown  ",
		"nodes":              " *   leader   ready   active         10.0.0.1\n",
		"token":              "skep up --join SWMTKN-1-w 10.0.0.1:2377",
		"token manager":      "skep up --join SWMTKN-1-m 10.0.0.1:2377",
		"--json token":       `"token": "SWMTKN-1-w"`,
		"explain web":        "constraint refused 1 node: node.role==worker: n1",
		"logs s_a":           "s_a.1@n1 | hello\n",
		"logs id-s_a-t1":     "s_a.1@n1 | hello\n",
		"logs --raw s_a":     "com.docker.swarm",
		"--json logs s_a":    `"line":"oops","stream":"stderr","task":"s_a.1@n1"`,
		"--json ls":          `"Name": "s_a"`,
		"--json ps":          `"ServiceID": "id-s_a"`,
		"--json nodes":       `"Hostname": "n1"`,
		"--json explain web": `"serviceName": "web"`,
		"--json status":      `"state": "active"`,
	} {
		if out := must(t, host, strings.Fields(args)...); !strings.Contains(out, want) {
			t.Errorf("%s: want %q in\n%s", args, want, out)
		} else if strings.HasPrefix(args, "--json") && !strings.Contains(args, "logs") && out != "" && !json.Valid([]byte(out)) {
			t.Errorf("%s prints no JSON: %s", args, out)
		}
	}
	if _, err := skep(t, host, "explain", "nothing"); err == nil || err.Error() != "no such service or task: nothing" {
		t.Errorf("explain of nothing: %v", err)
	}
	if _, err := skep(t, host, "logs", "nothing"); err == nil || !strings.Contains(err.Error(), "there is no service or task nothing") {
		t.Errorf("logs of nothing: %v", err)
	}
}

func TestNetCheck(t *testing.T) {
	_, host := newFake(t)
	if out := must(t, host, "net", "check", "clean"); out != "n1: as it should be\nn2: not checked: the node is down\n" {
		t.Errorf("of a network that is well:\n%s", out)
	}
	out, err := skep(t, host, "net", "check")
	want := "n1: 1 difference\n  back: bridge is missing, mended\nn2: not checked: no answer\nn3: 1 difference\n  rules differ, NOT MENDED\n  error: no room\n"
	if exit, ok := errors.AsType[ExitError](err); !ok || exit.Code != 1 || out != want {
		t.Errorf("%v\n%s", err, out)
	}
	if out, err := skep(t, host, "--json", "net", "check"); err == nil || !json.Valid([]byte(out)) {
		t.Errorf("as JSON: %v\n%s", err, out)
	}
	if _, err := skep(t, host, "net", "check", "nothing"); err == nil || err.Error() != "there is no network or service nothing" {
		t.Errorf("of nothing: %v", err)
	}
}

func TestStatus(t *testing.T) {
	f, host := newFake(t)
	f.overview = `{"clusterId":"c1","leaderId":"n1","raftIndex":"42","nodes":[` +
		`{"id":"n1","hostname":"n1","role":"manager","state":"ready","availability":"active","address":"10.0.0.1","reachability":"reachable","leader":true,"runningTasks":2},` +
		`{"id":"n2","hostname":"n2","role":"manager","state":"down","availability":"active","reachability":"unreachable","message":"heartbeat failure"},` +
		`{"id":"n3","hostname":"n3","role":"manager","state":"ready","availability":"active","reachability":"reachable"}],` +
		`"services":[{"id":"s1","name":"web","mode":"replicated","desired":"3","running":"2","reason":"1 task waits: no suitable node"}],"problems":["node n2 is down: heartbeat failure"]}`
	out := must(t, host, "status")
	for _, want := range []string{
		"Node       n1: manager, leader at 10.0.0.1\n", "Managers   2 of 3 reachable; the swarm cannot lose another\n",
		"n2     manager (unreachable)   down", "web       replicated   2/3                1 task waits: no suitable node\n",
		"Wrong:\n  - node n2 is down: heartbeat failure\n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("want %q in\n%s", want, out)
		}
	}
	f.overview = ""
	if out := must(t, host, "status"); !strings.Contains(out, "does not know /skep/v1/overview: it is not Skep") {
		t.Errorf("without overview:\n%s", out)
	}
	f.manager = false
	if out := must(t, host, "status"); !strings.Contains(out, "Node       n1: worker") || !strings.Contains(out, "Nothing is wrong") {
		t.Errorf("on a worker:\n%s", out)
	}
	for _, args := range []string{"ls", "ps", "nodes", "token", "rm x", "scale a=1", "logs x", "explain x"} {
		if _, err := skep(t, host, strings.Fields(args)...); !errors.Is(err, errNotManager) {
			t.Errorf("%s on a worker: %v", args, err)
		}
	}
	f.state = swarm.LocalNodeStateInactive
	if out := must(t, host, "status"); !strings.Contains(out, "this node is in no swarm: run `skep up`") {
		t.Errorf("without swarm:\n%s", out)
	}
	if _, err := skep(t, host, "ls"); err == nil || !strings.Contains(err.Error(), "this node is in no swarm") {
		t.Errorf("ls without swarm: %v", err)
	}
}

func TestProblemsAreSaidOnce(t *testing.T) {
	s := status{Problems: []string{"rpc error: code = Unknown desc = no leader", "rpc error: code = Unknown desc = no leader", "no leader", "node n2 is down"}}
	s.tidyProblems()
	if diff := cmp.Diff([]string{"no leader", "node n2 is down"}, s.Problems); diff != "" {
		t.Error(diff)
	}
}

func TestHostChoice(t *testing.T) {
	dir := t.TempDir()
	env := map[string]string{"DOCKER_CONFIG": dir}
	a := &app{Env: Env{Getenv: func(k string) string { return env[k] }}}
	want := func(host string) {
		t.Helper()
		if e, err := a.resolveHost(); err != nil || e.host != host {
			t.Errorf("got %q, %v; want %q", e.host, err, host)
		}
	}
	want(DefaultHost)
	if err := a.writeContext("unix:///a"); err != nil {
		t.Fatal(err)
	}
	want(DefaultHost)
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{"currentContext":"skep"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	want("unix:///a")
	env["DOCKER_CONTEXT"] = "default"
	want(DefaultHost)
	env["DOCKER_HOST"] = "unix:///b"
	want("unix:///b")
	env["SKEP_HOST"] = "tcp://127.0.0.1:1"
	want("tcp://127.0.0.1:1")
	a.host = "unix:///c"
	want("unix:///c")
	a.host = "nonsense"
	if _, err := a.resolveHost(); err == nil {
		t.Error("a host without scheme was accepted")
	}
	if err := a.removeContext("unix:///other"); err != nil || len(contexts(t, dir)) != 1 {
		t.Errorf("the context of another node was removed: %v", err)
	}
	for range 2 {
		if err := a.removeContext("unix:///a"); err != nil || len(contexts(t, dir)) != 0 {
			t.Errorf("the context stays: %v", err)
		}
	}
}

func contexts(t *testing.T, dir string) []os.DirEntry {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(dir, "contexts", "meta"))
	if err != nil {
		t.Fatal(err)
	}
	return entries
}

func TestUnit(t *testing.T) {
	text := unitText("/usr/bin/skep", []string{"daemon", "--label=a b", `--label=q"$%`})
	if want := `ExecStart=/usr/bin/skep daemon "--label=a b" "--label=q\"$$%%"` + "\n"; !strings.Contains(text, want) {
		t.Errorf("want %s in\n%s", want, text)
	}
}

func TestDaemonArgs(t *testing.T) {
	a := &app{Env: Env{Getenv: os.Getenv}}
	c := a.upCommand()
	if err := c.ParseFlags([]string{"--label", "a=1", "--label", "b=2", "--join", "x", "--stop-tasks", "-H", "unix:///s", "--data-root", "/d"}); err != nil {
		t.Fatal(err)
	}
	got := daemonArgs(c.Flags())
	slices.Sort(got)
	if diff := cmp.Diff([]string{"--data-root=/d", "--host=unix:///s", "--label=a=1", "--label=b=2", "--stop-tasks=true"}, got); diff != "" {
		t.Error(diff)
	}
}

func FuzzParseDetails(f *testing.F) {
	f.Add("com.docker.swarm.node.id=n1,com.docker.swarm.task.id=t1")
	f.Add("a=%zz,=,b")
	f.Fuzz(func(_ *testing.T, s string) { parseDetails(s) })
}

func FuzzParseScale(f *testing.F) {
	f.Add("web=3")
	f.Add("=")
	f.Fuzz(func(t *testing.T, s string) {
		if name, _, err := parseScale(s); err == nil && name == "" {
			t.Errorf("%q has no name", s)
		}
	})
}

func FuzzParseSince(f *testing.F) {
	f.Add("10m")
	f.Add("2026-01-02T03:04:05Z")
	f.Add("1.5")
	f.Fuzz(func(_ *testing.T, s string) { _, _ = parseSince(s, time.Unix(1e9, 0)) })
}

func TestHelperOf(t *testing.T) {
	for line, want := range map[string]bool{
		"/opt/skep/containerd --config /data/containerd/config.toml":        true,
		"/opt/skep/containerd --config=/data/containerd/config.toml":        true,
		"/opt/skep/containerd-shim-skep-v1 -address /run/x/containerd.sock": true,
		"/usr/bin/containerd":                                              false,
		"/usr/bin/containerd --config /data2/config.toml":                  false,
		"/usr/bin/containerd-shim-runc-v2 -address /run/containerd/c.sock": false,
		"tail -f /data/skep.log":                                           false,
		"":                                                                 false,
	} {
		if got := helperOf(process.Entry{Args: strings.Fields(line)}, "/run/x", "/data"); got != want {
			t.Errorf("%q: %v", line, got)
		}
	}
}

func TestLiveLines(t *testing.T) {
	var plain, screen bytes.Buffer
	for _, l := range []*live{{w: &plain}, {w: &screen, width: 20}} {
		l.show([]string{"a: 0/1", "b: 0/1"})
		l.show([]string{"a: 0/1", "b: 1/1"})
		l.show([]string{"a: 1/1 " + strings.Repeat("long", 9)})
	}
	if want := "a: 0/1\nb: 0/1\nb: 1/1\na: 1/1 " + strings.Repeat("long", 9) + "\n"; plain.String() != want {
		t.Errorf("without a terminal: %q", plain.String())
	}
	want := "\x1b[2Ka: 0/1\n\x1b[2Kb: 0/1\n\x1b[2A\x1b[2Ka: 0/1\n\x1b[2Kb: 1/1\n\x1b[2A\x1b[2Ka: 1/1 longlonglon…\n\x1b[2K\n"
	if diff := cmp.Diff(want, screen.String()); diff != "" {
		t.Errorf("on a terminal, -want +got:\n%s", diff)
	}
}
