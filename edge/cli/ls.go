package cli

import (
	"fmt"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

func (a *app) lsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "ls [STACK]",
		Short: "List services",
		Args:  args(0, 1),
		RunE: func(c *cobra.Command, given []string) error {
			d, _, err := a.manager(c.Context())
			if err != nil {
				return err
			}
			defer d.Close() //nolint:errcheck // only idle connections
			filters := client.Filters{}
			if len(given) == 1 {
				filters = ofStack(given[0])
			}
			list, err := d.ServiceList(c.Context(), client.ServiceListOptions{Status: true, Filters: filters})
			if err != nil {
				return fmt.Errorf("list services: %w", err)
			}
			slices.SortFunc(list.Items, func(x, y swarm.Service) int { return strings.Compare(x.Spec.Name, y.Spec.Name) })
			if a.json {
				return a.printJSON(list.Items)
			}
			if len(list.Items) == 0 && len(given) == 1 {
				return fmt.Errorf("there is no stack %s: `skep ls` lists all services", given[0])
			}
			if len(list.Items) == 0 {
				a.say("no services: deploy some with `skep deploy compose.yaml`")
				return nil
			}
			var rows [][]string
			for _, s := range list.Items {
				running := "?"
				if s.ServiceStatus != nil {
					running = fmt.Sprintf("%d/%d", s.ServiceStatus.RunningTasks, s.ServiceStatus.DesiredTasks)
				}
				rows = append(rows, []string{short(s.ID), s.Spec.Name, modeName(s.Spec.Mode), running, image(s.Spec.TaskTemplate), ports(s)})
			}
			return a.table([]string{"ID", "NAME", "MODE", "RUNNING", "IMAGE", "PORTS"}, rows)
		},
	}
}

func modeName(m swarm.ServiceMode) string {
	switch {
	case m.Global != nil:
		return "global"
	case m.ReplicatedJob != nil:
		return "replicated-job"
	case m.GlobalJob != nil:
		return "global-job"
	default:
		return "replicated"
	}
}

// image returns a task's image without the digest, which people do not read.
func image(t swarm.TaskSpec) string {
	if t.ContainerSpec == nil {
		return ""
	}
	name, _, _ := strings.Cut(t.ContainerSpec.Image, "@")
	return name
}

func ports(s swarm.Service) string {
	list := s.Endpoint.Ports
	if len(list) == 0 && s.Spec.EndpointSpec != nil {
		list = s.Spec.EndpointSpec.Ports
	}
	var out []string
	for _, p := range list {
		at := "*"
		if p.PublishMode == swarm.PortConfigPublishModeHost {
			at = "its node"
		}
		published := fmt.Sprint(p.PublishedPort)
		if p.PublishedPort == 0 {
			published = "any"
		}
		out = append(out, fmt.Sprintf("%s:%s->%d/%s", at, published, p.TargetPort, p.Protocol))
	}
	return strings.Join(out, ", ")
}
