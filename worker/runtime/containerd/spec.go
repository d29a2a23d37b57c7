package containerd

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime/docker"
)

const initPath = "/sbin/docker-init"

// spec builds the OCI specification of a container that is about to start.
func (e *Engine) spec(ctx context.Context, rootfs []rootMount, s *saved) (*specs.Spec, error) {
	user, err := resolveUser(s, rootfs)
	if err != nil {
		return nil, err
	}
	sec, err := securityOptions(s.Host)
	if err != nil {
		return nil, err
	}
	caps, err := capabilities(s.Host)
	if err != nil {
		return nil, err
	}
	user.Umask = s.Host.Umask
	spec := &specs.Spec{
		Version:    ociVersion,
		Hostname:   s.Config.Hostname,
		Domainname: s.Config.Domainname,
		Root:       &specs.Root{Path: "rootfs", Readonly: s.Host.ReadonlyRootfs},
		Process: &specs.Process{
			Terminal:        s.Config.Tty,
			User:            user,
			Args:            docker.Argv(s.Config),
			Env:             environment(s),
			Cwd:             s.Config.WorkingDir,
			Capabilities:    caps.spec(user.UID != 0),
			NoNewPrivileges: sec.noNewPrivileges,
			OOMScoreAdj:     oomScore(s.Host.OomScoreAdj),
			Rlimits:         rlimits(s.Host),
		},
		Annotations: maps.Clone(s.Host.Annotations),
		Linux: &specs.Linux{
			CgroupsPath: e.cgroupPath(s),
			Resources:   linuxResources(s.Host),
			Sysctl:      maps.Clone(s.Host.Sysctls),
		},
	}
	if spec.Process.Cwd == "" {
		spec.Process.Cwd = "/"
	}
	if s.Config.Tty && (s.Host.ConsoleSize[0] != 0 || s.Host.ConsoleSize[1] != 0) {
		spec.Process.ConsoleSize = &specs.Box{Height: s.Host.ConsoleSize[0], Width: s.Host.ConsoleSize[1]}
	}
	if err := e.namespaces(spec, s); err != nil {
		return nil, err
	}
	if err := e.mounts(spec, s); err != nil {
		return nil, err
	}
	if s.Host.Init == nil && e.cfg.Init || s.Host.Init != nil && *s.Host.Init {
		spec.Process.Args = append([]string{initPath, "--"}, spec.Process.Args...)
		spec.Mounts = append(spec.Mounts, specs.Mount{
			Destination: initPath, Type: "bind", Source: filepath.Join(e.cfg.BinDir, initBinary), Options: []string{"bind", "ro"},
		})
	}
	if err := devices(ctx, spec, s); err != nil {
		return nil, err
	}
	sec.apply(spec, s.Host)
	if s.Host.Privileged {
		return spec, nil
	}
	sec.filter(spec)
	e.bpf.annotate(spec)
	return spec, nil
}

func environment(s *saved) []string {
	base := []string{"PATH=" + docker.DefaultPath, "HOSTNAME=" + s.Config.Hostname}
	if s.Config.Tty {
		base = append(base, "TERM=xterm")
	}
	own := map[string]bool{}
	for _, kv := range s.Config.Env {
		name, _, _ := strings.Cut(kv, "=")
		own[name] = true
	}
	base = slices.DeleteFunc(base, func(kv string) bool {
		name, _, _ := strings.Cut(kv, "=")
		return own[name]
	})
	for _, kv := range s.Config.Env {
		if strings.Contains(kv, "=") { // without a value it means the variable is not to be set
			base = append(base, kv)
		}
	}
	return base
}

func oomScore(n int) *int {
	if n == 0 {
		return nil
	}
	return &n
}

func (e *Engine) cgroupPath(s *saved) string {
	parent := e.cfg.CgroupParent
	if s.Host.CgroupParent != "" {
		parent = "/" + strings.Trim(s.Host.CgroupParent, "/")
	}
	return filepath.Join(parent, s.ID)
}

