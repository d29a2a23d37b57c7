package shim

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/manager"
	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/task"
	ctdshim "github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"github.com/containerd/ttrpc"
)

// RuntimeName is the name under which containerd knows the shim.
const RuntimeName = "io.containerd.skep.v1"

// Run is the shim's main: it follows the command line that containerd gives and does
// not return to a shim that serves before its tasks are gone.
func Run(ctx context.Context) {
	// Packages linked in register plugins of the server, which must not start here.
	registry.Reset()
	registry.Register(&plugin.Registration{
		Type:     plugins.TTRPCPlugin,
		ID:       "task",
		Requires: []plugin.Type{plugins.EventPlugin, plugins.InternalPlugin},
		InitFn: func(ic *plugin.InitContext) (any, error) {
			publisher, stop, err := services(ic)
			if err != nil {
				return nil, err
			}
			inner, err := task.NewTaskService(ic.Context, publisher, stop)
			if err != nil {
				return nil, err
			}
			go reap(ic.Context)
			tasks := NewTasks(ic.Context, inner)
			return &both{tasks: tasks, sandbox: newSandbox(tasks, stop)}, nil
		},
	})
	ctdshim.RunShim(ctx, manager.NewShimManager(RuntimeName), func(c *ctdshim.Config) { c.NoReaper = true })
}

// both registers the two services of the shim.
type both struct {
	tasks   *Tasks
	sandbox *sandbox
}

// RegisterTTRPC registers the services with the shim's server.
func (b *both) RegisterTTRPC(server *ttrpc.Server) error {
	if err := b.tasks.RegisterTTRPC(server); err != nil {
		return err
	}
	return b.sandbox.RegisterTTRPC(server)
}

func services(ic *plugin.InitContext) (ctdshim.Publisher, shutdown.Service, error) {
	p, err := ic.GetByID(plugins.EventPlugin, "publisher")
	if err != nil {
		return nil, nil, fmt.Errorf("find publisher: %w", err)
	}
	s, err := ic.GetByID(plugins.InternalPlugin, "shutdown")
	if err != nil {
		return nil, nil, fmt.Errorf("find shutdown service: %w", err)
	}
	return p.(ctdshim.Publisher), s.(shutdown.Service), nil
}
