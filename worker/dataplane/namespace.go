package dataplane

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	goruntime "runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

func (d *Dataplane) netns(containerID string) string {
	return filepath.Join(d.cfg.ExecDir, containerID)
}

// pinned reports whether a namespace is mounted at path.
func pinned(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.NSFS_MAGIC
}

// makeNamespace pins a new network namespace at path with its loopback up, unless it is there.
func makeNamespace(path string) error {
	if pinned(path) {
		return nil
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("make network namespace: %w", err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("make network namespace: %w", err)
	}
	if err := unshareTo(path); err != nil {
		return errors.Join(fmt.Errorf("make network namespace: %w", err), os.Remove(path))
	}
	h, err := handleAt(path)
	if err != nil {
		return err
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find loopback: %w", err)
	}
	return h.LinkSetUp(lo)
}

func removeNamespace(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("remove network namespace: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove network namespace: %w", err)
	}
	return nil
}

// onThread runs f on a thread whose namespace f may change. The thread returns to its old
// namespace before it is used for anything else.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		goruntime.LockOSThread()
		old, err := netns.Get()
		if err != nil {
			goruntime.UnlockOSThread()
			done <- err
			return
		}
		defer old.Close() //nolint:errcheck // a read-only descriptor
		err = f()
		if back := netns.Set(old); back != nil {
			done <- errors.Join(err, back) // the thread stays locked and dies with this goroutine
			return
		}
		goruntime.UnlockOSThread()
		done <- err
	}()
	return <-done
}

// unshareTo makes a namespace and mounts it at path.
func unshareTo(path string) error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), path, "", unix.MS_BIND, "")
	})
}

// within runs f in a namespace.
func within(ns netns.NsHandle, f func() error) error {
	return onThread(func() error {
		if err := netns.Set(ns); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return f()
	})
}

// withinPath runs f in the namespace pinned at path.
func withinPath(path string, f func(ns netns.NsHandle) error) error {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close() //nolint:errcheck // a read-only descriptor
	return within(ns, func() error { return f(ns) })
}

// tryWithin runs f in a new namespace that is gone afterwards. One that is there was left by a
// process that ended meanwhile, with what f is about to make.
func tryWithin(path string, f func(ns netns.NsHandle) error) error {
	if err := errors.Join(removeNamespace(path), makeNamespace(path)); err != nil {
		return err
	}
	return errors.Join(withinPath(path, f), removeNamespace(path))
}

func handleAt(path string) (*netlink.Handle, error) {
	ns, h, err := openAt(path)
	if err == nil {
		_ = ns.Close() // the handle has its own
	}
	return h, err
}

// openAt opens a pinned namespace and a handle in it, which callers close.
func openAt(path string) (netns.NsHandle, *netlink.Handle, error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return ns, nil, fmt.Errorf("open network namespace %s: %w", filepath.Base(path), err)
	}
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return ns, nil, errors.Join(fmt.Errorf("enter network namespace %s: %w", filepath.Base(path), err), ns.Close())
	}
	return ns, h, nil
}

// sysctl writes a setting of the calling thread's namespace if it is not so yet.
func sysctl(file, value string) error {
	path := filepath.Join("/proc/sys", file)
	if data, err := os.ReadFile(path); err == nil && len(data) > 0 && string(data[:len(data)-1]) == value {
		return nil
	}
	if err := os.WriteFile(path, []byte(value), 0o644); err != nil { //nolint:gosec // the kernel's file
		return fmt.Errorf("set %s: %w", file, err)
	}
	return nil
}

// dumpTries bounds how often a list is asked for that changes while it is read.
const dumpTries = 20

// dump asks the kernel for a list, again if it changed meanwhile: others change theirs in
// the host's namespace, and the kernel settles addresses by itself.
func dump[T any](list func() ([]T, error)) (out []T, err error) {
	err = again(func() (err error) { out, err = list(); return err })
	return out, err
}

// again does so for a list that list keeps itself.
func again(list func() error) (err error) {
	for range dumpTries {
		if err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return err
}
