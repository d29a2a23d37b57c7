package containerd

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	ctd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/oci"
	"golang.org/x/sys/unix"
)

// idleGroup is how long the current shim stays when it serves nothing.
const idleGroup = time.Minute

// groups keeps the shims: each serves at most Config.GroupSize containers. New
// containers go to the current one; former ones drain.
type groups struct {
	e     *Engine
	turn  chan struct{} // holds one token; who has it may make a group
	mu    sync.Mutex
	all   map[string]*group
	focus *group // nil when the next container needs a new one
}

// group is one shim. groups.mu guards it.
type group struct {
	id    string
	n     int
	empty time.Time // since when nothing is in it
	bad   bool
}

func newGroups(e *Engine) *groups {
	g := &groups{e: e, turn: make(chan struct{}, 1), all: map[string]*group{}}
	g.turn <- struct{}{}
	return g
}

func (g *groups) socket(id string) string { return filepath.Join(g.e.stateDir("a"), id) }

// join returns a group with room for one more and counts the caller in.
func (g *groups) join(ctx context.Context) (*group, error) {
	if got := g.tryJoin(); got != nil {
		return got, nil
	}
	select {
	case <-g.turn:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { g.turn <- struct{}{} }()
	if got := g.tryJoin(); got != nil {
		return got, nil
	}
	var b [6]byte
	if _, err := rand.Read(b[:]); err != nil {
		return nil, fmt.Errorf("make shim id: %w", err)
	}
	id := hex.EncodeToString(b[:])
	s, err := g.e.client.NewSandbox(ctx, id,
		ctd.WithSandboxRuntime(shimPath(g.e.cfg), g.e.runcOptions(0, 0)),
		ctd.WithSandboxSpec(&oci.Spec{Version: ociVersion}))
	if err == nil {
		err = s.Start(ctx)
	}
	if err != nil {
		g.stop(context.WithoutCancel(ctx), id) // or its record stays
		g.e.killShim(ctx, id)
		return nil, fmt.Errorf("start shim: %w", err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.focus = &group{id: id, n: 1}
	g.all[id] = g.focus
	return g.focus, nil
}

func (g *groups) tryJoin() *group {
	g.mu.Lock()
	defer g.mu.Unlock()
	f := g.focus
	if f == nil || f.bad || f.n >= g.e.cfg.GroupSize {
		return nil
	}
	f.n++
	return f
}

// adopt counts a container that a former process put into group id.
func (g *groups) adopt(id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	x := g.all[id]
	if x == nil {
		x = &group{id: id}
		g.all[id] = x
	}
	x.n++
}

// leave counts a container out. bad keeps others from joining.
func (g *groups) leave(id string, bad bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	x := g.all[id]
	if x == nil {
		return
	}
	x.n--
	x.bad = x.bad || bad
	if x.n <= 0 {
		x.empty = time.Now()
	}
}

// reap ends shims that serve nothing until ctx ends.
func (g *groups) reap(ctx context.Context) error {
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			g.sweep(ctx, time.Now())
		case <-ctx.Done():
			return nil
		}
	}
}

func (g *groups) sweep(ctx context.Context, now time.Time) {
	var end []string
	g.mu.Lock()
	for id, x := range g.all {
		if x.n > 0 || x == g.focus && !x.bad && now.Sub(x.empty) < idleGroup {
			continue
		}
		if x == g.focus {
			g.focus = nil
		}
		delete(g.all, id)
		end = append(end, id)
	}
	g.mu.Unlock()
	for _, id := range end {
		g.stop(ctx, id)
	}
}

// shutdown ends every shim that serves nothing.
func (g *groups) shutdown(ctx context.Context) {
	g.mu.Lock()
	g.focus = nil
	g.mu.Unlock()
	g.sweep(ctx, time.Now())
}

func (g *groups) stop(ctx context.Context, id string) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	s, err := g.e.client.LoadSandbox(ctx, id)
	if err == nil {
		err = s.Stop(ctx)
	}
	if err == nil {
		err = s.Shutdown(ctx)
	}
	if err != nil {
		g.e.log.LogAttrs(ctx, slog.LevelDebug, "shim did not end cleanly", slog.String("group_id", id), slog.Any("error", err))
		// A shim that is gone already leaves its record.
		_ = g.e.client.SandboxStore().Delete(ctx, id) // tried again at the next start
	}
}

// killShim ends the process of a shim that does not serve: containerd knows no other way
// to end one than to ask it.
func (e *Engine) killShim(ctx context.Context, id string) {
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return
	}
	for _, p := range procs {
		b, err := os.ReadFile(p)
		argv := strings.Split(string(b), "\x00")
		at := slices.Index(argv, "-id")
		if err != nil || argv[0] != shimPath(e.cfg) || at < 0 || at+1 >= len(argv) || argv[at+1] != id {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(p)))
		if err == nil {
			err = unix.Kill(pid, unix.SIGKILL)
		}
		e.log.LogAttrs(ctx, slog.LevelWarn, "killed shim that does not serve", slog.String("group_id", id), slog.Int("pid", pid), slog.Any("error", err))
	}
}

// find learns of shims that a former process left and are empty, so that reap ends them.
func (g *groups) find(ctx context.Context) error {
	list, err := g.e.client.SandboxStore().List(ctx)
	if err != nil {
		return fmt.Errorf("list shims: %w", err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, s := range list {
		if g.all[s.ID] == nil {
			g.all[s.ID] = &group{id: s.ID}
		}
	}
	return nil
}

func (e *Engine) runcOptions(uid, gid uint32) *runcoptions.Options {
	return &runcoptions.Options{BinaryName: e.oci.path, Root: e.stateDir("r"), IoUid: uid, IoGid: gid}
}

// condemn keeps others from joining a group that does not work. It reports whether there
// is such a group.
func (g *groups) condemn(id string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	x := g.all[id]
	if x != nil {
		x.bad = true
	}
	return x != nil
}
