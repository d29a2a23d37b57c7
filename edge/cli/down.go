package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/platform/process"
)

// stopGrace is how long a daemon may take to stop its tasks before it is killed.
const stopGrace = 60 * time.Second

func (a *app) downCommand() *cobra.Command {
	var dataRoot, execRoot string
	var keep bool
	c := &cobra.Command{
		Use:   "down",
		Short: "Stop the node on this machine and everything that it runs",
		Long: `Stop the node that skep up started: its tasks, its daemon, its containerd, its mounts and
bridge, and the systemd unit and docker context with it. Data stay: the next skep up is the
same node of the same swarm, with its images, volumes and secrets.

With --keep-data=false the node leaves its swarm first (a manager is demoted if others can
carry on) and everything below the data directory is deleted.

A daemon that somebody started by hand is stopped by hand; then skep down --data-root DIR
--exec-root DIR removes what it left running.`,
		Args: args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := needRoot("stopping a node"); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(c.Context(), 3*time.Minute)
			defer cancel()
			return a.down(ctx, dataRoot, execRoot, keep)
		},
	}
	c.Flags().StringVar(&dataRoot, "data-root", DefaultDataRoot, "data directory of the node, as given to skep up")
	c.Flags().StringVar(&execRoot, "exec-root", DefaultExecRoot, "exec directory of a daemon that skep up did not start")
	c.Flags().BoolVar(&keep, "keep-data", true, "keep images, volumes and swarm state; =false leaves the swarm and deletes them")
	return c
}

func (a *app) down(ctx context.Context, dataRoot, execRoot string, keep bool) error {
	i, err := readInstalled(dataRoot)
	if errors.Is(err, os.ErrNotExist) {
		return a.clear(ctx, dataRoot, execRoot, keep)
	}
	if err != nil {
		return err
	}
	if !keep {
		if err := a.leave(ctx, i); err != nil {
			return hint(err, "the node still runs; if its swarm is lost, run `docker swarm leave --force` first")
		}
	}
	a.say("stopping the node and its tasks")
	if i.Unit != "" {
		err = stopUnit(ctx, i.Unit)
	} else {
		err = stopProcess(ctx, i)
	}
	if err != nil {
		return err
	}
	if err := cleanUp(ctx, i); err != nil {
		return err
	}
	if err := a.removeContext(i.Host); err != nil {
		return err
	}
	if keep {
		a.say("the node is down; its data are in %s", i.DataRoot)
		return nil
	}
	if err := emptyDir(i.DataRoot); err != nil {
		return err
	}
	a.say("the node is down and %s is empty", i.DataRoot)
	return nil
}

// clear removes what a daemon left that `skep up` did not start and that has ended.
func (a *app) clear(ctx context.Context, dataRoot, execRoot string, keep bool) error {
	d := Daemon{DataRoot: dataRoot, ExecRoot: execRoot}
	if err := d.checkDirs(); err != nil {
		return err
	}
	left, err := process.Select(func(e process.Entry) bool { return helperOf(e, execRoot, dataRoot) })
	if err != nil {
		return err
	}
	if entries, err := os.ReadDir(execRoot); len(left) == 0 && (errors.Is(err, os.ErrNotExist) || err == nil && len(entries) == 0) {
		a.say("no node is up here: %s does not exist, and %s is empty", recordFile(dataRoot), execRoot)
		return nil
	}
	running, err := process.Select(func(e process.Entry) bool { return daemonOf(e, dataRoot, execRoot) })
	if err != nil {
		return err
	}
	if len(running) > 0 {
		return fmt.Errorf("process %d is a daemon that `skep up` did not start with these directories: stop it first, or give those that `skep up` was given", running[0].PID)
	}
	a.say("removing what a daemon left in %s", execRoot)
	if err := cleanUp(ctx, installed{DataRoot: dataRoot, ExecRoot: execRoot, CgroupParent: DefaultCgroupParent}); err != nil || keep {
		return err
	}
	return emptyDir(dataRoot)
}

// daemonOf reports whether a process is a daemon that works in one of two directories:
// somebody else's data with this exec directory is a daemon that must not be swept away.
func daemonOf(e process.Entry, dataRoot, execRoot string) bool {
	if len(e.Args) < 2 || filepath.Base(e.Args[0]) != "skep" || !slices.Contains(e.Args, "daemon") {
		return false
	}
	return flagOf(e.Args, "--data-root", DefaultDataRoot) == dataRoot || flagOf(e.Args, "--exec-root", DefaultExecRoot) == execRoot
}

// flagOf returns the value of a flag among arguments.
func flagOf(given []string, flag, otherwise string) string {
	for i, arg := range given {
		if value, ok := strings.CutPrefix(arg, flag+"="); ok {
			return value
		}
		if arg == flag && i+1 < len(given) {
			return given[i+1]
		}
	}
	return otherwise
}

