package dockerapi

import (
	"context"
	"net/http"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
)

// routeRotation adds how a secret gets a new value, which Docker does not know.
func (a *API) routeRotation() {
	a.handle("POST", "/skep/v1/secrets/{id}/rotate", func(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) error {
		var body struct{ Data []byte }
		if err := httpapi.ReadJSON(w, r, &body); err != nil {
			return err
		}
		return a.rotation(ctx, c, w, r, func(s skepv1.SecretsClient, id string) (proto.Message, error) {
			return s.Rotate(ctx, &skepv1.RotateSecretRequest{SecretId: id, Data: body.Data})
		})
	})
	a.handle("POST", "/skep/v1/secrets/{id}/rollback", func(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) error {
		return a.rotation(ctx, c, w, r, func(s skepv1.SecretsClient, id string) (proto.Message, error) {
			return s.Rollback(ctx, &skepv1.RollbackSecretRequest{SecretId: id})
		})
	})
}

func (a *API) rotation(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request, change func(skepv1.SecretsClient, string) (proto.Message, error)) error {
	secret, err := findSecret(ctx, c, r.PathValue("id"))
	if err != nil {
		return err
	}
	setObject(r, secret.GetSpec().GetAnnotations().GetName())
	client, err := a.manager.Secrets()
	if err != nil {
		return err
	}
	answer, err := change(client, secret.GetId())
	if err != nil {
		return err
	}
	return writeMessage(w, answer)
}
