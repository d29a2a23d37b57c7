package containerd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/volume"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/skep-dev/skep/core/model"
)

// mountPoint is one mount that a user asked for, resolved.
type mountPoint struct {
	container.MountPoint
	// HostPath is what is mounted, empty for tmpfs.
	HostPath string
	Options  []string
}

// mountPlan collects a container's mounts.
type mountPlan struct {
	e      *Engine
	c      *record
	mounts []mountPoint
	anon   []string
}

// resolveMounts turns everything that Docker calls a mount into mount points; it makes
// volumes and directories that are missing, and fills new volumes.
func (e *Engine) resolveMounts(ctx context.Context, c *record) (_ []mountPoint, anon []string, err error) {
	p := &mountPlan{e: e, c: c}
	for _, b := range c.Host.Binds {
		if err := p.bind(ctx, b); err != nil {
			return nil, p.anon, err
		}
	}
	for i := range c.Host.Mounts {
		if err := p.mount(ctx, &c.Host.Mounts[i]); err != nil {
			return nil, p.anon, err
		}
	}
	for target, options := range c.Host.Tmpfs {
		opts := []string{"noexec", "nosuid", "nodev"}
		if options != "" {
			opts = append(opts, strings.Split(options, ",")...)
		}
		if err := p.add(mountPoint{MountPoint: container.MountPoint{Type: mount.TypeTmpfs, Destination: target, RW: true}, Options: opts}); err != nil {
			return nil, p.anon, err
		}
	}
	if err := p.volumesFrom(ctx); err != nil {
		return nil, p.anon, err
	}
	for target := range c.Config.Volumes {
		target = filepath.Clean(target)
		if p.has(target) {
			continue
		}
		if err := p.volume(ctx, volume.CreateRequest{}, container.MountPoint{Destination: target, RW: true}, "", false); err != nil {
			return nil, p.anon, err
		}
	}
	slices.SortStableFunc(p.mounts, func(a, b mountPoint) int {
		return strings.Count(filepath.Clean(a.Destination), "/") - strings.Count(filepath.Clean(b.Destination), "/")
	})
	return p.mounts, p.anon, nil
}

func (p *mountPlan) has(target string) bool {
	return slices.ContainsFunc(p.mounts, func(m mountPoint) bool { return m.Destination == target })
}

func (p *mountPlan) add(m mountPoint) error {
	if !filepath.IsAbs(m.Destination) {
		return model.Errorf(model.Invalid, "invalid mount config for type %q: invalid mount path: '%s' mount path must be absolute", m.Type, m.Destination)
	}
	m.Destination = filepath.Clean(m.Destination)
	if m.Destination == "/" {
		return model.Errorf(model.Invalid, "invalid mount config for type %q: invalid specification: destination can't be '/'", m.Type)
	}
	if p.has(m.Destination) {
		return model.Errorf(model.Invalid, "Duplicate mount point: %s", m.Destination)
	}
	p.mounts = append(p.mounts, m)
	return nil
}

// bind adds a "source:target[:options]" of the old form.
func (p *mountPlan) bind(ctx context.Context, spec string) error {
	parts := strings.Split(spec, ":")
	if len(parts) < 2 || len(parts) > 3 || parts[0] == "" {
		return model.Errorf(model.Invalid, "invalid volume specification: '%s'", spec)
	}
	point := container.MountPoint{Destination: parts[1], RW: true}
	nocopy := false
	if len(parts) == 3 {
		point.Mode = parts[2]
		for o := range strings.SplitSeq(parts[2], ",") {
			switch o {
			case "ro":
				point.RW = false
			case "nocopy":
				nocopy = true
			case "rw", "z", "Z", "":
			default:
				if !slices.Contains(mount.Propagations, mount.Propagation(o)) {
					return model.Errorf(model.Invalid, "invalid mode: %s", parts[2])
				}
				point.Propagation = mount.Propagation(o)
			}
		}
	}
	if !filepath.IsAbs(parts[0]) {
		return p.volume(ctx, volume.CreateRequest{Name: parts[0], Driver: p.c.Host.VolumeDriver}, point, "", nocopy)
	}
	if _, err := os.Stat(parts[0]); errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(parts[0], 0o755); err != nil {
			return fmt.Errorf("make bind mount source: %w", err)
		}
	}
	return p.hostPath(parts[0], point, nil)
}

// mount adds a mount of the new form.
func (p *mountPlan) mount(ctx context.Context, m *mount.Mount) error {
	point := container.MountPoint{Destination: m.Target, RW: !m.ReadOnly}
	invalid := func(format string, args ...any) error {
		return model.Errorf(model.Invalid, "invalid mount config for type %q: %s", m.Type, fmt.Sprintf(format, args...))
	}
	if m.Target == "" {
		return invalid("field Target must not be empty")
	}
	switch m.Type {
	case mount.TypeBind:
		if m.Source == "" {
			return invalid("field Source must not be empty")
		}
		if !filepath.IsAbs(m.Source) {
			return invalid("invalid mount path: '%s' mount path must be absolute", m.Source)
		}
		o := m.BindOptions
		if o == nil {
			o = &mount.BindOptions{}
		}
		if o.Propagation != "" && !slices.Contains(mount.Propagations, o.Propagation) {
			return invalid("invalid propagation mode: %s", o.Propagation)
		}
		point.Propagation = o.Propagation
		if _, err := os.Stat(m.Source); errors.Is(err, fs.ErrNotExist) {
			if !o.CreateMountpoint {
				return invalid("bind source path does not exist: %s", m.Source)
			}
			if err := os.MkdirAll(m.Source, 0o755); err != nil {
				return fmt.Errorf("make bind mount source: %w", err)
			}
		}
		return p.hostPath(m.Source, point, o)
	case mount.TypeVolume:
		if filepath.IsAbs(m.Source) {
			return invalid("mount source must not be an absolute path: %s", m.Source)
		}
		req := volume.CreateRequest{Name: m.Source}
		subpath, nocopy := "", false
		if o := m.VolumeOptions; o != nil {
			req.Labels, subpath, nocopy = o.Labels, o.Subpath, o.NoCopy
			if o.DriverConfig != nil {
				req.Driver, req.DriverOpts = o.DriverConfig.Name, o.DriverConfig.Options
			}
		}
		return p.volume(ctx, req, point, subpath, nocopy)
	case mount.TypeTmpfs:
		if m.Source != "" {
			return invalid("field Source must not be specified")
		}
		return p.tmpfs(m, point)
	default:
		return model.Errorf(model.Unimplemented, "mount type %q is not implemented by skep", m.Type)
	}
}

