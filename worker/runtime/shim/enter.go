package shim

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// EnterCommand is the first argument that makes the shim binary run the command that
// follows in a mount namespace of its own, without the empty cgroup2 hierarchy that some
// machines mount beside cgroup v1 and that crun refuses to live with. Mounts made by the
// host later still appear in it, for it is a slave of the host's.
const EnterCommand = "enter"

const unified = "/sys/fs/cgroup/unified"

// Enter does what EnterCommand says. It returns only if it fails.
func Enter(argv []string) error {
	if len(argv) == 0 {
		return errors.New("enter: no command")
	}
	runtime.LockOSThread() // the namespace belongs to this thread until exec makes it the process's
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		return fmt.Errorf("enter: unshare: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("enter: make mounts slaves: %w", err)
	}
	if err := unix.Unmount(unified, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("enter: unmount %s: %w", unified, err)
	}
	if err := unix.Exec(argv[0], argv, os.Environ()); err != nil {
		return fmt.Errorf("enter: run %s: %w", argv[0], err)
	}
	return nil
}
