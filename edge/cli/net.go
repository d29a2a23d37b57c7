package cli

import (
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
			s, err := d.SwarmInspect(c.Context(), client.SwarmInspectOptions{})
			if err != nil {
				return err
			}
			spec := s.Swarm.Spec
			count, err := strconv.ParseUint(spec.Labels[model.RotateLabel], 10, 64)
			if err != nil {
				count = 0 // the first time; or somebody wrote something else, which is replaced
			}
			count++
			labels := maps.Clone(spec.Labels)
			if labels == nil {
				labels = map[string]string{}
			}
			labels[model.RotateLabel] = strconv.FormatUint(count, 10)
			spec.Labels = labels
			if _, err := d.SwarmUpdate(c.Context(), client.SwarmUpdateOptions{Version: s.Swarm.Version, Spec: spec}); err != nil {
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
