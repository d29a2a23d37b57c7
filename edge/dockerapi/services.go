package dockerapi

import (
	"context"
	"net/http"
	"slices"

	"github.com/moby/moby/api/pkg/authconfig"
	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/convert"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
)

func (a *API) routeServices() {
	a.handle("GET", "/services", listServices)
	a.handle("GET", "/services/{id}", getService)
	a.handle("POST", "/services/create", a.createService)
	a.handle("POST", "/services/{id}/update", a.updateService)
	a.handle("DELETE", "/services/{id}", removeService)
	a.router.Handle("GET", "/services/{id}/logs", a.serviceLogs)
}

func listServices(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) error {
	f, err := httpapi.RequestFilters(r, "name", "id", "label", "mode", "runtime")
	if err != nil {
		return err
	}
	withStatus := false
	if !httpapi.RequestVersion(r).Before(41) {
		if withStatus, err = httpapi.StrictBool(r, "status"); err != nil {
			return err
		}
	}
	runtimes := f["runtime"]
	if len(runtimes) == 0 {
		runtimes = []string{string(swarm.RuntimeContainer)}
	}
	resp, err := c.ListServices(ctx, &api.ListServicesRequest{Filters: &api.ListServicesRequest_Filters{
		NamePrefixes: f["name"], IdPrefixes: f["id"], Labels: labelMap(f["label"]), Runtimes: runtimes,
	}})
	if err != nil {
		return err
	}
	out := make([]swarm.Service, 0, len(resp.GetServices()))
	for _, s := range resp.GetServices() {
		if f.Exact("mode", convert.ServiceMode(s.GetSpec())) {
			out = append(out, convert.DockerService(s))
		}
	}
	if withStatus && len(out) > 0 {
		if err := addStatuses(ctx, c, out); err != nil {
			return err
		}
	}
	return httpapi.WriteJSON(w, http.StatusOK, out)
}

// addStatuses fills in how many tasks run, for all services in one call.
func addStatuses(ctx context.Context, c api.ControlClient, services []swarm.Service) error {
	index := make(map[string]int, len(services))
	req := new(api.ListServiceStatusesRequest)
	for i, s := range services {
		index[s.ID] = i
		req.Services = append(req.Services, s.ID)
	}
	resp, err := c.ListServiceStatuses(ctx, req)
	if err != nil {
		return err
	}
	for _, s := range resp.GetStatuses() {
		if i, ok := index[s.GetServiceId()]; ok {
			services[i].ServiceStatus = &swarm.ServiceStatus{
				RunningTasks: s.GetRunningTasks(), DesiredTasks: s.GetDesiredTasks(), CompletedTasks: s.GetCompletedTasks(),
			}
		}
	}
	return nil
}

func getService(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) error {
	insertDefaults, err := httpapi.StrictBool(r, "insertDefaults")
	if err != nil {
		return err
	}
	s, err := findService(ctx, c, r.PathValue("id"), insertDefaults)
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusOK, convert.DockerService(s))
}

// serviceBody is a service spec with the network list of clients before 1.44.
type serviceBody struct {
	swarm.ServiceSpec
	Networks []swarm.NetworkAttachmentConfig
}

// readServiceSpec decodes, adapts and converts the body, and replaces network names
// by ids, so that stored specs compare equal when nothing changed.
func readServiceSpec(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) (*api.ServiceSpec, error) {
	var body serviceBody
	if err := httpapi.ReadJSON(w, r, &body); err != nil {
		return nil, err
	}
	version := httpapi.RequestVersion(r)
	adaptServiceSpec(&body.ServiceSpec, version)
	if !version.Before(44) {
		body.Networks = nil
	}
	spec, err := convert.StoreServiceSpec(body.ServiceSpec, body.Networks)
	if err != nil {
		return nil, err
	}
	for _, n := range spec.GetTask().GetNetworks() {
		if n.Target, err = networkID(ctx, c, n.GetTarget()); err != nil {
			return nil, err
		}
	}
	return spec, nil
}

// setRegistryAuth stores credentials with a container spec, in the form that agents decode.
func setRegistryAuth(spec *api.ServiceSpec, r *http.Request) (bool, error) {
	auth := httpapi.RegistryAuth(r)
	container := spec.GetTask().GetContainer()
	if auth == nil || container == nil {
		return false, nil
	}
	encoded, err := authconfig.Encode(*auth)
	if err != nil {
		return false, err
	}
	container.PullOptions = &api.ContainerSpec_PullOptions{RegistryAuth: encoded}
	return true, nil
}

