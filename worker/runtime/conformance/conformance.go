// Package conformance holds every container runtime to the same behaviour. It is a list
// of cases over runtime.Engine; the tests of each implementation run them. Cases own the
// engine they are given while they run and leave nothing in it; they do no I/O of their
// own and may run in a testing/synctest bubble.
package conformance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/volume"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

// TB is the part of [testing.TB] that cases use.
type TB interface {
	Helper()
	Context() context.Context
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// Programs are the commands that an implementation understands.
type Programs struct {
	// Image is a reference whose image is present.
	Image string
	// Forever runs until it is told to stop, and then ends within a second.
	Forever []string
	// Deaf runs until it is killed.
	Deaf []string
	// Exit ends at once with a code.
	Exit func(code int) []string
	// Print writes one line to standard output and one to standard error, and ends with 0.
	Print func(out, err string) []string
	// Missing cannot be started.
	Missing []string
}

// Case is one requirement.
type Case struct {
	Name string
	Run  func(t TB, e runtime.Engine, p Programs)
}

// Cases returns every case.
func Cases() []Case {
	return []Case{
		{"life", life},
		{"lookup", lookup},
		{"names are taken", names},
		{"start twice, stop twice", idempotence},
		{"failing start", failingStart},
		{"stop kills after the grace", grace},
		{"kill", kill},
		{"removal", removal},
		{"wait conditions", waits},
		{"pause", pause},
		{"rename", rename},
		{"logs", logs},
		{"exec", exec},
		{"events", watch},
		{"images", images},
		{"volumes", volumes},
		{"list is newest first", order},
	}
}

// bench wraps an engine with what cases do all the time.
type bench struct {
	TB
	e   runtime.Engine
	p   Programs
	ctx context.Context //nolint:containedctx // of one case
}

func newBench(t TB, e runtime.Engine, p Programs) *bench {
	return &bench{TB: t, e: e, p: p, ctx: t.Context()}
}

func (b *bench) must(err error) {
	b.Helper()
	if err != nil {
		b.Fatalf("unexpected error: %v", err)
	}
}

func (b *bench) kind(err error, want model.Kind, text string) {
	b.Helper()
	if err == nil || model.KindOf(err) != want || !strings.Contains(err.Error(), text) {
		b.Errorf("error %v (kind %v), want kind %v with %q", err, model.KindOf(err), want, text)
	}
}

func (b *bench) create(name string, cmd []string, host *container.HostConfig) string {
	b.Helper()
	id, _, err := b.e.Create(b.ctx, runtime.CreateOptions{
		Name: name, Config: &container.Config{Image: b.p.Image, Cmd: cmd, Labels: map[string]string{"case": "1"}}, HostConfig: host,
	})
	b.must(err)
	return id
}

func (b *bench) run(name string, cmd []string) string {
	b.Helper()
	id := b.create(name, cmd, nil)
	b.must(b.e.Start(b.ctx, id))
	return id
}

func (b *bench) state(id string) container.State {
	b.Helper()
	c, err := b.e.Inspect(b.ctx, id)
	b.must(err)
	return *c.State
}

func (b *bench) await(id string) int {
	b.Helper()
	ch, err := b.e.Wait(b.ctx, id, container.WaitConditionNotRunning)
	b.must(err)
	r := <-ch
	b.must(r.Err)
	return r.ExitCode
}

func (b *bench) remove(ids ...string) {
	b.Helper()
	for _, id := range ids {
		b.must(b.e.Remove(b.ctx, id, true, true))
	}
}

func life(t TB, e runtime.Engine, p Programs) {
	b := newBench(t, e, p)
	id := b.create("bee", p.Forever, nil)
	if s := b.state(id); s.Status != container.StateCreated || s.Running {
		t.Errorf("after create: %+v", s)
	}
	b.must(e.Start(b.ctx, id))
	if s := b.state(id); s.Status != container.StateRunning || !s.Running || s.Pid == 0 {
		t.Errorf("after start: %+v", s)
	}
	b.must(e.Stop(b.ctx, id, "", nil))
	if s := b.state(id); s.Status != container.StateExited || s.Running || s.Pid != 0 {
		t.Errorf("after stop: %+v", s)
	}
	b.must(e.Start(b.ctx, id))
	if s := b.state(id); !s.Running {
		t.Errorf("after another start: %+v", s)
	}
	b.remove(id)
	_, err := e.Inspect(b.ctx, id)
	b.kind(err, model.NotFound, "No such container: "+id)

	for _, code := range []int{0, 1, 42, 255} {
		id := b.run("", p.Exit(code))
		if got := b.await(id); got != code {
			t.Errorf("exit code %d, want %d", got, code)
		}
		b.remove(id)
	}
}

func lookup(t TB, e runtime.Engine, p Programs) {
	b := newBench(t, e, p)
	id := b.create("finder", p.Forever, nil)
	for _, ref := range []string{id, "finder", "/finder", id[:12]} {
		c, err := e.Inspect(b.ctx, ref)
		if err != nil || c.ID != id || c.Name != "/finder" || c.Image == "" {
			t.Errorf("%s: %v", ref, err)
		}
	}
	_, err := e.Inspect(b.ctx, "find")
	b.kind(err, model.NotFound, "No such container: find")
	b.remove(id)
	_, _, err = e.Create(b.ctx, runtime.CreateOptions{Config: &container.Config{Image: "no-such-image:9"}})
	b.kind(err, model.NotFound, "No such image: no-such-image:9")
}

func names(t TB, e runtime.Engine, p Programs) {
	b := newBench(t, e, p)
	id := b.create("queen", p.Forever, nil)
	opts := runtime.CreateOptions{Name: "queen", Config: &container.Config{Image: p.Image, Cmd: p.Forever}}
	_, _, err := e.Create(b.ctx, opts)
	b.kind(err, model.Exists, "is already in use by container")
	opts.Name = "not a name"
	_, _, err = e.Create(b.ctx, opts)
	b.kind(err, model.Invalid, "Invalid container name")
	b.remove(id)
	b.remove(b.create("queen", p.Forever, nil))
}

func idempotence(t TB, e runtime.Engine, p Programs) {
	b := newBench(t, e, p)
	id := b.run("", p.Forever)
	if err := e.Start(b.ctx, id); !errors.Is(err, runtime.ErrNotModified) {
		t.Errorf("second start: %v", err)
	}
	b.must(e.Stop(b.ctx, id, "", nil))
	if err := e.Stop(b.ctx, id, "", nil); !errors.Is(err, runtime.ErrNotModified) {
		t.Errorf("second stop: %v", err)
	}
	b.remove(id)
}

func failingStart(t TB, e runtime.Engine, p Programs) {
	b := newBench(t, e, p)
	id := b.create("", p.Missing, nil)
	if err := e.Start(b.ctx, id); err == nil {
		t.Errorf("start of a missing program succeeded")
	}
	if s := b.state(id); s.Running || s.Error == "" || s.ExitCode == 0 {
		t.Errorf("after a failed start: %+v", s)
	}
	b.remove(id)
}

func grace(t TB, e runtime.Engine, p Programs) {
	b := newBench(t, e, p)
	id := b.run("", p.Deaf)
	start := time.Now()
	wait := time.Second
	b.must(e.Stop(b.ctx, id, "", &wait))
	if s := b.state(id); s.ExitCode != 137 || time.Since(start) < wait {
		t.Errorf("%+v after %v", s, time.Since(start))
	}
	b.remove(id)
}

func kill(t TB, e runtime.Engine, p Programs) {
	b := newBench(t, e, p)
	id := b.run("", p.Forever)
	b.kind(e.Kill(b.ctx, id, "NOPE"), model.Invalid, "invalid signal: NOPE")
	b.must(e.Kill(b.ctx, id, "KILL"))
	if code := b.await(id); code != 137 {
		t.Errorf("exit code %d", code)
	}
	b.kind(e.Kill(b.ctx, id, "KILL"), model.Conflict, "is not running")
	b.remove(id)
}

func removal(t TB, e runtime.Engine, p Programs) {
	b := newBench(t, e, p)
	id := b.run("", p.Forever)
	b.kind(e.Remove(b.ctx, id, false, false), model.Conflict, "container is running")
	gone, err := e.Wait(b.ctx, id, container.WaitConditionRemoved)
	b.must(err)
	b.must(e.Remove(b.ctx, id, true, false))
	<-gone
	b.kind(e.Remove(b.ctx, id, true, false), model.NotFound, "No such container")
	self := b.create("", p.Exit(0), &container.HostConfig{AutoRemove: true})
	gone, err = e.Wait(b.ctx, self, container.WaitConditionRemoved)
	b.must(err)
	b.must(e.Start(b.ctx, self))
	if r := <-gone; r.ExitCode != 0 || r.Err != nil {
		t.Errorf("auto-removed: %+v", r)
	}
}

func waits(t TB, e runtime.Engine, p Programs) {
	b := newBench(t, e, p)
	id := b.create("", p.Exit(3), nil)
	if code := b.await(id); code != 0 {
		t.Errorf("not running before the start: %d", code)
	}
	next, err := e.Wait(b.ctx, id, container.WaitConditionNextExit)
	b.must(err)
	b.must(e.Start(b.ctx, id))
	if r := <-next; r.ExitCode != 3 || r.Err != nil {
		t.Errorf("next exit: %+v", r)
	}
	ctx, cancel := context.WithCancel(b.ctx)
	next, err = e.Wait(ctx, id, container.WaitConditionNextExit)
	b.must(err)
	cancel()
	if r := <-next; r.Err == nil {
		t.Errorf("cancelled wait: %+v", r)
	}
	b.remove(id)
}

func pause(t TB, e runtime.Engine, p Programs) {
	b := newBench(t, e, p)
	id := b.run("", p.Forever)
	b.kind(e.Unpause(b.ctx, id), model.Conflict, "is not paused")
	b.must(e.Pause(b.ctx, id))
	if s := b.state(id); s.Status != container.StatePaused || !s.Paused || !s.Running {
		t.Errorf("%+v", s)
	}
	b.kind(e.Pause(b.ctx, id), model.Conflict, "already paused")
	_, err := e.ExecCreate(b.ctx, id, &container.ExecCreateRequest{Cmd: p.Exit(0)})
	b.kind(err, model.Conflict, "is paused, unpause the container before exec")
	b.must(e.Unpause(b.ctx, id))
	if s := b.state(id); s.Status != container.StateRunning || s.Paused {
		t.Errorf("%+v", s)
	}
	b.must(e.Stop(b.ctx, id, "", nil))
	b.kind(e.Pause(b.ctx, id), model.Conflict, "is not running")
	b.remove(id)
}

func rename(t TB, e runtime.Engine, p Programs) {
	b := newBench(t, e, p)
	id, other := b.create("old", p.Forever, nil), b.create("taken", p.Forever, nil)
	b.must(e.Rename(b.ctx, "old", "new"))
	if c, err := e.Inspect(b.ctx, "new"); err != nil || c.ID != id || c.Name != "/new" {
		t.Errorf("%v", err)
	}
	_, err := e.Inspect(b.ctx, "old")
	b.kind(err, model.NotFound, "No such container")
	b.kind(e.Rename(b.ctx, id, "taken"), model.Exists, "already in use")
	b.remove(id, other)
}

func logs(t TB, e runtime.Engine, p Programs) {
	b := newBench(t, e, p)
	id := b.run("", p.Print("to stdout", "to stderr"))
	b.await(id)
	read := func(opts runtime.LogOptions) string {
		b.Helper()
		var lines []string
		b.must(e.Logs(b.ctx, id, opts, func(l runtime.LogLine) error {
			lines = append(lines, fmt.Sprintf("%t:%s", l.Stderr, l.Data))
			return nil
		}))
		slices.Sort(lines)
		return strings.Join(lines, "")
	}
	both := runtime.LogOptions{Stdout: true, Stderr: true, Tail: -1}
	follow, none := both, both
	follow.Follow, none.Tail = true, 0
	for _, c := range []struct {
		opts runtime.LogOptions
		want string
	}{
		{both, "false:to stdout\ntrue:to stderr\n"},
		{runtime.LogOptions{Stdout: true, Tail: -1}, "false:to stdout\n"},
		{follow, "false:to stdout\ntrue:to stderr\n"},
		{none, ""},
	} {
		if got := read(c.opts); got != c.want {
			t.Errorf("%+v: %q, want %q", c.opts, got, c.want)
		}
	}
	b.remove(id)
}

func exec(t TB, e runtime.Engine, p Programs) {
	b := newBench(t, e, p)
	id := b.run("", p.Forever)
	x, err := e.ExecCreate(b.ctx, id, &container.ExecCreateRequest{Cmd: p.Print("hi", "ho"), AttachStdout: true})
	b.must(err)
	if i, err := e.ExecInspect(b.ctx, x); err != nil || i.Running || i.ExitCode != nil || i.ContainerID != id {
		t.Errorf("before the start: %+v, %v", i, err)
	}
	var out, errs strings.Builder
	b.must(e.ExecStart(b.ctx, x, runtime.Stdio{Stdout: &out, Stderr: &errs}))
	if i, err := e.ExecInspect(b.ctx, x); err != nil || i.Running || i.ExitCode == nil || *i.ExitCode != 0 {
		t.Errorf("after the end: %+v, %v", i, err)
	}
	if out.String() != "hi\n" || errs.String() != "ho\n" {
		t.Errorf("output %q, %q", out.String(), errs.String())
	}
	b.kind(e.ExecStart(b.ctx, x, runtime.Stdio{}), model.Conflict, "already run")
	_, err = e.ExecCreate(b.ctx, id, &container.ExecCreateRequest{})
	b.kind(err, model.Invalid, "No exec command specified")
	_, err = e.ExecInspect(b.ctx, "nope")
	b.kind(err, model.NotFound, "No such exec instance: nope")
	b.must(e.Stop(b.ctx, id, "", nil))
	_, err = e.ExecCreate(b.ctx, id, &container.ExecCreateRequest{Cmd: p.Exit(0)})
	b.kind(err, model.Conflict, "is not running")
	b.remove(id)
}

func watch(t TB, e runtime.Engine, p Programs) {
	b := newBench(t, e, p)
	ctx, cancel := context.WithCancel(b.ctx)
	messages, errs := e.Events(ctx)
	id := b.run("seen", p.Exit(7))
	b.await(id)
	b.remove(id)
	var got []events.Action
	for m := range messages {
		if m.Actor.ID != id {
			continue
		}
		got = append(got, m.Action)
		a := m.Actor.Attributes
		if m.Type != events.ContainerEventType || m.Scope != "local" || m.TimeNano == 0 || a["name"] != "seen" || a["image"] != p.Image || a["case"] != "1" {
			t.Errorf("%+v", m)
		}
		if m.Action == events.ActionDie && a["exitCode"] != "7" {
			t.Errorf("%+v", m)
		}
		if m.Action == events.ActionDestroy {
			break
		}
	}
	if want := []events.Action{"create", "start", "die", "destroy"}; !slices.Equal(got, want) {
		t.Errorf("events %v, want %v", got, want)
	}
	cancel()
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Errorf("after the end: %v", err)
	}
}

