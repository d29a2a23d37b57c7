package cli

import (
	"encoding/json"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/skep-dev/skep/api/skepv1"
)

func (a *app) netCheckCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "check [NETWORK|SERVICE]",
		Short: "Compare every node's kernel with what its networks should be, and mend what differs",
		Long: `Compare every node's kernel with what its networks should be, and mend what differs.

Each node does so by itself every ten seconds; this asks all of them now and tells what they
found. The exit code is 1 if anything differed, even if it was mended, if something could not
be mended, or if a node did not answer.`,
		Args: args(0, 1),
		RunE: func(c *cobra.Command, given []string) error {
			query := url.Values{}
			if len(given) > 0 {
				query.Set("target", given[0])
			}
			var report skepv1.CheckNetworksResponse
			d, data, err := a.ask(c.Context(), http.MethodPost, "/skep/v1/networks/check", query, nil, &report)
			if err != nil {
				return err
			}
			defer d.Close() //nolint:errcheck // only idle connections
			if a.json {
				err = a.printJSON(json.RawMessage(data))
			} else {
				a.printNetworks(&report)
			}
			if err == nil && slices.ContainsFunc(report.GetNodes(), wrong) {
				return ExitError{Code: 1}
			}
			return err
		},
	}
}

// wrong reports whether a node's networks were not as they should be, or nobody knows.
func wrong(n *skepv1.NodeNetworks) bool {
	return n.GetMissing() || n.GetError() != "" || len(n.GetDifferences()) > 0
}

func (a *app) printNetworks(report *skepv1.CheckNetworksResponse) {
	for _, n := range report.GetNodes() {
		switch {
		case n.GetUnchecked() != "":
			a.say("%s: not checked: %s", n.GetNodeName(), n.GetUnchecked())
		case !wrong(n):
			a.say("%s: as it should be", n.GetNodeName())
		default:
			a.say("%s: %s", n.GetNodeName(), plural(len(n.GetDifferences()), "difference"))
		}
		for _, x := range n.GetDifferences() {
			end := ", NOT MENDED"
			if x.GetMended() {
				end = ", mended"
			}
			where := strings.Join(x.GetNetworkNames(), ", ")
			if where != "" {
				where += ": "
			}
			a.say("  %s%s%s", where, x.GetText(), end)
		}
		if n.GetError() != "" {
			a.say("  error: %s", n.GetError())
		}
	}
}
