package convert

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"

	"github.com/moby/moby/api/types/mount"

	"github.com/skep-dev/skep/api"
)

func storeMount(m mount.Mount) (*api.Mount, error) {
	kind, err := enum[api.Mount_Type](api.Mount_Type_value, string(m.Type), "MountType")
	if err != nil {
		return nil, err
	}
	consistency, err := enum[api.Mount_Consistency](api.Mount_Consistency_value, string(m.Consistency), "MountConsistency")
	if err != nil {
		return nil, err
	}
	out := &api.Mount{Type: kind, Source: m.Source, Target: m.Target, Readonly: m.ReadOnly, Consistency: consistency}
	if b := m.BindOptions; b != nil {
		propagation, err := enum[api.Mount_BindOptions_Propagation](api.Mount_BindOptions_Propagation_value, string(b.Propagation), "MountPropagation")
		if err != nil {
			return nil, err
		}
		out.BindOptions = &api.Mount_BindOptions{
			Propagation: propagation, Nonrecursive: b.NonRecursive, Createmountpoint: b.CreateMountpoint,
			Readonlynonrecursive: b.ReadOnlyNonRecursive, Readonlyforcerecursive: b.ReadOnlyForceRecursive,
		}
	}
	if v := m.VolumeOptions; v != nil {
		out.VolumeOptions = &api.Mount_VolumeOptions{Nocopy: v.NoCopy, Labels: maps.Clone(v.Labels), Subpath: v.Subpath}
		if d := v.DriverConfig; d != nil {
			out.VolumeOptions.DriverConfig = &api.Driver{Name: d.Name, Options: maps.Clone(d.Options)}
		}
	}
	if t := m.TmpfsOptions; t != nil {
		out.TmpfsOptions = &api.Mount_TmpfsOptions{SizeBytes: t.SizeBytes, Mode: uint32(t.Mode)}
		if len(t.Options) > 0 {
			// The wire has one string for the list of pairs; Docker puts JSON there.
			text, err := json.Marshal(t.Options)
			if err != nil {
				return nil, fmt.Errorf("encode tmpfs options: %w", err)
			}
			out.TmpfsOptions.Options = string(text)
		}
	}
	return out, nil
}

func dockerMount(m *api.Mount) mount.Mount {
	out := mount.Mount{Type: mount.Type(word(m.GetType())), Source: m.GetSource(), Target: m.GetTarget(), ReadOnly: m.GetReadonly()}
	if m.GetConsistency() != api.Mount_DEFAULT {
		out.Consistency = mount.Consistency(word(m.GetConsistency()))
	}
	if b := m.GetBindOptions(); b != nil {
		out.BindOptions = &mount.BindOptions{
			Propagation: mount.Propagation(word(b.GetPropagation())), NonRecursive: b.GetNonrecursive(), CreateMountpoint: b.GetCreatemountpoint(),
			ReadOnlyNonRecursive: b.GetReadonlynonrecursive(), ReadOnlyForceRecursive: b.GetReadonlyforcerecursive(),
		}
	}
	if v := m.GetVolumeOptions(); v != nil {
		out.VolumeOptions = &mount.VolumeOptions{NoCopy: v.GetNocopy(), Labels: maps.Clone(v.GetLabels()), Subpath: v.GetSubpath()}
		if d := v.GetDriverConfig(); d != nil {
			out.VolumeOptions.DriverConfig = &mount.Driver{Name: d.GetName(), Options: maps.Clone(d.GetOptions())}
		}
	}
	if m.GetType() == api.Mount_CLUSTER {
		out.ClusterOptions = new(mount.ClusterOptions)
	}
	if t := m.GetTmpfsOptions(); t != nil {
		out.TmpfsOptions = &mount.TmpfsOptions{SizeBytes: t.GetSizeBytes(), Mode: os.FileMode(t.GetMode())}
		if t.GetOptions() != "" {
			// Other writers may have put anything there; what cannot be read is not shown.
			if err := json.Unmarshal([]byte(t.GetOptions()), &out.TmpfsOptions.Options); err != nil {
				out.TmpfsOptions.Options = nil
			}
		}
	}
	return out
}
