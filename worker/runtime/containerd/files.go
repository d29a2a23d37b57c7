package containerd

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

const secretsDir = "/run/secrets"

// filesDir is where a container's secrets are mounted on the host.
func (e *Engine) filesDir(id string) string { return filepath.Join(e.stateDir("f"), id) }

// writeFiles puts a container's files on a file system of its own that exists in memory only. Those below /run/secrets
// keep their place under "secrets"; others are numbered under "files", with their target
// in the link of the same number.
func (e *Engine) writeFiles(c *record, files []runtime.File) (err error) {
	dir := e.filesDir(c.id)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("make directory for secrets: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.dropFiles(c.id))
		}
	}()
	if err := mountMemory(dir); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("open tmpfs of secrets: %w", err)
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	for i, f := range files {
		target := f.Path
		if !filepath.IsAbs(target) {
			target = filepath.Join(secretsDir, filepath.Clean("/"+target))
		}
		target = filepath.Clean(target)
		place := fmt.Sprintf("files/%d", i)
		if rel, ok := strings.CutPrefix(target, secretsDir+"/"); ok {
			place = filepath.Join("secrets", rel)
		} else {
			if err := root.MkdirAll("links", 0o700); err != nil {
				return fmt.Errorf("write file %s: %w", f.Path, err)
			}
			if err := root.Symlink(target, fmt.Sprintf("links/%d", i)); err != nil {
				return fmt.Errorf("write file %s: %w", f.Path, err)
			}
		}
		if err := writeFile(root, place, f); err != nil {
			return fmt.Errorf("write file %s: %w", f.Path, err)
		}
	}
	return nil
}

const fileFlags = unix.MS_NODEV | unix.MS_NOSUID | unix.MS_NOEXEC

// mountMemory mounts a file system whose pages the kernel never writes to swap: a tmpfs
// without swap (Linux 6.4), else a ramfs. The size of what is written is bounded by that of
// secrets and configs.
func mountMemory(dir string) error {
	if err := unix.Mount("tmpfs", dir, "tmpfs", fileFlags, "mode=0711,noswap"); err == nil {
		return nil
	}
	return mountRAM(dir)
}

func mountRAM(dir string) error {
	if err := unix.Mount("ramfs", dir, "ramfs", fileFlags, "mode=0711"); err != nil {
		return fmt.Errorf("mount memory for secrets: %w", err)
	}
	return nil
}

// inMemory reports whether a directory lies on such a file system.
func inMemory(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && (st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC) && isMount(dir)
}

// isMount reports whether a directory is the root of a mount: its device differs from that
// of its parent.
func isMount(dir string) bool {
	var own, parent unix.Stat_t
	return unix.Lstat(dir, &own) == nil && unix.Lstat(filepath.Dir(dir), &parent) == nil && own.Dev != parent.Dev
}

func writeFile(root *os.Root, place string, f runtime.File) error {
	if err := root.MkdirAll(filepath.Dir(place), 0o755); err != nil {
		return err
	}
	mode := fs.FileMode(f.Mode) & fs.ModePerm
	out, err := root.OpenFile(place, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = out.Write(f.Data)
	if err == nil {
		err = out.Chown(f.UID, f.GID)
	}
	if err == nil {
		err = out.Chmod(mode)
	}
	return errors.Join(err, out.Close())
}

// fileMounts returns the mounts that show a container its files.
func (e *Engine) fileMounts(id string) ([]specs.Mount, error) {
	dir := e.filesDir(id)
	if !inMemory(dir) {
		return nil, model.Errorf(model.Precondition, "the secrets of container %s are gone since it ended or the machine restarted: create the container anew", id)
	}
	options := []string{"bind", "ro", "nosuid", "nodev", "noexec", "rprivate"}
	var mounts []specs.Mount
	if _, err := os.Stat(filepath.Join(dir, "secrets")); err == nil {
		mounts = append(mounts, specs.Mount{Destination: secretsDir, Type: "bind", Source: filepath.Join(dir, "secrets"), Options: options})
	}
	links, err := os.ReadDir(filepath.Join(dir, "links"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read files of container: %w", err)
	}
	for _, l := range links {
		target, err := os.Readlink(filepath.Join(dir, "links", l.Name()))
		if err != nil {
			return nil, fmt.Errorf("read files of container: %w", err)
		}
		mounts = append(mounts, specs.Mount{Destination: target, Type: "bind", Source: filepath.Join(dir, "files", l.Name()), Options: options})
	}
	slices.SortFunc(mounts, func(a, b specs.Mount) int { return strings.Compare(a.Destination, b.Destination) })
	return mounts, nil
}

// dropFiles removes a container's files.
func (e *Engine) dropFiles(id string) error {
	dir := e.filesDir(id)
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount secrets: %w", err)
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove directory of secrets: %w", err)
	}
	return nil
}
