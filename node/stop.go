package node

import (
	"context"
	"errors"
)

// ErrStopTasks is the cause to cancel Run's context with to have it stop the containers
// as if StopTasks were set.
var ErrStopTasks = errors.New("the daemon and its tasks shall stop")

// stopsTasks reports whether the containers go with the daemon.
func (c *Config) stopsTasks(ctx context.Context) bool {
	return c.StopTasks || errors.Is(context.Cause(ctx), ErrStopTasks)
}
