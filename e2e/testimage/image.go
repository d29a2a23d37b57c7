// Package testimage makes the image that end-to-end tests and benchmarks run: busybox and
// testapp, without a registry. It keeps no state.
package testimage

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Tags of the test image; all but their labels are the same.
const (
	V1 = "skep.test/app:1"
	V2 = "skep.test/app:2"
)

// Write writes an archive for `docker load` with both tags to file. It needs the go
// command and /bin/busybox.
func Write(ctx context.Context, file string) error {
	dir, err := os.MkdirTemp("", "testimage")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	app := filepath.Join(dir, "testapp")
	if err := Build(ctx, app); err != nil {
		return err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return rootFS(app) })
	if err != nil {
		return fmt.Errorf("make layer: %w", err)
	}
	images := map[name.Tag]v1.Image{}
	for _, ref := range []string{V1, V2} {
		img, err := mutate.AppendLayers(empty.Image, layer)
		if err != nil {
			return fmt.Errorf("make image %s: %w", ref, err)
		}
		config, err := img.ConfigFile()
		if err != nil {
			return fmt.Errorf("make image %s: %w", ref, err)
		}
		config = config.DeepCopy()
		config.Architecture, config.OS = "amd64", "linux"
		config.Config = v1.Config{
			Entrypoint: []string{"/bin/testapp"},
			Env:        []string{"PATH=/bin"},
			Labels:     map[string]string{"ref": ref},
		}
		if img, err = mutate.ConfigFile(img, config); err != nil {
			return fmt.Errorf("make image %s: %w", ref, err)
		}
		tag, err := name.NewTag(ref)
		if err != nil {
			return fmt.Errorf("make image %s: %w", ref, err)
		}
		images[tag] = img
	}
	return tarball.MultiWriteToFile(file, images)
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
	for _, file := range []struct{ path, source string }{{"bin/busybox", "/bin/busybox"}, {"bin/testapp", app}} {
		data, err := os.ReadFile(file.source)
		if err != nil {
			return nil, err
		}
		if err := w.WriteHeader(&tar.Header{Name: file.path, Mode: 0o755, Size: int64(len(data))}); err != nil {
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

// Build builds testapp as a static program.
func Build(ctx context.Context, file string) error {
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", file, "github.com/skep-dev/skep/e2e/testapp")
	build.Env = append(build.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build testapp: %w\n%s", err, out)
	}
	return nil
}