// namespaces chooses what the container shares with the host or another container.
func (e *Engine) namespaces(spec *specs.Spec, s *saved) error {
	add := func(t specs.LinuxNamespaceType, path string) {
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: t, Path: path})
	}
	of := func(ref, kind string) (string, error) {
		other, err := e.find(ref)
		if err != nil {
			return "", err
		}
		o := e.view(other)
		if o.Pid == 0 {
			return "", model.Errorf(model.Conflict, "cannot join the namespace of a non running container: container %s is %s", o.ID, o.Status)
		}
		return fmt.Sprintf("/proc/%d/ns/%s", o.Pid, kind), nil
	}
	add(specs.MountNamespace, "")
	host := s.Host
	switch {
	case host.NetworkMode.IsHost():
	case host.NetworkMode.IsContainer():
		path, err := of(host.NetworkMode.ConnectedContainer(), "net")
		if err != nil {
			return err
		}
		add(specs.NetworkNamespace, path)
	default:
		add(specs.NetworkNamespace, s.Sandbox.NetNS)
	}
	switch {
	case host.PidMode.IsHost():
	case host.PidMode.IsContainer():
		path, err := of(host.PidMode.Container(), "pid")
		if err != nil {
			return err
		}
		add(specs.PIDNamespace, path)
	default:
		add(specs.PIDNamespace, "")
	}
	switch {
	case host.IpcMode.IsHost():
	case host.IpcMode.IsContainer():
		path, err := of(host.IpcMode.Container(), "ipc")
		if err != nil {
			return err
		}
		add(specs.IPCNamespace, path)
	default:
		add(specs.IPCNamespace, "")
	}
	if host.UTSMode.IsHost() {
		spec.Hostname, spec.Domainname = "", ""
	} else {
		add(specs.UTSNamespace, "")
	}
	if host.CgroupnsMode.IsPrivate() || host.CgroupnsMode.IsEmpty() && !cgroupV1() {
		add(specs.CgroupNamespace, "")
	}
	return e.sysctls(spec, s)
}

// sysctls refuses what would change the host, and adds Docker's own.
func (e *Engine) sysctls(spec *specs.Spec, s *saved) error {
	for key := range s.Host.Sysctls {
		switch {
		case strings.HasPrefix(key, "net.") && s.Host.NetworkMode.IsHost():
			return model.Errorf(model.Invalid, "sysctl %q not allowed in host network namespace", key)
		case (strings.HasPrefix(key, "kernel.shm") || strings.HasPrefix(key, "kernel.msg") || key == "kernel.sem" || strings.HasPrefix(key, "fs.mqueue.")) && s.Host.IpcMode.IsHost():
			return model.Errorf(model.Invalid, "sysctl %q is not allowed in the hosts ipc namespace", key)
		}
	}
	if s.Host.NetworkMode.IsHost() || s.Host.NetworkMode.IsContainer() {
		return nil
	}
	if spec.Linux.Sysctl == nil {
		spec.Linux.Sysctl = map[string]string{}
	}
	for key, value := range map[string]string{"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 2147483647"} {
		if _, ok := spec.Linux.Sysctl[key]; !ok {
			spec.Linux.Sysctl[key] = value
		}
	}
	return nil
}

