package cli

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

func (a *app) psCommand() *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use:   "ps [SERVICE…]",
		Short: "List tasks: where they run, since when, and what went wrong",
		Args:  args(0, -1),
		RunE: func(c *cobra.Command, given []string) error {
			d, _, err := a.manager(c.Context())
			if err != nil {
				return err
			}
			defer d.Close() //nolint:errcheck // only idle connections
			tasks, names, err := readTasks(c.Context(), d, given)
			if err != nil {
				return err
			}
			if !all {
				tasks = current(tasks)
			}
			if a.json {
				return a.printJSON(tasks)
			}
			if len(tasks) == 0 {
				a.say("no tasks")
				return nil
			}
			return a.table([]string{"ID", "TASK", "NODE", "STATE", "WANTED", "SINCE", "ERROR"}, taskRows(tasks, names))
		},
	}
	c.Flags().BoolVarP(&all, "all", "a", false, "show tasks of the past as well")
	return c
}

// names maps the ids of services and nodes to their names.
type names map[string]string

func (n names) of(id string) string {
	if name := n[id]; name != "" {
		return name
	}
	return short(id)
}

// task returns the name of a task as docker shows it.
func (n names) task(t swarm.Task) string {
	if t.Slot > 0 {
		return fmt.Sprintf("%s.%d", n.of(t.ServiceID), t.Slot)
	}
	return n.of(t.ServiceID) + "." + n.of(t.NodeID)
}

// readNames reads the names of all services and nodes.
func readNames(ctx context.Context, d *client.Client) (names, error) {
	out := names{}
	services, err := d.ServiceList(ctx, client.ServiceListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list services: %w", err)
	}
	for _, s := range services.Items {
		out[s.ID] = s.Spec.Name
	}
	nodes, err := d.NodeList(ctx, client.NodeListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	for _, n := range nodes.Items {
		out[n.ID] = n.Description.Hostname
	}
	return out, nil
}

// readTasks returns the tasks of some services, or all, newest first in every slot.
func readTasks(ctx context.Context, d *client.Client, services []string) ([]swarm.Task, names, error) {
	names, err := readNames(ctx, d)
	if err != nil {
		return nil, nil, err
	}
	filters := client.Filters{}
	for _, s := range services {
		filters.Add("service", s)
	}
	list, err := d.TaskList(ctx, client.TaskListOptions{Filters: filters})
	if err != nil {
		return nil, nil, fmt.Errorf("list tasks: %w", err)
	}
	tasks := list.Items
	if tasks == nil {
		tasks = []swarm.Task{}
	}
	slices.SortFunc(tasks, func(x, y swarm.Task) int {
		return cmp.Or(
			strings.Compare(names.of(x.ServiceID), names.of(y.ServiceID)),
			cmp.Compare(x.Slot, y.Slot),
			strings.Compare(slotOf(x), slotOf(y)),
			y.CreatedAt.Compare(x.CreatedAt),
		)
	})
	return tasks, names, nil
}

// slotOf identifies what a task stands for: a slot, or a node of a global service.
func slotOf(t swarm.Task) string {
	if t.Slot > 0 {
		return fmt.Sprintf("%s.%d", t.ServiceID, t.Slot)
	}
	return t.ServiceID + "." + t.NodeID
}

// current keeps the tasks that are wanted or still there. The error of a task's latest
// predecessor is kept with it, as that is what someone who looks wants to know.
func current(tasks []swarm.Task) []swarm.Task {
	out := []swarm.Task{}
	for _, t := range tasks {
		past := finished(t.Status.State) && t.DesiredState != swarm.TaskStateRunning && t.DesiredState != swarm.TaskStateComplete
		last := len(out) - 1
		switch {
		case !past:
			out = append(out, t)
		case last < 0 || slotOf(out[last]) != slotOf(t):
			if t.Status.State == swarm.TaskStateFailed || t.Status.State == swarm.TaskStateRejected {
				out = append(out, t) // nothing took its place
			}
		case out[last].Status.Err == "" && t.Status.Err != "" && out[last].Status.State != swarm.TaskStateRunning:
			out[last].Status.Err = "before: " + t.Status.Err
		}
	}
	return out
}

func finished(s swarm.TaskState) bool {
	return slices.Contains([]swarm.TaskState{
		swarm.TaskStateComplete, swarm.TaskStateShutdown, swarm.TaskStateFailed, swarm.TaskStateRejected, swarm.TaskStateRemove, swarm.TaskStateOrphaned,
	}, s)
}

func taskRows(tasks []swarm.Task, names names) [][]string {
	var rows [][]string
	for _, t := range tasks {
		node := "-"
		if t.NodeID != "" {
			node = names.of(t.NodeID)
		}
		rows = append(rows, []string{short(t.ID), names.task(t), node, string(t.Status.State), string(t.DesiredState), ago(t.Status.Timestamp), t.Status.Err})
	}
	return rows
}
