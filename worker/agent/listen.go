package agent

import (
	"context"
	"log/slog"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/lifecycle"
	"github.com/skep-dev/skep/worker/runtime"
)

const (
	// lookFirst and lookLast are the pauses between looks at a task that is to listen: they
	// double, since most listen at once and a few never do.
	lookFirst = 5 * time.Millisecond
	lookLast  = 100 * time.Millisecond
)

// listening waits, for a bounded time, until a task that others are led to listens, or has
// ended. Its state tells managers that they may lead there and stop the task that it
// replaces, or the next one of an update, so it is the state that waits.
func (m *managed) listening(ctx context.Context, task *api.Task, c *container.InspectResponse, exit <-chan runtime.WaitResult) (*container.InspectResponse, error) {
	expected := lifecycle.Expected(task, exposed(c))
	started, err := time.Parse(time.RFC3339Nano, c.State.StartedAt)
	if m.w.cfg.Networks == nil || !spansNodes(task) || expected.None() || err != nil {
		return c, nil
	}
	late := time.NewTimer(min(time.Until(started.Add(lifecycle.ListenWait)), lifecycle.ListenWait)) // clocks are set
	defer late.Stop()
	for wait := lookFirst; ; wait = min(2*wait, lookLast) {
		sockets, err := m.w.cfg.Networks.Listening(c.ID)
		if err != nil { // of a container that ended, or on a kernel that does not tell
			m.log.Debug("cannot see whether the task listens", slog.Any("error", err))
			return m.w.cfg.Engine.Inspect(ctx, c.ID)
		}
		if expected.Met(sockets) {
			return c, nil
		}
		select {
		case <-exit:
			return m.w.cfg.Engine.Inspect(ctx, c.ID)
		case <-late.C:
			m.log.Info("task does not listen where it publishes or exposes ports, and is led to all the same")
			return c, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(wait):
		}
	}
}

// exposed are the ports that a container's image and configuration expose.
func exposed(c *container.InspectResponse) []lifecycle.Port {
	if c.Config == nil {
		return nil
	}
	var out []lifecycle.Port
	for p := range c.Config.ExposedPorts {
		switch p.Proto() {
		case network.TCP:
			out = append(out, lifecycle.Port{Protocol: unix.IPPROTO_TCP, Number: p.Num()})
		case network.UDP:
			out = append(out, lifecycle.Port{Protocol: unix.IPPROTO_UDP, Number: p.Num()})
		case network.SCTP: // not watched
		}
	}
	return out
}