func images(t TB, e runtime.Engine, p Programs) {
	b := newBench(t, e, p)
	i, err := e.InspectImage(b.ctx, p.Image)
	b.must(err)
	for _, ref := range []string{i.ID, strings.TrimPrefix(i.ID, "sha256:")[:12]} {
		if x, err := e.InspectImage(b.ctx, ref); err != nil || x.ID != i.ID {
			t.Errorf("%s: %v", ref, err)
		}
	}
	_, err = e.InspectImage(b.ctx, "absent:1")
	b.kind(err, model.NotFound, "No such image: absent:1")
	b.must(e.Tag(b.ctx, p.Image, "alias:2"))
	if x, err := e.InspectImage(b.ctx, "docker.io/library/alias:2"); err != nil || x.ID != i.ID || !slices.Contains(x.RepoTags, "alias:2") {
		t.Errorf("alias: %v", err)
	}
	gone, err := e.RemoveImage(b.ctx, "alias:2", false)
	if err != nil || len(gone) != 1 || gone[0].Untagged != "alias:2" {
		t.Errorf("%+v, %v", gone, err)
	}
	id := b.create("", p.Forever, nil)
	_, err = e.RemoveImage(b.ctx, p.Image, false)
	b.kind(err, model.Conflict, "conflict: unable to")
	b.remove(id)
	list, err := e.ListImages(b.ctx)
	if err != nil || !slices.ContainsFunc(list, func(s image.Summary) bool { return s.ID == i.ID }) {
		t.Errorf("%+v, %v", list, err)
	}
}

