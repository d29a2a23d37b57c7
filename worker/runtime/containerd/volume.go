package containerd

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	ctdmount "github.com/containerd/containerd/v2/core/mount"
	continuity "github.com/containerd/continuity/fs"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/volume"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/runtime/docker"
)

// anonymousLabel marks volumes that nobody named, as Docker does.
const anonymousLabel = "com.docker.volume.anonymous"

// volumeRecord is what is kept of a volume on disk. It does not change.
type volumeRecord struct {
	Name    string
	Created time.Time
	Labels  map[string]string
	Options map[string]string
}

func (e *Engine) volumeDir(name string) string { return filepath.Join(e.cfg.Root, "volumes", name) }

func (e *Engine) volume(v *volumeRecord) *volume.Volume {
	return &volume.Volume{
		Name: v.Name, Driver: "local", Scope: "local", Mountpoint: filepath.Join(e.volumeDir(v.Name), "_data"),
		CreatedAt: v.Created.Format(time.RFC3339), Labels: maps.Clone(v.Labels), Options: maps.Clone(v.Options),
	}
}

func noVolume(name string) error { return model.Errorf(model.NotFound, "get %s: no such volume", name) }

func (e *Engine) volumeEvent(action events.Action, name string) {
	e.bus.Publish(events.Message{
		Type: events.VolumeEventType, Action: action,
		Actor: events.Actor{ID: name, Attributes: map[string]string{"driver": "local"}},
	})
}

// CreateVolume implements runtime.Volumes.
func (e *Engine) CreateVolume(_ context.Context, req volume.CreateRequest) (*volume.Volume, error) {
	if req.Driver != "" && req.Driver != "local" {
		return nil, model.Errorf(model.NotFound, "error looking up volume plugin %s: plugin %q not found", req.Driver, req.Driver)
	}
	if len(req.DriverOpts) > 0 {
		return nil, model.Errorf(model.Unimplemented, "options of the local volume driver are not implemented by skep: %v",
			slices.Sorted(maps.Keys(req.DriverOpts)))
	}
	labels := maps.Clone(req.Labels)
	if req.Name == "" {
		id, err := docker.NewContainerID(rand.Reader)
		if err != nil {
			return nil, err
		}
		req.Name = id
		if labels == nil {
			labels = map[string]string{}
		}
		labels[anonymousLabel] = ""
	} else if err := docker.ValidateVolumeName(req.Name); err != nil {
		return nil, err
	}
	v := &volumeRecord{Name: req.Name, Created: time.Now().UTC(), Labels: labels}
	e.mu.Lock()
	if have := e.volumes[req.Name]; have != nil {
		e.mu.Unlock()
		return e.volume(have), nil
	}
	e.volumes[req.Name] = v
	e.mu.Unlock()
	err := os.MkdirAll(filepath.Join(e.volumeDir(v.Name), "_data"), 0o755)
	if err == nil {
		err = e.put(volumeBucket, v.Name, v)
	}
	if err != nil {
		e.mu.Lock()
		delete(e.volumes, v.Name)
		e.mu.Unlock()
		return nil, fmt.Errorf("create volume %s: %w", v.Name, err)
	}
	e.volumeEvent(events.ActionCreate, v.Name)
	return e.volume(v), nil
}

// fillVolume copies what the image has at path into an empty volume, with the owner and
// mode of the directory itself.
func (e *Engine) fillVolume(ctx context.Context, c *record, dir, path string) (err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("look into volume: %w", err)
	}
	if len(entries) > 0 || !inLayers(c.rootfs, path) {
		return nil
	}
	return ctdmount.WithTempMount(ctx, c.rootfs, func(root string) error {
		src, err := continuity.RootPath(root, path)
		if err != nil {
			return fmt.Errorf("find %s in image: %w", path, err)
		}
		info, err := os.Stat(src)
		if errors.Is(err, fs.ErrNotExist) || err == nil && !info.IsDir() {
			return nil
		}
		if err != nil {
			return fmt.Errorf("find %s in image: %w", path, err)
		}
		if err := continuity.CopyDir(dir, src); err != nil {
			return fmt.Errorf("copy %s of image into volume: %w", path, err)
		}
		return nil
	})
}

// inLayers reports whether any layer below a container has something at path. It may say
// yes where a layer above hides it.
func inLayers(mounts []rootMount, path string) bool {
	for _, dir := range layerDirs(mounts) {
		if _, err := os.Lstat(filepath.Join(dir, path)); err == nil {
			return true
		}
		// A symbolic link on the way may lead anywhere.
		for p := filepath.Dir(path); p != "/"; p = filepath.Dir(p) {
			if info, err := os.Lstat(filepath.Join(dir, p)); err == nil && info.Mode()&fs.ModeSymlink != 0 {
				return true
			}
		}
	}
	return false
}

