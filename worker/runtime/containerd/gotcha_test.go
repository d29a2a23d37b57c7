package containerd_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	ctd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/manager"
	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/task"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	ctdshim "github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/worker/runtime/containerd"
	"github.com/skep-dev/skep/worker/runtime/shim"
)

// What containerd and the OCI runtimes do that one does not expect, as it was met when
// they were measured; each test fails if we are caught by it again.

// TestMain lets a copy of the test binary be a shim without the sandbox service.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) != "containerd-shim-skep-v1" {
		os.Exit(m.Run())
	}
	if len(os.Args) > 1 && os.Args[1] == shim.EnterCommand {
		fmt.Fprintln(os.Stderr, shim.Enter(os.Args[2:]))
		os.Exit(126)
	}
	registry.Reset()
	registry.Register(&plugin.Registration{
		Type: plugins.TTRPCPlugin, ID: "task", Requires: []plugin.Type{plugins.EventPlugin, plugins.InternalPlugin},
		InitFn: func(ic *plugin.InitContext) (any, error) {
			p, err := ic.GetByID(plugins.EventPlugin, "publisher")
			if err != nil {
				return nil, err
			}
			s, err := ic.GetByID(plugins.InternalPlugin, "shutdown")
			if err != nil {
				return nil, err
			}
			return task.NewTaskService(ic.Context, p.(ctdshim.Publisher), s.(shutdown.Service))
		},
	})
	ctdshim.RunShim(context.Background(), manager.NewShimManager(shim.RuntimeName))
}

// shimOf returns the process id of the shim that serves a container.
func (b *bench) shimOf(t *testing.T, id string) int {
	t.Helper()
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(b.state(t, id).Pid) + "/stat")
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.Fields(string(stat[strings.LastIndex(string(stat), ")")+2:]))[1])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// shims returns the shims of the bench that run.
func (b *bench) shims(t *testing.T) (pids []int) {
	t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		line, err := os.ReadFile(p)
		cwd, _ := os.Readlink(filepath.Join(filepath.Dir(p), "cwd"))
		if err != nil || !strings.HasPrefix(filepath.Base(strings.Split(string(line), "\x00")[0]), "containerd-shim") || !strings.HasPrefix(cwd, b.cfg.Root+"/") {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(p)))
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}