func volumes(t TB, e runtime.Engine, p Programs) {
	b := newBench(t, e, p)
	v, err := e.CreateVolume(b.ctx, volume.CreateRequest{Name: "jar", Labels: map[string]string{"k": "v"}})
	b.must(err)
	if again, err := e.CreateVolume(b.ctx, volume.CreateRequest{Name: "jar"}); err != nil || again.Mountpoint != v.Mountpoint {
		t.Errorf("again: %v", err)
	}
	_, err = e.InspectVolume(b.ctx, "nope")
	b.kind(err, model.NotFound, "get nope: no such volume")
	id := b.create("", p.Forever, &container.HostConfig{Mounts: []mount.Mount{
		{Type: mount.TypeVolume, Source: "jar", Target: "/jar"}, {Type: mount.TypeVolume, Target: "/anon"},
	}})
	b.kind(e.RemoveVolume(b.ctx, "jar", false), model.Conflict, "remove jar: volume is in use - ["+id)
	list, err := e.ListVolumes(b.ctx)
	if err != nil || len(list) != 2 {
		t.Errorf("%d volumes, %v", len(list), err)
	}
	b.remove(id)
	if names, _, err := e.PruneVolumes(b.ctx, runtime.PruneOptions{}); err != nil || len(names) != 0 {
		t.Errorf("pruned %v, %v", names, err)
	}
	if names, _, err := e.PruneVolumes(b.ctx, runtime.PruneOptions{All: true}); err != nil || !slices.Equal(names, []string{"jar"}) {
		t.Errorf("pruned %v, %v", names, err)
	}
}

func order(t TB, e runtime.Engine, p Programs) {
	b := newBench(t, e, p)
	var ids []string
	for range 3 {
		ids = append(ids, b.create("", p.Forever, nil))
	}
	list, err := e.List(b.ctx)
	b.must(err)
	var got []string
	for _, c := range list {
		got = append(got, c.ID)
	}
	slices.Reverse(got)
	if !slices.Equal(got, ids) {
		t.Errorf("list %v, want %v", got, ids)
	}
	b.remove(ids...)
}
