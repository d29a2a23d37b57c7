package node

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/model"
)

// lockDir makes this process the only daemon of a data root until release.
func lockDir(dir string) (release func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, "daemon.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock data root: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, model.Errorf(model.Conflict, "another daemon runs with the data root %s; choose another with --data-root", dir)
	}
	return func() { _ = f.Close() }, nil
}
