package cli

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/spf13/cobra"

	"github.com/skep-dev/skep/api/skepv1"
)

func (a *app) explainCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "explain SERVICE|TASK",
		Short: "Say why the tasks of a service are where they are, or are not running",
		Args:  args(1, 1),
		RunE: func(c *cobra.Command, given []string) error {
			var e skepv1.ExplainResponse
			d, data, err := a.ask(c.Context(), http.MethodGet, "/skep/v1/explain", url.Values{"target": given}, nil, &e)
			if err != nil {
				return err
			}
			defer d.Close() //nolint:errcheck // only idle connections
			if a.json {
				return a.printJSON(json.RawMessage(data))
			}
			a.printExplanation(&e)
			return nil
		},
	}
}

func (a *app) printExplanation(e *skepv1.ExplainResponse) {
	a.say("service %s (%s)", e.GetServiceName(), short(e.GetServiceId()))
	for _, n := range e.GetNotes() {
		a.say("  %s", n)
	}
	for _, t := range e.GetTasks() {
		where := "no node"
		if t.GetNodeId() != "" {
			where = "on " + t.GetNodeName()
		}
		since := ""
		if t.GetSince() != nil {
			since = ", " + ago(t.GetSince().AsTime())
		}
		a.say("\n%s (%s), %s: %s, wanted %s%s", t.GetName(), short(t.GetTaskId()), where, t.GetState(), t.GetDesiredState(), since)
		if m := t.GetMessage(); m != "" {
			a.say("  %s", m)
		}
		if m := t.GetError(); m != "" {
			a.say("  error: %s", m)
		}
		for _, r := range t.GetRefusals() {
			a.say("  %s refused %s: %s%s", r.GetFilter(), plural(len(r.GetNodeIds()), "node"), r.GetReason(), nonEmpty(": ", someOf(r.GetNodeNames())))
		}
	}
}

// someOf names the first few of many.
func someOf(names []string) string {
	const most = 8
	if len(names) > most {
		return strings.Join(names[:most], ", ") + fmt.Sprintf(" and %d more", len(names)-most)
	}
	return strings.Join(names, ", ")
}
