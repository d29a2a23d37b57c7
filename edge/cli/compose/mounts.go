package compose

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/swarm"
)

// mounts converts volumes and tmpfs, ordered by target so that a redeploy compares equal.
func (s *Stack) mounts(p *types.Project, at string, c types.ServiceConfig) ([]mount.Mount, error) {
	var out []mount.Mount
	var errs []error
	for i, v := range c.Volumes {
		m, err := s.mount(p, fmt.Sprintf("%s.volumes[%d]", at, i), v)
		out = append(out, m)
		errs = append(errs, err)
	}
	for _, text := range c.Tmpfs {
		m, err := tmpfs(at+".tmpfs", text)
		out = append(out, m)
		errs = append(errs, err)
	}
	slices.SortStableFunc(out, func(a, b mount.Mount) int { return strings.Compare(a.Target, b.Target) })
	return out, errors.Join(errs...)
}

func (s *Stack) mount(p *types.Project, at string, v types.ServiceVolumeConfig) (mount.Mount, error) {
	m := mount.Mount{Type: mount.Type(v.Type), Source: v.Source, Target: v.Target, ReadOnly: v.ReadOnly, Consistency: mount.Consistency(v.Consistency)}
	var err error
	switch v.Type {
	case types.VolumeTypeBind:
		m.BindOptions, err = bindOptions(at, v.Bind)
	case types.VolumeTypeVolume:
		m.Source, m.VolumeOptions, err = s.volume(p, at, v)
	case types.VolumeTypeTmpfs:
		m.Source = ""
		if v.Tmpfs != nil {
			m.TmpfsOptions = &mount.TmpfsOptions{SizeBytes: int64(v.Tmpfs.Size), Mode: os.FileMode(v.Tmpfs.Mode)}
		}
	default:
		return m, fmt.Errorf("%s.type: %q is none of bind, volume, tmpfs", at, v.Type)
	}
	return m, err
}

// bindOptions leaves create_host_path aside: in a swarm the directory must be there on
// the node, and the task is rejected with its path if it is not.
func bindOptions(at string, b *types.ServiceVolumeBind) (*mount.BindOptions, error) {
	if b == nil {
		return nil, nil //nolint:nilnil // nothing was asked for
	}
	out := mount.BindOptions{Propagation: mount.Propagation(b.Propagation)}
	if out.Propagation != "" && !slices.Contains(mount.Propagations, out.Propagation) {
		return nil, fmt.Errorf("%s.bind.propagation: %q is not known", at, b.Propagation)
	}
	switch b.Recursive {
	case "", "enabled":
	case "disabled":
		out.NonRecursive = true
	default:
		return nil, fmt.Errorf("%s.bind.recursive: %q is neither enabled nor disabled", at, b.Recursive)
	}
	if out == (mount.BindOptions{}) {
		return nil, nil //nolint:nilnil // nothing was asked for
	}
	return &out, nil
}

// volume returns the source and options of a volume mount; a source without a name is
// an anonymous volume.
func (s *Stack) volume(p *types.Project, at string, v types.ServiceVolumeConfig) (string, *mount.VolumeOptions, error) {
	options := &mount.VolumeOptions{}
	if v.Volume != nil {
		options.NoCopy, options.Subpath = v.Volume.NoCopy, v.Volume.Subpath
	}
	var own types.Mapping
	if v.Volume != nil {
		own = v.Volume.Labels
	}
	if v.Source == "" {
		if options.NoCopy || options.Subpath != "" || len(own) > 0 {
			options.Labels = own
			return "", options, nil
		}
		return "", nil, nil
	}
	config, ok := p.Volumes[v.Source]
	if !ok {
		return "", nil, fmt.Errorf("%s.source: volume %q is not declared below volumes", at, v.Source)
	}
	if config.External {
		options.Labels = own
		if !options.NoCopy && options.Subpath == "" && len(own) == 0 {
			options = nil
		}
		return config.Name, options, nil
	}
	options.Labels = s.labels(config.Labels)
	maps.Copy(options.Labels, own)
	if config.Driver != "" || len(config.DriverOpts) > 0 {
		options.DriverConfig = &mount.Driver{Name: config.Driver, Options: config.DriverOpts}
	}
	return config.Name, options, nil
}

