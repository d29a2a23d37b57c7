package dockerapi

import (
	"io"
	"net/http"

	"github.com/moby/moby/api/types/build"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
)

// routeSystem adds what is about the daemon.
func (a *API) routeSystem() {
	a.router.Handle("GET", "/_ping", a.ping)
	a.router.Handle("HEAD", "/_ping", a.ping)
	a.router.Handle("GET", "/info", a.info)
	a.router.Handle("GET", "/version", a.version)
	a.router.Handle("GET", "/events", a.events)
	a.router.Handle("GET", "/distribution/{name...}/json", a.distribution)
	a.router.Handle("GET", "/plugins", func(w http.ResponseWriter, _ *http.Request) error {
		return httpapi.WriteJSON(w, http.StatusOK, []struct{}{})
	})
	// `docker inspect X` asks for every kind of object in turn and needs 404 for a miss.
	a.router.Handle("GET", "/plugins/{name...}/json", func(_ http.ResponseWriter, r *http.Request) error {
		return model.Errorf(model.NotFound, "plugin %q not found", r.PathValue("name"))
	})
	// `docker system prune` clears a build cache, of which there is none.
	a.router.Handle("POST", "/build/prune", func(w http.ResponseWriter, _ *http.Request) error {
		return httpapi.WriteJSON(w, http.StatusOK, build.CachePruneReport{})
	})
}

func (a *API) ping(w http.ResponseWriter, r *http.Request) error {
	h := w.Header()
	h.Set("Cache-Control", "no-cache, no-store, must-revalidate")
	h.Set("Pragma", "no-cache")
	h.Set("Builder-Version", "1")
	status := a.swarm.Status()
	state := string(status.LocalNodeState)
	if state == "active" {
		state += "/worker"
		if status.ControlAvailable {
			state = "active/manager"
		}
	}
	h.Set("Swarm", state)
	h.Set("Content-Type", "text/plain; charset=utf-8")
	if r.Method == http.MethodHead {
		h.Set("Content-Length", "0")
		return httpapi.Empty(w, http.StatusOK)
	}
	_, err := io.WriteString(w, "OK")
	return err
}

func (a *API) distribution(w http.ResponseWriter, r *http.Request) error {
	if a.local == nil {
		return model.Errorf(model.Unimplemented, "this node cannot ask registries")
	}
	found, err := a.local.Distribution(r.Context(), r.PathValue("name"), httpapi.RegistryAuth(r))
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusOK, found)
}
