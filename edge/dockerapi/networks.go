package dockerapi

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/network"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/convert"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
)

func (a *API) routeNetworks() {
	a.router.Handle("GET", "/networks", a.listNetworks)
	a.router.Handle("GET", "/networks/{id...}", a.getNetwork)
	a.router.Handle("POST", "/networks/create", a.createNetwork)
	a.router.Handle("DELETE", "/networks/{id...}", a.removeNetwork)
	a.router.Handle("POST", "/networks/prune", a.pruneNetworks)
	a.router.Handle("POST", "/networks/{id...}/connect", a.connectContainer)
	a.router.Handle("POST", "/networks/{id...}/disconnect", a.disconnectContainer)
}

// predefined are the networks that every node has; their names are taken everywhere.
func predefined(name string) bool { return slices.Contains([]string{"bridge", "host", "none"}, name) }

// localNetworks are this node's own networks.
func (a *API) localNetworks(ctx context.Context) ([]network.Inspect, error) {
	if a.local != nil {
		list, err := a.local.Networks(ctx)
		if err != nil || list != nil {
			return list, err
		}
	}
	var list []network.Inspect
	for name, driver := range map[string]string{"bridge": "bridge", "host": "host", "none": "null"} {
		id := sha256.Sum256([]byte(a.daemon.Facts().ID + "/" + name))
		list = append(list, network.Inspect{
			Network: network.Network{
				Name: name, ID: hex.EncodeToString(id[:]), Scope: "local", Driver: driver, EnableIPv4: true,
				IPAM: network.IPAM{Driver: "default"}, Options: map[string]string{}, Labels: map[string]string{},
			},
			Containers: map[string]network.EndpointResource{},
		})
	}
	return list, nil
}

// swarmNetworks are the networks of the swarm; none unless this node is a manager.
// The swarm's copies of predefined networks are shown as each node's own.
func (a *API) swarmNetworks(ctx context.Context) ([]network.Inspect, error) {
	c, err := a.manager.Control()
	if err != nil {
		return nil, nil //nolint:nilerr // a node that is no manager has no swarm networks to show
	}
	resp, err := c.ListNetworks(ctx, new(api.ListNetworksRequest))
	if err != nil {
		return nil, err
	}
	var list []network.Inspect
	for _, n := range resp.GetNetworks() {
		if !predefined(n.GetSpec().GetAnnotations().GetName()) {
			list = append(list, network.Inspect{Network: convert.DockerSwarmNetwork(n), Containers: map[string]network.EndpointResource{}})
		}
	}
	return list, nil
}

// networks lists the swarm's networks first, then this node's. What this node knows of a
// network of the swarm is added to the swarm's record of it, or stands alone on a worker.
func (a *API) networks(ctx context.Context) ([]network.Inspect, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	list, err := a.swarmNetworks(ctx)
	if err != nil {
		return nil, err
	}
	local, err := a.localNetworks(ctx)
	if err != nil {
		return nil, err
	}
	slices.SortFunc(local, func(a, b network.Inspect) int { return cmp.Compare(a.Name, b.Name) })
	for _, n := range local {
		if i := slices.IndexFunc(list, func(s network.Inspect) bool { return s.ID == n.ID }); i >= 0 {
			list[i].Containers = n.Containers
			continue
		}
		list = append(list, n)
	}
	return list, nil
}

func (a *API) listNetworks(w http.ResponseWriter, r *http.Request) error {
	f, err := httpapi.RequestFilters(r, "name", "id", "driver", "scope", "type", "label", "dangling", "until", "label!")
	if err != nil {
		return err
	}
	dangling, err := f.Bool("dangling", false)
	if err != nil {
		return err
	}
	for _, kind := range f["type"] {
		if kind != "builtin" && kind != "custom" {
			return model.Errorf(model.Internal, "invalid filter: 'type'='%s'", kind)
		}
	}
	list, err := a.networks(r.Context())
	if err != nil {
		return err
	}
	out := make([]network.Summary, 0, len(list))
	for _, n := range list {
		kind := "custom"
		if predefined(n.Name) {
			kind = "builtin"
		}
		if f.Match("name", n.Name) && f.Match("id", n.ID) && f.Exact("driver", n.Driver) && f.Exact("scope", n.Scope) &&
			f.Exact("type", kind) && f.Labels("label", n.Labels) && (!f.Has("dangling") || dangling == (kind == "custom" && len(n.Containers) == 0)) {
			out = append(out, network.Summary{Network: n.Network})
		}
	}
	return httpapi.WriteJSON(w, http.StatusOK, out)
}

