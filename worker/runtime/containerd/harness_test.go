package containerd_test

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/runtime/containerd"
)

// binDir finds what tools/containerd/build.sh built.
func binDir(tb testing.TB) string {
	tb.Helper()
	if os.Getuid() != 0 {
		tb.Skip("needs root")
	}
	dir := os.Getenv("SKEP_BIN")
	if dir == "" {
		dir = "../../../bin"
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		tb.Fatal(err)
	}
	for _, b := range []string{"containerd", "containerd-shim-skep-v1", "skep-init"} {
		if _, err := os.Stat(filepath.Join(dir, b)); err != nil {
			tb.Skipf("needs %s in %s (make build, or SKEP_BIN)", b, dir)
		}
	}
	if _, err := os.Stat("/bin/busybox"); err != nil {
		tb.Skip("needs /bin/busybox (busybox-static)")
	}
	return dir
}

// bench is one machine's runtime in a directory of its own.
type bench struct {
	*containerd.Engine
	cfg  containerd.Config
	stop func()
}

func newBench(tb testing.TB, edit func(*containerd.Config)) *bench {
	tb.Helper()
	bin := binDir(tb)
	root, err := os.MkdirTemp("/tmp", "sk") //nolint:usetesting // short: socket paths have a limit
	if err != nil {
		tb.Fatal(err)
	}
	cfg := containerd.Config{Root: root, BinDir: bin, CgroupParent: "/" + filepath.Base(root), Log: slog.New(slog.NewTextHandler(testWriter{tb}, &slog.HandlerOptions{Level: slog.LevelWarn}))}
	if edit != nil {
		edit(&cfg)
	}
	b := &bench{cfg: cfg}
	tb.Cleanup(func() { b.clean(tb) })
	b.start(tb)
	return b
}

type testWriter struct{ tb testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.tb.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// start opens the engine and runs it.
func (b *bench) start(tb testing.TB) {
	tb.Helper()
	e, err := containerd.New(context.Background(), b.cfg)
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	b.Engine = e
	b.stop = func() {
		cancel()
		if err := <-done; err != nil {
			tb.Errorf("engine ended with %v", err)
		}
		b.stop = func() {}
	}
}

// restart is what a restart of the daemon does to the engine.
func (b *bench) restart(tb testing.TB) {
	tb.Helper()
	b.stop()
	b.start(tb)
}

// clean removes every container, containerd, the shims, mounts and cgroups.
func (b *bench) clean(tb testing.TB) {
	if b.Engine != nil && b.stop != nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		list, err := b.List(ctx)
		if err != nil {
			tb.Error(err)
		}
		for _, c := range list {
			if err := b.Remove(ctx, c.ID, true, true); err != nil {
				tb.Errorf("remove %s: %v", c.Name, err)
			}
		}
		if err := b.Shutdown(ctx); err != nil {
			tb.Error(err)
		}
		b.stop()
	}
	killAll(tb, b.cfg.Root)
	b.unmount()
	if tb.Failed() {
		if log, err := os.ReadFile(filepath.Join(b.cfg.Root, "containerd/containerd.log")); err == nil {
			tb.Logf("containerd.log:\n%s", tail(string(log), 4000))
		}
	}
	if err := os.RemoveAll(b.cfg.Root); err != nil {
		tb.Error(err)
	}
	dirs, _ := filepath.Glob("/sys/fs/cgroup/*" + b.cfg.CgroupParent)
	for _, d := range append(dirs, "/sys/fs/cgroup"+b.cfg.CgroupParent) {
		_ = os.Remove(d)
	}
}

// unmount lets go of every mount below the bench's directory.
func (b *bench) unmount() {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return
	}
	lines := strings.Split(string(mounts), "\n")
	for _, line := range slices.Backward(lines) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], b.cfg.Root+"/") {
			_ = unix.Unmount(f[4], unix.MNT_DETACH)
		}
	}
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

// killAll kills the processes whose command line names root: a containerd or shim of ours
// that outlived its test.
func killAll(tb testing.TB, root string) {
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		b, err := os.ReadFile(p)
		cwd, _ := os.Readlink(filepath.Join(filepath.Dir(p), "cwd")) // a shim's is its bundle
		if err != nil || !bytes.Contains(b, []byte(root+"/")) && !strings.HasPrefix(cwd, root+"/") {
			continue
		}
		var pid int
		for _, c := range filepath.Base(filepath.Dir(p)) {
			pid = pid*10 + int(c-'0')
		}
		if pid == os.Getpid() {
			continue
		}
		tb.Logf("killing leftover %d: %s", pid, bytes.ReplaceAll(b, []byte{0}, []byte{' '}))
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}

