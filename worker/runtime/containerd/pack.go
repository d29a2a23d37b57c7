package containerd

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/model"
)

// capabilityXattr is the one extended attribute that programs cannot do without.
const (
	capabilityXattr = "security.capability"
	paxXattr        = "SCHILY.xattr."
)

// inode tells files with several names.
type inode struct{ dev, ino uint64 }

// packer writes files as a tar archive.
type packer struct {
	ctx  context.Context //nolint:containedctx // lives for one archive
	w    *tar.Writer
	seen map[inode]string
}

func newPacker(ctx context.Context, w io.Writer) *packer {
	return &packer{ctx: ctx, w: tar.NewWriter(w), seen: map[inode]string{}}
}

func (t *packer) close() error { return t.w.Close() }

// add packs what f, which need not be readable, is, under a name; a directory with
// everything below it. An empty name leaves the directory itself out.
func (t *packer) add(f *os.File, name string) error {
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("pack %s: %w", name, err)
	}
	switch {
	case info.IsDir():
		root, err := os.OpenRoot(proc(f))
		if err != nil {
			return fmt.Errorf("pack %s: %w", name, err)
		}
		defer func() { _ = root.Close() }() // only read from
		if name != "" {
			if err := t.header(info, "", name, nil); err != nil {
				return err
			}
		}
		return t.tree(root, ".", name)
	case info.Mode()&fs.ModeSymlink != 0:
		link, err := readLink(f)
		if err != nil {
			return fmt.Errorf("pack %s: %w", name, err)
		}
		return t.header(info, link, name, nil)
	case !info.Mode().IsRegular():
		return t.header(info, "", name, nil)
	}
	in, err := os.Open(proc(f))
	if err != nil {
		return fmt.Errorf("pack %s: %w", name, err)
	}
	return t.file(in, name)
}

// tree packs what is in a directory.
func (t *packer) tree(root *os.Root, dir, name string) error {
	if err := t.ctx.Err(); err != nil {
		return err
	}
	d, err := root.Open(dir)
	if err != nil {
		return fmt.Errorf("pack %s: %w", name, err)
	}
	entries, err := d.ReadDir(-1)
	_ = d.Close() // only read from
	if err != nil {
		return fmt.Errorf("pack %s: %w", name, err)
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	for _, x := range entries {
		err := t.entry(root, path.Join(dir, x.Name()), path.Join(name, x.Name()))
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // vanished meanwhile
			return err
		}
	}
	return nil
}

func (t *packer) entry(root *os.Root, rel, name string) error {
	info, err := root.Lstat(rel)
	if err != nil {
		return err
	}
	switch {
	case info.IsDir():
		if err := t.header(info, "", name, nil); err != nil {
			return err
		}
		return t.tree(root, rel, name)
	case info.Mode()&fs.ModeSymlink != 0:
		link, err := root.Readlink(rel)
		if err != nil {
			return err
		}
		return t.header(info, link, name, nil)
	case !info.Mode().IsRegular():
		return t.header(info, "", name, nil)
	}
	f, err := root.OpenFile(rel, os.O_RDONLY|unix.O_NONBLOCK, 0) // it may be a pipe by now
	if err != nil {
		return err
	}
	return t.file(f, name)
}

// file packs a regular file and closes it.
func (t *packer) file(f *os.File, name string) error {
	defer func() { _ = f.Close() }() // only read from
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Nlink > 1 {
		id := inode{dev: st.Dev, ino: st.Ino}
		if first, ok := t.seen[id]; ok {
			h, err := tar.FileInfoHeader(info, "")
			if err != nil {
				return fmt.Errorf("pack %s: %w", name, err)
			}
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			return t.write(h, name)
		}
		t.seen[id] = name
	}
	records := map[string]string{}
	buf := make([]byte, 128)
	if n, err := unix.Fgetxattr(int(f.Fd()), capabilityXattr, buf); err == nil {
		records[paxXattr+capabilityXattr] = string(buf[:n])
	}
	if err := t.header(info, "", name, records); err != nil {
		return err
	}
	// A file that grows is cut, one that shrinks is filled up: its header is out.
	n, err := io.CopyN(t.w, f, info.Size())
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("pack %s: %w", name, err)
	}
	zeros := make([]byte, 32<<10)
	for n < info.Size() {
		k, err := t.w.Write(zeros[:min(info.Size()-n, int64(len(zeros)))])
		if err != nil {
			return fmt.Errorf("pack %s: %w", name, err)
		}
		n += int64(k)
	}
	return nil
}

func (t *packer) header(info fs.FileInfo, link, name string, records map[string]string) error {
	if info.Mode()&fs.ModeSocket != 0 {
		return nil // it means nothing elsewhere
	}
	h, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return fmt.Errorf("pack %s: %w", name, err)
	}
	if len(records) > 0 {
		h.PAXRecords = records
	}
	return t.write(h, name)
}

