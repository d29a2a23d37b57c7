package containerd_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

// untar returns names, link targets and contents of an archive.
func untar(t *testing.T, b []byte) map[string]string {
	t.Helper()
	out := map[string]string{}
	for r := tar.NewReader(bytes.NewReader(b)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		out[h.Name] = h.Linkname + string(data)
	}
}

// packed makes an archive of regular files and, where the content begins with "->", links.
func packed(t *testing.T, files ...string) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for pair := range slices.Chunk(files, 2) {
		h := &tar.Header{Name: pair[0], Typeflag: tar.TypeReg, Mode: 0o640, Uid: 7, Gid: 8, Size: int64(len(pair[1])), ModTime: time.Unix(1e9, 0)}
		data := pair[1]
		if link, ok := strings.CutPrefix(data, "->"); ok {
			h.Typeflag, h.Linkname, h.Size, data = tar.TypeSymlink, link, 0, ""
		}
		if strings.HasSuffix(h.Name, "/") {
			h.Typeflag, h.Mode = tar.TypeDir, 0o750
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

func (b *bench) copyFrom(t *testing.T, id, path string) map[string]string {
	t.Helper()
	var out bytes.Buffer
	err := b.CopyFrom(t.Context(), id, path, func(*container.PathStat) io.Writer { return &out })
	if err != nil {
		t.Fatalf("copy %s: %v", path, err)
	}
	return untar(t, out.Bytes())
}

// TestCopy copies in and out of a container that runs, has ended, and was never started.
func TestCopy(t *testing.T) {
	b := newBench(t, nil).withBusybox(t)
	ctx := context.Background()
	secret := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(secret, []byte("of the host"), 0o600); err != nil {
		t.Fatal(err)
	}
	host := func(volume string) *container.HostConfig {
		return &container.HostConfig{Mounts: []mount.Mount{
			{Type: mount.TypeVolume, Source: volume, Target: "/v"},
			{Type: mount.TypeVolume, Source: volume, Target: "/ro", ReadOnly: true},
		}}
	}
	script := []string{"sh", "-c", "mkdir -p /d/sub; echo one > /d/a; echo two > /d/sub/b; busybox ln -s " + secret + " /d/out; busybox ln -s /d /link; busybox ln /d/a /d/same; echo vol > /v/x; busybox rm /etc/group; exec sleep 1000"}
	running := b.run(t, &container.Config{Cmd: script}, host("one"))
	until(t, "script is through", func() bool {
		_, err := b.StatPath(ctx, running, "/v/x")
		_, gone := b.StatPath(ctx, running, "/etc/group")
		return err == nil && model.KindOf(gone) == model.NotFound
	})
	ended := b.run(t, &container.Config{Cmd: slices.Concat(script[:2], []string{strings.TrimSuffix(script[2], "exec sleep 1000")})}, host("two"))
	b.wait(t, ended)
	tree := map[string]string{"d/": "", "d/a": "one\n", "d/out": secret, "d/same": "d/a", "d/sub/": "", "d/sub/b": "two\n"}
	for name, id := range map[string]string{"running": running, "ended": ended} {
		t.Run(name, func(t *testing.T) {
			if d := cmp.Diff(tree, b.copyFrom(t, id, "/d")); d != "" {
				t.Error(d)
			}
			for path, want := range map[string]map[string]string{
				"/d/a":      {"a": "one\n"},
				"/link/a":   {"a": "one\n"},
				"/d/../d/a": {"a": "one\n"},
				"/link":     {"link": "/d"},
				"/d/sub/.":  {"./": "", "b": "two\n"},
				"/v/x":      {"x": "vol\n"},
				"/v":        {"v/": "", "v/x": "vol\n"},
			} {
				if d := cmp.Diff(want, b.copyFrom(t, id, path)); d != "" {
					t.Errorf("%s: %s", path, d)
				}
			}
			st, err := b.StatPath(ctx, id, "/link")
			if err != nil || st.Name != "link" || st.LinkTarget != "/d" || st.Mode&os.ModeSymlink == 0 {
				t.Errorf("%+v, %v", st, err)
			}
			if st, err := b.StatPath(ctx, id, "/link/"); err != nil || !st.Mode.IsDir() {
				t.Errorf("%+v, %v", st, err)
			}
			// A link to a file of the host leads nowhere.
			for _, path := range []string{"/d/out/.", "/nowhere", "/d/a/x"} {
				if _, err := b.StatPath(ctx, id, path); model.KindOf(err) != model.NotFound {
					t.Errorf("%s: %v", path, err)
				}
			}
			// Into it.
			err = b.CopyTo(ctx, id, "/link", packed(t, "new/", "", "new/f", "fresh", "a", "over", "up", "->../.."), runtime.CopyOptions{KeepKind: true})
			if err != nil {
				t.Fatal(err)
			}
			got := b.copyFrom(t, id, "/d")
			if got["d/new/f"] != "fresh" || got["d/a"] != "over" || got["d/same"] != "one\n" || got["d/up"] != "../.." {
				t.Errorf("%v", got)
			}
			if st, err := b.StatPath(ctx, id, "/d/new/f"); err != nil || st.Mode != 0o640 || !st.Mtime.Equal(time.Unix(1e9, 0)) {
				t.Errorf("%+v, %v", st, err)
			}
			if err := b.CopyTo(ctx, id, "/v", packed(t, "y", "1"), runtime.CopyOptions{}); err != nil {
				t.Error(err)
			}
			for _, bad := range []struct {
				path string
				tar  io.Reader
				opts runtime.CopyOptions
				kind model.Kind
			}{
				{"/absent", packed(t, "x", "1"), runtime.CopyOptions{}, model.NotFound},
				{"/d/a", packed(t, "x", "1"), runtime.CopyOptions{}, model.Invalid},
				{"/d", strings.NewReader("no archive, but long enough to be looked at"), runtime.CopyOptions{}, model.Invalid},
				{"/d", packed(t, "sub", "a file"), runtime.CopyOptions{KeepKind: true}, model.Invalid},
				{"/ro", packed(t, "x", "1"), runtime.CopyOptions{}, model.Denied},
			} {
				if err := b.CopyTo(ctx, id, bad.path, bad.tar, bad.opts); model.KindOf(err) != bad.kind {
					t.Errorf("copy to %s: %v", bad.path, err)
				}
			}
			// Nothing in an archive leads out of the container.
			err = b.CopyTo(ctx, id, "/d", packed(t, "esc", "->"+filepath.Dir(secret), "esc/evil", "x", "../../../../evil", "y"), runtime.CopyOptions{})
			if _, serr := os.Stat(filepath.Join(filepath.Dir(secret), "evil")); serr == nil || err == nil {
				t.Errorf("escaped: %v, %v", err, serr)
			}
		})
	}
	changes, err := b.Changes(ctx, running)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []container.FilesystemChange{
		{Kind: container.ChangeAdd, Path: "/d/sub/b"}, {Kind: container.ChangeModify, Path: "/etc"}, {Kind: container.ChangeDelete, Path: "/etc/group"},
	} {
		if !slices.Contains(changes, want) {
			t.Errorf("%v lacks %v", changes, want)
		}
	}
	var exported bytes.Buffer
	if err := b.Export(ctx, running, &exported); err != nil {
		t.Fatal(err)
	}
	all := untar(t, exported.Bytes())
	if _, deleted := all["etc/group"]; deleted || all["d/sub/b"] != "two\n" || all["bin/sh"] != "busybox" || all["v/x"] != "" || len(all["bin/busybox"]) < 1<<20 {
		t.Errorf("exported %d files, busybox of %d bytes", len(all), len(all["bin/busybox"]))
	}

	fresh := b.create(t, &container.Config{Cmd: []string{"cat", "/etc/mine", "/v/mine"}, User: "bee"}, host("three"))
	if err := b.CopyTo(ctx, fresh, "/etc", packed(t, "mine", "copied\n"), runtime.CopyOptions{OwnByUser: true}); err != nil {
		t.Fatal(err)
	}
	if err := b.CopyTo(ctx, fresh, "/v/", packed(t, "mine", "there\n"), runtime.CopyOptions{OwnByUser: true}); err != nil {
		t.Fatal(err)
	}
	if err := b.Start(ctx, fresh); err != nil {
		t.Fatal(err)
	}
	if code := b.wait(t, fresh); code != 0 || b.logs(t, fresh) != "copied\nthere\n" {
		t.Errorf("exit code %d: %q", code, b.logs(t, fresh))
	}
	locked := b.create(t, &container.Config{}, &container.HostConfig{ReadonlyRootfs: true})
	if err := b.CopyTo(ctx, locked, "/etc", packed(t, "x", "1"), runtime.CopyOptions{}); model.KindOf(err) != model.Denied {
		t.Errorf("read-only root: %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(b.cfg.Root, "run/m/*")); err != nil || len(left) != 0 {
		t.Errorf("left mounted: %v, %v", left, err)
	}
}

// TestLeftoverMount: what a daemon that died while copying left mounted goes.
func TestLeftoverMount(t *testing.T) {
	b := newBench(t, nil).withBusybox(t)
	b.stop()
	dir := filepath.Join(b.cfg.Root, "run/m/left")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	b.start(t)
	if _, err := os.Stat(dir); err == nil {
		t.Error("still there")
	}
}
