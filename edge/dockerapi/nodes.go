package dockerapi

import (
	"context"
	"net/http"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/swarm"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/convert"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
)

func (a *API) routeNodes() {
	a.handle("GET", "/nodes", listNodes)
	a.handle("GET", "/nodes/{id}", getNode)
	a.handle("POST", "/nodes/{id}/update", updateNode)
	a.handle("DELETE", "/nodes/{id}", removeNode)
}

func listNodes(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) error {
	f, err := httpapi.RequestFilters(r, "name", "id", "label", "node.label", "role", "membership")
	if err != nil {
		return err
	}
	filters := &api.ListNodesRequest_Filters{
		NamePrefixes: f["name"], IdPrefixes: f["id"], Labels: labelMap(f["label"]), NodeLabels: labelMap(f["node.label"]),
	}
	for _, role := range f["role"] {
		v, ok := api.NodeRole_value[strings.ToUpper(role)]
		if !ok {
			return model.Errorf(model.Internal, "Invalid role filter: '%s'", role)
		}
		filters.Roles = append(filters.Roles, api.NodeRole(v))
	}
	for _, membership := range f["membership"] {
		v, ok := api.NodeSpec_Membership_value[strings.ToUpper(membership)]
		if !ok {
			return model.Errorf(model.Internal, "Invalid membership filter: '%s'", membership)
		}
		filters.Memberships = append(filters.Memberships, api.NodeSpec_Membership(v))
	}
	resp, err := c.ListNodes(ctx, &api.ListNodesRequest{Filters: filters})
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusOK, all(resp.GetNodes(), convert.DockerNode))
}

func getNode(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) error {
	n, err := findNode(ctx, c, r.PathValue("id"))
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusOK, convert.DockerNode(n))
}

func updateNode(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) error {
	var spec swarm.NodeSpec
	if err := httpapi.ReadJSON(w, r, &spec); err != nil {
		return err
	}
	version, err := versionQuery(r, "node")
	if err != nil {
		return err
	}
	stored, err := convert.StoreNodeSpec(spec)
	if err != nil {
		return err
	}
	n, err := findNode(ctx, c, r.PathValue("id"))
	if err != nil {
		return err
	}
	_, err = c.UpdateNode(ctx, &api.UpdateNodeRequest{NodeId: n.GetId(), NodeVersion: version, Spec: stored})
	return err
}

func removeNode(ctx context.Context, c api.ControlClient, _ http.ResponseWriter, r *http.Request) error {
	n, err := findNode(ctx, c, r.PathValue("id"))
	if err != nil {
		return err
	}
	setObject(r, n.GetId()+" "+n.GetDescription().GetHostname())
	_, err = c.RemoveNode(ctx, &api.RemoveNodeRequest{NodeId: n.GetId(), Force: httpapi.Bool(r, "force")})
	return err
}

// versionQuery reads the version that an update is based on.
func versionQuery(r *http.Request, what string) (*api.Version, error) {
	text := r.URL.Query().Get("version")
	index, err := strconv.ParseUint(text, 10, 64)
	switch {
	case err == nil:
		return &api.Version{Index: index}, nil
	case what == "secret" || what == "config":
		return nil, model.Errorf(model.Invalid, "invalid %s version", what)
	default:
		return nil, model.Errorf(model.Invalid, "invalid %s version '%s': %v", what, text, err)
	}
}

// labelMap turns "k" and "k=v" into a map.
func labelMap(list []string) map[string]string {
	if len(list) == 0 {
		return nil
	}
	labels := make(map[string]string, len(list))
	for _, l := range list {
		k, v, _ := strings.Cut(l, "=")
		labels[k] = v
	}
	return labels
}

// all converts a list for an answer, where an empty one is [] and never null.
func all[A, B any](list []A, convert func(A) B) []B {
	out := make([]B, 0, len(list))
	for _, x := range list {
		out = append(out, convert(x))
	}
	return out
}
