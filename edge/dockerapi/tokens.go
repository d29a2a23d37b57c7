package dockerapi

import (
	"context"
	"net/http"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api/skepv1"
)

// maxTokenRequest bounds the body of a request for a join token.
const maxTokenRequest = 64 << 10

// routeTokens adds the endpoints of join tokens that end by themselves.
func (a *API) routeTokens() {
	a.router.Handle("GET", "/skep/v1/tokens", func(w http.ResponseWriter, r *http.Request) error {
		return answer(w, r, a.manager.Tokens, func(ctx context.Context, c skepv1.TokensClient) (proto.Message, error) {
			return c.ListTokens(ctx, new(skepv1.ListTokensRequest))
		})
	})
	a.router.Handle("POST", "/skep/v1/tokens", func(w http.ResponseWriter, r *http.Request) error {
		req := new(skepv1.CreateTokenRequest)
		if err := readMessage(w, r, maxTokenRequest, req); err != nil {
			return err
		}
		return answer(w, r, a.manager.Tokens, func(ctx context.Context, c skepv1.TokensClient) (proto.Message, error) {
			return c.CreateToken(ctx, req)
		})
	})
	a.router.Handle("DELETE", "/skep/v1/tokens/{id}", func(w http.ResponseWriter, r *http.Request) error {
		return answer(w, r, a.manager.Tokens, func(ctx context.Context, c skepv1.TokensClient) (proto.Message, error) {
			return c.RemoveToken(ctx, &skepv1.RemoveTokenRequest{Id: r.PathValue("id")})
		})
	})
}
