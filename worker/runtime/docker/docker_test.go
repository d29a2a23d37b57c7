package docker_test

import (
	"context"
	"crypto/rand"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime/docker"
)

func FuzzParseSignal(f *testing.F) {
	for _, s := range []string{"", "9", "TERM", "sigterm", "RTMIN+3", "SIGRTMAX-1", "65", "x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := docker.ParseSignal(s); err == nil && (n < 1 || n > 64) {
			t.Errorf("%q is %d", s, n)
		}
	})
}

func TestParseSignal(t *testing.T) {
	for s, want := range map[string]unix.Signal{"": 9, "15": 15, "HUP": 1, "SIGUSR1": 10, "sigint": 2, "RTMIN": 34, "SIGRTMIN+2": 36, "RTMAX-1": 63} {
		if got, err := docker.ParseSignal(s); got != want || err != nil {
			t.Errorf("%q: %d, %v", s, got, err)
		}
	}
	for _, s := range []string{"0", "-1", "65", "NOPE", "RTMIN-1", "RTMAX+1", "RTMINx"} {
		if _, err := docker.ParseSignal(s); model.KindOf(err) != model.Invalid {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestMerge(t *testing.T) {
	img := &dockerspec.DockerOCIImageConfig{ImageConfig: ocispec.ImageConfig{
		Entrypoint: []string{"/entry"}, Cmd: []string{"serve"}, Env: []string{"A=image", "B=image"}, User: "bee", WorkingDir: "/w",
		Labels: map[string]string{"l": "image", "m": "image"},
	}}
	for _, c := range []struct {
		name     string
		own      container.Config
		argv     string
		env      []string
		user, wd string
	}{
		{"nothing of its own", container.Config{}, "/entry serve", []string{"A=image", "B=image"}, "bee", "/w"},
		{"command", container.Config{Cmd: []string{"x"}}, "/entry x", []string{"A=image", "B=image"}, "bee", "/w"},
		{"entrypoint drops the image's command", container.Config{Entrypoint: []string{"/e"}}, "/e", []string{"A=image", "B=image"}, "bee", "/w"},
		{"empty entrypoint", container.Config{Entrypoint: []string{""}, Cmd: []string{"x"}}, "x", []string{"A=image", "B=image"}, "bee", "/w"},
		{"environment", container.Config{Env: []string{"B=own", "C=own"}}, "/entry serve", []string{"B=own", "C=own", "A=image"}, "bee", "/w"},
		{"user and directory", container.Config{User: "0", WorkingDir: "/x"}, "/entry serve", []string{"A=image", "B=image"}, "0", "/x"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := docker.Merge(&c.own, img)
			if d := cmp.Diff(c.argv, strings.Join(docker.Argv(got), " ")); d != "" {
				t.Error(d)
			}
			if d := cmp.Diff(c.env, got.Env); d != "" || got.User != c.user || got.WorkingDir != c.wd {
				t.Errorf("%s, %q, %q", d, got.User, got.WorkingDir)
			}
		})
	}
}

// TestJudge holds Docker's sentences about health.
func TestJudge(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		check, _ := docker.HealthCheck(&container.HealthConfig{
			Test: []string{"CMD", "x"}, Retries: rapid.IntRange(1, 4).Draw(t, "retries"),
			StartPeriod: time.Duration(rapid.IntRange(0, 5).Draw(t, "start period")) * time.Second,
		})
		h := container.Health{Status: container.Starting}
		streak := 0
		for i, code := range rapid.SliceOf(rapid.IntRange(0, 1)).Draw(t, "codes") {
			up := time.Duration(i) * time.Second
			before := h.Status
			h = check.Judge(h, container.HealthcheckResult{ExitCode: code}, up)
			switch {
			case code == 0:
				streak = 0
			case before != container.Starting || up >= check.StartPeriod:
				streak++
			}
			if code == 0 && h.Status != container.Healthy {
				t.Fatalf("a success leaves %s", h.Status)
			}
			if code != 0 && (h.Status == container.Unhealthy) != (streak >= check.Retries || before == container.Unhealthy) {
				t.Fatalf("%d failures of %d leave %s", streak, check.Retries, h.Status)
			}
			if h.FailingStreak != streak || len(h.Log) > 5 {
				t.Fatalf("streak %d of %d, %d results kept", h.FailingStreak, streak, len(h.Log))
			}
		}
	})
}