// direct is a client of the bench's containerd beside the engine's.
func (b *bench) direct(t *testing.T) *ctd.Client {
	t.Helper()
	c, err := ctd.New(filepath.Join(b.cfg.Root, "run/containerd.sock"), ctd.WithDefaultNamespace("skep"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func (b *bench) namespaced(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, "skep")
}

// TestCrunBesideCgroup2 (gotchas G1, G2): crun is chosen wherever it is installed, also
// where a cgroup2 hierarchy beside v1 and new specification versions trouble it, and what
// the host mounts later appears in containers all the same.
func TestCrunBesideCgroup2(t *testing.T) {
	if _, err := exec.LookPath("crun"); err != nil {
		t.Skip("needs crun")
	}
	b := newBench(t, nil).withBusybox(t)
	if info, err := b.Info(t.Context()); err != nil || info.RuntimeName != "crun" {
		t.Errorf("runtime %s, %v: %q", info.RuntimeName, err, info.Warnings)
	}
	var root, unified unix.Statfs_t
	if unix.Statfs("/sys/fs/cgroup", &root) == nil && root.Type != unix.CGROUP2_SUPER_MAGIC && unix.Statfs("/sys/fs/cgroup/unified", &unified) == nil {
		mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", b.containerdPID(t)))
		if err != nil || strings.Contains(string(mounts), " /sys/fs/cgroup/unified ") {
			t.Errorf("containerd sees the cgroup2 hierarchy beside v1, %v", err)
		}
	}
	late := t.TempDir()
	if err := unix.Mount("tmpfs", late, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(late, unix.MNT_DETACH) })
	if err := os.WriteFile(filepath.Join(late, "f"), []byte("late\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	host := &container.HostConfig{Mounts: []mount.Mount{{Type: mount.TypeBind, Source: late, Target: "/late"}}}
	id := b.run(t, &container.Config{Cmd: []string{"sh", "-c", "cat /late/f; exec sleep 1000"}}, host)
	until(t, "the late mount is seen", func() bool { return b.logs(t, id) == "late\n" })
	text, err := os.ReadFile(filepath.Join(b.cfg.Root, "run/c/io.containerd.runtime.v2.task/skep", id, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	var spec struct{ OCIVersion string }
	if err := json.Unmarshal(text, &spec); err != nil || spec.OCIVersion != "1.1.0" {
		t.Errorf("specification version %q, %v", spec.OCIVersion, err)
	}
}

// TestOutputToNowhere (gotcha G3): whoever keeps no output still lets it be written.
func TestOutputToNowhere(t *testing.T) {
	b := newBench(t, nil).withBusybox(t)
	const script = "echo x && echo y >&2 && touch /tmp/written"
	id := b.run(t, &container.Config{Cmd: []string{"sh", "-c", script}}, &container.HostConfig{LogConfig: container.LogConfig{Type: "none"}})
	if code := b.wait(t, id); code != 0 {
		t.Errorf("without a log: exit code %d", code)
	}
	if _, err := os.Stat(filepath.Join(b.cfg.Root, "containers", id, id+"-json.log")); err == nil {
		t.Error("there is a log")
	}
	well := b.run(t, &container.Config{
		Cmd:         []string{"sleep", "1000"},
		Healthcheck: &container.HealthConfig{Test: []string{"CMD-SHELL", script}, Interval: 20 * time.Millisecond, Timeout: 20 * time.Second},
	}, nil)
	until(t, "healthy", func() bool { return b.state(t, well).Health.Status == container.Healthy })
}

// TestGarbageCollection (gotcha G4): containerd's collector, however often it runs, takes
// nothing from a container or an image that is just being made.
func TestGarbageCollection(t *testing.T) {
	b := newBench(t, nil).withBusybox(t)
	m := b.direct(t).LeasesService()
	ctx, cancel := context.WithCancel(b.namespaced(t.Context()))
	var collected int
	var loop sync.WaitGroup
	loop.Go(func() {
		for ctx.Err() == nil {
			l, err := m.Create(ctx, leases.WithRandomID())
			if err == nil {
				err = m.Delete(ctx, l, leases.SynchronousDelete)
			}
			if err != nil && ctx.Err() == nil {
				t.Errorf("collect: %v", err)
				return
			}
			collected++
		}
	})
	kept := b.create(t, &container.Config{Cmd: []string{"true"}}, nil)
	for i := range 8 {
		tag := fmt.Sprintf("made:%d", i)
		img := busybox(t, v1.Config{Cmd: []string{"sh", "-c", "exit 3"}, Env: []string{fmt.Sprintf("N=%d", i)}})
		if _, err := b.Load(t.Context(), archive(t, tag, img)); err != nil {
			t.Errorf("load: %v", err)
			break
		}
		id := b.create(t, &container.Config{Image: tag}, nil)
		if err := b.Start(t.Context(), id); err != nil {
			t.Errorf("start: %v", err)
			break
		}
		if code := b.wait(t, id); code != 3 {
			t.Errorf("exit code %d", code)
		}
	}
	cancel()
	loop.Wait()
	if collected < 8 {
		t.Errorf("the collector ran %d times only", collected)
	}
	if err := b.Start(t.Context(), kept); err != nil {
		t.Errorf("start of a container that was made before: %v", err)
	}
}

// TestOneShimForMany (gotchas G7, G8): containers that start at the same time share one
// shim, and it stays when the last of them goes, for the next to use.
func TestOneShimForMany(t *testing.T) {
	b := newBench(t, nil).withBusybox(t)
	var ids []string
	for range 12 {
		ids = append(ids, b.create(t, &container.Config{Cmd: []string{"sleep", "1000"}}, nil))
	}
	each := func(f func(id string) error) {
		var all sync.WaitGroup
		for _, id := range ids {
			all.Go(func() {
				if err := f(id); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
	}
	each(func(id string) error { return b.Start(context.Background(), id) })
	if t.Failed() {
		return
	}
	first := b.shimOf(t, ids[0])
	for _, id := range ids {
		if pid := b.shimOf(t, id); pid != first {
			t.Errorf("shims %d and %d", first, pid)
		}
	}
	if all := b.shims(t); len(all) != 1 || all[0] != first {
		t.Errorf("shims %v serve, want %d", all, first)
	}
	each(func(id string) error { return b.Remove(context.Background(), id, true, true) })
	again := b.run(t, &container.Config{Cmd: []string{"sleep", "1000"}}, nil)
	if pid := b.shimOf(t, again); pid != first {
		t.Errorf("the shim %d was replaced by %d", first, pid)
	}
}

// TestShimWithoutSandboxes (gotcha G9): a shim that cannot serve fails the start, and
// neither it nor its record stays.
func TestShimWithoutSandboxes(t *testing.T) {
	bin, other := binDir(t), t.TempDir()
	for _, name := range []string{"containerd", "skep-init"} {
		if err := os.Symlink(filepath.Join(bin, name), filepath.Join(other, name)); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(other, "containerd-shim-skep-v1"), self, 0o700); err != nil {
		t.Fatal(err)
	}
	b := newBench(t, func(c *containerd.Config) { c.BinDir = other }).withBusybox(t)
	id := b.create(t, &container.Config{Cmd: []string{"sleep", "1000"}}, nil)
	if err := b.Start(t.Context(), id); err == nil || !strings.Contains(err.Error(), "start shim") {
		t.Errorf("start: %v", err)
	}
	until(t, "the shim is gone", func() bool { return len(b.shims(t)) == 0 })
	list, err := b.direct(t).SandboxStore().List(b.namespaced(t.Context()))
	if err != nil || len(list) != 0 {
		t.Errorf("%d records of shims, %v", len(list), err)
	}
	if s := b.state(t, id); s.Status != container.StateCreated || s.ExitCode == 0 {
		t.Errorf("%+v", s)
	}
}

// TestPlacesOfSockets (gotchas G5, G10): containerd takes its configuration and the shim
// starts none of the server's plugins, or they would listen where others do; and the
// programs may be reached through links.
func TestPlacesOfSockets(t *testing.T) {
	bin, links := binDir(t), t.TempDir()
	for _, name := range []string{"containerd", "skep-init", "containerd-shim-skep-v1"} {
		if err := os.Symlink(filepath.Join(bin, name), filepath.Join(links, name)); err != nil {
			t.Fatal(err)
		}
	}
	b := newBench(t, func(c *containerd.Config) { c.BinDir = links }).withBusybox(t)
	id := b.run(t, &container.Config{Cmd: []string{"sleep", "1000"}}, nil)
	table, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		t.Fatal(err)
	}
	paths := map[string]string{}
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) > 7 {
			paths["socket:["+f[6]+"]"] = f[7]
		}
	}
	for name, pid := range map[string]int{"containerd": b.containerdPID(t), "shim": b.shimOf(t, id)} {
		fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		if err != nil {
			t.Fatal(err)
		}
		listens := 0
		for _, fd := range fds {
			to, _ := os.Readlink(fd) // it may be closed by now
			path, ok := paths[to]
			if ok && !strings.HasPrefix(path, b.cfg.Root+"/") {
				t.Errorf("%s has a socket at %s", name, path)
			}
			if ok {
				listens++
			}
		}
		if listens == 0 {
			t.Errorf("no socket of %s was found among %d files", name, len(fds))
		}
	}
}

// TestStalls (gotcha G11): an OCI runtime that stalls for longer than containerd's own
// limits delays a start and an exit, and nothing else happens.
func TestStalls(t *testing.T) {
	t.Parallel()
	runc, err := exec.LookPath("runc")
	if err != nil {
		t.Skip("needs runc")
	}
	dir := t.TempDir()
	slow := filepath.Join(dir, "slow")
	script := fmt.Sprintf("#!/bin/sh\nif [ -e %s/stall ]; then case \"$*\" in *\" create \"*|*\" delete \"*) sleep 6;; esac; fi\nexec %s \"$@\"\n", dir, runc)
	if err := os.WriteFile(slow, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	b := newBench(t, func(c *containerd.Config) { c.Runtime = slow }).withBusybox(t)
	id := b.create(t, &container.Config{Cmd: []string{"sh", "-c", "echo out; exit 9"}}, nil)
	if err := os.WriteFile(filepath.Join(dir, "stall"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := b.Start(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if code := b.wait(t, id); code != 9 || b.logs(t, id) != "out\n" {
		t.Errorf("exit code %d, output %q", code, b.logs(t, id))
	}
	if d := time.Since(begin); d < 6*time.Second {
		t.Errorf("nothing stalled: %v", d)
	}
	if err := os.Remove(filepath.Join(dir, "stall")); err != nil {
		t.Fatal(err)
	}
	if err := b.Start(t.Context(), id); err != nil {
		t.Errorf("again: %v", err)
	}
	b.wait(t, id)
	if all := b.shims(t); len(all) != 1 {
		t.Errorf("shims %v", all)
	}
}