// layerDirs returns the directories that make up a root file system, topmost first.
func layerDirs(mounts []rootMount) []string {
	var dirs []string
	for _, m := range mounts {
		if m.Type == "bind" || m.Type == "rbind" {
			dirs = append(dirs, m.Source)
		}
		for _, o := range m.Options {
			if v, ok := strings.CutPrefix(o, "upperdir="); ok {
				dirs = append([]string{v}, dirs...)
			}
			if v, ok := strings.CutPrefix(o, "lowerdir="); ok {
				dirs = append(dirs, strings.Split(v, ":")...)
			}
		}
	}
	return dirs
}

// InspectVolume implements runtime.Volumes.
func (e *Engine) InspectVolume(_ context.Context, name string) (*volume.Volume, error) {
	e.mu.Lock()
	v := e.volumes[name]
	e.mu.Unlock()
	if v == nil {
		return nil, noVolume(name)
	}
	return e.volume(v), nil
}

// ListVolumes implements runtime.Volumes.
func (e *Engine) ListVolumes(context.Context) ([]*volume.Volume, error) {
	e.mu.Lock()
	all := slices.Collect(maps.Values(e.volumes))
	e.mu.Unlock()
	slices.SortFunc(all, func(a, b *volumeRecord) int { return strings.Compare(a.Name, b.Name) })
	out := make([]*volume.Volume, len(all))
	for i, v := range all {
		out[i] = e.volume(v)
	}
	return out, nil
}

// volumeUsersLocked returns the ids of the containers that mount a volume.
func (e *Engine) volumeUsersLocked(name string) []string {
	var out []string
	for id, c := range e.containers {
		if slices.ContainsFunc(c.Mounts, func(m mountPoint) bool { return m.Name == name }) {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

// RemoveVolume implements runtime.Volumes.
func (e *Engine) RemoveVolume(_ context.Context, name string, force bool) error {
	e.mu.Lock()
	v := e.volumes[name]
	users := e.volumeUsersLocked(name)
	if v != nil && len(users) == 0 {
		delete(e.volumes, name)
	}
	e.mu.Unlock()
	switch {
	case v == nil && force:
		return nil
	case v == nil:
		return noVolume(name)
	case len(users) > 0:
		return model.Errorf(model.Conflict, "remove %s: volume is in use - %v", name, users)
	}
	if err := e.forget(volumeBucket, name); err != nil {
		return err
	}
	if err := os.RemoveAll(e.volumeDir(name)); err != nil {
		return fmt.Errorf("remove volume %s: %w", name, err)
	}
	e.volumeEvent(events.ActionDestroy, name)
	return nil
}

// PruneVolumes implements runtime.Volumes.
func (e *Engine) PruneVolumes(ctx context.Context, opts runtime.PruneOptions) ([]string, uint64, error) {
	e.mu.Lock()
	var names []string
	for name, v := range e.volumes {
		_, anonymous := v.Labels[anonymousLabel]
		if (opts.All || anonymous) && docker.Prunable(opts, v.Created, v.Labels) && len(e.volumeUsersLocked(name)) == 0 {
			names = append(names, name)
		}
	}
	e.mu.Unlock()
	slices.Sort(names)
	var freed uint64
	for i, name := range names {
		size := diskUsage(e.volumeDir(name))
		if err := e.RemoveVolume(ctx, name, true); err != nil {
			return names[:i], freed, err
		}
		freed += uint64(size)
	}
	return names, freed, nil
}

// VolumeUsage implements runtime.Volumes.
func (e *Engine) VolumeUsage(_ context.Context, name string) (int64, int, error) {
	e.mu.Lock()
	v := e.volumes[name]
	users := len(e.volumeUsersLocked(name))
	e.mu.Unlock()
	if v == nil {
		return 0, 0, noVolume(name)
	}
	return diskUsage(e.volumeDir(name)), users, nil
}

// diskUsage returns the bytes that the files under dir hold; files with several links count once.
func diskUsage(dir string) int64 {
	var n int64
	seen := map[uint64]bool{}
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil //nolint:nilerr // what vanishes meanwhile takes no space
		}
		info, err := d.Info()
		if err != nil || !info.Mode().IsRegular() {
			return nil //nolint:nilerr // as above
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Nlink > 1 {
			if seen[st.Ino] {
				return nil
			}
			seen[st.Ino] = true
		}
		n += info.Size()
		return nil
	})
	return n
}
