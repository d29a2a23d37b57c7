package fake

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/volume"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/runtime/docker"
)

type volumeRecord struct {
	volume    volume.Volume
	created   time.Time
	anonymous bool
	target    map[string]string // container id -> where it is mounted
}

// CreateVolume implements runtime.Volumes.
func (e *Engine) CreateVolume(_ context.Context, req volume.CreateRequest) (*volume.Volume, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	v, err := e.createVolume(req)
	if err != nil {
		return nil, err
	}
	out := v.volume
	return &out, nil
}

func (e *Engine) createVolume(req volume.CreateRequest) (*volumeRecord, error) {
	if req.Driver != "" && req.Driver != "local" {
		return nil, model.Errorf(model.NotFound, "error looking up volume plugin %s: plugin %q not found", req.Driver, req.Driver)
	}
	anonymous := req.Name == ""
	if anonymous {
		id, err := docker.NewContainerID(e.cfg.Random)
		if err != nil {
			return nil, err
		}
		req.Name = id
	} else if err := docker.ValidateVolumeName(req.Name); err != nil {
		return nil, err
	}
	if v := e.volumes[req.Name]; v != nil {
		return v, nil
	}
	labels := maps.Clone(req.Labels)
	if anonymous {
		if labels == nil {
			labels = map[string]string{}
		}
		labels["com.docker.volume.anonymous"] = ""
	}
	now := time.Now()
	v := &volumeRecord{
		volume: volume.Volume{
			Name: req.Name, Driver: "local", Scope: "local", Labels: labels, Options: maps.Clone(req.DriverOpts),
			Mountpoint: "/volumes/" + req.Name + "/_data", CreatedAt: now.UTC().Format(time.RFC3339),
		},
		created: now, anonymous: anonymous, target: map[string]string{},
	}
	e.volumes[req.Name] = v
	e.volumeEvent(events.ActionCreate, req.Name)
	return v, nil
}

func (e *Engine) volumeEvent(action events.Action, name string) {
	e.bus.Publish(events.Message{Type: events.VolumeEventType, Action: action, Actor: events.Actor{ID: name, Attributes: map[string]string{"driver": "local"}}})
}

// useVolumes creates what a container mounts and is not there yet.
func (e *Engine) useVolumes(c *record) error {
	use := func(req volume.CreateRequest, target string) error {
		if slices.ContainsFunc(c.volumes, func(v string) bool { return e.volumes[v].target[c.id] == target }) {
			return nil
		}
		v, err := e.createVolume(req)
		if err != nil {
			return err
		}
		v.target[c.id] = target
		c.volumes = append(c.volumes, v.volume.Name)
		if req.Name == "" {
			c.anon = append(c.anon, v.volume.Name)
		}
		return nil
	}
	for _, m := range c.host.Mounts {
		if m.Type != mount.TypeVolume {
			continue
		}
		req := volume.CreateRequest{Name: m.Source}
		if o := m.VolumeOptions; o != nil {
			req.Labels = o.Labels
			if o.DriverConfig != nil {
				req.Driver, req.DriverOpts = o.DriverConfig.Name, o.DriverConfig.Options
			}
		}
		if err := use(req, m.Target); err != nil {
			return err
		}
	}
	for _, b := range c.host.Binds {
		parts := strings.Split(b, ":")
		if len(parts) < 2 || strings.HasPrefix(parts[0], "/") {
			continue
		}
		if err := use(volume.CreateRequest{Name: parts[0]}, parts[1]); err != nil {
			return err
		}
	}
	for target := range c.config.Volumes {
		if err := use(volume.CreateRequest{}, target); err != nil {
			return err
		}
	}
	return nil
}

func (e *Engine) volumeUsers(v *volumeRecord) []string {
	var out []string
	for id := range v.target {
		if e.containers[id] != nil {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

// InspectVolume implements runtime.Volumes.
func (e *Engine) InspectVolume(_ context.Context, name string) (*volume.Volume, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	v := e.volumes[name]
	if v == nil {
		return nil, noVolume(name)
	}
	out := v.volume
	return &out, nil
}

func noVolume(name string) error { return model.Errorf(model.NotFound, "get %s: no such volume", name) }

// ListVolumes implements runtime.Volumes.
func (e *Engine) ListVolumes(context.Context) ([]*volume.Volume, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := []*volume.Volume{}
	for _, name := range slices.Sorted(maps.Keys(e.volumes)) {
		v := e.volumes[name].volume
		out = append(out, &v)
	}
	return out, nil
}

// RemoveVolume implements runtime.Volumes.
func (e *Engine) RemoveVolume(_ context.Context, name string, force bool) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	v := e.volumes[name]
	if v == nil {
		if force {
			return nil
		}
		return noVolume(name)
	}
	if users := e.volumeUsers(v); len(users) > 0 {
		return model.Errorf(model.Conflict, "remove %s: volume is in use - %s", name, fmt.Sprint(users))
	}
	delete(e.volumes, name)
	e.volumeEvent(events.ActionDestroy, name)
	return nil
}

// PruneVolumes implements runtime.Volumes.
func (e *Engine) PruneVolumes(_ context.Context, opts runtime.PruneOptions) ([]string, uint64, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []string
	for _, name := range slices.Sorted(maps.Keys(e.volumes)) {
		v := e.volumes[name]
		if len(e.volumeUsers(v)) > 0 || !opts.All && !v.anonymous || !docker.Prunable(opts, v.created, v.volume.Labels) {
			continue
		}
		delete(e.volumes, name)
		e.volumeEvent(events.ActionDestroy, name)
		out = append(out, name)
	}
	return out, 0, nil
}

// VolumeUsage implements runtime.Volumes.
func (e *Engine) VolumeUsage(_ context.Context, name string) (int64, int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	v := e.volumes[name]
	if v == nil {
		return 0, 0, noVolume(name)
	}
	return 0, len(e.volumeUsers(v)), nil
}
