package local

import (
	"net/http"
	"slices"

	"github.com/moby/moby/api/types/build"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/system"
	"github.com/moby/moby/api/types/volume"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
)

// usage is the answer of GET /system/df: the members of today and those of old.
type usage struct {
	*system.DiskUsage
	LayersSize int64
	Images     []image.Summary
	Containers []container.Summary
	Volumes    []volume.Volume
	BuildCache []struct{}
}

func (a *API) diskUsage(w http.ResponseWriter, r *http.Request) error {
	types := r.URL.Query()["type"]
	for _, t := range types {
		if !slices.Contains([]string{"container", "image", "volume", "build-cache"}, t) {
			return model.Errorf(model.Invalid, "unknown object type: %s", t)
		}
	}
	wants := func(t string) bool { return len(types) == 0 || slices.Contains(types, t) }
	verbose := httpapi.Bool(r, "verbose")
	var out usage
	modern := system.DiskUsage{BuildCacheUsage: new(build.DiskUsage)}
	if wants("image") {
		images, size, err := a.imageUsage(r)
		if err != nil {
			return err
		}
		out.Images, out.LayersSize = images.Items, size
		modern.ImageUsage = images
	}
	if wants("container") {
		containers, err := a.containerUsage(r)
		if err != nil {
			return err
		}
		out.Containers = containers.Items
		modern.ContainerUsage = containers
	}
	if wants("volume") {
		volumes, err := a.volumeUsage(r)
		if err != nil {
			return err
		}
		out.Volumes = volumes.Items
		modern.VolumeUsage = volumes
	}
	out.BuildCache = []struct{}{}
	if httpapi.RequestVersion(r).Before(52) {
		return httpapi.WriteJSON(w, http.StatusOK, out)
	}
	if verbose {
		return httpapi.WriteJSON(w, http.StatusOK, modern)
	}
	if modern.ImageUsage != nil {
		modern.ImageUsage.Items = nil
	}
	if modern.ContainerUsage != nil {
		modern.ContainerUsage.Items = nil
	}
	if modern.VolumeUsage != nil {
		modern.VolumeUsage.Items = nil
	}
	out.DiskUsage = &modern
	return httpapi.WriteJSON(w, http.StatusOK, out)
}

func (a *API) imageUsage(r *http.Request) (*image.DiskUsage, int64, error) {
	all, err := a.engine.ListImages(r.Context())
	if err != nil {
		return nil, 0, err
	}
	users := a.imageUsers(r)
	u := &image.DiskUsage{Items: []image.Summary{}}
	for _, i := range all {
		i.Containers, i.SharedSize = users[i.ID], -1
		u.TotalCount++
		u.TotalSize += i.Size
		if i.Containers > 0 {
			u.ActiveCount++
		} else {
			u.Reclaimable += i.Size
		}
		u.Items = append(u.Items, i)
	}
	return u, u.TotalSize, nil
}

func (a *API) containerUsage(r *http.Request) (*container.DiskUsage, error) {
	all, err := a.engine.List(r.Context())
	if err != nil {
		return nil, err
	}
	u := &container.DiskUsage{Items: []container.Summary{}}
	for _, c := range all {
		s := a.summary(r, c)
		if c.SizeRw != nil {
			s.SizeRw = *c.SizeRw
		}
		u.TotalCount++
		u.TotalSize += s.SizeRw
		if c.State.Running {
			u.ActiveCount++
		} else {
			u.Reclaimable += s.SizeRw
		}
		u.Items = append(u.Items, s)
	}
	return u, nil
}

func (a *API) volumeUsage(r *http.Request) (*volume.DiskUsage, error) {
	all, err := a.engine.ListVolumes(r.Context())
	if err != nil {
		return nil, err
	}
	u := &volume.DiskUsage{Items: []volume.Volume{}}
	for _, v := range all {
		bytes, users, err := a.engine.VolumeUsage(r.Context(), v.Name)
		if model.KindOf(err) == model.NotFound {
			continue // removed in the meantime
		}
		if err != nil {
			return nil, err
		}
		item := *v
		item.UsageData = &volume.UsageData{RefCount: int64(users), Size: bytes}
		u.TotalCount++
		u.TotalSize += bytes
		if users > 0 {
			u.ActiveCount++
		} else {
			u.Reclaimable += bytes
		}
		u.Items = append(u.Items, item)
	}
	return u, nil
}
