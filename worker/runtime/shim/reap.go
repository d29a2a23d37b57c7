package shim

import (
	"context"
	"os"
	"os/signal"

	"github.com/containerd/containerd/v2/pkg/sys/reaper"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// reap collects ended children until ctx ends. Each signal has a goroutine of its own: one
// that tells of an exit waits up to a second for whoever is behind with earlier ones, and
// what that one waits for may be the exit that comes next. Goroutines are bounded by the
// children there were.
func reap(ctx context.Context) {
	ended := make(chan os.Signal, 32)
	signal.Notify(ended, unix.SIGCHLD)
	defer signal.Stop(ended)
	for {
		select {
		case <-ctx.Done():
			return
		case <-ended:
			go func() {
				if err := reaper.Reap(); err != nil {
					log.G(ctx).WithError(err).Error("collect ended children")
				}
			}()
		}
	}
}