// tmpfs reads PATH[:size=64m,mode=1777].
func tmpfs(at, text string) (mount.Mount, error) {
	target, rest, _ := strings.Cut(text, ":")
	if !path.IsAbs(target) {
		return mount.Mount{}, fmt.Errorf("%s: %q is not an absolute path", at, target)
	}
	m := mount.Mount{Type: mount.TypeTmpfs, Target: path.Clean(target)}
	for option := range strings.SplitSeq(rest, ",") {
		key, value, _ := strings.Cut(trimmed(option), "=")
		switch key {
		case "":
			continue
		case "ro":
			m.ReadOnly = true
			continue
		case "rw":
			continue
		}
		if m.TmpfsOptions == nil {
			m.TmpfsOptions = &mount.TmpfsOptions{}
		}
		switch key {
		case "size":
			size, err := units.RAMInBytes(value)
			if err != nil {
				return m, fmt.Errorf("%s: size %q: %w", at, value, err)
			}
			m.TmpfsOptions.SizeBytes = size
		case "mode":
			mode, err := strconv.ParseUint(value, 8, 32)
			if err != nil {
				return m, fmt.Errorf("%s: mode %q is not octal", at, value)
			}
			m.TmpfsOptions.Mode = os.FileMode(mode)
		default:
			return m, fmt.Errorf("%s: option %q is not supported: size, mode, ro and rw are", at, key)
		}
	}
	return m, nil
}

// fileTarget is what secrets and configs have in common.
type fileTarget struct {
	name, uid, gid string
	mode           os.FileMode
}

func target(f types.FileReferenceConfig) fileTarget {
	out := fileTarget{name: f.Target, uid: f.UID, gid: f.GID, mode: 0o444}
	if out.name == "" {
		out.name = f.Source
	}
	if out.uid == "" {
		out.uid = "0"
	}
	if out.gid == "" {
		out.gid = "0"
	}
	if f.Mode != nil {
		out.mode = os.FileMode(*f.Mode)
	}
	return out
}

func (s *Stack) secretRefs(p *types.Project, at string, c types.ServiceConfig) ([]*swarm.SecretReference, error) {
	var out []*swarm.SecretReference
	for _, r := range c.Secrets {
		config, ok := p.Secrets[r.Source]
		if !ok {
			return nil, fmt.Errorf("%s.secrets: secret %q is not declared below secrets", at, r.Source)
		}
		t := target(types.FileReferenceConfig(r))
		out = append(out, &swarm.SecretReference{
			SecretName: config.Name, File: &swarm.SecretReferenceFileTarget{Name: t.name, UID: t.uid, GID: t.gid, Mode: t.mode},
		})
	}
	slices.SortFunc(out, func(a, b *swarm.SecretReference) int {
		return strings.Compare(a.SecretName+a.File.Name, b.SecretName+b.File.Name)
	})
	return out, nil
}

func (s *Stack) configRefs(p *types.Project, at string, c types.ServiceConfig) ([]*swarm.ConfigReference, error) {
	var out []*swarm.ConfigReference
	for _, r := range c.Configs {
		config, ok := p.Configs[r.Source]
		if !ok {
			return nil, fmt.Errorf("%s.configs: config %q is not declared below configs", at, r.Source)
		}
		t := target(types.FileReferenceConfig(r))
		out = append(out, &swarm.ConfigReference{
			ConfigName: config.Name, File: &swarm.ConfigReferenceFileTarget{Name: t.name, UID: t.uid, GID: t.gid, Mode: t.mode},
		})
	}
	slices.SortFunc(out, func(a, b *swarm.ConfigReference) int {
		return strings.Compare(a.ConfigName+a.File.Name, b.ConfigName+b.File.Name)
	})
	return out, nil
}
