package e2e

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Tags of the test image; all but their labels are the same.
const (
	testImage   = "skep.test/app:1"
	testImageV2 = "skep.test/app:2"
)

// writeImages writes an archive for `docker load` with both tags: busybox and testapp.
func writeImages(t *testing.T, file string) {
	t.Helper()
	app := filepath.Join(t.TempDir(), "testapp")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", app, "./testapp")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build testapp: %v\n%s", err, out)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return rootFS(app) })
	if err != nil {
		t.Fatal(err)
	}
	images := map[name.Tag]v1.Image{}
	for _, ref := range []string{testImage, testImageV2} {
		img, err := mutate.AppendLayers(empty.Image, layer)
		if err != nil {
			t.Fatal(err)
		}
		img, err = mutate.ConfigFile(img, configFile(t, img, ref))
		if err != nil {
			t.Fatal(err)
		}
		tag, err := name.NewTag(ref)
		if err != nil {
			t.Fatal(err)
		}
		images[tag] = img
	}
	if err := tarball.MultiWriteToFile(file, images); err != nil {
		t.Fatal(err)
	}
}

func configFile(t *testing.T, img v1.Image, ref string) *v1.ConfigFile {
	t.Helper()
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	c.Architecture, c.OS = "amd64", "linux"
	c.Config = v1.Config{
		Entrypoint: []string{"/bin/testapp"},
		Env:        []string{"PATH=/bin"},
		Labels:     map[string]string{"ref": ref},
	}
	return c
}

// rootFS returns a layer with busybox, its usual applets and the test program.
func rootFS(app string) (io.ReadCloser, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, dir := range []string{"bin", "tmp", "etc", "var", "root"} {
		if err := w.WriteHeader(&tar.Header{Name: dir + "/", Typeflag: tar.TypeDir, Mode: 0o755}); err != nil {
			return nil, err
		}
	}
	for path, source := range map[string]string{"bin/busybox": "/bin/busybox", "bin/testapp": app} {
		data, err := os.ReadFile(source)
		if err != nil {
			return nil, err
		}
		if err := w.WriteHeader(&tar.Header{Name: path, Mode: 0o755, Size: int64(len(data))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(data); err != nil {
			return nil, err
		}
	}
	for _, applet := range []string{"sh", "cat", "echo", "ls", "ps", "sleep", "id", "hostname", "mount", "wget", "true", "false", "env", "touch", "kill"} {
		if err := w.WriteHeader(&tar.Header{Name: "bin/" + applet, Typeflag: tar.TypeSymlink, Linkname: "busybox"}); err != nil {
			return nil, err
		}
	}
	passwd := []byte("root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/tmp:/bin/sh\n")
	if err := w.WriteHeader(&tar.Header{Name: "etc/passwd", Mode: 0o644, Size: int64(len(passwd))}); err != nil {
		return nil, err
	}
	if _, err := w.Write(passwd); err != nil {
		return nil, err
	}
	return io.NopCloser(&b), w.Close()
}