// busybox makes an image of one layer with the machine's static busybox.
func busybox(tb testing.TB, cfg v1.Config) v1.Image {
	tb.Helper()
	program, err := os.ReadFile("/bin/busybox")
	if err != nil {
		tb.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h *tar.Header, data []byte) {
		h.Size = int64(len(data))
		h.ModTime = time.Unix(1e9, 0)
		if err := w.WriteHeader(h); err != nil {
			tb.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			tb.Fatal(err)
		}
	}
	for _, d := range []string{"bin/", "etc/", "tmp/", "data/", "root/"} {
		add(&tar.Header{Name: d, Typeflag: tar.TypeDir, Mode: 0o755}, nil)
	}
	add(&tar.Header{Name: "bin/busybox", Typeflag: tar.TypeReg, Mode: 0o755}, program)
	for a := range strings.FieldsSeq("sh echo cat sleep ls id env pwd hostname mount stat wget true false kill ps grep head seq touch mkdir df ulimit yes tr wc test dd stty nproc awk readlink") {
		add(&tar.Header{Name: "bin/" + a, Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777}, nil)
	}
	add(&tar.Header{Name: "etc/passwd", Typeflag: tar.TypeReg, Mode: 0o644}, []byte("root:x:0:0:root:/root:/bin/sh\nbee:x:1234:1235:Bee:/data:/bin/sh\n"))
	add(&tar.Header{Name: "etc/group", Typeflag: tar.TypeReg, Mode: 0o644}, []byte("root:x:0:\nbee:x:1235:\nhive:x:1300:bee\nextra:x:1400:\n"))
	add(&tar.Header{Name: "data/seed", Typeflag: tar.TypeReg, Mode: 0o640, Uid: 1234, Gid: 1235}, []byte("from the image\n"))
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		tb.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		tb.Fatal(err)
	}
	if img, err = mutate.Config(img, cfg); err != nil {
		tb.Fatal(err)
	}
	f, err := img.ConfigFile()
	if err != nil {
		tb.Fatal(err)
	}
	f = f.DeepCopy()
	f.OS, f.Architecture = "linux", "amd64"
	if img, err = mutate.ConfigFile(img, f); err != nil {
		tb.Fatal(err)
	}
	return img
}

// archive is a docker-save archive of img under ref.
func archive(tb testing.TB, ref string, img v1.Image) *bytes.Buffer {
	tb.Helper()
	tag, err := name.NewTag(ref)
	if err != nil {
		tb.Fatal(err)
	}
	var b bytes.Buffer
	if err := tarball.Write(tag, img, &b); err != nil {
		tb.Fatal(err)
	}
	return &b
}

// withBusybox loads busybox:latest, whose command is a shell.
func (b *bench) withBusybox(tb testing.TB) *bench {
	tb.Helper()
	img := busybox(tb, v1.Config{Cmd: []string{"sh"}})
	if _, err := b.Load(context.Background(), archive(tb, "busybox:latest", img)); err != nil {
		tb.Fatal(err)
	}
	return b
}

// run creates and starts a container of busybox.
func (b *bench) run(tb testing.TB, cfg *container.Config, host *container.HostConfig, files ...runtime.File) string {
	tb.Helper()
	id := b.create(tb, cfg, host, files...)
	if err := b.Start(context.Background(), id); err != nil {
		tb.Fatal(err)
	}
	return id
}

func (b *bench) create(tb testing.TB, cfg *container.Config, host *container.HostConfig, files ...runtime.File) string {
	tb.Helper()
	if cfg.Image == "" {
		cfg.Image = "busybox"
	}
	id, _, err := b.Create(context.Background(), runtime.CreateOptions{Config: cfg, HostConfig: host, Files: files})
	if err != nil {
		tb.Fatal(err)
	}
	return id
}

// wait waits for the container's exit.
func (b *bench) wait(tb testing.TB, id string) int {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	ch, err := b.Wait(ctx, id, container.WaitConditionNotRunning)
	if err != nil {
		tb.Fatal(err)
	}
	r := <-ch
	if r.Err != nil {
		tb.Fatal(r.Err)
	}
	return r.ExitCode
}

// output runs a shell script in a new container and returns what it printed.
func (b *bench) output(tb testing.TB, script string, cfg container.Config, host container.HostConfig, files ...runtime.File) string {
	tb.Helper()
	cfg.Cmd = []string{"sh", "-c", script}
	id := b.run(tb, &cfg, &host, files...)
	code := b.wait(tb, id)
	out := b.logs(tb, id)
	if code != 0 {
		tb.Errorf("%q exited with %d: %s", script, code, out)
	}
	if err := b.Remove(context.Background(), id, true, true); err != nil {
		tb.Error(err)
	}
	return strings.TrimSpace(out)
}

func (b *bench) logs(tb testing.TB, id string) string {
	tb.Helper()
	var out strings.Builder
	err := b.Logs(context.Background(), id, runtime.LogOptions{Stdout: true, Stderr: true, Tail: -1}, func(l runtime.LogLine) error {
		out.Write(l.Data)
		return nil
	})
	if err != nil {
		tb.Fatal(err)
	}
	return out.String()
}