func TestIndex(t *testing.T) {
	x := docker.NewIndex()
	for id, name := range map[string]string{"abc1": "one", "abd2": "two"} {
		if err := x.Add(id, name); err != nil {
			t.Fatal(err)
		}
	}
	for ref, want := range map[string]string{"abc1": "abc1", "one": "abc1", "/two": "abd2", "abd": "abd2"} {
		if got, err := x.Resolve(ref); got != want || err != nil {
			t.Errorf("%s: %s, %v", ref, got, err)
		}
	}
	if _, err := x.Resolve("ab"); model.KindOf(err) != model.Invalid {
		t.Errorf("ambiguous: %v", err)
	}
	if err := x.Add("abc1", "renamed"); err != nil || x.HasName("one") || !x.HasName("renamed") {
		t.Errorf("rename: %v", err)
	}
	if err := x.Reserve("abc1", "two"); model.KindOf(err) != model.Exists {
		t.Errorf("a name of another reserved: %v", err)
	}
	named := func(when string, want map[string]string) {
		t.Helper()
		for ref, id := range want {
			if got, _ := x.Resolve(ref); got != id {
				t.Errorf("%s: %s is %q, want %q", when, ref, got, id)
			}
		}
	}
	reserve := func() {
		t.Helper()
		if err := x.Reserve("abc1", "next"); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"renamed", "next"} {
			if err := x.Add("abd2", name); model.KindOf(err) != model.Exists {
				t.Errorf("%s was free while a name was reserved: %v", name, err)
			}
		}
	}
	reserve()
	named("reserved", map[string]string{"renamed": "abc1", "two": "abd2"})
	x.Release("abc1", "next")
	named("released", map[string]string{"renamed": "abc1", "next": "", "two": "abd2"})
	reserve()
	if err := x.Add("abc1", "next"); err != nil {
		t.Error(err)
	}
	x.Release("abc1", "next")
	named("taken", map[string]string{"renamed": "", "next": "abc1"})
	if err := x.Add("abc1", "renamed"); err != nil {
		t.Error(err)
	}
	x.Remove("abc1")
	if _, err := x.Resolve("renamed"); model.KindOf(err) != model.NotFound {
		t.Errorf("removed: %v", err)
	}
}

func TestGenerateName(t *testing.T) {
	seen := map[string]bool{}
	for range 500 {
		name, err := docker.GenerateName(rand.Reader, func(n string) bool { return seen[n] })
		if err != nil || docker.ValidateName(name) != nil || seen[name] {
			t.Fatalf("%q, %v", name, err)
		}
		seen[name] = true
	}
}

// TestBusDropsTheSlow: a subscriber that falls behind is told so and does not hold up others.
func TestBusDropsTheSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var bus docker.Bus
		ctx, cancel := context.WithCancel(t.Context())
		_, slow := bus.Subscribe(ctx)
		for range docker.MaxBacklog + 1 {
			bus.Publish(events.Message{Action: events.ActionCreate})
		}
		if err := <-slow; model.KindOf(err) != model.Exhausted {
			t.Errorf("slow subscriber: %v", err)
		}
		messages, errs := bus.Subscribe(ctx)
		bus.Publish(events.Message{Action: events.ActionStart})
		if m := <-messages; m.Action != events.ActionStart || m.Scope != "local" || m.TimeNano == 0 {
			t.Errorf("%+v", m)
		}
		cancel()
		if err := <-errs; !errors.Is(err, context.Canceled) || bus.Len() != 0 {
			t.Errorf("after the end: %v, %d subscribers", err, bus.Len())
		}
	})
}
