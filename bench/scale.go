package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/wire"
)

const (
	// scaleServices are created one after the other, together they are one load.
	scaleServices = 5
	scaleReplicas = 2000
	// joinsAtOnce bounds the handshakes in flight while simulated nodes join.
	joinsAtOnce = 16
	scaleFiles  = 20000
)

// scaled is what a manager under load tells of one load.
type scaled struct {
	Tasks int `json:"tasks"`
	// Assigned and Running are the seconds from the first service to the last task in
	// that state.
	Assigned float64 `json:"assigned"`
	Running  float64 `json:"running"`
	// CPU is the processor time of the manager until all ran, Deciding that of the
	// scheduler's decisions, in seconds.
	CPU      float64 `json:"cpu"`
	Deciding float64 `json:"deciding"`
	// Resident is the manager's memory at the end in MB, Before that with the nodes only.
	Resident float64 `json:"resident"`
	Before   float64 `json:"before"`
}

// scale measures placements per second and the leader's memory with simulated nodes: the
// manager is a process of its own with a real raft log on disk and a real dispatcher over
// mutual TLS; the nodes, all in this process, do what an agent says on the wire, and
// their tasks run at once.
func (b *bench) scale(ctx context.Context) error {
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: scaleFiles, Max: scaleFiles}); err != nil {
		return fmt.Errorf("allow %d open files: %w", scaleFiles, err)
	}
	var costs []float64
	for field := range strings.SplitSeq(b.nodes, ",") {
		n, err := strconv.Atoi(field)
		if err != nil {
			return fmt.Errorf("nodes: %w", err)
		}
		s, err := b.scaleWith(ctx, n)
		if err != nil {
			return fmt.Errorf("%d nodes: %w", n, err)
		}
		tasks := float64(s.Tasks)
		name := fmt.Sprintf("d. %d nodes, %d tasks: ", n, s.Tasks)
		b.add(row{name + "placements", tasks / s.Assigned, "/s", "from the request to the last task assigned, in the log", ">= 2000"})
		b.add(row{name + "tasks running", tasks / s.Running, "/s", "from the request to the last status, in the log", ""})
		b.add(row{name + "deciding where", 1e6 * s.Deciding / tasks, "µs/task", "the scheduler alone", "flat"})
		b.add(row{name + "leader's processor", 1e6 * s.CPU / tasks, "µs/task", "user and system, from the request to running", "flat"})
		b.add(row{name + "leader's memory", s.Resident, "MB", fmt.Sprintf("%.0f MB before the tasks", s.Before), ""})
		costs = append(costs, s.CPU/tasks)
	}
	if len(costs) > 1 {
		b.add(row{"d. cost of a placement, most to fewest nodes", costs[len(costs)-1] / costs[0], "x", "leader's processor time", "flat"})
	}
	return nil
}

func (b *bench) scaleWith(ctx context.Context, n int) (*scaled, error) {
	dir := filepath.Join(b.work, fmt.Sprint("scale", n))
	ids, err := writeScaleSwarm(dir, n)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	m, err := startScaleManager(ctx, dir)
	if err != nil {
		return nil, err
	}
	defer m.stop()
	begin := time.Now()
	var nodes sync.WaitGroup
	defer nodes.Wait()
	defer cancel()
	if err := joinAll(ctx, &nodes, m.addr, ids, nil); err != nil {
		return nil, err
	}
	fmt.Fprintf(os.Stderr, "%d nodes joined in %.1f s\n", n, time.Since(begin).Seconds())
	s := new(scaled)
	return s, m.ask("load", s)
}

// joinAll starts the simulated nodes, with data planes unless there are none, and returns
// when all have a session.
func joinAll(ctx context.Context, group *sync.WaitGroup, addr string, ids []*wire.Credentials, planes []*netNode) error {
	slots := make(chan struct{}, joinsAtOnce)
	joined := make(chan error, 2*len(ids))
	var complain sync.Once // of many with the same trouble, one is heard
	for i, creds := range ids {
		var plane *netNode
		if planes != nil {
			plane = planes[i]
		}
		slots <- struct{}{}
		group.Go(func() {
			once := sync.OnceFunc(func() { <-slots })
			defer once()
			err := simulate(ctx, addr, creds, plane, func() { joined <- nil; once() })
			if err != nil && ctx.Err() == nil {
				complain.Do(func() { fmt.Fprintln(os.Stderr, "simulated node:", err) })
				joined <- err
			}
		})
	}
	for range ids {
		select {
		case err := <-joined:
			if err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// scaleSwarm is what a manager under load is told to begin with.
type scaleSwarm struct {
	ClusterID  string
	ManagerID  string
	NodeIDs    []string
	Root, Key  []byte // the swarm's CA
	Chain, Own []byte // the manager's certificate and key
}

// writeScaleSwarm makes the identities of a swarm and leaves them for its manager.
func writeScaleSwarm(dir string, n int) ([]*wire.Credentials, error) {
	root, err := pki.NewRoot(rand.Reader, time.Now())
	if err != nil {
		return nil, err
	}
	s := &scaleSwarm{Root: root.CertPEM, Key: root.KeyPEM}
	for _, id := range []*string{&s.ClusterID, &s.ManagerID} {
		if *id, err = model.NewID(rand.Reader); err != nil {
			return nil, err
		}
	}
	issue := func(id, role string) (chain, own []byte, creds *wire.Credentials, err error) {
		key, err := pki.NewKey(rand.Reader)
		if err != nil {
			return nil, nil, nil, err
		}
		csr, err := pki.NewCSR(rand.Reader, key)
		if err != nil {
			return nil, nil, nil, err
		}
		chain, err = root.Issue(rand.Reader, time.Now(), csr, pki.Leaf{NodeID: id, ClusterID: s.ClusterID, OU: role})
		if err != nil {
			return nil, nil, nil, err
		}
		if own, err = pki.EncodeKey(key); err != nil {
			return nil, nil, nil, err
		}
		material, err := wire.NewMaterial(root, chain, key)
		if err != nil {
			return nil, nil, nil, err
		}
		creds = new(wire.Credentials)
		creds.Set(material)
		return chain, own, creds, nil
	}
	if s.Chain, s.Own, _, err = issue(s.ManagerID, pki.ManagerRole); err != nil {
		return nil, err
	}
	all := make([]*wire.Credentials, n)
	for i := range all {
		id, err := model.NewID(rand.Reader)
		if err != nil {
			return nil, err
		}
		s.NodeIDs = append(s.NodeIDs, id)
		if _, _, all[i], err = issue(id, pki.WorkerRole); err != nil {
			return nil, err
		}
	}
	data, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return all, os.WriteFile(filepath.Join(dir, "swarm.json"), data, 0o600)
}

// scaleProcess is the manager under load.
type scaleProcess struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Reader
	addr string
}

func startScaleManager(ctx context.Context, dir string) (*scaleProcess, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &scaleProcess{cmd: exec.CommandContext(ctx, self, "-scale-manager", dir)}
	p.cmd.Stderr = os.Stderr
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.out = bufio.NewReader(out)
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	return p, p.read(&p.addr)
}

// ask sends a command and reads its answer.
func (p *scaleProcess) ask(command string, answer any) error {
	if _, err := fmt.Fprintln(p.in, command); err != nil {
		return err
	}
	return p.read(answer)
}

func (p *scaleProcess) read(answer any) error {
	line, err := p.out.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("manager under load: %w", err)
	}
	return json.Unmarshal(line, answer)
}

// stop ends the manager; its end of the pipe tells it.
func (p *scaleProcess) stop() {
	_ = p.in.Close()
	_ = p.cmd.Wait()
}
