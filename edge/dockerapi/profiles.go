package dockerapi

import (
	"net/http"
	"net/http/pprof"
	runtimepprof "runtime/pprof"
	"slices"
	"strings"

	"github.com/skep-dev/skep/core/model"
)

// routeProfiles serves the profiles of Go's runtime, as Docker does when it is debugged.
func (a *API) routeProfiles() {
	a.router.Handle("GET", "/debug/pprof/{name}", func(w http.ResponseWriter, r *http.Request) error {
		if !a.daemon.Facts().Debug {
			return model.Errorf(model.NotFound, "profiles are served by a daemon that was started with --debug")
		}
		switch name := r.PathValue("name"); name {
		case "profile":
			pprof.Profile(w, r)
		case "trace":
			pprof.Trace(w, r)
		default:
			if runtimepprof.Lookup(name) == nil {
				return model.Errorf(model.NotFound, "no profile %s: there are %s", name, profileNames())
			}
			pprof.Handler(name).ServeHTTP(w, r)
		}
		return nil
	})
}

func profileNames() string {
	names := []string{"profile", "trace"}
	for _, p := range runtimepprof.Profiles() {
		names = append(names, p.Name())
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}