// findNetwork looks a network up by full id, name, then id prefix; scope may be empty.
func (a *API) findNetwork(ctx context.Context, typed, scope string) (network.Inspect, error) {
	list, err := a.networks(ctx)
	if err != nil {
		return network.Inspect{}, err
	}
	list = slices.DeleteFunc(list, func(n network.Inspect) bool { return scope != "" && n.Scope != scope })
	for _, match := range []struct {
		by string
		fn func(network.Inspect) bool
	}{
		{"ID", func(n network.Inspect) bool { return n.ID == typed }},
		{"name", func(n network.Inspect) bool { return n.Name == typed }},
		{"ID prefix", func(n network.Inspect) bool { return strings.HasPrefix(n.ID, typed) }},
	} {
		var found []network.Inspect
		for _, n := range list {
			if match.fn(n) {
				found = append(found, n)
			}
		}
		switch len(found) {
		case 0:
		case 1:
			return found[0], nil
		default:
			return network.Inspect{}, model.Errorf(model.Invalid, "network %s is ambiguous (%d matches found based on %s)", typed, len(found), match.by)
		}
	}
	return network.Inspect{}, model.Errorf(model.NotFound, "network %s not found", typed)
}

func (a *API) getNetwork(w http.ResponseWriter, r *http.Request) error {
	verbose, err := httpapi.StrictBool(r, "verbose")
	if err != nil {
		return err
	}
	scope := r.URL.Query().Get("scope")
	typed := r.PathValue("id")
	n, err := a.findNetwork(r.Context(), typed, scope)
	if model.KindOf(err) == model.NotFound && scope == "swarm" && predefined(typed) {
		// `service create --network host` asks for the swarm's copy.
		return a.predefinedCopy(w, r, typed)
	}
	if err != nil {
		return err
	}
	if n.Scope == "swarm" && scope == "" {
		if err := a.addMembers(r.Context(), &n, verbose); err != nil {
			return err
		}
	}
	return httpapi.WriteJSON(w, http.StatusOK, n)
}