func (t *packer) write(h *tar.Header, name string) error {
	h.Name = name
	if h.Typeflag == tar.TypeDir && !strings.HasSuffix(name, "/") {
		h.Name += "/"
	}
	// The host's names for the container's numbers would be wrong.
	h.Uname, h.Gname = "", ""
	h.AccessTime, h.ChangeTime = time.Time{}, time.Time{}
	if err := t.w.WriteHeader(h); err != nil {
		return fmt.Errorf("pack %s: %w", name, err)
	}
	return nil
}

// unpacker makes files from a tar archive below root, which nothing in it leads out of.
type unpacker struct {
	root     *os.Root
	keepKind bool // not to replace a directory by a file and the reverse
	own      bool // everything belongs to uid and gid
	uid, gid int

	dirs []*tar.Header // whose times are set last
}

func (u *unpacker) unpack(ctx context.Context, archive io.Reader) error {
	in, err := compression.DecompressStream(archive)
	if err != nil {
		return model.Wrap(model.Invalid, err, "read archive")
	}
	defer func() { _ = in.Close() }() // only read from
	r := tar.NewReader(in)
	for ctx.Err() == nil {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return model.Wrap(model.Invalid, err, "read archive")
		}
		name := path.Clean("/" + h.Name)[1:]
		if name == "" || h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if err := u.entry(h, name, r); err != nil {
			return fmt.Errorf("unpack %s: %w", h.Name, err)
		}
	}
	for _, h := range slices.Backward(u.dirs) {
		if err := u.root.Chtimes(path.Clean("/" + h.Name)[1:], h.ModTime, h.ModTime); err != nil {
			return fmt.Errorf("unpack %s: %w", h.Name, err)
		}
	}
	return ctx.Err()
}

func (u *unpacker) entry(h *tar.Header, name string, r io.Reader) error {
	if err := u.root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	isDir := h.Typeflag == tar.TypeDir
	there, err := u.root.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case u.keepKind && there.IsDir() && !isDir:
		return model.Errorf(model.Invalid, "cannot overwrite directory %q with non-directory %q", name, h.Name)
	case u.keepKind && !there.IsDir() && isDir:
		return model.Errorf(model.Invalid, "cannot overwrite non-directory %q with directory %q", name, h.Name)
	case there.IsDir() && isDir:
	default:
		if err := u.root.RemoveAll(name); err != nil {
			return err
		}
	}
	if err := u.make(h, name, r, there); err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeDir:
		u.dirs = append(u.dirs, h)
	case tar.TypeSymlink, tar.TypeLink:
	default:
		return u.root.Chtimes(name, h.ModTime, h.ModTime)
	}
	return nil
}

// make makes one file with its owner and mode. there is what the name had before.
func (u *unpacker) make(h *tar.Header, name string, r io.Reader, there fs.FileInfo) error {
	uid, gid, mode := h.Uid, h.Gid, h.FileInfo().Mode()
	if u.own {
		uid, gid = u.uid, u.gid
	}
	switch h.Typeflag {
	case tar.TypeReg:
		return u.file(h, name, r, uid, gid)
	case tar.TypeLink:
		return u.root.Link(path.Clean("/" + h.Linkname)[1:], name)
	case tar.TypeSymlink:
		if err := u.root.Symlink(h.Linkname, name); err != nil {
			return err
		}
		return u.root.Lchown(name, uid, gid)
	case tar.TypeDir:
		if there == nil || !there.IsDir() {
			if err := u.root.Mkdir(name, 0o700); err != nil {
				return err
			}
		}
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		if err := u.node(h, name); err != nil {
			return err
		}
	default:
		return model.Errorf(model.Invalid, "unknown type %q in archive", h.Typeflag)
	}
	if err := u.root.Lchown(name, uid, gid); err != nil {
		return err
	}
	return u.root.Chmod(name, mode)
}

func (u *unpacker) file(h *tar.Header, name string, r io.Reader, uid, gid int) (err error) {
	f, err := u.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := io.Copy(f, r); err != nil {
		return err
	}
	if err := f.Chown(uid, gid); err != nil {
		return err
	}
	if err := f.Chmod(h.FileInfo().Mode()); err != nil {
		return err
	}
	if v := h.PAXRecords[paxXattr+capabilityXattr]; v != "" { // a change of owner would have dropped it
		return unix.Fsetxattr(int(f.Fd()), capabilityXattr, []byte(v), 0)
	}
	return nil
}

// node makes a device or pipe.
func (u *unpacker) node(h *tar.Header, name string) error {
	kind := map[byte]uint32{tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK, tar.TypeFifo: unix.S_IFIFO}[h.Typeflag]
	dir, err := u.root.Open(path.Dir(name))
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }() // only a handle
	return unix.Mknodat(int(dir.Fd()), path.Base(name), kind|0o600, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))))
}
