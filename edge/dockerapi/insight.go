package dockerapi

import (
	"context"
	"io"
	"net/http"

	"google.golang.org/protobuf/encoding/protojson"
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
		return answer(w, r, a.manager.Insight, func(ctx context.Context, c skepv1.InsightClient) (proto.Message, error) {
			return c.Explain(ctx, &skepv1.ExplainRequest{Target: target})
		})
	})
	a.router.Handle("GET", "/skep/v1/overview", func(w http.ResponseWriter, r *http.Request) error {
		return answer(w, r, a.manager.Insight, func(ctx context.Context, c skepv1.InsightClient) (proto.Message, error) {
			return c.Overview(ctx, new(skepv1.OverviewRequest))
		})
	})
	a.router.Handle("POST", "/skep/v1/networks/check", func(w http.ResponseWriter, r *http.Request) error {
		return answer(w, r, a.manager.Networks, func(ctx context.Context, c skepv1.NetworksClient) (proto.Message, error) {
			return c.Check(ctx, &skepv1.CheckNetworksRequest{Target: r.URL.Query().Get("target")})
		})
	})
}

// answer asks a service of skep.v1 and answers with the JSON form of what it says.
func answer[C any](w http.ResponseWriter, r *http.Request, service func() (C, error), ask func(context.Context, C) (proto.Message, error)) error {
	c, err := service()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	m, err := ask(ctx, c)
	if err != nil {
		return err
	}
	return writeMessage(w, m)
}

// readMessage reads the JSON form of a message of skep.v1, of at most limit bytes.
func readMessage(w http.ResponseWriter, r *http.Request, limit int64, m proto.Message) error {
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	if err == nil {
		err = protojson.Unmarshal(data, m)
	}
	return model.Wrap(model.Invalid, err, "read request")
}

// writeMessage answers with the JSON form of a message of skep.v1.
func writeMessage(w http.ResponseWriter, m proto.Message) error {
	data, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	_, err = w.Write(append(data, '\n'))
	return err
}