// mounts puts together the file systems every container has and those it asked for.
func (e *Engine) mounts(spec *specs.Spec, s *saved) error {
	cgroup := []string{"nosuid", "noexec", "nodev", "relatime"}
	sys := []string{"nosuid", "noexec", "nodev"}
	if !s.Host.Privileged {
		cgroup, sys = append(cgroup, "ro"), append(sys, "ro")
	}
	shm := specs.Mount{
		Destination: "/dev/shm", Type: "tmpfs", Source: "shm",
		Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=" + strconv.FormatInt(s.Host.ShmSize, 10)},
	}
	if s.Host.IpcMode.IsHost() {
		shm = specs.Mount{Destination: "/dev/shm", Type: "bind", Source: "/dev/shm", Options: []string{"rbind", "rprivate"}}
	}
	base := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: sys},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: cgroup},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		shm,
	}
	if s.Host.NetworkMode.IsHost() { // sysfs cannot be mounted without a network namespace of one's own
		base[3] = specs.Mount{Destination: "/sys", Type: "bind", Source: "/sys", Options: append([]string{"rbind"}, sys...)}
	}
	if s.Host.IpcMode.IsNone() {
		base = base[:len(base)-1]
	}
	var own []specs.Mount
	for _, m := range s.Mounts {
		own = append(own, m.spec())
	}
	if s.HasFiles {
		files, err := e.fileMounts(s.ID)
		if err != nil {
			return err
		}
		own = append(own, files...)
	}
	taken := func(dest string) bool {
		return slices.ContainsFunc(own, func(m specs.Mount) bool { return m.Destination == dest })
	}
	for _, name := range []string{resolvFile, hostnameFile, hostsFile} {
		if dest := "/etc/" + name; !taken(dest) {
			own = append(own, specs.Mount{
				Destination: dest, Type: "bind", Source: filepath.Join(e.containerDir(s.ID), name), Options: []string{"rbind", "rprivate"},
			})
		}
	}
	for _, m := range base {
		if !taken(m.Destination) {
			spec.Mounts = append(spec.Mounts, m)
		}
	}
	spec.Mounts = append(spec.Mounts, own...)
	spec.Linux.RootfsPropagation = rootPropagation(own)
	return nil
}

// rootPropagation is what the root mount must be for the mounts to propagate as asked.
func rootPropagation(mounts []specs.Mount) string {
	out := ""
	for _, m := range mounts {
		for _, o := range m.Options {
			switch o {
			case "shared", "rshared":
				return "rshared"
			case "slave", "rslave":
				out = "rslave"
			}
		}
	}
	return out
}

// devices gives the container what devices it asked for and closes the others.
func devices(ctx context.Context, spec *specs.Spec, s *saved) error {
	r := spec.Linux.Resources
	if s.Host.Privileged {
		r.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
		if err := oci.WithHostDevices(ctx, nil, &containers.Container{}, spec); err != nil {
			return fmt.Errorf("list host devices: %w", err)
		}
		return nil
	}
	r.Devices = []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}
	for _, d := range s.Host.Devices {
		perm := d.CgroupPermissions
		if perm == "" {
			perm = "rwm"
		}
		if _, err := os.Stat(d.PathOnHost); err != nil {
			return model.Errorf(model.Invalid, "error gathering device information while adding custom device %q: no such file or directory", d.PathOnHost)
		}
		target := d.PathInContainer
		if target == "" {
			target = d.PathOnHost
		}
		if err := oci.WithDevices(d.PathOnHost, target, perm)(ctx, nil, &containers.Container{}, spec); err != nil {
			return fmt.Errorf("add device %s: %w", d.PathOnHost, err)
		}
	}
	for _, rule := range s.Host.DeviceCgroupRules {
		d, err := deviceRule(rule)
		if err != nil {
			return err
		}
		r.Devices = append(r.Devices, d)
	}
	return nil
}

// deviceRule reads "c 1:3 rwm".
func deviceRule(rule string) (specs.LinuxDeviceCgroup, error) {
	f := strings.Fields(rule)
	bad := model.Errorf(model.Invalid, "invalid device cgroup rule format: '%s'", rule)
	if len(f) != 3 || f[0] != "a" && f[0] != "b" && f[0] != "c" {
		return specs.LinuxDeviceCgroup{}, bad
	}
	d := specs.LinuxDeviceCgroup{Allow: true, Type: f[0], Access: f[2]}
	major, minor, ok := strings.Cut(f[1], ":")
	if !ok {
		return d, bad
	}
	for _, n := range []struct {
		text string
		to   **int64
	}{{major, &d.Major}, {minor, &d.Minor}} {
		if n.text == "*" {
			continue
		}
		v, err := strconv.ParseInt(n.text, 10, 64)
		if err != nil {
			return d, bad
		}
		*n.to = &v
	}
	return d, nil
}
