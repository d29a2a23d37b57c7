package dockerapi

import "strings"

// grant is what a route asks of its caller.
type grant struct {
	// role is the least that may call the route.
	role Role
	// recorded calls are in the audit log, long ones from their beginning.
	recorded, long bool
}

// grants are those of all routes, as "METHOD /pattern". docs/security.md says what the roles
// are for; a test holds this table against the router.
type grants map[string]grant

// of returns the grant of a route; one that is not in the table is for admins alone.
func (g grants) of(route string) grant {
	if found, ok := g[route]; ok {
		return found
	}
	return grant{role: Admin, recorded: true}
}

// viewerRoutes read what the swarm and this node are and do.
const viewerRoutes = `
	GET /_ping  HEAD /_ping
	GET /info
	GET /version
	GET /events
	GET /system/df
	GET /swarm
	GET /nodes
	GET /nodes/{id}
	GET /services
	GET /services/{id}
	GET /services/{id}/logs
	GET /tasks
	GET /tasks/{id}
	GET /tasks/{id}/logs
	GET /secrets
	GET /secrets/{id}
	GET /configs
	GET /configs/{id}
	GET /networks
	GET /networks/{id...}
	GET /containers/json
	GET /containers/{name...}/json
	GET /containers/{name...}/logs
	GET /containers/{name...}/stats
	GET /containers/{name...}/top
	GET /containers/{name...}/changes
	GET /containers/{name...}/checkpoints
	POST /containers/{name...}/wait
	GET /exec/{id}/json
	GET /images/json
	GET /images/{name...}/json
	GET /images/{name...}/history
	GET /images/{name...}/attestations
	GET /volumes
	GET /volumes/{name...}
	GET /plugins
	GET /plugins/{name...}/json
	GET /skep/v1/explain
	GET /skep/v1/overview
`

// operatorRoutes change services and what belongs to them, and ask registries for it.
const operatorRoutes = `
	POST /services/create
	POST /services/{id}/update
	DELETE /services/{id}
	POST /secrets/create
	POST /secrets/{id}/update
	DELETE /secrets/{id}
	POST /skep/v1/secrets/{id}/rotate
	POST /skep/v1/secrets/{id}/rollback
	POST /configs/create
	POST /configs/{id}/update
	DELETE /configs/{id}
	POST /networks/create
	POST /networks/prune
	POST /skep/v1/networks/check
	DELETE /networks/{id...}
	POST /auth
	GET /distribution/{name...}/json
	GET /images/search
`

// adminRoutes change the swarm and its nodes, reach into containers, or show keys.
const adminRoutes = `
	POST /swarm/init
	POST /swarm/join
	POST /swarm/leave
	POST /swarm/update
	POST /swarm/unlock
	GET /swarm/unlockkey
	POST /nodes/{id}/update
	DELETE /nodes/{id}
	GET /debug/pprof/{name}
	GET /skep/v1/audit
	GET /skep/v1/tokens
	POST /skep/v1/tokens
	DELETE /skep/v1/tokens/{id}
	GET /skep/v1/unlocking
	POST /skep/v1/unlocking
	POST /skep/v1/backup
	POST /skep/v1/restore
	POST /containers/create
	POST /containers/prune
	POST /containers/{name...}/start
	POST /containers/{name...}/stop
	POST /containers/{name...}/restart
	POST /containers/{name...}/kill
	POST /containers/{name...}/pause
	POST /containers/{name...}/unpause
	POST /containers/{name...}/rename
	POST /containers/{name...}/resize
	POST /containers/{name...}/update
	POST /containers/{name...}/attach
	GET /containers/{name...}/attach/ws
	POST /containers/{name...}/exec
	POST /containers/{name...}/checkpoints
	DELETE /containers/{name...}/checkpoints/{checkpoint}
	DELETE /containers/{name...}
	GET /containers/{name...}/archive
	HEAD /containers/{name...}/archive
	PUT /containers/{name...}/archive
	GET /containers/{name...}/export
	POST /exec/{id}/start
	POST /exec/{id}/resize
	POST /commit
	GET /images/get
	GET /images/{name...}/get
	POST /images/create
	POST /images/load
	POST /images/prune
	POST /images/{name...}/push
	POST /images/{name...}/tag
	DELETE /images/{name...}
	POST /build
	POST /build/cancel
	POST /build/prune
	POST /session
	POST /grpc
	POST /networks/{id...}/connect
	POST /networks/{id...}/disconnect
	POST /volumes/create
	POST /volumes/prune
	PUT /volumes/{name...}
	DELETE /volumes/{name...}
	GET /plugins/privileges
	POST /plugins/pull
	POST /plugins/create
	POST /plugins/{name...}/enable
	POST /plugins/{name...}/disable
	POST /plugins/{name...}/push
	POST /plugins/{name...}/set
	POST /plugins/{name...}/upgrade
	DELETE /plugins/{name...}
`

// newGrants makes the table. Writes are recorded, and what only admins may read; so that a
// terminal leaves no flood, the changes of its size are not.
func newGrants() grants {
	g := grants{}
	for role, routes := range map[Role]string{Viewer: viewerRoutes, Operator: operatorRoutes, Admin: adminRoutes} {
		fields := strings.Fields(routes)
		for i := 0; i+1 < len(fields); i += 2 {
			route := fields[i] + " " + fields[i+1]
			reads := fields[i] == "GET" || fields[i] == "HEAD"
			g[route] = grant{
				role:     role,
				recorded: role == Admin && !strings.HasSuffix(route, "/resize") || role == Operator && !reads,
				long: route == "POST /exec/{id}/start" || route == "POST /containers/{name...}/attach" ||
					route == "GET /containers/{name...}/attach/ws",
			}
		}
	}
	return g
}