func (p *mountPlan) tmpfs(m *mount.Mount, point container.MountPoint) error {
	point.Type = mount.TypeTmpfs
	opts := []string{"nosuid", "nodev", "noexec"}
	if m.ReadOnly {
		opts = append(opts, "ro")
	}
	if o := m.TmpfsOptions; o != nil {
		if o.SizeBytes > 0 {
			opts = append(opts, "size="+strconv.FormatInt(o.SizeBytes, 10))
		}
		if o.Mode != 0 {
			opts = append(opts, "mode="+strconv.FormatUint(uint64(o.Mode), 8))
		}
		for _, kv := range o.Options {
			switch len(kv) {
			case 1:
				if kv[0] == "exec" {
					opts = slices.DeleteFunc(opts, func(s string) bool { return s == "noexec" })
				}
				opts = append(opts, kv[0])
			case 2:
				opts = append(opts, kv[0]+"="+kv[1])
			default:
				return model.Errorf(model.Invalid, "invalid option array length for tmpfs mount %s", m.Target)
			}
		}
	}
	return p.add(mountPoint{MountPoint: point, Options: opts})
}

func (p *mountPlan) hostPath(source string, point container.MountPoint, o *mount.BindOptions) error {
	point.Type, point.Source = mount.TypeBind, filepath.Clean(source)
	if point.Propagation == "" {
		point.Propagation = mount.PropagationRPrivate
	}
	opts := []string{"rbind"}
	if o != nil && o.NonRecursive {
		opts = []string{"bind"}
	}
	if !point.RW {
		opts = append(opts, "ro")
		// A file has no mounts below it, and crun refuses to look for them there.
		if info, err := os.Stat(source); err == nil && info.IsDir() && o != nil && !o.NonRecursive && !o.ReadOnlyNonRecursive {
			opts = append(opts, "rro")
		}
	}
	opts = append(opts, string(point.Propagation))
	return p.add(mountPoint{MountPoint: point, HostPath: point.Source, Options: opts})
}

// volume adds a volume, which it creates if need be.
func (p *mountPlan) volume(ctx context.Context, req volume.CreateRequest, point container.MountPoint, subpath string, nocopy bool) error {
	v, err := p.e.CreateVolume(ctx, req)
	if err != nil {
		return err
	}
	if req.Name == "" {
		p.anon = append(p.anon, v.Name)
	}
	if !nocopy && subpath == "" {
		if err := p.e.fillVolume(ctx, p.c, v.Mountpoint, point.Destination); err != nil {
			return err
		}
	}
	point.Type, point.Name, point.Driver, point.Source = mount.TypeVolume, v.Name, v.Driver, v.Mountpoint
	path := v.Mountpoint
	if subpath != "" {
		if !filepath.IsLocal(subpath) {
			return model.Errorf(model.Invalid, "invalid mount config for type \"volume\": subpath must be a relative path within the volume")
		}
		root, err := os.OpenRoot(v.Mountpoint)
		if err != nil {
			return fmt.Errorf("open volume: %w", err)
		}
		defer func() { _ = root.Close() }() // only looked at
		if _, err := root.Stat(subpath); err != nil {
			return model.Errorf(model.Invalid, "cannot access path %s: %w", filepath.Join(path, subpath), err)
		}
		if path, err = filepath.EvalSymlinks(filepath.Join(path, subpath)); err != nil {
			return fmt.Errorf("open volume: %w", err)
		}
	}
	opts := []string{"rbind"}
	if !point.RW {
		opts = append(opts, "ro")
	}
	return p.add(mountPoint{MountPoint: point, HostPath: path, Options: append(opts, string(mount.PropagationRPrivate))})
}

// volumesFrom adds the binds and volumes of other containers.
func (p *mountPlan) volumesFrom(context.Context) error {
	for _, spec := range p.c.Host.VolumesFrom {
		ref, mode, _ := strings.Cut(spec, ":")
		other, err := p.e.find(ref)
		if err != nil {
			return err
		}
		for _, m := range p.e.view(other).Mounts {
			if m.Type == mount.TypeTmpfs || p.has(m.Destination) {
				continue
			}
			if mode == "ro" && m.RW {
				m.RW = false
				m.Options = append(slices.Clone(m.Options), "ro")
			}
			p.mounts = append(p.mounts, m)
		}
	}
	return nil
}

// spec returns the OCI form of a mount.
func (m mountPoint) spec() specs.Mount {
	if m.Type == mount.TypeTmpfs {
		return specs.Mount{Destination: m.Destination, Type: "tmpfs", Source: "tmpfs", Options: m.Options}
	}
	return specs.Mount{Destination: m.Destination, Type: "bind", Source: m.HostPath, Options: m.Options}
}
