package containerd_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/moby/moby/api/types/container"
	registrytypes "github.com/moby/moby/api/types/registry"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

// newRegistry serves an empty registry on loopback over plain HTTP; with a password it
// wants basic authorization of user "bee".
func newRegistry(t *testing.T, password string) string {
	t.Helper()
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, _ := r.BasicAuth(); password != "" && (u != "bee" || p != password) {
			w.Header().Set("WWW-Authenticate", `Basic realm="hive"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

func TestImages(t *testing.T) {
	b := newBench(t, nil)
	ctx := context.Background()
	img := busybox(t, v1.Config{Cmd: []string{"sh"}, Env: []string{"FROM=image"}, Labels: map[string]string{"l": "v"}, User: "bee"})
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	id, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	open, closed := newRegistry(t, ""), newRegistry(t, "honey")
	ref, err := name.ParseReference(open + "/app:1")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}

	var lines []string
	if err := b.Pull(ctx, open+"/app:1", "", nil, func(p runtime.Progress) { lines = append(lines, p.Status) }); err != nil {
		t.Fatal(err)
	}
	if got := lines[len(lines)-1]; got != "Status: Downloaded newer image for "+open+"/app:1" {
		t.Errorf("last line %q of %q", got, lines)
	}
	i, err := b.InspectImage(ctx, open+"/app:1")
	if err != nil || i.ID != id.String() || i.Config.Labels["l"] != "v" || i.Size < 1<<20 || i.Os != "linux" {
		t.Fatalf("%+v, %v", i, err)
	}
	if d := cmp.Diff([]string{open + "/app@" + digest.String()}, i.RepoDigests); d != "" {
		t.Error(d)
	}
	if got := b.output(t, "echo $FROM; id -u", container.Config{Image: open + "/app:1"}, container.HostConfig{}); got != "image\n1234" {
		t.Errorf("output %q", got)
	}
	for _, ref := range []string{id.String(), id.Hex[:12], open + "/app@" + digest.String(), open + "/app:1@" + digest.String()} {
		if x, err := b.InspectImage(ctx, ref); err != nil || x.ID != id.String() {
			t.Errorf("%s: %v", ref, err)
		}
	}
	t.Run("pull by digest", func(t *testing.T) {
		if err := b.Pull(ctx, open+"/app:1@"+digest.String(), "", nil, nil); err != nil {
			t.Error(err)
		}
	})
	t.Run("errors", func(t *testing.T) {
		if err := b.Pull(ctx, open+"/app:absent", "", nil, nil); model.KindOf(err) != model.NotFound || !strings.Contains(err.Error(), "manifest unknown") {
			t.Errorf("absent: %v", err)
		}
		if err := b.Pull(ctx, closed+"/app:1", "", nil, nil); model.KindOf(err) != model.Denied || !strings.Contains(err.Error(), "pull access denied") {
			t.Errorf("without authorization: %v", err)
		}
		if err := b.Pull(ctx, "127.0.0.1:1/app", "", nil, nil); err == nil {
			t.Error("no registry: no error")
		}
		if err := b.Pull(ctx, "Not A Ref", "", nil, nil); model.KindOf(err) != model.Invalid {
			t.Errorf("no reference: %v", err)
		}
	})
	t.Run("push and pull with authorization", func(t *testing.T) {
		auth := &registrytypes.AuthConfig{Username: "bee", Password: "honey"}
		if err := b.Tag(ctx, open+"/app:1", closed+"/copy:2"); err != nil {
			t.Fatal(err)
		}
		if err := b.Push(ctx, closed+"/copy:2", &registrytypes.AuthConfig{Username: "bee", Password: "wrong"}, nil); err == nil {
			t.Error("wrong password: no error")
		}
		if err := b.Push(ctx, closed+"/copy:2", auth, nil); err != nil {
			t.Fatal(err)
		}
		if err := b.Pull(ctx, closed+"/copy:2", "", auth, nil); err != nil {
			t.Error(err)
		}
		d, err := b.Distribution(ctx, closed+"/copy:2", auth)
		if err != nil || d.Descriptor.Digest.String() != digest.String() || len(d.Platforms) != 1 || d.Platforms[0].OS != "linux" {
			t.Errorf("%+v, %v", d, err)
		}
		if _, err := b.RemoveImage(ctx, closed+"/copy:2", false); err != nil {
			t.Error(err)
		}
	})
	t.Run("save and load", func(t *testing.T) {
		if err := b.Tag(ctx, open+"/app:1", "saved:1"); err != nil {
			t.Fatal(err)
		}
		var tar bytes.Buffer
		if err := b.Save(ctx, []string{"saved:1"}, &tar); err != nil {
			t.Fatal(err)
		}
		if _, err := b.RemoveImage(ctx, "saved:1", false); err != nil {
			t.Fatal(err)
		}
		var zipped bytes.Buffer
		w := gzip.NewWriter(&zipped)
		_, _ = w.Write(tar.Bytes())
		_ = w.Close()
		refs, err := b.Load(ctx, &zipped)
		if err != nil || !cmp.Equal(refs, []string{"saved:1"}) {
			t.Errorf("%q, %v", refs, err)
		}
		if x, err := b.InspectImage(ctx, "saved:1"); err != nil || x.ID != id.String() {
			t.Errorf("%v, %v", x, err)
		}
		if _, err := b.Load(ctx, strings.NewReader("no archive")); model.KindOf(err) != model.Invalid {
			t.Errorf("rubbish: %v", err)
		}
	})
	t.Run("a moved tag leaves an image without name", func(t *testing.T) {
		other := busybox(t, v1.Config{Cmd: []string{"sh"}, Env: []string{"OTHER=1"}})
		for _, x := range []v1.Image{busybox(t, v1.Config{Cmd: []string{"sh"}, Env: []string{"FIRST=1"}}), other} {
			if _, err := b.Load(ctx, archive(t, "moved:1", x)); err != nil {
				t.Fatal(err)
			}
		}
		list, err := b.ListImages(ctx)
		if err != nil {
			t.Fatal(err)
		}
		nameless := 0
		for _, x := range list {
			if len(x.RepoTags) == 0 {
				nameless++
			}
		}
		if nameless != 1 {
			t.Errorf("%d images without name: %+v", nameless, list)
		}
		gone, _, err := b.PruneImages(ctx, runtime.PruneOptions{})
		if err != nil || len(gone) != 1 || gone[0].Deleted == "" {
			t.Errorf("%+v, %v", gone, err)
		}
	})
	t.Run("remove", func(t *testing.T) {
		user := b.create(t, &container.Config{Image: "saved:1"}, nil)
		if _, err := b.RemoveImage(ctx, id.String(), false); model.KindOf(err) != model.Conflict {
			t.Errorf("with two names: %v", err)
		}
		if _, err := b.RemoveImage(ctx, "saved:1", false); err != nil {
			t.Errorf("one name of two: %v", err)
		}
		for _, x := range []string{open + "/app:1"} {
			if _, err := b.RemoveImage(ctx, x, false); err != nil && model.KindOf(err) != model.Conflict {
				t.Errorf("in use: %v", err)
			}
		}
		if err := b.Start(ctx, user); err != nil {
			t.Errorf("container of an image without names: %v", err)
		}
		b.wait(t, user)
		if err := b.Remove(ctx, user, true, true); err != nil {
			t.Fatal(err)
		}
		if _, err := b.RemoveImage(ctx, id.String(), true); err != nil {
			t.Fatal(err)
		}
		if _, err := b.InspectImage(ctx, id.String()); model.KindOf(err) != model.NotFound {
			t.Errorf("after removal: %v", err)
		}
	})
	if h, err := b.History(ctx, "moved:1"); err != nil || len(h) != 1 || h[0].Size < 1<<20 {
		t.Errorf("%+v, %v", h, err)
	}
}
