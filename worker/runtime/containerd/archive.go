package containerd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	ctdmount "github.com/containerd/containerd/v2/core/mount"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

var _ runtime.Archives = (*Engine)(nil)

// place is something inside a container: a file at rel below root.
type place struct {
	root *os.File
	rel  string
	// follow is set when a last symbolic link is to be followed.
	follow bool
}

// open opens what is there without reading it. The kernel keeps every symbolic link
// inside the root, whatever the container does meanwhile.
func (p place) open(more uint64) (*os.File, error) {
	how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC | more, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	if !p.follow {
		how.Flags |= unix.O_NOFOLLOW
	}
	fd, err := unix.Openat2(int(p.root.Fd()), p.rel, how)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), p.rel), nil
}

// proc is another way to f, to open it for reading.
func proc(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

// inside calls f with the place that a path means in a container. A running container is
// looked at through its first process, with all its mounts; else the root file system is
// mounted, and a path below a volume or bind mount leads there. For writing, the container
// cannot start until f returns.
func (e *Engine) inside(ctx context.Context, ref, name string, write bool, f func(*record, place) error) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	if strings.ContainsRune(name, 0) || name == "" {
		return model.Errorf(model.Invalid, "bad parameter: path cannot be empty")
	}
	clean := path.Clean("/" + name)
	p := place{rel: "." + clean, follow: strings.HasSuffix(name, "/") || path.Base(name) == "." || clean == "/"}
	if root, err := e.runningRoot(c); err == nil && root != nil {
		defer func() { _ = root.Close() }() // only a handle
		p.root = root
		return f(c, p)
	}
	if write {
		if c, err = e.findTurn(ctx, c.id); err != nil {
			return err
		}
		defer c.give()
		if isRunning(e.view(c)) {
			return model.Errorf(model.Conflict, "container %s was started meanwhile", c.id)
		}
	}
	s := e.view(c)
	if m, ok := mountOf(s.Mounts, clean); ok {
		if write && !m.RW {
			return model.Errorf(model.Denied, "mounted volume is marked read-only")
		}
		return m.visit(clean, p, func(p place) error { return f(c, p) })
	}
	if write && s.Host.ReadonlyRootfs {
		return model.Errorf(model.Denied, "container rootfs is marked read-only")
	}
	return e.mounted(ctx, c, write, func(root *os.File) error {
		p.root = root
		return f(c, p)
	})
}

// mountOf returns the mount that a path is on.
func mountOf(mounts []mountPoint, clean string) (found mountPoint, ok bool) {
	for _, m := range mounts {
		d := m.Destination
		if m.Type == mount.TypeTmpfs || clean != d && !strings.HasPrefix(clean, d+"/") || len(d) <= len(found.Destination) {
			continue
		}
		found, ok = m, true
	}
	return found, ok
}

// visit calls f with the place of a path on the mount.
func (m mountPoint) visit(clean string, p place, f func(place) error) error {
	source, rel := m.HostPath, "."+strings.TrimPrefix(clean, m.Destination)
	if info, err := os.Stat(source); err == nil && !info.IsDir() {
		source, rel = filepath.Dir(source), filepath.Base(source)
	}
	root, err := os.Open(source)
	if err != nil {
		return fmt.Errorf("open mount %s: %w", m.Destination, err)
	}
	defer func() { _ = root.Close() }() // only a handle
	p.root, p.rel = root, rel
	return f(p)
}

// runningRoot opens the root of a running container's first process, nil if there is none.
func (e *Engine) runningRoot(c *record) (*os.File, error) {
	s := e.view(c)
	if !isRunning(s) || s.Pid == 0 {
		return nil, nil //nolint:nilnil // documented
	}
	root, err := os.Open(fmt.Sprintf("/proc/%d/root", s.Pid))
	if err != nil {
		return nil, fmt.Errorf("open root of container: %w", err)
	}
	// The number may be another process's by now: ours is in the container's cgroup.
	cgroup, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", s.Pid))
	if err != nil || !strings.Contains(string(cgroup), c.id) {
		_ = root.Close() // of another
		return nil, model.Errorf(model.Conflict, "container %s is not running", c.id)
	}
	return root, nil
}

