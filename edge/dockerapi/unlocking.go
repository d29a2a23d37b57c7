package dockerapi

import (
	"context"
	"net/http"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api/skepv1"
)

// maxUnlockingRequest bounds the body of a request to set whether managers unlock each other.
const maxUnlockingRequest = 4 << 10

// routeUnlocking adds the endpoints of unlocking by other managers.
func (a *API) routeUnlocking() {
	a.router.Handle("GET", "/skep/v1/unlocking", func(w http.ResponseWriter, r *http.Request) error {
		return answer(w, r, a.manager.Unlocking, func(ctx context.Context, c skepv1.UnlockClient) (proto.Message, error) {
			return c.GetState(ctx, new(skepv1.GetUnlockStateRequest))
		})
	})
	a.router.Handle("POST", "/skep/v1/unlocking", func(w http.ResponseWriter, r *http.Request) error {
		req := new(skepv1.ConfigureUnlockRequest)
		if err := readMessage(w, r, maxUnlockingRequest, req); err != nil {
			return err
		}
		return answer(w, r, a.manager.Unlocking, func(ctx context.Context, c skepv1.UnlockClient) (proto.Message, error) {
			return c.Configure(ctx, req)
		})
	})
}
