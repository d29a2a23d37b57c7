package dockerapi

import (
	"context"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
	"github.com/skep-dev/skep/platform/audit"
)

// requestTimeout bounds what a request waits for the leader. Docker's clients know
// the error that follows without a quorum.
const requestTimeout = 20 * time.Second

// infoTimeout bounds the same for `docker info`, which many commands call first.
const infoTimeout = 2 * time.Second

// Config says what an API speaks for.
type Config struct {
	// Daemon, Swarm and Manager must be set; one value may be all three.
	Daemon  Daemon
	Swarm   Swarm
	Manager Manager
	// Local may be nil: then there is nothing to tell of containers and images.
	Local Local
	// Backups may be nil: then the endpoints for them refuse.
	Backups Backups
	// Experimental is told to clients.
	Experimental bool
	Log          *slog.Logger
	// Registerer gets the metrics; nil for none.
	Registerer prometheus.Registerer
	// Roles say what the certificates of clients may do.
	Roles RoleRules
	// Audit gets every write and every refusal; nil for none.
	Audit *audit.Log
}

// API serves the Docker Engine API of one daemon.
type API struct {
	daemon  Daemon
	swarm   Swarm
	manager Manager
	local   Local
	log     *slog.Logger
	router  *httpapi.Router
	config  Config
	grants  grants
	past    swarmPast
}

// New returns an API with all routes of this package.
func New(config Config) *API {
	a := &API{
		daemon: config.Daemon, swarm: config.Swarm, manager: config.Manager, local: config.Local,
		log: config.Log, config: config, grants: newGrants(),
	}
	a.router = httpapi.NewRouter(httpapi.Config{
		ServerVersion: config.Daemon.Facts().Version, Experimental: config.Experimental,
		Log: config.Log, Registerer: config.Registerer, Gate: a.gate,
	})
	a.routeSystem()
	a.routeSwarm()
	a.routeNodes()
	a.routeServices()
	a.routeTasks()
	a.routePayloads()
	a.routeRotation()
	a.routeNetworks()
	a.routeInsight()
	a.routeBackups()
	a.routeAudit()
	a.routeTokens()
	a.routeUnlocking()
	a.routeProfiles()
	return a
}

// Register lets another package add its routes. It must be called before Handler.
func (a *API) Register(add func(*httpapi.Router)) { add(a.router) }

// Handler returns what serves the API. Endpoints that Docker has and nobody added
// answer 501.
func (a *API) Handler() http.Handler {
	a.routeAbsent()
	return a.router
}

// onLeader is a handler that calls the leader. ctx ends with the request or after
// requestTimeout.
type onLeader func(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) error

// handle adds a route that only managers answer.
func (a *API) handle(method, pattern string, h onLeader) {
	a.router.Handle(method, pattern, func(w http.ResponseWriter, r *http.Request) error {
		c, err := a.manager.Control()
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
		defer cancel()
		return h(ctx, c, w, r)
	})
}
