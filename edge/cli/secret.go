package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/spf13/cobra"

	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
)

func (a *app) secretCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "secret",
		Short: "Give a secret a new value, or the former one back",
		Long: `Give a secret a new value, or the former one back. Everything else about secrets
is with the docker command: docker secret create, ls, inspect, rm.`,
	}
	c.AddCommand(a.rotateCommand(), a.rollbackCommand())
	return c
}

func (a *app) rotateCommand() *cobra.Command {
	var w rotationWait
	c := &cobra.Command{
		Use:   "rotate SECRET < FILE",
		Short: "Give a secret a new value and roll the services that use it",
		Long: `Read a new value of a secret from standard input, and have the services that use
the secret take it, each by its own update settings. The name SECRET stands for the new
value from then on; the former one is kept as SECRET.N until the next rotation, for
"skep secret rollback". Jobs take the value with their next run.`,
		Args: args(1, 1),
		RunE: func(c *cobra.Command, given []string) error {
			data, err := io.ReadAll(io.LimitReader(a.In, model.MaxSecret+2))
			if err != nil {
				return fmt.Errorf("read the new value: %w", err)
			}
			if len(bytes.TrimSpace(data)) == 0 {
				return errors.New("standard input is empty: write `skep secret rotate " + given[0] + " < FILE`")
			}
			return a.rotate(c.Context(), w, given[0], "rotate", map[string][]byte{"Data": data})
		},
	}
	w.flags(c)
	return c
}

func (a *app) rollbackCommand() *cobra.Command {
	var w rotationWait
	c := &cobra.Command{
		Use:   "rollback SECRET",
		Short: "Give a secret its former value back and roll the services that use it",
		Long: `Exchange the value of a secret with the one before the last rotation, and have the
services that use the secret take it. A second rollback undoes the first.`,
		Args: args(1, 1),
		RunE: func(c *cobra.Command, given []string) error {
			return a.rotate(c.Context(), w, given[0], "rollback", struct{}{})
		},
	}
	w.flags(c)
	return c
}

// rotationWait says how long to wait for the services.
type rotationWait struct {
	detach  bool
	timeout time.Duration
}

func (w *rotationWait) flags(c *cobra.Command) {
	c.Flags().BoolVarP(&w.detach, "detach", "d", false, "do not wait for the services")
	c.Flags().DurationVar(&w.timeout, "timeout", 5*time.Minute, "give up waiting after this time")
}

// rotate calls one of the two endpoints and waits until the services have converged.
func (a *app) rotate(ctx context.Context, w rotationWait, secret, action string, body any) error {
	var answer skepv1.RotateSecretResponse
	d, data, err := a.ask(ctx, http.MethodPost, "/skep/v1/secrets/"+url.PathEscape(secret)+"/"+action, nil, body, &answer)
	if err != nil {
		return err
	}
	defer d.Close() //nolint:errcheck // only idle connections
	var ids []string
	for _, s := range answer.GetServices() {
		if !s.GetJob() {
			ids = append(ids, s.GetId())
		}
	}
	if a.json {
		if err := a.printJSON(json.RawMessage(data)); err != nil {
			return err
		}
	} else {
		a.say("%s has value %d; the former is kept as %s", secret, answer.GetVersion(), answer.GetFormerName())
		for _, name := range answer.GetRemoved() {
			a.say("removed %s, which nothing used any more", name)
		}
		for _, s := range answer.GetServices() {
			if s.GetJob() {
				a.say("the job %s takes it with its next run", s.GetName())
			}
		}
	}
	if w.detach || len(ids) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, w.timeout)
	defer cancel()
	return hint(a.converge(ctx, d, ids), "take the new value back with `skep secret rollback "+secret+"`")
}
