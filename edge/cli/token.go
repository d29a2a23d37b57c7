package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/skep-dev/skep/api/skepv1"
)

const tokensPath = "/skep/v1/tokens" //nolint:gosec // a path, not a token

// tokenCommands are those of join tokens that end by themselves.
func (a *app) tokenCommands() []*cobra.Command {
	return []*cobra.Command{a.tokenCreateCommand(), a.tokenLsCommand(), a.tokenRmCommand()}
}

func (a *app) tokenCreateCommand() *cobra.Command {
	var (
		role   string
		ttl    time.Duration
		uses   uint32
		labels []string
	)
	c := &cobra.Command{
		Use:   "create",
		Short: "Make a join token that ends by itself",
		Long: `Make a join token that admits nodes for a time, and only so many. It is shown this
once; the swarm keeps its digest. Machines join with it as with any other:
skep up --join TOKEN ADDR, or docker swarm join --token TOKEN ADDR.`,
		Args: args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			body := map[string]any{"role": role, "ttl": fmt.Sprintf("%.9fs", ttl.Seconds()), "uses": uses, "labels": labelMap(labels)}
			var answer skepv1.CreateTokenResponse
			d, data, err := a.ask(c.Context(), http.MethodPost, tokensPath, nil, body, &answer)
			if err != nil {
				return err
			}
			defer d.Close() //nolint:errcheck // only idle connections
			addr, err := a.joinAddr(c.Context(), d)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(json.RawMessage(data))
			}
			i := answer.GetInfo()
			a.say("Token %s is for %s until %s.\nOn the machine that shall be a %s, run:\n\n    skep up --join %s %s\n",
				short(i.GetId()), howMany(i), i.GetExpires().AsTime().Local().Format(time.DateTime), role, answer.GetToken(), addr)
			return nil
		},
	}
	c.Flags().StringVar(&role, "role", "worker", "what joins with it: worker or manager")
	c.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long it admits nodes")
	c.Flags().Uint32Var(&uses, "uses", 1, "how many nodes it admits, 0 for any number")
	c.Flags().StringArrayVar(&labels, "label", nil, "a label to tell it by, key=value (repeatable)")
	return c
}

func (a *app) tokenLsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List the join tokens that end by themselves",
		Args:  args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			var answer skepv1.ListTokensResponse
			d, data, err := a.ask(c.Context(), http.MethodGet, tokensPath, nil, nil, &answer)
			if err != nil {
				return err
			}
			defer d.Close() //nolint:errcheck // only idle connections
			if a.json {
				return a.printJSON(json.RawMessage(data))
			}
			var rows [][]string
			for _, t := range answer.GetTokens() {
				var labels []string
				for k, v := range t.GetLabels() {
					labels = append(labels, k+"="+v)
				}
				slices.Sort(labels)
				state := "valid"
				if t.GetVoid() != "" {
					state = "void: " + t.GetVoid()
				}
				uses := fmt.Sprint(t.GetUsed())
				if t.GetUses() > 0 {
					uses += fmt.Sprintf("/%d", t.GetUses())
				}
				rows = append(rows, []string{short(t.GetId()), t.GetRole(), uses, t.GetExpires().AsTime().Local().Format(time.DateTime), strings.Join(labels, ","), state})
			}
			return a.table([]string{"ID", "ROLE", "USED", "EXPIRES", "LABELS", "STATE"}, rows)
		},
	}
}

func (a *app) tokenRmCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rm TOKEN-ID...",
		Short: "Make join tokens void at once",
		Args:  args(1, -1),
		RunE: func(c *cobra.Command, given []string) error {
			var errs []error
			for _, id := range given {
				var answer skepv1.RemoveTokenResponse
				d, _, err := a.ask(c.Context(), http.MethodDelete, tokensPath+"/"+url.PathEscape(id), nil, nil, &answer)
				if err != nil {
					errs = append(errs, err)
					continue
				}
				errs = append(errs, d.Close())
				a.say("%s", short(answer.GetId()))
			}
			return errors.Join(errs...)
		},
	}
}

func howMany(t *skepv1.TokenInfo) string {
	if t.GetUses() == 0 {
		return "any number of nodes"
	}
	return plural(int(t.GetUses()), "node")
}

// labelMap reads key=value pairs; a key alone has an empty value.
func labelMap(pairs []string) map[string]string {
	labels := map[string]string{}
	for _, pair := range pairs {
		key, value, _ := strings.Cut(pair, "=")
		labels[key] = value
	}
	return labels
}
