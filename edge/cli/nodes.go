package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

func (a *app) nodesCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "nodes",
		Short: "List the nodes of the swarm",
		Args:  args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			d, self, err := a.manager(c.Context())
			if err != nil {
				return err
			}
			defer d.Close() //nolint:errcheck // only idle connections
			list, err := d.NodeList(c.Context(), client.NodeListOptions{})
			if err != nil {
				return fmt.Errorf("list nodes: %w", err)
			}
			slices.SortFunc(list.Items, func(x, y swarm.Node) int {
				return strings.Compare(x.Description.Hostname+x.ID, y.Description.Hostname+y.ID)
			})
			if a.json {
				return a.printJSON(list.Items)
			}
			var rows [][]string
			for _, n := range list.Items {
				name, role := n.Description.Hostname, string(n.Spec.Role)
				if n.ID == self.NodeID {
					name += " *"
				}
				if m := n.ManagerStatus; m != nil {
					role += ", " + string(m.Reachability)
					if m.Leader {
						role = "leader"
					}
				}
				rows = append(rows, []string{
					short(n.ID), name, role, string(n.Status.State), string(n.Spec.Availability), n.Status.Addr, n.Description.Engine.EngineVersion, n.Status.Message,
				})
			}
			return a.table([]string{"ID", "NODE", "ROLE", "STATE", "AVAILABILITY", "ADDRESS", "ENGINE", ""}, rows)
		},
	}
}

func (a *app) tokenCommand() *cobra.Command {
	var rotate bool
	c := &cobra.Command{
		Use:       "token [worker|manager]",
		Short:     "Print the command with which another machine joins the swarm",
		Args:      cobra.MatchAll(args(0, 1), cobra.OnlyValidArgs),
		ValidArgs: []string{"worker", "manager"},
		RunE: func(c *cobra.Command, given []string) error {
			role := "worker"
			if len(given) == 1 {
				role = given[0]
			}
			d, _, err := a.manager(c.Context())
			if err != nil {
				return err
			}
			defer d.Close() //nolint:errcheck // only idle connections
			s, err := d.SwarmInspect(c.Context(), client.SwarmInspectOptions{})
			if err != nil {
				return fmt.Errorf("read join tokens: %w", err)
			}
			if rotate {
				if _, err := d.SwarmUpdate(c.Context(), client.SwarmUpdateOptions{
					Version: s.Swarm.Version, Spec: s.Swarm.Spec, RotateWorkerToken: role == "worker", RotateManagerToken: role == "manager",
				}); err != nil {
					return fmt.Errorf("rotate the %s token: %w", role, err)
				}
				if s, err = d.SwarmInspect(c.Context(), client.SwarmInspectOptions{}); err != nil {
					return fmt.Errorf("read join tokens: %w", err)
				}
			}
			addr, err := a.joinAddr(c.Context(), d)
			if err != nil {
				return err
			}
			token := s.Swarm.JoinTokens.Worker
			if role == "manager" {
				token = s.Swarm.JoinTokens.Manager
			}
			if a.json {
				return a.printJSON(map[string]string{"role": role, "token": token, "addr": addr})
			}
			a.say("On the machine that shall be a %s, run:\n\n    skep up --join %s %s\n", role, token, addr)
			return nil
		},
	}
	c.Flags().BoolVar(&rotate, "rotate", false, "make a new token first, so that the old one is worth nothing")
	c.AddCommand(a.tokenCommands()...)
	return c
}

// joinAddr returns the address at which others join the swarm of the manager d.
func (a *app) joinAddr(ctx context.Context, d *client.Client) (string, error) {
	info, err := d.Info(ctx, client.InfoOptions{})
	if err != nil {
		return "", fmt.Errorf("read this manager's address: %w", err)
	}
	n, err := d.NodeInspect(ctx, info.Info.Swarm.NodeID, client.NodeInspectOptions{})
	if err != nil {
		return "", fmt.Errorf("read this manager's address: %w", err)
	}
	if m := n.Node.ManagerStatus; m != nil && m.Addr != "" {
		return m.Addr, nil
	}
	return info.Info.Swarm.NodeAddr, nil
}
