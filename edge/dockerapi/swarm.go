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

func (a *API) routeSwarm() {
	a.router.Handle("POST", "/swarm/init", a.initSwarm)
	a.router.Handle("POST", "/swarm/join", a.joinSwarm)
	a.router.Handle("POST", "/swarm/leave", a.leaveSwarm)
	a.router.Handle("POST", "/swarm/unlock", a.unlockSwarm)
	a.router.Handle("GET", "/swarm/unlockkey", a.unlockKey)
	a.handle("GET", "/swarm", getSwarm)
	a.handle("POST", "/swarm/update", updateSwarm)
}

func (a *API) initSwarm(w http.ResponseWriter, r *http.Request) error {
	var req swarm.InitRequest
	if err := httpapi.ReadJSON(w, r, &req); err != nil {
		return err
	}
	if v := httpapi.RequestVersion(r); v.Before(39) {
		req.DefaultAddrPool, req.SubnetSize = nil, 0
	} else if v.Before(40) {
		req.DataPathPort = 0
	}
	id, err := a.swarm.Init(r.Context(), req)
	if err != nil {
		return err
	}
	a.past.restart(a.follow)
	return httpapi.WriteJSON(w, http.StatusOK, id)
}

func (a *API) joinSwarm(w http.ResponseWriter, r *http.Request) error {
	var req swarm.JoinRequest
	if err := httpapi.ReadJSON(w, r, &req); err != nil {
		return err
	}
	if err := a.swarm.Join(r.Context(), req); err != nil {
		return err
	}
	a.past.restart(a.follow)
	return nil
}

func (a *API) leaveSwarm(_ http.ResponseWriter, r *http.Request) error {
	return a.swarm.Leave(r.Context(), httpapi.Bool(r, "force"))
}

func (a *API) unlockSwarm(w http.ResponseWriter, r *http.Request) error {
	var req swarm.UnlockRequest
	if err := httpapi.ReadJSON(w, r, &req); err != nil {
		return err
	}
	err := a.swarm.Unlock(r.Context(), req)
	if model.KindOf(err) == model.Denied {
		return httpapi.Errorf(http.StatusUnauthorized, "%s", err)
	}
	if err == nil {
		a.past.restart(a.follow)
	}
	return err
}

func (a *API) unlockKey(w http.ResponseWriter, r *http.Request) error {
	if _, err := a.manager.Control(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	key, err := a.swarm.UnlockKey(ctx)
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusOK, swarm.UnlockKeyResponse{UnlockKey: key})
}

func getSwarm(ctx context.Context, c api.ControlClient, w http.ResponseWriter, _ *http.Request) error {
	cluster, err := theCluster(ctx, c)
	if err != nil {
		return err
	}
	out := convert.DockerSwarm(cluster)
	if callerOf(ctx).Role < Admin { // who has a token can add a node, which then gets secrets
		out.JoinTokens = swarm.JoinTokens{}
	}
	return httpapi.WriteJSON(w, http.StatusOK, out)
}

func updateSwarm(ctx context.Context, c api.ControlClient, w http.ResponseWriter, r *http.Request) error {
	var spec swarm.Spec
	if err := httpapi.ReadJSON(w, r, &spec); err != nil {
		return err
	}
	version, err := versionQuery(r, "swarm")
	if err != nil {
		return err
	}
	rotation := new(api.KeyRotation)
	for key, flag := range map[string]*bool{
		"rotateWorkerToken": &rotation.WorkerJoinToken, "rotateManagerToken": &rotation.ManagerJoinToken,
		"rotateManagerUnlockKey": &rotation.ManagerUnlockKey,
	} {
		if *flag, err = httpapi.StrictBool(r, key); err != nil {
			return err
		}
	}
	stored, err := convert.StoreClusterSpec(spec)
	if err != nil {
		return err
	}
	cluster, err := theCluster(ctx, c)
	if err != nil {
		return err
	}
	_, err = c.UpdateCluster(ctx, &api.UpdateClusterRequest{
		ClusterId: cluster.GetId(), ClusterVersion: version, Spec: stored, Rotation: rotation,
	})
	return err
}
