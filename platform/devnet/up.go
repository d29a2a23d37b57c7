package devnet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/platform/process"
)

// Up makes a swarm of managers and workers: namespaces, links and started daemons. Then
// form makes them one swarm. If anything fails, what was made is left for a look, and
// Down removes it.
func Up(ctx context.Context, cfg Config, name string, managers, workers int, form func(context.Context, *Swarm) error) (*Swarm, error) {
	switch {
	case managers < 1:
		return nil, model.Errorf(model.Invalid, "a swarm needs at least one manager")
	case workers < 0 || managers+workers > maxNodes:
		return nil, model.Errorf(model.Invalid, "a dev swarm has 1 to %d nodes", maxNodes)
	}
	unlock, err := cfg.lock(ctx, name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if _, err := Open(cfg, name); err == nil {
		return nil, model.Errorf(model.Exists, "dev swarm %s exists: remove it with `skep dev down --name %s`", name, name)
	} else if model.KindOf(err) != model.NotFound {
		return nil, err
	}
	subnet, err := freeSubnet(cfg)
	if err != nil {
		return nil, err
	}
	r := record{Name: name, Subnet: subnet, Managers: managers, Workers: workers}
	if err := write(cfg, r); err != nil {
		return nil, err
	}
	s := build(cfg, r)
	if longest := s.Nodes[len(s.Nodes)-1].Socket; len(longest) > maxSocket {
		return nil, model.Errorf(model.Invalid, "the path %s is longer than the %d characters that the kernel allows for sockets: choose a shorter --dir or --name", longest, maxSocket)
	}
	if err := s.makeBridge(); err != nil {
		return nil, err
	}
	for _, n := range s.Nodes {
		if err := s.plug(n); err != nil {
			return nil, err
		}
		if err := s.launch(n); err != nil {
			return nil, err
		}
	}
	for _, n := range s.Nodes {
		if err := s.await(ctx, n); err != nil {
			return nil, err
		}
	}
	if err := form(ctx, s); err != nil {
		return nil, err
	}
	return Open(cfg, name)
}

func write(cfg Config, r record) error {
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("write dev swarm %s: %w", r.Name, err)
	}
	if err := os.MkdirAll(cfg.dir(r.Name), 0o755); err != nil {
		return fmt.Errorf("make directory of dev swarm: %w", err)
	}
	if err := os.WriteFile(cfg.file(r.Name), append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("write dev swarm %s: %w", r.Name, err)
	}
	return nil
}

// Start starts the daemon of a node that was killed and waits until its API answers.
func (s *Swarm) Start(ctx context.Context, name string) error {
	unlock, err := s.cfg.lock(ctx, s.Name)
	if err != nil {
		return err
	}
	defer unlock()
	n, err := s.Node(name)
	if err != nil {
		return err
	}
	if p, err := process.ReadPIDFile(n.pidFile()); err == nil {
		return model.Errorf(model.Exists, "node %s runs already, as process %d", name, p.PID)
	}
	if netnsInode(n.NetNS) == 0 {
		if err := removeNetNS(n.NetNS); err != nil {
			return err
		}
		if err := s.plug(n); err != nil {
			return err
		}
	}
	if err := s.launch(n); err != nil {
		return err
	}
	return s.await(ctx, n)
}

// launch starts a node's daemon without waiting for it.
func (s *Swarm) launch(n Node) error {
	for _, dir := range []string{n.Dir, n.DataRoot(), n.ExecRoot()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("make directory of %s: %w", n.Name, err)
		}
	}
	if err := os.Remove(n.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove old socket of %s: %w", n.Name, err)
	}
	args := []string{
		"daemon", "--data-root", n.DataRoot(), "--exec-root", n.ExecRoot(), "--host", "unix://" + n.Socket,
		"--advertise-addr", n.Addr, "--cgroup-parent", s.cgroup() + "/" + n.Name,
	}
	p, err := process.Start(process.Command{
		Path: s.cfg.Binary, Args: append(args, s.cfg.DaemonArgs...), Env: s.cfg.Env, Dir: "/", Log: n.Log(),
		Enter: func() error { return enter(filepath.Join(netnsDir, n.NetNS), n.Name) },
	})
	if err != nil {
		return fmt.Errorf("start node %s: %w", n.Name, err)
	}
	return p.WritePIDFile(n.pidFile())
}

// await waits until a node's API answers; a daemon that ends instead is an error with
// the last lines of its log.
func (s *Swarm) await(ctx context.Context, n Node) error {
	p, err := process.ReadPIDFile(n.pidFile())
	for err == nil {
		if process.Ping(ctx, n.Socket) == nil {
			return nil
		}
		if !p.Alive() {
			err = process.ErrNotRunning
			break
		}
		select {
		case <-ctx.Done():
			err = ctx.Err()
		case <-time.After(30 * time.Millisecond):
		}
	}
	return fmt.Errorf("wait for node %s: %w; the end of %s:\n%s", n.Name, err, n.Log(), strings.TrimSpace(process.Tail(n.Log(), 2000)))
}
