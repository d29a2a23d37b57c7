package dockerapi

import "github.com/skep-dev/skep/edge/dockerapi/httpapi"

// absent lists endpoints that Docker has. Those that no package has added when the
// API begins to serve answer 501 instead of 404.
func absent() [][2]string {
	return [][2]string{
		{"POST", "/auth"},
		{"GET", "/system/df"},
		{"GET", "/containers/json"},
		{"POST", "/containers/create"},
		{"POST", "/containers/prune"},
		{"GET", "/containers/{name...}/json"},
		{"GET", "/containers/{name...}/logs"},
		{"GET", "/containers/{name...}/stats"},
		{"GET", "/containers/{name...}/top"},
		{"GET", "/containers/{name...}/attach/ws"},
		{"GET", "/containers/{name...}/checkpoints"},
		{"POST", "/containers/{name...}/checkpoints"},
		{"DELETE", "/containers/{name...}/checkpoints/{checkpoint}"},
		{"POST", "/containers/{name...}/attach"},
		{"POST", "/containers/{name...}/exec"},
		{"POST", "/containers/{name...}/kill"},
		{"POST", "/containers/{name...}/pause"},
		{"POST", "/containers/{name...}/unpause"},
		{"POST", "/containers/{name...}/rename"},
		{"POST", "/containers/{name...}/resize"},
		{"POST", "/containers/{name...}/restart"},
		{"POST", "/containers/{name...}/start"},
		{"POST", "/containers/{name...}/stop"},
		{"POST", "/containers/{name...}/update"},
		{"POST", "/containers/{name...}/wait"},
		{"DELETE", "/containers/{name...}"},
		{"GET", "/exec/{id}/json"},
		{"POST", "/exec/{id}/start"},
		{"POST", "/exec/{id}/resize"},
		{"POST", "/commit"},
		{"GET", "/images/json"},
		{"GET", "/images/get"},
		{"GET", "/images/search"},
		{"GET", "/images/{name...}/get"},
		{"GET", "/images/{name...}/history"},
		{"GET", "/images/{name...}/json"},
		{"GET", "/images/{name...}/attestations"},
		{"POST", "/images/create"},
		{"POST", "/images/load"},
		{"POST", "/images/prune"},
		{"POST", "/images/{name...}/push"},
		{"POST", "/images/{name...}/tag"},
		{"DELETE", "/images/{name...}"},
		{"POST", "/build"},
		{"POST", "/build/cancel"},
		{"POST", "/session"},
		{"POST", "/grpc"},
		{"GET", "/volumes"},
		{"GET", "/volumes/{name...}"},
		{"POST", "/volumes/create"},
		{"POST", "/volumes/prune"},
		{"PUT", "/volumes/{name...}"},
		{"DELETE", "/volumes/{name...}"},
		{"GET", "/plugins/privileges"},
		{"POST", "/plugins/pull"},
		{"POST", "/plugins/create"},
		{"POST", "/plugins/{name...}/enable"},
		{"POST", "/plugins/{name...}/disable"},
		{"POST", "/plugins/{name...}/push"},
		{"POST", "/plugins/{name...}/set"},
		{"POST", "/plugins/{name...}/upgrade"},
		{"DELETE", "/plugins/{name...}"},
	}
}

func (a *API) routeAbsent() {
	for _, route := range absent() {
		if !a.router.Has(route[0], route[1]) {
			a.router.Handle(route[0], route[1], httpapi.NotImplemented)
		}
	}
}