// addMembers shows the nodes that take part in a network of the swarm and, when verbose,
// its services with their tasks. Only managers know.
func (a *API) addMembers(ctx context.Context, n *network.Inspect, verbose bool) error {
	c, err := a.manager.Control()
	if err != nil {
		return nil // a worker shows what it has
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	nodes, err := c.ListNodes(ctx, new(api.ListNodesRequest))
	if err != nil {
		return err
	}
	tasks, err := c.ListTasks(ctx, new(api.ListTasksRequest))
	if err != nil {
		return err
	}
	m := convert.NetworkMembers(n.ID, n.Ingress, nodes.GetNodes(), tasks.GetTasks())
	n.Peers = m.Peers
	if !verbose {
		return nil
	}
	services, err := c.ListServices(ctx, new(api.ListServicesRequest))
	if err != nil {
		return err
	}
	n.Services = m.Services(services.GetServices())
	return nil
}

func (a *API) predefinedCopy(w http.ResponseWriter, r *http.Request, name string) error {
	c, err := a.manager.Control()
	if err != nil {
		return model.Errorf(model.NotFound, "network %s not found", name)
	}
	resp, err := c.GetNetwork(r.Context(), &api.GetNetworkRequest{Name: name})
	if err != nil {
		return model.Errorf(model.NotFound, "network %s not found", name)
	}
	return httpapi.WriteJSON(w, http.StatusOK, network.Inspect{
		Network: convert.DockerSwarmNetwork(resp.GetNetwork()), Containers: map[string]network.EndpointResource{},
	})
}

// networkID replaces the name or id prefix of a swarm network in a service spec. What
// only nodes have cannot be used, but for the predefined networks.
func networkID(ctx context.Context, c api.ControlClient, typed string) (string, error) {
	resp, err := c.ListNetworks(ctx, new(api.ListNetworksRequest))
	if err != nil {
		return "", err
	}
	var byName, byPrefix []string
	for _, n := range resp.GetNetworks() {
		switch {
		case n.GetId() == typed:
			return typed, nil
		case n.GetSpec().GetAnnotations().GetName() == typed:
			byName = append(byName, n.GetId())
		case strings.HasPrefix(n.GetId(), typed):
			byPrefix = append(byPrefix, n.GetId())
		}
	}
	for _, ids := range [][]string{byName, byPrefix} {
		switch len(ids) {
		case 0:
		case 1:
			return ids[0], nil
		default:
			return "", model.Errorf(model.Invalid, "network %s is ambiguous (%d matches found)", typed, len(ids))
		}
	}
	return "", model.Errorf(model.Internal, "network %s not found", typed)
}

func (a *API) createNetwork(w http.ResponseWriter, r *http.Request) error {
	var req network.CreateRequest
	if err := httpapi.ReadJSON(w, r, &req); err != nil {
		return err
	}
	setObject(r, req.Name)
	switch {
	case predefined(req.Name):
		return model.Errorf(model.Denied, "%s is a pre-defined network and cannot be created", req.Name)
	case req.Labels["com.docker.swarm.predefined"] != "":
		return model.Errorf(model.Denied, "label com.docker.swarm.predefined is reserved for the swarm's own networks")
	case req.Driver != "overlay" && req.Scope != "swarm":
		return a.createLocalNetwork(w, r, req)
	}
	switch {
	case req.ConfigOnly:
		return model.Errorf(model.Unimplemented, "network %s: configurations of networks (--config-only) are not implemented by skep yet", req.Name)
	case req.EnableIPv4 != nil && !*req.EnableIPv4:
		return model.Errorf(model.Invalid, "IPv4 cannot be disabled in a Swarm scoped network")
	}
	c, err := a.manager.Control()
	if err != nil {
		return httpapi.Errorf(http.StatusForbidden, "%s", err)
	}
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	list, err := a.networks(ctx)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(list, func(n network.Inspect) bool { return n.Name == req.Name }) {
		return model.Errorf(model.Exists, "network with name %s already exists", req.Name)
	}
	resp, err := c.CreateNetwork(ctx, &api.CreateNetworkRequest{Spec: convert.StoreNetworkSpec(req)})
	if err != nil {
		return err
	}
	id := resp.GetNetwork().GetId()
	awaitNetwork(ctx, c, id)
	return httpapi.WriteJSON(w, http.StatusCreated, network.CreateResponse{ID: id})
}

// createLocalNetwork makes a network of this node.
func (a *API) createLocalNetwork(w http.ResponseWriter, r *http.Request, req network.CreateRequest) error {
	switch req.Driver {
	case "", "default", "bridge":
	case "host", "null":
		return model.Errorf(model.Denied, "only one instance of %q network is allowed", req.Driver)
	case "macvlan", "ipvlan":
		return model.Errorf(model.Unimplemented, "network %s: the driver %s is not implemented by skep", req.Name, req.Driver)
	default:
		return model.Errorf(model.NotFound, "plugin %q not found", req.Driver)
	}
	if a.local == nil {
		return httpapi.NotImplemented(w, r)
	}
	list, err := a.networks(r.Context())
	if err != nil {
		return err
	}
	if slices.ContainsFunc(list, func(n network.Inspect) bool { return n.Name == req.Name }) {
		return model.Errorf(model.Exists, "network with name %s already exists", req.Name)
	}
	id, err := a.local.CreateNetwork(r.Context(), req)
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusCreated, network.CreateResponse{ID: id})
}

