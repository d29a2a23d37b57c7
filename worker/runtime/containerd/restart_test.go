package containerd_test

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/runtime/containerd"
)

func (b *bench) containerdPID(t *testing.T) int {
	t.Helper()
	p, err := os.ReadFile(filepath.Join(b.cfg.Root, "containerd/pid"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(p)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// until waits for a condition of the machine.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

func (b *bench) state(t *testing.T, id string) *container.State {
	t.Helper()
	c, err := b.Inspect(context.Background(), id)
	if err != nil {
		t.Fatal(err)
	}
	return c.State
}

// TestDaemonRestart: containers outlive the daemon, and it finds everything again.
func TestDaemonRestart(t *testing.T) {
	b := newBench(t, nil).withBusybox(t)
	ctx := context.Background()
	loop := []string{"sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done"}
	stays := b.run(t, &container.Config{Cmd: loop, Labels: map[string]string{"a": "b"}}, &container.HostConfig{Resources: container.Resources{Memory: 32 << 20}})
	ends := b.run(t, &container.Config{Cmd: []string{"sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.02; done; exit 42"}}, nil)
	stopped := b.run(t, &container.Config{Cmd: []string{"sh", "-c", "exit 3"}}, nil)
	b.wait(t, stopped)
	before, err := b.Inspect(ctx, stays)
	if err != nil {
		t.Fatal(err)
	}
	pid := b.containerdPID(t)
	endsPID := b.state(t, ends).Pid
	b.stop()
	// It ends while nobody looks.
	if err := os.WriteFile("/proc/"+strconv.Itoa(endsPID)+"/root/tmp/go", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	until(t, "container ends", func() bool { return unix.Kill(endsPID, 0) != nil })
	b.start(t)
	if now := b.containerdPID(t); now != pid {
		t.Errorf("containerd was restarted: %d, %d", pid, now)
	}
	after, err := b.Inspect(ctx, stays)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(before.State, after.State); d != "" {
		t.Errorf("state: %s", d)
	}
	if d := cmp.Diff(before.Config.Labels, after.Config.Labels); d != "" || after.HostConfig.Memory != 32<<20 {
		t.Errorf("configuration: %s, %+v", d, after.HostConfig.Memory)
	}
	if code := b.wait(t, ends); code != 42 {
		t.Errorf("exit code of what ended meanwhile: %d", code)
	}
	if s := b.state(t, stopped); s.ExitCode != 3 || s.Status != container.StateExited {
		t.Errorf("%+v", s)
	}
	if err := b.Stop(ctx, stays, "KILL", nil); err != nil {
		t.Fatal(err)
	}
	for i, line := range strings.Fields(b.logs(t, stays)) {
		if line != strconv.Itoa(i+1) {
			t.Fatalf("line %d of the log is %q", i, line)
		}
	}
	if err := b.Start(ctx, stays); err != nil {
		t.Fatal(err)
	}
}

// TestContainerdKilled: neither containers nor their exit codes suffer when containerd
// and the daemon die together.
func TestContainerdKilled(t *testing.T) {
	b := newBench(t, nil).withBusybox(t)
	ctx := context.Background()
	stays := b.run(t, &container.Config{Cmd: []string{"sleep", "1000"}}, nil)
	ends := b.run(t, &container.Config{Cmd: []string{"sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.02; done; echo bye; exit 42"}}, nil)
	pid, endsPID := b.containerdPID(t), b.state(t, ends).Pid
	b.stop()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("/proc/"+strconv.Itoa(endsPID)+"/root/tmp/go", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	until(t, "container ends", func() bool { return unix.Kill(endsPID, 0) != nil })
	b.start(t)
	if s := b.state(t, stays); !s.Running {
		t.Errorf("%+v", s)
	}
	if code := b.wait(t, ends); code != 42 {
		t.Errorf("exit code %d", code)
	}
	if got := b.logs(t, ends); got != "bye\n" {
		t.Errorf("log %q", got)
	}
	// With the daemon alive, containerd is started again and events go on.
	if err := unix.Kill(b.containerdPID(t), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "containerd answers again", func() bool { _, err := b.Info(ctx); return err == nil })
	if code := b.wait(t, b.run(t, &container.Config{Cmd: []string{"sh", "-c", "exit 5"}}, nil)); code != 5 {
		t.Errorf("exit code %d", code)
	}
	if err := b.Stop(ctx, stays, "KILL", nil); err != nil {
		t.Error(err)
	}
}

// TestShimKilled: the containers of a killed shim end with 137, others do not, and new
// ones get a new shim.
func TestShimKilled(t *testing.T) {
	b := newBench(t, func(c *containerd.Config) { c.GroupSize = 2 }).withBusybox(t)
	var ids []string
	for range 3 {
		ids = append(ids, b.run(t, &container.Config{Cmd: []string{"sleep", "1000"}}, nil))
	}
	parent := func(id string) int { return b.shimOf(t, id) }
	if parent(ids[0]) != parent(ids[1]) || parent(ids[0]) == parent(ids[2]) {
		t.Fatalf("shims: %d %d %d", parent(ids[0]), parent(ids[1]), parent(ids[2]))
	}
	if err := unix.Kill(parent(ids[0]), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if a, c := b.wait(t, ids[0]), b.wait(t, ids[1]); a != 137 || c != 137 {
		t.Errorf("exit codes %d, %d", a, c)
	}
	if s := b.state(t, ids[2]); !s.Running {
		t.Errorf("%+v", s)
	}
	for _, id := range ids[:2] {
		if err := b.Start(context.Background(), id); err != nil {
			t.Error(err)
		}
	}
}

// TestSeveralEngines: two engines on one machine with the same namespace do not disturb
// each other (gotcha G5).
func TestSeveralEngines(t *testing.T) {
	a := newBench(t, nil).withBusybox(t)
	b := newBench(t, nil)
	id := a.run(t, &container.Config{Cmd: []string{"sleep", "1000"}}, nil)
	if list, err := b.List(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("%d containers, %v", len(list), err)
	}
	if images, err := b.ListImages(t.Context()); err != nil || len(images) != 0 {
		t.Errorf("%d images, %v", len(images), err)
	}
	b.restart(t)
	if s := a.state(t, id); !s.Running {
		t.Errorf("%+v", s)
	}
}

// TestRunc: without crun everything goes as well.
func TestRunc(t *testing.T) {
	b := newBench(t, func(c *containerd.Config) { c.Runtime = "runc" }).withBusybox(t)
	if info, err := b.Info(t.Context()); err != nil || info.RuntimeName != "runc" {
		t.Fatalf("%+v, %v", info, err)
	}
	if got := b.output(t, "grep Seccomp: /proc/self/status | tr -d '\\t'; id -u", container.Config{User: "bee"}, container.HostConfig{Resources: container.Resources{Memory: 64 << 20}}); got != "Seccomp:2\n1234" {
		t.Errorf("output %q", got)
	}
	id := b.run(t, &container.Config{Cmd: []string{"sleep", "1000"}}, nil)
	x, err := b.ExecCreate(t.Context(), id, &container.ExecCreateRequest{Cmd: []string{"echo", "hi"}})
	if err != nil {
		t.Fatal(err)
	}
	var out safeBuffer
	if err := b.ExecStart(t.Context(), x, runtime.Stdio{Stdout: &out}); err != nil || out.String() != "hi\n" {
		t.Errorf("%q, %v", out.String(), err)
	}
}

// TestSeccompCache: the second container of a profile is given the filter that crun
// compiled for the first, and is as confined.
func TestSeccompCache(t *testing.T) {
	b := newBench(t, nil).withBusybox(t)
	if info, err := b.Info(t.Context()); err != nil || info.RuntimeName != "crun" {
		t.Skipf("needs crun: %+v, %v", info.RuntimeName, err)
	}
	const script = "grep -E '^Seccomp' /proc/self/status | tr -d '\\t'; mount -t tmpfs x /tmp 2>/dev/null || echo refused"
	first := b.output(t, script, container.Config{}, container.HostConfig{CapAdd: []string{"SYS_PTRACE"}})
	files, err := filepath.Glob(filepath.Join(b.cfg.Root, "seccomp/*"))
	if err != nil || len(files) != 1 {
		t.Fatalf("%v, %v", files, err)
	}
	if second := b.output(t, script, container.Config{}, container.HostConfig{CapAdd: []string{"SYS_PTRACE"}}); second != first || !strings.Contains(first, "Seccomp:2") {
		t.Errorf("%q, then %q", first, second)
	}
}

// TestReboot: after a restart of the machine containers show as ended and start again.
func TestReboot(t *testing.T) {
	b := newBench(t, nil).withBusybox(t)
	ctx := context.Background()
	id := b.run(t, &container.Config{Cmd: []string{"sleep", "1000"}}, nil)
	secret := b.run(t, &container.Config{Cmd: []string{"sleep", "1000"}}, nil, runtime.File{Path: "k", Mode: 0o400, Data: []byte("x")})
	again := b.run(t, &container.Config{Cmd: []string{"sleep", "1000"}}, &container.HostConfig{RestartPolicy: container.RestartPolicy{Name: "always"}})
	b.stop()
	// What a power cut leaves: no process, no mount, an empty state directory.
	killAll(t, b.cfg.Root)
	until(t, "processes are gone", func() bool {
		dirs, _ := filepath.Glob("/sys/fs/cgroup/pids" + b.cfg.CgroupParent + "/*/cgroup.procs")
		for _, d := range dirs {
			p, _ := os.ReadFile(d)
			for pid := range strings.FieldsSeq(string(p)) {
				n, _ := strconv.Atoi(pid)
				_ = unix.Kill(n, unix.SIGKILL)
			}
			if len(p) > 0 {
				return false
			}
		}
		return true
	})
	b.unmount()
	if err := os.RemoveAll(filepath.Join(b.cfg.Root, "run")); err != nil {
		t.Fatal(err)
	}
	b.start(t)
	if code := b.wait(t, id); code != 255 && code != 137 {
		t.Errorf("exit code %d", code)
	}
	if err := b.Start(ctx, id); err != nil {
		t.Errorf("start again: %v", err)
	}
	b.wait(t, secret)
	if err := b.Start(ctx, secret); err == nil || !strings.Contains(err.Error(), "create the container anew") {
		t.Errorf("start without secrets: %v", err)
	}
	until(t, "restart policy", func() bool { return b.state(t, again).Running })
}

// TestPoliciesOverRestart: a restarted daemon does with what ended what its policy says,
// whether it ended before, waits for its restart, or ended while nobody looked.
func TestPoliciesOverRestart(t *testing.T) {
	t.Parallel()
	b := newBench(t, nil).withBusybox(t)
	ctx := context.Background()
	policy := func(name container.RestartPolicyMode, most int) *container.HostConfig {
		return &container.HostConfig{RestartPolicy: container.RestartPolicy{Name: name, MaximumRetryCount: most}}
	}
	gate := &container.Config{Cmd: []string{"sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.02; done; exit 1"}}
	run := func(host *container.HostConfig) string { return b.run(t, gate, host) }
	stopped := func(host *container.HostConfig) string {
		id := run(host)
		if err := b.Stop(ctx, id, "KILL", nil); err != nil {
			t.Fatal(err)
		}
		return id
	}
	ids := map[string]string{
		"always, stopped": stopped(policy("always", 0)), "unless-stopped, stopped": stopped(policy("unless-stopped", 0)),
		"no, stopped": stopped(policy("no", 0)), "on-failure, stopped": stopped(policy("on-failure", 0)),
		"always, ends meanwhile": run(policy("always", 0)), "unless-stopped, ends meanwhile": run(policy("unless-stopped", 0)),
		"on-failure, ends meanwhile": run(policy("on-failure", 3)), "no, ends meanwhile": run(policy("no", 0)),
		"rm, ends meanwhile": run(&container.HostConfig{AutoRemove: true}), "rm, runs on": run(&container.HostConfig{AutoRemove: true}),
		"unless-stopped, runs on": run(policy("unless-stopped", 0)),
		"rm, never started":       b.create(t, gate, &container.HostConfig{AutoRemove: true}),
		"always, never started":   b.create(t, gate, policy("always", 0)),
	}
	// These wait for their restart, longer every time, when the daemon ends.
	fails := &container.Config{Cmd: []string{"sh", "-c", "exit 1"}}
	for _, name := range []container.RestartPolicyMode{"always", "unless-stopped", "on-failure"} {
		id := b.run(t, fails, policy(name, 0))
		ids[string(name)+", waits"] = id
		until(t, "restarts", func() bool { c, err := b.Inspect(ctx, id); return err == nil && c.RestartCount >= 3 })
	}
	spent := b.run(t, fails, policy("on-failure", 1))
	until(t, "given up", func() bool {
		c, err := b.Inspect(ctx, spent)
		return err == nil && c.RestartCount == 1 && c.State.Status == container.StateExited
	})
	pids, counts := map[string]int{}, map[string]int{}
	for name, id := range ids {
		c, err := b.Inspect(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		pids[name], counts[name] = c.State.Pid, c.RestartCount
	}
	b.stop()
	for name, pid := range pids {
		if strings.HasSuffix(name, "ends meanwhile") {
			if err := os.WriteFile("/proc/"+strconv.Itoa(pid)+"/root/tmp/go", nil, 0o600); err != nil {
				t.Fatal(err)
			}
			until(t, "container ends", func() bool { return unix.Kill(pid, 0) != nil })
		}
	}
	b.start(t)
	for name, id := range ids {
		gone := strings.HasPrefix(name, "rm, ") && name != "rm, runs on"
		until(t, name, func() bool {
			c, err := b.Inspect(ctx, id)
			if gone || err != nil {
				return gone && model.KindOf(err) == model.NotFound
			}
			switch name {
			case "rm, runs on", "unless-stopped, runs on":
				return c.State.Running && c.State.Pid == pids[name]
			case "always, never started":
				return c.State.Status == container.StateCreated
			case "unless-stopped, stopped", "no, stopped", "on-failure, stopped", "no, ends meanwhile":
				return c.State.Status == container.StateExited && c.RestartCount == 0
			case "always, waits", "unless-stopped, waits", "on-failure, waits":
				return c.RestartCount > counts[name]
			case "always, stopped": // runs again; what ended meanwhile ends at once, for its gate is open
				return c.State.Running
			}
			return c.RestartCount > 0
		})
	}
	if c, err := b.Inspect(ctx, spent); err != nil || c.RestartCount != 1 || c.State.Status != container.StateExited {
		t.Errorf("what had no restart left: %+v, %v", c, err)
	}
}
