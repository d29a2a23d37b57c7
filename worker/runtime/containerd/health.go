package containerd

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/runtime/docker"
)

// maxHealthOutput bounds what is kept of a health check's output.
const maxHealthOutput = 4096

func initialHealth(cfg *container.Config) *container.Health {
	if _, ok := docker.HealthCheck(cfg.Healthcheck); !ok {
		return nil
	}
	return &container.Health{Status: container.Starting, Log: []*container.HealthcheckResult{}}
}

// watchHealth begins to check a running container that has a health check. A container
// found again goes on from the health it had.
func (e *Engine) watchHealth(c *record) {
	s := e.view(c)
	check, ok := docker.HealthCheck(s.Config.Healthcheck)
	if !ok {
		return
	}
	ctx, cancel := context.WithCancel(e.life)
	e.mu.Lock()
	if c.watching != nil {
		c.watching()
	}
	c.watching = cancel
	if c.Health == nil {
		c.Health = initialHealth(c.Config)
	}
	e.mu.Unlock()
	e.background(func(context.Context) { e.checkHealth(ctx, c, check, s.Started) })
}

func (e *Engine) stopHealth(c *record) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if c.watching != nil {
		c.watching()
		c.watching = nil
	}
}

// checkHealth probes until ctx ends.
func (e *Engine) checkHealth(ctx context.Context, c *record, check docker.Check, started time.Time) {
	for {
		h := e.view(c).Health
		if h == nil {
			return
		}
		t := time.NewTimer(check.Delay(*h, time.Since(started)))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
		if e.view(c).Status == container.StatePaused {
			continue
		}
		result := e.probe(ctx, c, check)
		if ctx.Err() != nil {
			return
		}
		e.judge(ctx, c, check, result, time.Since(started))
	}
}

func (e *Engine) judge(ctx context.Context, c *record, check docker.Check, result container.HealthcheckResult, uptime time.Duration) {
	label := "success"
	if result.ExitCode != 0 {
		label = "failure"
	}
	e.metrics.health.WithLabelValues(label).Inc()
	e.mu.Lock()
	if c.Health == nil || !c.running() {
		e.mu.Unlock()
		return
	}
	before := c.Health.Status
	next := check.Judge(*c.Health, result, uptime)
	c.Health = &next
	s := c.saved
	e.mu.Unlock()
	if next.Status == before {
		return
	}
	if err := e.save(s); err != nil {
		e.log.LogAttrs(ctx, slog.LevelError, "health was not saved", slog.String("container_id", c.id), slog.Any("error", err))
	}
	e.emit(c, events.ActionHealthStatus+events.Action(": "+next.Status))
}

// limited keeps the first bytes written to it.
type limited struct {
	mu sync.Mutex
	b  []byte
}

func (l *limited) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if room := maxHealthOutput - len(l.b); room > 0 {
		l.b = append(l.b, p[:min(room, len(p))]...)
	}
	return len(p), nil
}

func (l *limited) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.b)
}

// probe runs a health check once.
func (e *Engine) probe(ctx context.Context, c *record, check docker.Check) container.HealthcheckResult {
	result := container.HealthcheckResult{Start: time.Now()}
	s := e.view(c)
	argv := check.Argv
	if check.Shell {
		shell := s.Config.Shell
		if len(shell) == 0 {
			shell = []string{"/bin/sh", "-c"}
		}
		argv = append(append([]string{}, shell...), check.Argv...)
	}
	out := &limited{}
	code, err := e.runProbe(ctx, c, s, argv, check.Timeout, out)
	result.End, result.ExitCode, result.Output = time.Now(), code, out.String()
	if err != nil {
		result.ExitCode = -1
		result.Output = err.Error()
	}
	return result
}

func (e *Engine) runProbe(ctx context.Context, c *record, s saved, argv []string, timeout time.Duration, out *limited) (int, error) {
	id, err := docker.NewContainerID(rand.Reader)
	if err != nil {
		return 0, err
	}
	// It is no exec that anybody can find: probes would crowd out a person's.
	x := &execRecord{id: id, c: c, req: &container.ExecCreateRequest{Cmd: argv}, started: true}
	run, err := e.runExec(ctx, x, s, runtime.Stdio{Stdout: out, Stderr: out}, true)
	if err != nil {
		return 0, err
	}
	t := time.NewTimer(timeout)
	defer t.Stop()
	select {
	case st := <-run.exit:
		e.deleteExec(context.WithoutCancel(ctx), run)
		code, _, err := st.Result()
		return int(code), err
	case <-t.C:
		err = fmt.Errorf("Health check exceeded timeout (%v): %s", timeout, out) //nolint:staticcheck // Docker's words
	case <-ctx.Done():
		err = ctx.Err()
	}
	rest, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if kerr := killExec(rest, run); kerr != nil {
		return 0, err
	}
	select {
	case <-run.exit:
		e.deleteExec(rest, run)
	case <-rest.Done():
	}
	return 0, err
}