func (a *API) createService(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) error {
	spec, err := readServiceSpec(ctx, c, w, r)
	if err != nil {
		return err
	}
	setObject(r, spec.GetAnnotations().GetName())
	if err := admitService(ctx, c, nil, spec, false); err != nil {
		return err
	}
	if _, err := setRegistryAuth(spec, r); err != nil {
		return err
	}
	warnings := a.pinImage(ctx, spec, r)
	resp, err := createNamed(ctx, c, spec)
	if err != nil {
		return err
	}
	setObject(r, resp.GetService().GetSpec().GetAnnotations().GetName())
	return httpapi.WriteJSON(w, http.StatusCreated, swarm.ServiceCreateResponse{ID: resp.GetService().GetId(), Warnings: warnings})
}

// maxNames is how many random names are tried for a service that was given none.
const maxNames = 10

// createNamed creates a service, under a random name if it has none.
func createNamed(ctx context.Context, c api.ControlClient, spec *api.ServiceSpec) (*api.CreateServiceResponse, error) {
	if spec.GetAnnotations().GetName() != "" {
		return c.CreateService(ctx, &api.CreateServiceRequest{Spec: spec})
	}
	for try := 1; ; try++ {
		spec.Annotations.Name = randomName()
		resp, err := c.CreateService(ctx, &api.CreateServiceRequest{Spec: spec})
		if status.Code(err) != codes.AlreadyExists || try == maxNames {
			return resp, err
		}
	}
}

func (a *API) updateService(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) error {
	version, err := versionQuery(r, "service")
	if err != nil {
		return err
	}
	spec, err := readServiceSpec(ctx, c, w, r)
	if err != nil {
		return err
	}
	from := r.URL.Query().Get("registryAuthFrom")
	if !slices.Contains([]string{"", string(swarm.RegistryAuthFromSpec), string(swarm.RegistryAuthFromPreviousSpec)}, from) {
		return model.Errorf(model.Invalid, "invalid registryAuthFrom '%s'", from)
	}
	rollback := api.UpdateServiceRequest_NONE
	switch text := r.URL.Query().Get("rollback"); text {
	case "", "none":
	case "previous":
		rollback = api.UpdateServiceRequest_PREVIOUS
	default:
		return model.Errorf(model.Internal, "unrecognized rollback option %s", text)
	}
	old, err := findService(ctx, c, r.PathValue("id"), false)
	if err != nil {
		return err
	}
	setObject(r, old.GetSpec().GetAnnotations().GetName())
	if err := admitService(ctx, c, old, spec, rollback == api.UpdateServiceRequest_PREVIOUS); err != nil {
		return err
	}
	if err := keepRegistryAuth(spec, old, from, r); err != nil {
		return err
	}
	warnings := a.pinImage(ctx, spec, r)
	_, err = c.UpdateService(ctx, &api.UpdateServiceRequest{ServiceId: old.GetId(), ServiceVersion: version, Spec: spec, Rollback: rollback})
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusOK, swarm.ServiceUpdateResponse{Warnings: warnings})
}

// keepRegistryAuth takes the credentials of the request, or else those stored with the
// present or the previous spec.
func keepRegistryAuth(spec *api.ServiceSpec, old *api.Service, from string, r *http.Request) error {
	if set, err := setRegistryAuth(spec, r); set || err != nil {
		return err
	}
	source := old.GetSpec()
	if from == string(swarm.RegistryAuthFromPreviousSpec) {
		if source = old.GetPreviousSpec(); source == nil {
			return model.Errorf(model.Internal, "service does not have a previous spec")
		}
	}
	if container := spec.GetTask().GetContainer(); container != nil {
		container.PullOptions = model.Clone(source.GetTask().GetContainer().GetPullOptions())
	}
	return nil
}

func removeService(ctx context.Context, c api.ControlClient, _ http.ResponseWriter, r *http.Request) error {
	s, err := findService(ctx, c, r.PathValue("id"), false)
	if err != nil {
		return err
	}
	setObject(r, s.GetSpec().GetAnnotations().GetName())
	_, err = c.RemoveService(ctx, &api.RemoveServiceRequest{ServiceId: s.GetId()})
	return err
}
