package containerd

import (
	"context"
	"log/slog"
	"path/filepath"
	"slices"
	"testing"

	"github.com/moby/moby/api/types/container"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/runtime/docker"
)

// asked is a network that answers what a test says, when it says so.
type asked struct {
	attach func(runtime.SandboxRequest) error
}

func (a *asked) Attach(_ context.Context, req runtime.SandboxRequest) (runtime.Sandbox, error) {
	return runtime.Sandbox{Attached: req.Overlays}, a.attach(req)
}

func (*asked) Detach(context.Context, string) error { return nil }

func (*asked) Retain(context.Context, []string) error { return nil }

// recordsOnly is an engine with a database and a network, and without containerd.
func recordsOnly(t *testing.T, path string, n runtime.Network) *Engine {
	t.Helper()
	e := &Engine{
		cfg: Config{Root: t.TempDir(), Network: n}, log: slog.New(slog.DiscardHandler),
		index: docker.NewIndex(), containers: map[string]*record{}, volumes: map[string]*volumeRecord{},
	}
	var err error
	if e.db, err = openDB(path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.db.Close() })
	if err := e.load(); err != nil {
		t.Fatal(err)
	}
	return e
}

// overlaid is the record of a container that runs on a network of the swarm.
func overlaid(id, name string) saved {
	return saved{
		ID: id, Name: name, Config: &container.Config{}, Host: &container.HostConfig{NetworkMode: "net"}, HasNet: true,
		Status: container.StateRunning, Overlays: []runtime.OverlayRequest{{Name: "net"}},
	}
}

// While others are asked about a new name nobody else gets the old one, and a container that was
// not renamed has it still: in memory and on disk.
func TestRenameThatFails(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	var e *Engine
	n := &asked{func(req runtime.SandboxRequest) error {
		if req.Former != "old" || req.Name != "new" {
			t.Errorf("asked about %+v", req)
		}
		for _, name := range []string{"old", "new"} {
			if _, _, err := e.reserve(name); model.KindOf(err) != model.Exists {
				t.Errorf("another container takes the name %q meanwhile: %v", name, err)
			}
		}
		if c, err := e.find("old"); err != nil || c.id != "one" {
			t.Errorf("the old name finds nothing meanwhile: %v", err)
		}
		return model.Errorf(model.Unavailable, "no manager")
	}}
	e = recordsOnly(t, path, n)
	if err := e.save(overlaid("one", "old")); err != nil {
		t.Fatal(err)
	}
	if err := e.load(); err != nil {
		t.Fatal(err)
	}
	if err := e.Rename(t.Context(), "old", "new"); model.KindOf(err) != model.Unavailable {
		t.Errorf("rename: %v", err)
	}
	if _, _, err := e.reserve("new"); err != nil {
		t.Errorf("the new name is still reserved: %v", err)
	}
	if c, err := e.find("old"); err != nil || c.id != "one" || e.view(c).Name != "old" {
		t.Errorf("after it failed: %v", err)
	}
	var names []string
	n.attach = func(req runtime.SandboxRequest) error {
		names = append(names, req.Former+" to "+req.Name)
		return nil
	}
	if err := e.Rename(t.Context(), "old", "newer"); err == nil || !slices.Equal(names, []string{"old to newer", "newer to old"}) {
		t.Errorf("without a directory for the container's files: %v, the network heard %q", err, names)
	}
	if err := e.db.Close(); err != nil {
		t.Fatal(err)
	}
	if c, err := recordsOnly(t, path, n).find("old"); err != nil || c.id != "one" {
		t.Errorf("after a restart: %v", err)
	}
}

// Two records of one name, which an older Skep could leave, keep nobody from starting.
func TestTwoRecordsOfOneName(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	e := recordsOnly(t, path, nil)
	for _, id := range []string{"one", "two"} {
		if err := e.save(overlaid(id, "same")); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.db.Close(); err != nil {
		t.Fatal(err)
	}
	e = recordsOnly(t, path, nil)
	for ref, want := range map[string]saved{"same": {ID: "one", Name: "same"}, "two": {ID: "two", Name: "two"}} {
		if c, err := e.find(ref); err != nil || c.id != want.ID || e.view(c).Name != want.Name {
			t.Errorf("%s: %v, %v", ref, c, err)
		}
	}
}
