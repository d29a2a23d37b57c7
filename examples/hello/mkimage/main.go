// Command mkimage wraps one static binary in an image and writes it as an archive for
// `docker load` and `skep load`, so that a build needs neither a registry nor a daemon.
package main

import (
	"archive/tar"
	"bytes"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

func main() {
	tag := flag.String("tag", "", "name of the image")
	out := flag.String("out", "", "archive to write")
	flag.Parse()
	if *tag == "" || *out == "" || flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "usage: mkimage -tag NAME -out ARCHIVE BINARY")
		os.Exit(2)
	}
	if err := write(*out, *tag, flag.Arg(0)); err != nil {
		fmt.Fprintln(os.Stderr, "mkimage: "+err.Error())
		os.Exit(1)
	}
}

func write(out, tag, binary string) error {
	ref, err := name.NewTag(tag)
	if err != nil {
		return fmt.Errorf("read image name: %w", err)
	}
	data, err := os.ReadFile(binary)
	if err != nil {
		return fmt.Errorf("read binary: %w", err)
	}
	path := "/" + filepath.Base(binary)
	files, err := rootFS(path, data)
	if err != nil {
		return err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(files)), nil })
	if err != nil {
		return fmt.Errorf("make layer: %w", err)
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return fmt.Errorf("make image: %w", err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		return fmt.Errorf("make image: %w", err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", runtime.GOARCH
	config.Config = v1.Config{
		Entrypoint: []string{path}, User: "65534:65534",
		Labels: map[string]string{"org.opencontainers.image.title": filepath.Base(binary)},
	}
	if img, err = mutate.ConfigFile(img, config); err != nil {
		return fmt.Errorf("make image: %w", err)
	}
	if err := tarball.WriteToFile(out, ref, img); err != nil {
		return fmt.Errorf("write archive: %w", err)
	}
	return nil
}

// rootFS returns a layer with the binary and the directories that programs expect.
func rootFS(path string, data []byte) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, dir := range []tar.Header{{Name: "etc/", Mode: 0o755}, {Name: "tmp/", Mode: 0o1777}} {
		dir.Typeflag = tar.TypeDir
		if err := w.WriteHeader(&dir); err != nil {
			return nil, fmt.Errorf("make layer: %w", err)
		}
	}
	if err := w.WriteHeader(&tar.Header{Name: path[1:], Mode: 0o755, Size: int64(len(data))}); err != nil {
		return nil, fmt.Errorf("make layer: %w", err)
	}
	if _, err := w.Write(data); err != nil {
		return nil, fmt.Errorf("make layer: %w", err)
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("make layer: %w", err)
	}
	return b.Bytes(), nil
}
