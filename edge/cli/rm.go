package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

func (a *app) rmCommand() *cobra.Command {
	var detach bool
	var timeout time.Duration
	c := &cobra.Command{
		Use:   "rm STACK…",
		Short: "Remove stacks: their services, secrets and configs (volumes stay)",
		Args:  args(1, -1),
		RunE: func(c *cobra.Command, given []string) error {
			d, _, err := a.manager(c.Context())
			if err != nil {
				return err
			}
			defer d.Close() //nolint:errcheck // only idle connections
			ctx, cancel := context.WithTimeout(c.Context(), timeout)
			defer cancel()
			for _, stack := range given {
				if err := a.removeStack(ctx, d, stack, detach); err != nil {
					return err
				}
			}
			return nil
		},
	}
	c.Flags().BoolVarP(&detach, "detach", "d", false, "do not wait until the tasks are gone")
	c.Flags().DurationVar(&timeout, "timeout", 2*time.Minute, "give up waiting after this time")
	return c
}

func (a *app) removeStack(ctx context.Context, d *client.Client, stack string, detach bool) error {
	services, err := d.ServiceList(ctx, client.ServiceListOptions{Filters: ofStack(stack)})
	if err != nil {
		return fmt.Errorf("list services: %w", err)
	}
	secrets, err := d.SecretList(ctx, client.SecretListOptions{Filters: ofStack(stack)})
	if err != nil {
		return fmt.Errorf("list secrets: %w", err)
	}
	configs, err := d.ConfigList(ctx, client.ConfigListOptions{Filters: ofStack(stack)})
	if err != nil {
		return fmt.Errorf("list configs: %w", err)
	}
	networks, err := d.NetworkList(ctx, client.NetworkListOptions{Filters: ofStack(stack)})
	if err != nil {
		return fmt.Errorf("list networks: %w", err)
	}
	if len(services.Items)+len(secrets.Items)+len(configs.Items)+len(networks.Items) == 0 {
		return noStack(ctx, d, stack)
	}
	for _, s := range services.Items {
		_, err := d.ServiceRemove(ctx, s.ID, client.ServiceRemoveOptions{})
		if err := a.removed(err, "service", s.Spec.Name); err != nil {
			return err
		}
	}
	for _, s := range secrets.Items {
		_, err := d.SecretRemove(ctx, s.ID, client.SecretRemoveOptions{})
		if err := a.removed(err, "secret", s.Spec.Name); err != nil {
			return err
		}
	}
	for _, c := range configs.Items {
		_, err := d.ConfigRemove(ctx, c.ID, client.ConfigRemoveOptions{})
		if err := a.removed(err, "config", c.Spec.Name); err != nil {
			return err
		}
	}
	for _, n := range networks.Items { // tasks that are still stopping do not hinder it
		_, err := d.NetworkRemove(ctx, n.ID, client.NetworkRemoveOptions{})
		if err := a.removed(err, "network", n.Name); err != nil {
			return err
		}
	}
	if detach {
		return nil
	}
	return a.awaitGone(ctx, d, stack)
}

// removed reports one removal; what is gone already counts as removed.
func (a *app) removed(err error, kind, name string) error {
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("remove %s %s: %w", kind, name, err)
	}
	a.say("removed %s %s", kind, name)
	return nil
}

// noStack says what the name may have meant.
func noStack(ctx context.Context, d *client.Client, stack string) error {
	if _, err := d.ServiceInspect(ctx, stack, client.ServiceInspectOptions{}); err == nil {
		return fmt.Errorf("%s is a service, not a stack: remove it with `docker service rm %s`", stack, stack)
	}
	return fmt.Errorf("there is no stack %s: `skep ls` lists all services", stack)
}

// awaitGone waits until no task of the stack is left running.
func (a *app) awaitGone(ctx context.Context, d *client.Client, stack string) error {
	out := a.live()
	for shown := false; ; shown = true {
		tasks, err := d.TaskList(ctx, client.TaskListOptions{Filters: ofStack(stack)})
		if err != nil {
			return fmt.Errorf("list tasks: %w", err)
		}
		left := 0
		for _, t := range tasks.Items {
			if !finished(t.Status.State) {
				left++
			}
		}
		if left > 0 || shown {
			out.show([]string{"stopping " + plural(left, "task")})
		}
		if left == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s of %s still to stop: %w", plural(left, "task"), stack, ctx.Err())
		case <-time.After(pollEvery):
		}
	}
}