// allocationTimeout bounds how long a client waits for a new network's subnets. They come
// as fast as the log takes them; a network that cannot have any has its services say so.
const allocationTimeout = time.Second

// awaitNetwork returns once a network has its subnets, or after allocationTimeout.
func awaitNetwork(ctx context.Context, c api.ControlClient, id string) {
	ctx, cancel := context.WithTimeout(ctx, allocationTimeout)
	defer cancel()
	for pause := 2 * time.Millisecond; ; pause *= 2 {
		resp, err := c.GetNetwork(ctx, &api.GetNetworkRequest{NetworkId: id})
		if err != nil || resp.GetNetwork().GetDriverState() != nil {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

func (a *API) removeNetwork(w http.ResponseWriter, r *http.Request) error {
	n, err := a.findNetwork(r.Context(), r.PathValue("id"), "")
	if err != nil {
		return err
	}
	if predefined(n.Name) {
		return model.Errorf(model.Denied, "%s is a pre-defined network and cannot be removed", n.Name)
	}
	if n.Scope == "local" {
		if err := a.local.RemoveNetwork(r.Context(), n); err != nil {
			return err
		}
		return httpapi.Empty(w, http.StatusNoContent)
	}
	c, err := a.manager.Control()
	if err != nil {
		return err
	}
	if _, err := c.RemoveNetwork(r.Context(), &api.RemoveNetworkRequest{NetworkId: n.ID}); err != nil {
		return err
	}
	return httpapi.Empty(w, http.StatusNoContent)
}

// pruneNetworks removes the networks of this node and of the swarm that nothing uses.
func (a *API) pruneNetworks(w http.ResponseWriter, r *http.Request) error {
	f, err := httpapi.RequestFilters(r, "until", "label", "label!")
	if err != nil {
		return err
	}
	var until time.Time
	for _, text := range f["until"] {
		if until, err = httpapi.Until(text, time.Now()); err != nil {
			return err
		}
	}
	kept := func(n network.Inspect) bool {
		return n.Ingress || predefined(n.Name) || !f.Labels("label", n.Labels) || f.Has("label!") && f.Labels("label!", n.Labels) ||
			!until.IsZero() && !n.Created.Before(until)
	}
	var report network.PruneReport
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	if report.NetworksDeleted, err = a.pruneLocal(ctx, kept); err != nil {
		return err
	}
	c, err := a.manager.Control()
	if err != nil {
		return httpapi.WriteJSON(w, http.StatusOK, report) // a worker has none of the swarm
	}
	list, err := a.swarmNetworks(ctx)
	if err != nil {
		return err
	}
	for _, n := range list {
		if kept(n) {
			continue
		}
		_, err := c.RemoveNetwork(ctx, &api.RemoveNetworkRequest{NetworkId: n.ID})
		switch code := status.Code(err); {
		case err == nil:
			report.NetworksDeleted = append(report.NetworksDeleted, n.Name)
		case code != codes.FailedPrecondition && code != codes.NotFound: // in use, or gone
			return err
		}
	}
	return httpapi.WriteJSON(w, http.StatusOK, report)
}

// pruneLocal removes the networks of this node that nothing uses.
func (a *API) pruneLocal(ctx context.Context, kept func(network.Inspect) bool) ([]string, error) {
	list, err := a.localNetworks(ctx)
	if err != nil || a.local == nil {
		return nil, err
	}
	var deleted []string
	for _, n := range list {
		if n.Scope != "local" || kept(n) || len(n.Containers) > 0 {
			continue
		}
		switch err := a.local.RemoveNetwork(ctx, n); model.KindOf(err) {
		case model.Denied, model.NotFound: // in use meanwhile, or gone
		default:
			if err != nil {
				return deleted, err
			}
			deleted = append(deleted, n.Name)
		}
	}
	return deleted, nil
}
