package devnet

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/platform/process"
)

// Config says where dev swarms live and what their nodes run.
type Config struct {
	// Dir holds a directory for each swarm. Keep it short: sockets lie below it, and
	// the kernel allows them 107 characters.
	Dir string
	// Binary is the skep program.
	Binary string
	// Env is the environment of the daemons.
	Env []string
	// DaemonArgs are added to every daemon's arguments, after `daemon` and its defaults.
	DaemonArgs []string
}

// Node is one node of a dev swarm.
type Node struct {
	Name string `json:"name"`
	// Role is manager or worker, as the node was made; docker may promote it later.
	Role string `json:"role"`
	// Socket is the path of the node's API socket, reachable from any namespace.
	Socket string `json:"socket"`
	// Addr is the node's address on the swarm's bridge.
	Addr string `json:"addr"`
	// PID is the daemon's, 0 while it does not run.
	PID int `json:"pid"`
	// State is running or stopped; cut is added while the node's link is down.
	State string `json:"state"`
	// Dir holds the node's data, logs and sockets.
	Dir string `json:"dir"`
	// NetNS is the name of the node's network namespace.
	NetNS string `json:"netns"`

	// runDir holds the exec roots of the swarm's nodes.
	runDir string
}

// Log returns the path of the daemon's log file.
func (n Node) Log() string { return filepath.Join(n.Dir, "daemon.log") }

// DataRoot returns the daemon's data directory.
func (n Node) DataRoot() string { return filepath.Join(n.Dir, "data") }

// ExecRoot returns the daemon's directory of what does not survive a reboot. It is short
// whatever the names are: the sockets of containerd's shims lie below it.
func (n Node) ExecRoot() string { return filepath.Join(n.runDir, n.Name) }

func (n Node) pidFile() string { return filepath.Join(n.Dir, "daemon.pid") }

// Swarm is one dev swarm.
type Swarm struct {
	Name   string
	Subnet netip.Prefix
	Nodes  []Node

	cfg Config
}

// record is what a swarm's file holds.
type record struct {
	Name     string       `json:"name"`
	Subnet   netip.Prefix `json:"subnet"`
	Managers int          `json:"managers"`
	Workers  int          `json:"workers"`
}

// Nodes are named m1…, w1…; swarm names become parts of interface and path names.
const (
	maxNodes = 200
	maxName  = 24
	// maxSocket is the longest path of a unix socket.
	maxSocket = 107
)

func checkName(name string) error {
	if len(name) > maxName || !regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`).MatchString(name) {
		return model.Errorf(model.Invalid, "%q is not a name for a dev swarm: use at most %d of a-z, 0-9 and - inside", name, maxName)
	}
	return nil
}

func (c Config) dir(name string) string { return filepath.Join(c.Dir, name) }

// runDir tells swarms of the same name in different directories apart.
func (c Config) runDir(name string) string {
	sum := sha256.Sum256([]byte(c.dir(name)))
	return filepath.Join("/run/skep-dev", hex.EncodeToString(sum[:4]))
}
func (c Config) file(name string) string { return filepath.Join(c.dir(name), "swarm.json") }

// lock takes the swarm's lock; the returned function gives it back.
func (c Config) lock(ctx context.Context, name string) (func(), error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(c.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("make directory of dev swarms: %w", err)
	}
	path := filepath.Join(c.Dir, "."+name+".lock")
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, fmt.Errorf("open lock: %w", err)
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		// Down removes the file, so what was locked may be no longer the one at path.
		if err == nil && sameFile(f, path) {
			return func() { _ = f.Close() }, nil // closing unlocks
		}
		_ = f.Close()
		if err != nil && !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock dev swarm %s: %w", name, err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for another command on dev swarm %s: %w", name, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func sameFile(f *os.File, path string) bool {
	a, errA := f.Stat()
	b, errB := os.Stat(path)
	return errA == nil && errB == nil && os.SameFile(a, b)
}

// Names returns the names of the swarms under cfg.Dir, sorted.
func Names(cfg Config) ([]string, error) {
	dirs, err := os.ReadDir(cfg.Dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list dev swarms: %w", err)
	}
	var names []string
	for _, d := range dirs {
		if d.IsDir() {
			names = append(names, d.Name())
		}
	}
	slices.Sort(names)
	return names, nil
}

// Open returns a swarm and the present state of its nodes. The error is of the kind
// model.NotFound if there is none of that name.
func Open(cfg Config, name string) (*Swarm, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(cfg.file(name))
	if errors.Is(err, os.ErrNotExist) {
		return nil, model.Errorf(model.NotFound, "there is no dev swarm %s under %s: start one with `skep dev up --name %s`", name, cfg.Dir, name)
	}
	if err != nil {
		return nil, fmt.Errorf("read dev swarm %s: %w", name, err)
	}
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("read dev swarm %s: %w", name, err)
	}
	return build(cfg, r), nil
}

func build(cfg Config, r record) *Swarm {
	s := &Swarm{Name: r.Name, Subnet: r.Subnet, cfg: cfg}
	for i := range r.Managers + r.Workers {
		n := Node{Name: fmt.Sprintf("m%d", i+1), Role: "manager", runDir: cfg.runDir(r.Name)}
		if i >= r.Managers {
			n.Name, n.Role = fmt.Sprintf("w%d", i-r.Managers+1), "worker"
		}
		n.Dir = filepath.Join(cfg.dir(r.Name), n.Name)
		n.Socket = filepath.Join(n.Dir, "skep.sock")
		n.NetNS = "skep-" + r.Name + "-" + n.Name
		n.Addr = hostAddr(r.Subnet, i+2).String()
		n.State = "stopped"
		if p, err := process.ReadPIDFile(n.pidFile()); err == nil {
			n.PID, n.State = p.PID, "running"
		}
		if cut, err := s.isCut(n); err == nil && cut {
			n.State += ",cut"
		}
		s.Nodes = append(s.Nodes, n)
	}
	return s
}

// hostAddr returns the i-th address of a subnet.
func hostAddr(p netip.Prefix, i int) netip.Addr {
	a := p.Masked().Addr()
	for range i {
		a = a.Next()
	}
	return a
}

// Node returns the node of a name; the error names those that exist.
func (s *Swarm) Node(name string) (Node, error) {
	var names []string
	for _, n := range s.Nodes {
		if n.Name == name {
			return n, nil
		}
		names = append(names, n.Name)
	}
	return Node{}, model.Errorf(model.NotFound, "dev swarm %s has no node %q: it has %v", s.Name, name, names)
}

func (s *Swarm) bridgeNS() string { return "skep-" + s.Name }
func (s *Swarm) cgroup() string   { return "/skep-dev/" + s.Name }
