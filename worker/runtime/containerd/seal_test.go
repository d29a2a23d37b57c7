package containerd_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/container"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

// someKeys are the keys of a node; none once it has left its swarm.
type someKeys struct{ keys [][]byte }

func (k *someKeys) TaskKeys() ([][]byte, error) {
	if len(k.keys) == 0 {
		return nil, errors.New("no keys any more")
	}
	return slices.Clone(k.keys), nil
}

// found returns the files below the engine's data that show a word.
func (b *bench) found(tb testing.TB, word string) []string {
	tb.Helper()
	var files []string
	err := filepath.WalkDir(b.cfg.Root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.HasPrefix(path, filepath.Join(b.cfg.Root, "run")+"/") {
			return nil //nolint:nilerr // gone in the meantime, or in memory on a real node
		}
		if data, err := os.ReadFile(path); err == nil && bytes.Contains(data, []byte(word)) {
			files = append(files, path)
		}
		return nil
	})
	if err != nil {
		tb.Fatal(err)
	}
	return files
}

// The container of a task is sealed on disk, outlives a restart without its key, is known
// again with it, and moves to a new key.
func TestSealedContainer(t *testing.T) {
	b := newBench(t, nil).withBusybox(t)
	one, two := bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32)
	if err := b.Unseal(t.Context(), &someKeys{keys: [][]byte{one}}); err != nil {
		t.Fatal(err)
	}
	labels := map[string]string{"com.docker.swarm.task": "", "canary-label": "x"}
	id, _, err := b.Create(t.Context(), runtime.CreateOptions{
		Name:       "canary-name",
		Config:     &container.Config{Image: "busybox", Cmd: []string{"sleep", "1000"}, Env: []string{"E=canary-env"}, Labels: labels},
		HostConfig: &container.HostConfig{},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Start(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	plain := b.run(t, &container.Config{Cmd: []string{"sleep", "1000"}, Labels: map[string]string{"plain-word": "x"}}, &container.HostConfig{})
	if files := b.found(t, "canary-"); len(files) > 0 {
		t.Errorf("readable in %v", files)
	}
	if files := b.found(t, "plain-word"); len(files) != 1 {
		t.Errorf("a person's container is readable in %v", files)
	}

	b.restart(t)
	locked, err := b.Inspect(t.Context(), id)
	if err != nil || locked.Name != "/"+id || locked.State.Pid == 0 || len(locked.Config.Env) > 0 {
		t.Errorf("locked: %+v, %v", locked, err)
	}
	if c, err := b.Inspect(t.Context(), plain); err != nil || c.Config.Labels["plain-word"] == "" {
		t.Errorf("a person's container: %+v, %v", c, err)
	}
	if err := b.Unseal(t.Context(), &someKeys{keys: [][]byte{two}}); err != nil {
		t.Fatal(err)
	}
	if c, err := b.Inspect(t.Context(), id); err != nil || c.Name != "/"+id {
		t.Errorf("with another key: %+v, %v", c, err)
	}
	keys := &someKeys{keys: [][]byte{two, one}}
	if err := b.Unseal(t.Context(), keys); err != nil {
		t.Fatal(err)
	}
	open, err := b.Inspect(t.Context(), "canary-name")
	if err != nil || open.ID != id || open.State.Pid != locked.State.Pid || !slices.Contains(open.Config.Env, "E=canary-env") {
		t.Errorf("opened: %+v, %v", open, err)
	}

	// The record moved to the new key. What ends while it is locked is told afterwards.
	b.restart(t)
	if err := b.Kill(t.Context(), id, "KILL"); err != nil {
		t.Fatal(err)
	}
	b.wait(t, id)
	if err := b.Start(t.Context(), id); model.KindOf(err) != model.Unavailable || !strings.Contains(err.Error(), "docker swarm unlock") {
		t.Errorf("start while locked: %v", err)
	}
	b.restart(t)
	keys.keys = [][]byte{two}
	if err := b.Unseal(t.Context(), keys); err != nil {
		t.Fatal(err)
	}
	ended, err := b.Inspect(t.Context(), "canary-name")
	if err != nil || ended.State.ExitCode != 137 || ended.State.Status != container.StateExited {
		t.Errorf("ended: %+v, %v", ended, err)
	}
	if err := b.Start(t.Context(), id); err != nil {
		t.Errorf("start after unlocking: %v", err)
	}
	if files := b.found(t, "canary-"); len(files) > 0 {
		t.Errorf("readable in %v", files)
	}
	keys.keys = nil // the node has left its swarm
	for _, ref := range []string{id, plain} {
		if err := b.Remove(t.Context(), ref, true, true); err != nil {
			t.Error(err)
		}
	}
}
