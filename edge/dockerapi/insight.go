package dockerapi

import (
	"context"
	"net/http"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
)

// routeInsight adds Skep's own endpoints. They answer with the JSON form of the
// messages of skep.v1, and like all others under any version prefix or none.
func (a *API) routeInsight() {
	a.router.Handle("GET", "/skep/v1/explain", func(w http.ResponseWriter, r *http.Request) error {
		target := r.URL.Query().Get("target")
		if target == "" {
			return model.Errorf(model.Invalid, "explain needs a target: the id or name of a service or task")
		}
		return a.insight(w, r, func(ctx context.Context, c skepv1.InsightClient) (proto.Message, error) {
			return c.Explain(ctx, &skepv1.ExplainRequest{Target: target})
		})
	})
	a.router.Handle("GET", "/skep/v1/overview", func(w http.ResponseWriter, r *http.Request) error {
		return a.insight(w, r, func(ctx context.Context, c skepv1.InsightClient) (proto.Message, error) {
			return c.Overview(ctx, new(skepv1.OverviewRequest))
		})
	})
	a.router.Handle("POST", "/skep/v1/networks/check", func(w http.ResponseWriter, r *http.Request) error {
		c, err := a.manager.Networks()
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
		defer cancel()
		answer, err := c.Check(ctx, &skepv1.CheckNetworksRequest{Target: r.URL.Query().Get("target")})
		if err != nil {
			return err
		}
		return writeMessage(w, answer)
	})
}

func (a *API) insight(w http.ResponseWriter, r *http.Request, ask func(context.Context, skepv1.InsightClient) (proto.Message, error)) error {
	c, err := a.manager.Insight()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	answer, err := ask(ctx, c)
	if err != nil {
		return err
	}
	return writeMessage(w, answer)
}
