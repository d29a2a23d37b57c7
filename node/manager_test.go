package node

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/platform/wire"
)

// A write that raft dropped, as it does while leadership is handed over, ended the manager
// and the node's part in the swarm for good.
func TestLeaderBeginsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		begun, ended := 0, 0
		broken := errors.New("broken")
		r := &managerRole{log: slog.New(slog.DiscardHandler), creds: new(wire.Credentials)}
		r.lead = []func(context.Context) error{
			func(ctx context.Context) error {
				switch begun++; begun {
				case 1:
					return model.Wrap(model.Unavailable, errors.New("raft proposal dropped"), "place tasks")
				case 3:
					return broken
				}
				<-ctx.Done()
				return nil
			},
			func(ctx context.Context) error { <-ctx.Done(); ended++; return ctx.Err() },
		}
		if err := r.runTerm(ctx); !errors.Is(err, context.DeadlineExceeded) || begun != 2 || ended != 2 {
			t.Errorf("the term ended with %v after %d beginnings and %d ends", err, begun, ended)
		}
		if err := r.runTerm(t.Context()); !errors.Is(err, broken) {
			t.Errorf("a term in which something broke ended with %v", err)
		}
	})
}
