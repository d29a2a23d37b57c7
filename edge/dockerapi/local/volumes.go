package local

import (
	"net/http"

	"github.com/moby/moby/api/types/volume"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
)

func (a *API) listVolumes(w http.ResponseWriter, r *http.Request) error {
	f, err := httpapi.RequestFilters(r, "name", "driver", "label", "dangling")
	if err != nil {
		return err
	}
	dangling, err := f.Bool("dangling", false)
	if err != nil {
		return err
	}
	all, err := a.engine.ListVolumes(r.Context())
	if err != nil {
		return err
	}
	out := volume.ListResponse{Volumes: []volume.Volume{}}
	for _, v := range all {
		if !f.Match("name", v.Name) || !f.Exact("driver", v.Driver) || !f.Labels("label", v.Labels) {
			continue
		}
		if f.Has("dangling") {
			_, users, err := a.engine.VolumeUsage(r.Context(), v.Name)
			if model.KindOf(err) == model.NotFound {
				continue // removed in the meantime
			}
			if err != nil {
				return err
			}
			if (users == 0) != dangling {
				continue
			}
		}
		out.Volumes = append(out.Volumes, *v)
	}
	return httpapi.WriteJSON(w, http.StatusOK, out)
}

func (a *API) inspectVolume(w http.ResponseWriter, r *http.Request) error {
	v, err := a.engine.InspectVolume(r.Context(), r.PathValue("name"))
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusOK, v)
}

func (a *API) createVolume(w http.ResponseWriter, r *http.Request) error {
	var req volume.CreateRequest
	if err := httpapi.ReadOptionalJSON(w, r, &req); err != nil {
		return err
	}
	if req.ClusterVolumeSpec != nil {
		return model.Errorf(model.Unimplemented, "cluster volumes are not implemented by skep")
	}
	v, err := a.engine.CreateVolume(r.Context(), req)
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusCreated, v)
}

func (a *API) removeVolume(w http.ResponseWriter, r *http.Request) error {
	force := httpapi.Bool(r, "force")
	err := a.engine.RemoveVolume(r.Context(), r.PathValue("name"), force)
	if force && model.KindOf(err) == model.NotFound {
		err = nil
	}
	return done(w, err)
}

func (a *API) pruneVolumes(w http.ResponseWriter, r *http.Request) error {
	opts, f, err := pruneOptions(r, "all")
	if err != nil {
		return err
	}
	if opts.All, err = f.Bool("all", httpapi.RequestVersion(r).Before(42)); err != nil {
		return err
	}
	names, reclaimed, err := a.engine.PruneVolumes(r.Context(), opts)
	if err != nil {
		return err
	}
	if names == nil {
		names = []string{}
	}
	return httpapi.WriteJSON(w, http.StatusOK, volume.PruneReport{VolumesDeleted: names, SpaceReclaimed: reclaimed})
}
