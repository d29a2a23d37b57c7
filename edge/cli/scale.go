package cli

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

func (a *app) scaleCommand() *cobra.Command {
	var detach bool
	var timeout time.Duration
	c := &cobra.Command{
		Use:   "scale SERVICE=N…",
		Short: "Change how many tasks services have, and wait until they run",
		Args:  args(1, -1),
		RunE: func(c *cobra.Command, given []string) error {
			counts := map[string]uint64{}
			var order []string
			for _, g := range given {
				name, count, err := parseScale(g)
				if err != nil {
					return err
				}
				counts[name] = count
				order = append(order, name)
			}
			d, _, err := a.manager(c.Context())
			if err != nil {
				return err
			}
			defer d.Close() //nolint:errcheck // only idle connections
			var ids []string
			for _, name := range order {
				id, err := scale(c.Context(), d, name, counts[name])
				if err != nil {
					return err
				}
				ids = append(ids, id)
			}
			if detach {
				return nil
			}
			ctx, cancel := context.WithTimeout(c.Context(), timeout)
			defer cancel()
			return a.converge(ctx, d, ids)
		},
	}
	c.Flags().BoolVarP(&detach, "detach", "d", false, "do not wait")
	c.Flags().DurationVar(&timeout, "timeout", 5*time.Minute, "give up waiting after this time")
	return c
}

func parseScale(s string) (name string, count uint64, err error) {
	name, n, ok := strings.Cut(s, "=")
	if !ok || name == "" {
		return "", 0, fmt.Errorf("%q is not SERVICE=N", s)
	}
	count, err = strconv.ParseUint(n, 10, 32)
	if err != nil {
		return "", 0, fmt.Errorf("%q is not a number of tasks: write SERVICE=N", n)
	}
	return name, count, nil
}

// scale sets the number of tasks of one service and returns its id.
func scale(ctx context.Context, d *client.Client, name string, count uint64) (string, error) {
	var id string
	err := retryConflict(ctx, func() error {
		s, err := d.ServiceInspect(ctx, name, client.ServiceInspectOptions{})
		if err != nil {
			return fmt.Errorf("scale %s: %w", name, err)
		}
		id = s.Service.ID
		mode := &s.Service.Spec.Mode
		switch {
		case mode.Replicated != nil:
			mode.Replicated.Replicas = &count
		case mode.ReplicatedJob != nil:
			mode.ReplicatedJob.TotalCompletions = &count
		default:
			return fmt.Errorf("scale %s: a %s service has as many tasks as there are nodes for it", name, modeName(*mode))
		}
		if _, err := d.ServiceUpdate(ctx, id, client.ServiceUpdateOptions{Version: s.Service.Version, Spec: s.Service.Spec}); err != nil {
			return fmt.Errorf("scale %s: %w", name, err)
		}
		return nil
	})
	return id, err
}

// retryConflict runs f again when somebody else, maybe the swarm itself, changed the
// object between reading and writing.
func retryConflict(ctx context.Context, f func() error) error {
	for attempt := 0; ; attempt++ {
		err := f()
		if err == nil || attempt == 10 || !strings.Contains(err.Error(), "update out of sequence") {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(time.Duration(attempt+1) * 20 * time.Millisecond):
		}
	}
}
