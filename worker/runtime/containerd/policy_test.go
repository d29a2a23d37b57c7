package containerd_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/volume"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

func TestHealth(t *testing.T) {
	b := newBench(t, nil).withBusybox(t)
	ctx := context.Background()
	events, _ := b.Events(t.Context())
	id := b.run(t, &container.Config{
		Cmd: []string{"sh", "-c", "sleep 0.3; touch /tmp/ok; sleep 1000"},
		Healthcheck: &container.HealthConfig{
			Test: []string{"CMD-SHELL", "echo looking; test -e /tmp/ok"}, Interval: 50 * time.Millisecond, Timeout: 10 * time.Second,
			StartPeriod: 20 * time.Second, StartInterval: 40 * time.Millisecond, Retries: 2,
		},
	}, nil)
	status := func(want container.HealthStatus) func() bool {
		return func() bool { h := b.state(t, id).Health; return h != nil && h.Status == want }
	}
	if !status(container.Starting)() {
		t.Errorf("%+v", b.state(t, id).Health)
	}
	until(t, "healthy", status(container.Healthy))
	if h := b.state(t, id).Health; len(h.Log) == 0 || !strings.Contains(h.Log[0].Output, "looking") {
		t.Errorf("%+v", h)
	}
	b.restart(t)
	if !status(container.Healthy)() {
		t.Errorf("after a restart: %+v", b.state(t, id).Health)
	}
	x, err := b.ExecCreate(ctx, id, &container.ExecCreateRequest{Cmd: []string{"sh", "-c", "busybox rm /tmp/ok"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.ExecStart(ctx, x, runtime.Stdio{Stdout: &safeBuffer{}}); err != nil {
		t.Fatal(err)
	}
	until(t, "unhealthy", status(container.Unhealthy))
	for m := range events {
		if m.Action == "health_status: healthy" {
			break
		}
	}
	hangs := b.run(t, &container.Config{
		Cmd:         []string{"sleep", "1000"},
		Healthcheck: &container.HealthConfig{Test: []string{"CMD", "sleep", "100"}, Interval: 20 * time.Millisecond, Timeout: 200 * time.Millisecond, Retries: 1},
	}, nil)
	until(t, "timeout", func() bool { return b.state(t, hangs).Health.Status == container.Unhealthy })
	if out := b.state(t, hangs).Health.Log[0].Output; !strings.Contains(out, "exceeded timeout") {
		t.Errorf("output %q", out)
	}
}

func TestRestartPolicy(t *testing.T) {
	b := newBench(t, nil).withBusybox(t)
	ctx := context.Background()
	id := b.run(t, &container.Config{Cmd: []string{"sh", "-c", "echo x >> /n; exit 1"}},
		&container.HostConfig{RestartPolicy: container.RestartPolicy{Name: "on-failure", MaximumRetryCount: 2}})
	until(t, "given up", func() bool {
		c, err := b.Inspect(ctx, id)
		return err == nil && c.RestartCount == 2 && c.State.Status == container.StateExited
	})
	always := b.run(t, &container.Config{Cmd: []string{"sh", "-c", "exit 0"}}, &container.HostConfig{RestartPolicy: container.RestartPolicy{Name: "always"}})
	until(t, "restarts", func() bool { c, err := b.Inspect(ctx, always); return err == nil && c.RestartCount >= 2 })
	until(t, "stop while restarting", func() bool {
		err := b.Stop(ctx, always, "", nil)
		return err == nil || b.state(t, always).Status == container.StateExited
	})
	gone := b.run(t, &container.Config{Cmd: []string{"true"}}, &container.HostConfig{AutoRemove: true})
	until(t, "auto-remove", func() bool { _, err := b.Inspect(ctx, gone); return model.KindOf(err) == model.NotFound })
}

// TestStopKills: a first process that pays no attention to its signal is killed after its grace.
func TestStopKills(t *testing.T) {
	b := newBench(t, nil).withBusybox(t)
	id := b.run(t, &container.Config{Cmd: []string{"sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"}, StopTimeout: new(1)}, nil)
	start := time.Now()
	if err := b.Stop(t.Context(), id, "", nil); err != nil {
		t.Fatal(err)
	}
	if s := b.state(t, id); s.ExitCode != 137 || time.Since(start) < time.Second {
		t.Errorf("%+v after %v", s, time.Since(start))
	}
	if err := b.Stop(t.Context(), id, "", nil); err != runtime.ErrNotModified { //nolint:errorlint // returned as it is
		t.Errorf("again: %v", err)
	}
	oom := b.run(t, &container.Config{Cmd: []string{"sh", "-c", "head -c 100m /dev/zero | busybox tail -n1"}}, &container.HostConfig{Resources: container.Resources{Memory: 16 << 20, MemorySwap: 16 << 20}})
	b.wait(t, oom)
	until(t, "out-of-memory mark", func() bool { return b.state(t, oom).OOMKilled })
}

func TestVolumes(t *testing.T) {
	b := newBench(t, nil).withBusybox(t)
	ctx := context.Background()
	v, err := b.CreateVolume(ctx, volume.CreateRequest{Name: "comb", Labels: map[string]string{"k": "v"}})
	if err != nil {
		t.Fatal(err)
	}
	if v.Mountpoint != filepath.Join(b.cfg.Root, "volumes/comb/_data") {
		t.Errorf("%+v", v)
	}
	id := b.run(t, &container.Config{Cmd: []string{"sh", "-c", "echo honey > /v/f; echo x > /a/f"}, Volumes: map[string]struct{}{"/a": {}}},
		&container.HostConfig{Mounts: []mount.Mount{{Type: mount.TypeVolume, Source: "comb", Target: "/v"}}})
	b.wait(t, id)
	if _, users, err := b.VolumeUsage(ctx, "comb"); err != nil || users != 1 {
		t.Errorf("%d users, %v", users, err)
	}
	if err := b.RemoveVolume(ctx, "comb", false); model.KindOf(err) != model.Conflict || !strings.Contains(err.Error(), "volume is in use") {
		t.Errorf("in use: %v", err)
	}
	b.restart(t)
	if list, err := b.ListVolumes(ctx); err != nil || len(list) != 2 {
		t.Errorf("%+v, %v", list, err)
	}
	if err := b.Remove(ctx, id, false, true); err != nil {
		t.Fatal(err)
	}
	if list, err := b.ListVolumes(ctx); err != nil || len(list) != 1 || list[0].Labels["k"] != "v" {
		t.Errorf("%+v, %v", list, err)
	}
	if names, _, err := b.PruneVolumes(ctx, runtime.PruneOptions{}); err != nil || len(names) != 0 {
		t.Errorf("pruned a named volume: %v, %v", names, err)
	}
	if got, err := os.ReadFile(filepath.Join(v.Mountpoint, "f")); err != nil || string(got) != "honey\n" {
		t.Errorf("%q, %v", got, err)
	}
	if names, freed, err := b.PruneVolumes(ctx, runtime.PruneOptions{All: true}); err != nil || len(names) != 1 || freed == 0 {
		t.Errorf("%v, %d, %v", names, freed, err)
	}
	if _, err := b.InspectVolume(ctx, "comb"); model.KindOf(err) != model.NotFound {
		t.Errorf("after prune: %v", err)
	}
}
