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

// maxTokenRequest bounds the body of a request for a join token.
const maxTokenRequest = 64 << 10

// routeTokens adds the endpoints of join tokens that end by themselves.
func (a *API) routeTokens() {
	a.router.Handle("GET", "/skep/v1/tokens", func(w http.ResponseWriter, r *http.Request) error {
		return a.tokens(w, r, func(ctx context.Context, c skepv1.TokensClient) (proto.Message, error) {
			return c.ListTokens(ctx, new(skepv1.ListTokensRequest))
		})
	})
	a.router.Handle("POST", "/skep/v1/tokens", func(w http.ResponseWriter, r *http.Request) error {
		data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxTokenRequest))
		if err != nil {
			return model.Wrap(model.Invalid, err, "read request")
		}
		req := new(skepv1.CreateTokenRequest)
		if err := protojson.Unmarshal(data, req); err != nil {
			return model.Wrap(model.Invalid, err, "read request")
		}
		return a.tokens(w, r, func(ctx context.Context, c skepv1.TokensClient) (proto.Message, error) {
			return c.CreateToken(ctx, req)
		})
	})
	a.router.Handle("DELETE", "/skep/v1/tokens/{id}", func(w http.ResponseWriter, r *http.Request) error {
		return a.tokens(w, r, func(ctx context.Context, c skepv1.TokensClient) (proto.Message, error) {
			return c.RemoveToken(ctx, &skepv1.RemoveTokenRequest{Id: r.PathValue("id")})
		})
	})
}

func (a *API) tokens(w http.ResponseWriter, r *http.Request, ask func(context.Context, skepv1.TokensClient) (proto.Message, error)) error {
	c, err := a.manager.Tokens()
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
