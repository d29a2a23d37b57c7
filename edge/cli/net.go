package cli

import (
	"context"
	"maps"
	"strconv"

	"github.com/moby/moby/client"
	"github.com/spf13/cobra"

	"github.com/skep-dev/skep/core/model"
)

func (a *app) netCommand() *cobra.Command {
	c := &cobra.Command{Use: "net", Short: "Look after the networks of the swarm", Args: args(0, 0)}
	c.AddCommand(a.netCheckCommand(), a.rotateKeysCommand())
	return c
}

func (a *app) rotateKeysCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rotate-keys",
		Short: "Change the keys of all encrypted networks now",
		Long: `Change the keys of all encrypted networks now, rather than at their time. The leader does so
every 12 hours, and when a node is removed, by itself. No packet is lost by it: each rotation waits
until the nodes that are there have taken up the one before, two minutes at most.`,
		Args: args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			d, _, err := a.manager(c.Context())
			if err != nil {
				return err
			}
			defer d.Close() //nolint:errcheck // only idle connections
			var count uint64
			err = retryConflict(c.Context(), func() (err error) {
				count, err = askRotation(c.Context(), d)
				return err
			})
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(map[string]uint64{"rotation": count})
			}
			a.say("the keys of encrypted networks are being changed (rotation %d)", count)
			return nil
		},
	}
}

// askRotation asks for a change of keys and returns how many people have asked for.
func askRotation(ctx context.Context, d *client.Client) (count uint64, err error) {
	s, err := d.SwarmInspect(ctx, client.SwarmInspectOptions{})
	if err != nil {
		return 0, err
	}
	spec := s.Swarm.Spec
	if count, err = strconv.ParseUint(spec.Labels[model.RotateLabel], 10, 64); err != nil {
		count = 0 // the first time; or somebody wrote something else, which is replaced
	}
	count++
	labels := maps.Clone(spec.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	labels[model.RotateLabel] = strconv.FormatUint(count, 10)
	spec.Labels = labels
	_, err = d.SwarmUpdate(ctx, client.SwarmUpdateOptions{Version: s.Swarm.Version, Spec: spec})
	return count, err
}
