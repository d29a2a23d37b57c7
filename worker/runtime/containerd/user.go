package containerd

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/moby/sys/user"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/skep-dev/skep/core/model"
)

// resolveUser finds the numbers of a container's user and groups in its own /etc/passwd
// and /etc/group, read from the layers without mounting them.
func resolveUser(s *saved, rootfs []rootMount) (specs.User, error) {
	return lookupUser(s.Config.User, s.Host.GroupAdd, func(name string) []byte { return readLayers(rootfs, name) })
}

// lookupUser reads a "user[:group]" with the files that read returns, nil if absent.
func lookupUser(spec string, groups []string, read func(name string) []byte) (specs.User, error) {
	passwd, group := read("etc/passwd"), read("etc/group")
	open := func(b []byte) io.Reader { return bytes.NewReader(b) }
	u, err := user.GetExecUser(spec, &user.ExecUser{Home: "/"}, open(passwd), open(group))
	if err != nil {
		return specs.User{}, model.Errorf(model.Invalid, "unable to find user %s: %w", spec, err)
	}
	out := specs.User{UID: uint32(u.Uid), GID: uint32(u.Gid)}
	for _, g := range u.Sgids {
		out.AdditionalGids = append(out.AdditionalGids, uint32(g))
	}
	if len(groups) > 0 {
		extra, err := user.GetAdditionalGroups(groups, open(group))
		if err != nil {
			return specs.User{}, model.Errorf(model.Invalid, "unable to find group: %w", err)
		}
		for _, g := range extra {
			if !slices.Contains(out.AdditionalGids, uint32(g)) {
				out.AdditionalGids = append(out.AdditionalGids, uint32(g))
			}
		}
	}
	if !slices.Contains(out.AdditionalGids, out.GID) {
		out.AdditionalGids = append([]uint32{out.GID}, out.AdditionalGids...)
	}
	return out, nil
}

// maxPasswd bounds a passwd or group file that an image may bring.
const maxPasswd = 10 << 20

// readLayers reads a file from the topmost layer that has it; nil if none does, if it was
// deleted, or if it leads out of its layer.
func readLayers(rootfs []rootMount, name string) []byte {
	for _, dir := range layerDirs(rootfs) {
		b, found := readLayer(dir, name)
		if found {
			return b
		}
	}
	return nil
}

func readLayer(dir, name string) (content []byte, found bool) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, false
	}
	defer func() { _ = root.Close() }() // only read from
	info, err := root.Lstat(name)
	if err != nil {
		// Had the directory above been replaced whole, layers below would not count.
		if up, err := root.Lstat(filepath.Dir(name)); err == nil && up.Mode()&os.ModeCharDevice != 0 {
			return nil, true
		}
		return nil, false
	}
	if info.Mode()&os.ModeCharDevice != 0 { // a whiteout: deleted here
		return nil, true
	}
	f, err := root.Open(name)
	if err != nil {
		return nil, true
	}
	defer func() { _ = f.Close() }() // only read from
	b, err := io.ReadAll(io.LimitReader(f, maxPasswd))
	if err != nil {
		return nil, true
	}
	return b, true
}