// leave takes the node out of its swarm, if it runs and is in one.
func (a *app) leave(ctx context.Context, i installed) error {
	c, err := i.client()
	if err != nil {
		return err
	}
	defer c.Close() //nolint:errcheck // only idle connections
	info, err := c.Info(ctx, client.InfoOptions{})
	if err != nil {
		return nil // it does not run, so nothing can be said to its swarm
	}
	s := info.Info.Swarm
	if s.LocalNodeState == swarm.LocalNodeStateInactive || s.LocalNodeState == "" {
		return nil
	}
	a.say("leaving the swarm")
	if s.ControlAvailable && s.Managers > 1 {
		if err := demote(ctx, c, s.NodeID); err != nil {
			return err
		}
	}
	force := s.ControlAvailable && s.Managers <= 1 || s.LocalNodeState != swarm.LocalNodeStateActive
	if _, err := c.SwarmLeave(ctx, client.SwarmLeaveOptions{Force: force}); err != nil {
		return fmt.Errorf("leave the swarm: %w", err)
	}
	return nil
}

// demote makes this manager a worker and waits until it is one.
func demote(ctx context.Context, c *client.Client, id string) error {
	n, err := c.NodeInspect(ctx, id, client.NodeInspectOptions{})
	if err != nil {
		return fmt.Errorf("demote this manager: %w", err)
	}
	n.Node.Spec.Role = swarm.NodeRoleWorker
	if _, err := c.NodeUpdate(ctx, id, client.NodeUpdateOptions{Version: n.Node.Version, Spec: n.Node.Spec}); err != nil {
		return fmt.Errorf("demote this manager: %w", err)
	}
	for {
		info, err := c.Info(ctx, client.InfoOptions{})
		if err == nil && !info.Info.Swarm.ControlAvailable {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait until this manager is a worker: %w", ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// stopProcess ends the background daemon with its tasks.
func stopProcess(ctx context.Context, i installed) error {
	p, err := process.ReadPIDFile(i.pidFile())
	if errors.Is(err, process.ErrNotRunning) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := p.Signal(unix.SIGUSR1); err != nil && !errors.Is(err, process.ErrNotRunning) {
		return err
	}
	soft, cancel := context.WithTimeout(ctx, stopGrace)
	defer cancel()
	if p.Wait(soft) == nil {
		return nil
	}
	return p.Kill(ctx)
}

// awaitInactive waits until a unit's daemon has ended.
func awaitInactive(ctx context.Context, unit string) error {
	soft, cancel := context.WithTimeout(ctx, stopGrace)
	defer cancel()
	for systemctl(soft, "is-active", "--quiet", unit) == nil {
		select {
		case <-soft.Done():
			return nil // systemd's own time limit decides what happens next
		case <-time.After(200 * time.Millisecond):
		}
	}
	return nil
}

// cleanUp ends and removes what a daemon may have left: its containerd and shims with
// what runs below them, mounts, cgroups, sockets.
func cleanUp(ctx context.Context, i installed) error {
	if err := process.KillAll(ctx, func(e process.Entry) bool { return helperOf(e, i.ExecRoot, i.DataRoot) }); err != nil {
		return fmt.Errorf("end containerd: %w", err)
	}
	for _, dir := range []string{i.ExecRoot, i.DataRoot} {
		if err := process.UnmountBelow(dir); err != nil {
			return err
		}
	}
	_ = process.RemoveCgroups(i.CgroupParent) // stays while another daemon uses it
	if err := emptyDir(i.ExecRoot); err != nil {
		return err
	}
	if i.Host == "" {
		return nil
	}
	return removeFile(i.socket())
}

// helperOf reports whether a process is a containerd, shim or WireGuard device that works
// below one of dirs.
func helperOf(e process.Entry, dirs ...string) bool {
	if len(e.Args) == 0 {
		return false
	}
	name := filepath.Base(e.Args[0])
	device := name == "skep" && len(e.Args) > 1 && e.Args[1] == WireGuardCommand
	if name != "containerd" && !strings.HasPrefix(name, "containerd-shim") && !device {
		return false
	}
	for _, arg := range e.Args[1:] {
		if _, value, ok := strings.Cut(arg, "="); ok && strings.HasPrefix(arg, "-") {
			arg = value
		}
		if slices.ContainsFunc(dirs, func(dir string) bool { return strings.HasPrefix(arg, dir+"/") }) {
			return true
		}
	}
	return false
}

// emptyDir removes what is in a directory but not the directory, which may be a mount.
func emptyDir(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("empty %s: %w", dir, err)
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("empty %s: %w", dir, err)
		}
	}
	return nil
}

func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	return nil
}
