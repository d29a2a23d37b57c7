package dockerapi

import (
	"context"
	"io"
	"net/http"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
)

// maxUnlockingRequest bounds the body of a request to set whether managers unlock each other.
const maxUnlockingRequest = 4 << 10

// routeUnlocking adds the endpoints of unlocking by other managers.
func (a *API) routeUnlocking() {
	a.router.Handle("GET", "/skep/v1/unlocking", func(w http.ResponseWriter, r *http.Request) error {
		return a.unlocking(w, r, func(ctx context.Context, c skepv1.UnlockClient) (*skepv1.UnlockState, error) {
			return c.GetState(ctx, new(skepv1.GetUnlockStateRequest))
		})
	})
	a.router.Handle("POST", "/skep/v1/unlocking", func(w http.ResponseWriter, r *http.Request) error {
		data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxUnlockingRequest))
		if err != nil {
			return model.Wrap(model.Invalid, err, "read request")
		}
		req := new(skepv1.ConfigureUnlockRequest)
		if err := protojson.Unmarshal(data, req); err != nil {
			return model.Wrap(model.Invalid, err, "read request")
		}
		return a.unlocking(w, r, func(ctx context.Context, c skepv1.UnlockClient) (*skepv1.UnlockState, error) {
			return c.Configure(ctx, req)
		})
	})
}

func (a *API) unlocking(w http.ResponseWriter, r *http.Request, ask func(context.Context, skepv1.UnlockClient) (*skepv1.UnlockState, error)) error {
	c, err := a.manager.Unlocking()
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
