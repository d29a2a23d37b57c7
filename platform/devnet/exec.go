package devnet

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// enter puts the calling thread into a network namespace and gives it a host name of
// its own. The thread must be locked and must not return to other goroutines.
func enter(netnsPath, hostname string) error {
	ns, err := netns.GetFromPath(netnsPath)
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close() //nolint:errcheck // only read
	if err := unix.Unshare(unix.CLONE_NEWUTS); err != nil {
		return fmt.Errorf("make host name namespace: %w", err)
	}
	if err := unix.Sethostname([]byte(hostname)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	if err := netns.Set(ns); err != nil {
		return fmt.Errorf("enter network namespace: %w", err)
	}
	return nil
}

// Exec replaces the calling process by a command on a node: in the node's network, with
// its host name, and with DOCKER_HOST set to its socket. It returns only on an error.
func (s *Swarm) Exec(n Node, command, env []string) error {
	path, err := exec.LookPath(command[0])
	if err != nil {
		return fmt.Errorf("find command: %w", err)
	}
	if path, err = filepath.Abs(path); err != nil {
		return fmt.Errorf("find command: %w", err)
	}
	runtime.LockOSThread() // the command gets this thread's namespaces
	if err := enter(filepath.Join(netnsDir, n.NetNS), n.Name); err != nil {
		return fmt.Errorf("enter node %s: %w", n.Name, err)
	}
	var clean []string
	for _, e := range env {
		if !strings.HasPrefix(e, "DOCKER_") || strings.HasPrefix(e, "DOCKER_CONFIG=") {
			clean = append(clean, e)
		}
	}
	clean = append(clean, "DOCKER_HOST=unix://"+n.Socket)
	if err := unix.Exec(path, command, clean); err != nil {
		return fmt.Errorf("run %s: %w", command[0], err)
	}
	return nil
}
