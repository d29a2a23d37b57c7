package dockerapi

import (
	"context"
	"net/http"
	"strings"

	"github.com/moby/moby/api/types/swarm"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/convert"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
)

func (a *API) routeTasks() {
	a.handle("GET", "/tasks", listTasks)
	a.handle("GET", "/tasks/{id}", getTask)
	a.router.Handle("GET", "/tasks/{id}/logs", a.taskLogs)
}

func listTasks(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) error {
	f, err := httpapi.RequestFilters(r, "name", "id", "service", "node", "label", "desired-state", "runtime", "_up-to-date")
	if err != nil {
		return err
	}
	filters, err := taskFilters(ctx, c, f)
	if err != nil {
		return err
	}
	resp, err := c.ListTasks(ctx, &api.ListTasksRequest{Filters: filters})
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusOK, all(resp.GetTasks(), convert.DockerTask))
}

func taskFilters(ctx context.Context, c api.ControlClient, f httpapi.Filters) (*api.ListTasksRequest_Filters, error) {
	filters := &api.ListTasksRequest_Filters{
		NamePrefixes: f["name"], IdPrefixes: f["id"], Labels: labelMap(f["label"]), Runtimes: f["runtime"],
		UpToDate: f.Has("_up-to-date"),
	}
	if len(filters.Runtimes) == 0 {
		filters.Runtimes = []string{string(swarm.RuntimeContainer)}
	}
	for _, typed := range f["service"] {
		s, err := findService(ctx, c, typed, false)
		if err != nil {
			return nil, err
		}
		filters.ServiceIds = append(filters.ServiceIds, s.GetId())
	}
	for _, typed := range f["node"] {
		n, err := findNode(ctx, c, typed)
		if err != nil {
			return nil, err
		}
		filters.NodeIds = append(filters.NodeIds, n.GetId())
	}
	for _, state := range f["desired-state"] {
		v, ok := api.TaskState_value[strings.ToUpper(state)]
		if !ok {
			return nil, model.Errorf(model.Internal, "Invalid desired-state filter: '%s'", state)
		}
		filters.DesiredStates = append(filters.DesiredStates, api.TaskState(v))
	}
	return filters, nil
}

func getTask(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) error {
	t, err := findTask(ctx, c, r.PathValue("id"))
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusOK, convert.DockerTask(t))
}
