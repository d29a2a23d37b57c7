// Skep-init is the first process of containers that ask for an init: it runs the command
// that follows, forwards every signal to it, collects orphans and exits as it did.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

func main() {
	args := os.Args[1:]
	if len(args) > 0 && args[0] == "--" {
		args = args[1:]
	}
	if len(args) == 0 {
		os.Exit(0) // what the runtime self-test asks for
	}
	os.Exit(run(args))
}

func run(args []string) int {
	signals := make(chan os.Signal, 64)
	signal.Notify(signals)
	path, err := exec.LookPath(args[0])
	if err != nil {
		fmt.Fprintf(os.Stderr, "[FATAL skep-init] exec %s failed: %v\n", args[0], err)
		if errors.Is(err, os.ErrPermission) {
			return 126
		}
		return 127
	}
	child, err := os.StartProcess(path, args, &os.ProcAttr{
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
		Sys:   attributes(),
	})
	if err != nil {
		fmt.Fprintf(os.Stderr, "[FATAL skep-init] exec %s failed: %v\n", args[0], err)
		return 126
	}
	for s := range signals {
		switch s {
		case syscall.SIGCHLD:
			if code, ended := reap(child.Pid); ended {
				return code
			}
		case syscall.SIGURG: // the Go runtime's own
		default:
			if n, ok := s.(syscall.Signal); ok {
				_ = syscall.Kill(child.Pid, n) // it may have ended; then SIGCHLD follows
			}
		}
	}
	return 0
}

// attributes puts the child into a session-less process group of its own, in the
// foreground if there is a terminal.
func attributes() *syscall.SysProcAttr {
	a := &syscall.SysProcAttr{Setpgid: true}
	if _, err := unix.IoctlGetTermios(0, unix.TCGETS); err == nil {
		a.Foreground, a.Ctty = true, 0
	}
	return a
}

// reap collects every ended child; it reports the exit code of the main one if it is among them.
func reap(main int) (code int, ended bool) {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil || pid <= 0 {
			return code, ended
		}
		if pid == main {
			code, ended = status.ExitStatus(), true
			if status.Signaled() {
				code = 128 + int(status.Signal())
			}
		}
	}
}
