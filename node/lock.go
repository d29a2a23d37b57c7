package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/model"
)

// Lock makes this process the only daemon of a data root and of an exec root until
// release, and makes the directories if they are missing. It comes before anything that
// opens them: a second daemon would take the first one's containers for leftovers.
func Lock(dataRoot, execRoot string) (release func(), err error) {
	data, err := lockDir(dataRoot, "data-root")
	if err != nil {
		return nil, err
	}
	if same(dataRoot, execRoot) {
		return data, nil
	}
	exec, err := lockDir(execRoot, "exec-root")
	if err != nil {
		data()
		return nil, err
	}
	return func() { exec(); data() }, nil
}

func lockDir(dir, flag string) (release func(), err error) {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("start daemon: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "daemon.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock --%s: %w", flag, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock --%s %s: %w", flag, dir, err)
		}
		return nil, model.Errorf(model.Conflict, "another daemon runs in %s; give this one a directory of its own with --%s", dir, flag)
	}
	return func() { _ = f.Close() }, nil
}

func same(a, b string) bool {
	x, errX := os.Stat(a)
	y, errY := os.Stat(b)
	if errors.Is(errX, fs.ErrNotExist) || errors.Is(errY, fs.ErrNotExist) {
		return filepath.Clean(a) == filepath.Clean(b)
	}
	return errX == nil && errY == nil && os.SameFile(x, y)
}