// mounted calls f with a container's root file system mounted for the while, without the
// container's other mounts.
func (e *Engine) mounted(ctx context.Context, c *record, write bool, f func(root *os.File) error) (err error) {
	mounts, err := e.rootMounts(ctx, c)
	if err != nil {
		return err
	}
	if !write { // apart from the container's own, which may be mounted at the same time
		dirs := layerDirs(mounts)
		mounts = []rootMount{{Type: "overlay", Source: "overlay", Options: []string{"ro", "lowerdir=" + strings.Join(dirs, ":")}}}
		if len(dirs) == 1 {
			mounts = []rootMount{{Type: "bind", Source: dirs[0], Options: []string{"rbind", "ro"}}}
		}
	}
	dir, err := os.MkdirTemp(e.stateDir("m"), "")
	if err != nil {
		return fmt.Errorf("mount root file system: %w", err)
	}
	defer func() { err = errors.Join(err, unmountDir(dir)) }()
	if err := ctdmount.All(mounts, dir); err != nil {
		return fmt.Errorf("mount root file system: %w", err)
	}
	root, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("open root file system: %w", err)
	}
	defer func() { _ = root.Close() }() // only a handle
	return f(root)
}

func unmountDir(dir string) error {
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("unmount root file system: %w", err)
	}
	if err := os.Remove(dir); err != nil {
		return fmt.Errorf("remove mount point: %w", err)
	}
	return nil
}

// sweepMounts takes away what a former process mounted to copy files.
func (e *Engine) sweepMounts() error {
	entries, err := os.ReadDir(e.stateDir("m"))
	if err != nil {
		return fmt.Errorf("list mount points: %w", err)
	}
	var errs []error
	for _, x := range entries {
		errs = append(errs, unmountDir(filepath.Join(e.stateDir("m"), x.Name())))
	}
	return errors.Join(errs...)
}

// pathError puts an error about a path into Docker's words.
func pathError(err error, name, ref string) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		return model.Errorf(model.NotFound, "Could not find the file %s in container %s", name, ref)
	case errors.Is(err, unix.EROFS):
		return model.Wrap(model.Denied, err, "mounted volume or rootfs is marked read-only")
	}
	return fmt.Errorf("find %s in container: %w", name, err)
}

// statPlace describes what f, at name, is.
func statPlace(name string, f *os.File) (*container.PathStat, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	st := &container.PathStat{Name: path.Base(name), Size: info.Size(), Mode: info.Mode(), Mtime: info.ModTime()}
	if info.Mode()&fs.ModeSymlink != 0 {
		if st.LinkTarget, err = readLink(f); err != nil {
			return nil, err
		}
		if !path.IsAbs(st.LinkTarget) {
			st.LinkTarget = path.Join(path.Dir(path.Clean("/"+name)), st.LinkTarget)
		}
	}
	return st, nil
}

func readLink(f *os.File) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(f.Fd()), "", buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// StatPath implements runtime.Archives.
func (e *Engine) StatPath(ctx context.Context, ref, name string) (st *container.PathStat, err error) {
	err = e.inside(e.ns(ctx), ref, name, false, func(_ *record, p place) error {
		f, err := p.open(0)
		if err != nil {
			return pathError(err, name, ref)
		}
		defer func() { _ = f.Close() }() // only looked at
		st, err = statPlace(name, f)
		return err
	})
	return st, err
}

// CopyFrom implements runtime.Archives.
func (e *Engine) CopyFrom(ctx context.Context, ref, name string, begin func(*container.PathStat) io.Writer) error {
	return e.inside(e.ns(ctx), ref, name, false, func(_ *record, p place) error {
		f, err := p.open(0)
		if err != nil {
			return pathError(err, name, ref)
		}
		defer func() { _ = f.Close() }() // only read from
		st, err := statPlace(name, f)
		if err != nil {
			return pathError(err, name, ref)
		}
		t := newPacker(ctx, begin(st))
		return errors.Join(t.add(f, path.Base(name)), t.close())
	})
}

