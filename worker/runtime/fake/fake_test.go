package fake_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/moby/api/types/container"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/runtime/fake"
)

func TestLifeByScript(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		e := fake.New(fake.Config{Images: []fake.Image{{Ref: "web:1"}}})
		if _, _, err := e.Create(ctx, runtime.CreateOptions{Config: &container.Config{Image: "absent"}}); model.KindOf(err) != model.NotFound {
			t.Fatalf("create from absent image: %v", err)
		}
		id, _, err := e.Create(ctx, runtime.CreateOptions{Name: "ab", Config: &container.Config{Image: "web:1", Cmd: []string{"print hello; exit 3 after 2s"}}})
		if err != nil {
			t.Fatal(err)
		}
		done, err := e.Wait(ctx, "ab", container.WaitConditionNextExit)
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if err := e.Start(ctx, id[:10]); err != nil {
			t.Fatal(err)
		}
		if r := <-done; r.ExitCode != 3 || time.Since(start) != 2*time.Second {
			t.Fatalf("ended with %+v after %v", r, time.Since(start))
		}
		var log string
		err = e.Logs(ctx, "ab", runtime.LogOptions{Stdout: true, Tail: -1}, func(l runtime.LogLine) error { log += string(l.Data); return nil })
		if err != nil || log != "hello\n" {
			t.Fatalf("log %q, %v", log, err)
		}
	})
}

func TestIgnoredStopIsKilledAfterGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		e := fake.New(fake.Config{Images: []fake.Image{{Ref: "web:1", Script: "ignore"}}})
		id, _, err := e.Create(ctx, runtime.CreateOptions{Config: &container.Config{Image: "web:1"}})
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Start(ctx, id); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if err := e.Stop(ctx, id, "", nil); err != nil {
			t.Fatal(err)
		}
		c, err := e.Inspect(ctx, id)
		if err != nil || c.State.ExitCode != 137 || time.Since(start) != 10*time.Second {
			t.Fatalf("state %+v after %v, %v", c.State, time.Since(start), err)
		}
	})
}

func TestHealth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		e := fake.New(fake.Config{Images: []fake.Image{{Ref: "web:1"}}})
		id, _, err := e.Create(ctx, runtime.CreateOptions{Config: &container.Config{
			Image: "web:1", Cmd: []string{"healthy after 3s; unhealthy after 20s"},
			Healthcheck: &container.HealthConfig{Test: []string{"CMD", "x"}, Interval: time.Second, Retries: 5},
		}})
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Start(ctx, id); err != nil {
			t.Fatal(err)
		}
		for _, want := range []struct {
			at     time.Duration
			status container.HealthStatus
		}{{1500 * time.Millisecond, container.Starting}, {3 * time.Second, container.Healthy}, {22 * time.Second, container.Unhealthy}} {
			time.Sleep(want.at)
			c, err := e.Inspect(ctx, id)
			if err != nil || c.State.Health.Status != want.status {
				t.Fatalf("health %+v, %v, want %s", c.State.Health, err, want.status)
			}
		}
	})
}

func FuzzParseScript(f *testing.F) {
	f.Add("exit 3 after 2s; print hello")
	f.Add("stop in 4s; code 0; ignore")
	f.Add("unhealthy after 3s; healthy after 1s; fail text; error x")
	f.Fuzz(func(t *testing.T, text string) {
		s := fake.ParseScript(text)
		if again := fake.ParseScript(s.String()); again.String() != s.String() {
			t.Errorf("%q printed as %q, read back as %q", text, s, again)
		}
	})
}
