package devnet

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/platform/process"
)

// Kill ends a node's daemon with SIGKILL; its containers do not notice. With everything,
// containerd, shims and containers die too and what lives in memory is gone, as when
// the machine loses power.
func (s *Swarm) Kill(ctx context.Context, name string, everything bool) error {
	unlock, err := s.cfg.lock(ctx, s.Name)
	if err != nil {
		return err
	}
	defer unlock()
	n, err := s.Node(name)
	if err != nil {
		return err
	}
	p, err := process.ReadPIDFile(n.pidFile())
	switch {
	case err == nil:
		if err := p.Kill(ctx); err != nil {
			return fmt.Errorf("kill node %s: %w", name, err)
		}
	case !errors.Is(err, process.ErrNotRunning):
		return err
	case !everything:
		return model.Errorf(model.Precondition, "node %s does not run", name)
	}
	if !everything {
		return nil
	}
	return s.wipe(ctx, n)
}

// wipe ends every process of a node and removes what a reboot would remove.
func (s *Swarm) wipe(ctx context.Context, n Node) error {
	if err := process.KillAll(ctx, s.owns(n)); err != nil {
		return fmt.Errorf("end processes of %s: %w", n.Name, err)
	}
	for _, dir := range []string{n.Dir, n.ExecRoot()} {
		if err := process.UnmountBelow(dir); err != nil {
			return err
		}
	}
	if err := removeNetNS(n.NetNS); err != nil {
		return err
	}
	if err := os.RemoveAll(n.ExecRoot()); err != nil {
		return fmt.Errorf("remove what %s had in memory: %w", n.Name, err)
	}
	return process.RemoveCgroups(s.cgroup() + "/" + n.Name)
}

// owns accepts the processes of a node: those in its network namespace (daemon,
// containerd, shims) and in its cgroups (containers).
func (s *Swarm) owns(n Node) func(process.Entry) bool {
	inode := netnsInode(n.NetNS)
	cgroup := s.cgroup() + "/" + n.Name
	return func(e process.Entry) bool {
		if inode != 0 && e.NetNS == inode {
			return true
		}
		return slices.ContainsFunc(e.Cgroups, func(c string) bool { return c == cgroup || strings.HasPrefix(c, cgroup+"/") })
	}
}

// Down removes a swarm: processes, mounts, namespaces, cgroups and files. It finishes
// what an earlier Up or Down left, and does nothing where nothing is.
func Down(ctx context.Context, cfg Config, name string) error {
	unlock, err := cfg.lock(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	s, err := Open(cfg, name)
	if err != nil && model.KindOf(err) != model.NotFound {
		return err
	}
	if err == nil {
		for _, n := range s.Nodes {
			if err := s.wipe(ctx, n); err != nil {
				return err
			}
		}
		if err := removeNetNS(s.bridgeNS()); err != nil {
			return err
		}
		if err := process.RemoveCgroups(s.cgroup()); err != nil {
			return err
		}
	}
	for _, dir := range []string{cfg.dir(name), cfg.runDir(name)} {
		if err := process.UnmountBelow(dir); err != nil {
			return err
		}
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("remove dev swarm %s: %w", name, err)
		}
	}
	_ = process.RemoveCgroups("/skep-dev") // stays while other swarms use it
	_ = os.Remove(filepath.Join(cfg.Dir, "."+name+".lock"))
	return nil
}
