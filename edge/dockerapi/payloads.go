package dockerapi

import (
	"context"
	"net/http"

	"github.com/moby/moby/api/types/swarm"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/convert"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
)

// routePayloads adds secrets and configs.
func (a *API) routePayloads() {
	a.handle("GET", "/secrets", listSecrets)
	a.handle("GET", "/secrets/{id}", getSecret)
	a.handle("POST", "/secrets/create", createSecret)
	a.handle("POST", "/secrets/{id}/update", updateSecret)
	a.handle("DELETE", "/secrets/{id}", removeSecret)
	a.handle("GET", "/configs", listConfigs)
	a.handle("GET", "/configs/{id}", getConfig)
	a.handle("POST", "/configs/create", createConfig)
	a.handle("POST", "/configs/{id}/update", updateConfig)
	a.handle("DELETE", "/configs/{id}", removeConfig)
}

func listSecrets(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) error {
	f, err := httpapi.RequestFilters(r, "name", "names", "id", "label")
	if err != nil {
		return err
	}
	resp, err := c.ListSecrets(ctx, &api.ListSecretsRequest{Filters: &api.ListSecretsRequest_Filters{
		Names: f["names"], NamePrefixes: f["name"], IdPrefixes: f["id"], Labels: labelMap(f["label"]),
	}})
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusOK, all(resp.GetSecrets(), convert.DockerSecret))
}

func getSecret(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) error {
	s, err := findSecret(ctx, c, r.PathValue("id"))
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusOK, convert.DockerSecret(s))
}

// checkTemplating refuses what clients before 1.37 cannot mean.
func checkTemplating(r *http.Request, templating *swarm.Driver) error {
	if templating != nil && httpapi.RequestVersion(r).Before(37) {
		return model.Errorf(model.Invalid, "templating is not supported on the specified API version %d.%d",
			httpapi.RequestVersion(r).Major, httpapi.RequestVersion(r).Minor)
	}
	return nil
}

func createSecret(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) error {
	var spec swarm.SecretSpec
	if err := httpapi.ReadJSON(w, r, &spec); err != nil {
		return err
	}
	setObject(r, spec.Name)
	if err := checkTemplating(r, spec.Templating); err != nil {
		return err
	}
	resp, err := c.CreateSecret(ctx, &api.CreateSecretRequest{Spec: convert.StoreSecretSpec(spec)})
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusCreated, swarm.SecretCreateResponse{ID: resp.GetSecret().GetId()})
}

func updateSecret(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) error {
	var spec swarm.SecretSpec
	if err := httpapi.ReadJSON(w, r, &spec); err != nil {
		return err
	}
	version, err := versionQuery(r, "secret")
	if err != nil {
		return err
	}
	s, err := findSecret(ctx, c, r.PathValue("id"))
	if err != nil {
		return err
	}
	setObject(r, s.GetSpec().GetAnnotations().GetName())
	_, err = c.UpdateSecret(ctx, &api.UpdateSecretRequest{SecretId: s.GetId(), SecretVersion: version, Spec: convert.StoreSecretSpec(spec)})
	return err
}

func removeSecret(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) error {
	s, err := findSecret(ctx, c, r.PathValue("id"))
	if err != nil {
		return err
	}
	setObject(r, s.GetSpec().GetAnnotations().GetName())
	if _, err := c.RemoveSecret(ctx, &api.RemoveSecretRequest{SecretId: s.GetId()}); err != nil {
		return err
	}
	return httpapi.Empty(w, http.StatusNoContent)
}

func listConfigs(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) error {
	f, err := httpapi.RequestFilters(r, "name", "id", "label")
	if err != nil {
		return err
	}
	resp, err := c.ListConfigs(ctx, &api.ListConfigsRequest{Filters: &api.ListConfigsRequest_Filters{
		NamePrefixes: f["name"], IdPrefixes: f["id"], Labels: labelMap(f["label"]),
	}})
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusOK, all(resp.GetConfigs(), convert.DockerConfig))
}

func getConfig(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) error {
	config, err := findConfig(ctx, c, r.PathValue("id"))
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusOK, convert.DockerConfig(config))
}

func createConfig(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) error {
	var spec swarm.ConfigSpec
	if err := httpapi.ReadJSON(w, r, &spec); err != nil {
		return err
	}
	setObject(r, spec.Name)
	if err := checkTemplating(r, spec.Templating); err != nil {
		return err
	}
	resp, err := c.CreateConfig(ctx, &api.CreateConfigRequest{Spec: convert.StoreConfigSpec(spec)})
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusCreated, swarm.ConfigCreateResponse{ID: resp.GetConfig().GetId()})
}

func updateConfig(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) error {
	var spec swarm.ConfigSpec
	if err := httpapi.ReadJSON(w, r, &spec); err != nil {
		return err
	}
	version, err := versionQuery(r, "config")
	if err != nil {
		return err
	}
	config, err := findConfig(ctx, c, r.PathValue("id"))
	if err != nil {
		return err
	}
	setObject(r, config.GetSpec().GetAnnotations().GetName())
	_, err = c.UpdateConfig(ctx, &api.UpdateConfigRequest{ConfigId: config.GetId(), ConfigVersion: version, Spec: convert.StoreConfigSpec(spec)})
	return err
}

func removeConfig(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) error {
	config, err := findConfig(ctx, c, r.PathValue("id"))
	if err != nil {
		return err
	}
	setObject(r, config.GetSpec().GetAnnotations().GetName())
	if _, err := c.RemoveConfig(ctx, &api.RemoveConfigRequest{ConfigId: config.GetId()}); err != nil {
		return err
	}
	return httpapi.Empty(w, http.StatusNoContent)
}