// CopyTo implements runtime.Archives.
func (e *Engine) CopyTo(ctx context.Context, ref, name string, archive io.Reader, opts runtime.CopyOptions) error {
	return e.inside(e.ns(ctx), ref, name, true, func(c *record, p place) error {
		p.follow = true
		f, err := p.open(0)
		if err != nil {
			return pathError(err, name, ref)
		}
		defer func() { _ = f.Close() }() // only a handle
		if info, err := f.Stat(); err != nil || !info.IsDir() {
			return model.Errorf(model.Invalid, "extraction point is not a directory")
		}
		root, err := os.OpenRoot(proc(f))
		if err != nil {
			return pathError(err, name, ref)
		}
		defer func() { _ = root.Close() }() // only a handle
		u := unpacker{root: root, keepKind: opts.KeepKind}
		if s := e.view(c); opts.OwnByUser && s.Config.User != "" {
			rootfs, err := e.rootMounts(e.ns(ctx), c)
			if err != nil {
				return err
			}
			user, err := resolveUser(&s, rootfs)
			if err != nil {
				return err
			}
			u.own, u.uid, u.gid = true, int(user.UID), int(user.GID)
		}
		if err := u.unpack(ctx, archive); errors.Is(err, unix.EROFS) {
			return pathError(err, name, ref)
		} else if err != nil {
			return fmt.Errorf("copy into container: %w", err)
		}
		return nil
	})
}

// Export implements runtime.Archives.
func (e *Engine) Export(ctx context.Context, ref string, w io.Writer) error {
	ctx = e.ns(ctx)
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	return e.mounted(ctx, c, false, func(root *os.File) error {
		t := newPacker(ctx, w)
		return errors.Join(t.add(root, ""), t.close())
	})
}

// Changes implements runtime.Archives.
func (e *Engine) Changes(ctx context.Context, ref string) ([]container.FilesystemChange, error) {
	c, err := e.find(ref)
	if err != nil {
		return nil, err
	}
	mounts, err := e.rootMounts(e.ns(ctx), c)
	if err != nil {
		return nil, err
	}
	dirs := layerDirs(mounts)
	if len(dirs) == 0 {
		return nil, model.Errorf(model.Internal, "root file system of container %s has no layers", c.id)
	}
	out := []container.FilesystemChange{}
	err = filepath.WalkDir(dirs[0], func(p string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) { // vanished meanwhile
			return nil
		}
		if err != nil || p == dirs[0] {
			return err
		}
		rel := strings.TrimPrefix(p, dirs[0])
		kind := container.ChangeAdd
		switch {
		case isWhiteout(p):
			kind = container.ChangeDelete
		case inLower(dirs[1:], rel):
			kind = container.ChangeModify
		}
		out = append(out, container.FilesystemChange{Kind: kind, Path: rel})
		return ctx.Err()
	})
	if err != nil {
		return nil, fmt.Errorf("compare container with image: %w", err)
	}
	slices.SortFunc(out, func(a, b container.FilesystemChange) int { return strings.Compare(a.Path, b.Path) })
	return out, nil
}

// inLower reports whether layers show something at rel.
func inLower(dirs []string, rel string) bool {
	for _, dir := range dirs {
		for p := rel; p != "/"; p = path.Dir(p) { // what is deleted above hides what lies below
			if isWhiteout(dir + p) {
				return false
			}
		}
		if _, err := os.Lstat(dir + rel); err == nil {
			return true
		}
	}
	return false
}

// isWhiteout reports whether a layer marks p as deleted.
func isWhiteout(p string) bool {
	var st unix.Stat_t
	return unix.Lstat(p, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}
