package dockerapi

import (
	"context"
	"net/http"

	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/swarm"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
)

// anyNetwork finds a network for a container of this node. A worker does not know the
// networks of the swarm that none of its containers is on: the managers will be asked.
func (a *API) anyNetwork(ctx context.Context, typed string) (network.Inspect, error) {
	n, err := a.findNetwork(ctx, typed, "")
	if model.KindOf(err) != model.NotFound {
		return n, err
	}
	if _, controlErr := a.manager.Control(); controlErr == nil || a.swarm.Status().LocalNodeState != swarm.LocalNodeStateActive {
		return n, err
	}
	n.Name, n.Scope = typed, "swarm"
	return n, nil
}

func (a *API) connectContainer(w http.ResponseWriter, r *http.Request) error {
	if a.local == nil {
		return httpapi.NotImplemented(w, r)
	}
	var req network.ConnectRequest
	if err := httpapi.ReadJSON(w, r, &req); err != nil {
		return err
	}
	n, err := a.anyNetwork(r.Context(), r.PathValue("id"))
	if err != nil {
		return err
	}
	if _, err := a.manager.Control(); err == nil && n.Scope == "swarm" && !n.Attachable { // else the managers refuse it
		return model.Errorf(model.Denied, "Could not attach to network %s: rpc error: code = PermissionDenied desc = network %s not manually attachable", n.Name, n.Name)
	}
	if err := a.local.Connect(r.Context(), req.Container, n, req.EndpointConfig); err != nil {
		return err
	}
	return httpapi.Empty(w, http.StatusOK)
}

func (a *API) disconnectContainer(w http.ResponseWriter, r *http.Request) error {
	if a.local == nil {
		return httpapi.NotImplemented(w, r)
	}
	var req network.DisconnectRequest
	if err := httpapi.ReadJSON(w, r, &req); err != nil {
		return err
	}
	n, err := a.anyNetwork(r.Context(), r.PathValue("id"))
	if err != nil {
		return err
	}
	if err := a.local.Disconnect(r.Context(), req.Container, n); err != nil {
		return err
	}
	return httpapi.Empty(w, http.StatusOK)
}
