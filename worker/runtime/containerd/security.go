package containerd

import (
	"encoding/json"
	"os"
	"slices"
	"strings"

	ctdseccomp "github.com/containerd/containerd/v2/contrib/seccomp"
	ctdcap "github.com/containerd/containerd/v2/pkg/cap"
	"github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/skep-dev/skep/core/model"
)

// security is what HostConfig.SecurityOpt says.
type security struct {
	noNewPrivileges bool
	unconfined      bool // no seccomp filter
	profile         *seccompProfile
	openPaths       bool // systempaths=unconfined
}

// securityOptions reads HostConfig.SecurityOpt.
func securityOptions(host *container.HostConfig) (security, error) {
	var out security
	for _, o := range host.SecurityOpt {
		key, value, ok := strings.Cut(o, "=")
		if !ok {
			key, value, ok = strings.Cut(o, ":")
		}
		switch {
		case key == "no-new-privileges":
			if ok && value != "true" && value != "false" {
				return out, model.Errorf(model.Invalid, "invalid --security-opt: %q", o)
			}
			out.noNewPrivileges = value != "false"
		case !ok:
			return out, model.Errorf(model.Invalid, "invalid --security-opt 1: %q", o)
		case key == "seccomp" && value == "unconfined":
			out.unconfined = true
		case key == "seccomp" && value == "builtin":
		case key == "seccomp":
			out.profile = &seccompProfile{}
			if err := json.Unmarshal([]byte(value), out.profile); err != nil {
				return out, model.Errorf(model.Invalid, "Decoding seccomp profile failed: %w", err)
			}
		case key == "apparmor":
			if value != "unconfined" && value != "docker-default" && value != "" {
				if _, err := os.Stat("/sys/kernel/security/apparmor"); err != nil {
					return out, model.Errorf(model.Precondition, "AppArmor profile %q was asked for, but AppArmor is not enabled on this machine", value)
				}
				return out, model.Errorf(model.Unimplemented, "AppArmor profiles are not implemented by skep")
			}
		case key == "label":
			if value != "disable" {
				return out, model.Errorf(model.Unimplemented, "SELinux labels are not implemented by skep")
			}
		case key == "systempaths" && value == "unconfined":
			out.openPaths = true
		default:
			return out, model.Errorf(model.Invalid, "invalid --security-opt 2: %q", o)
		}
	}
	return out, nil
}

// apply hides or opens kernel files.
func (s security) apply(spec *specs.Spec, host *container.HostConfig) {
	if host.Privileged || s.openPaths {
		return
	}
	spec.Linux.MaskedPaths = host.MaskedPaths
	if host.MaskedPaths == nil {
		spec.Linux.MaskedPaths = []string{
			"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
			"/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware",
		}
	}
	spec.Linux.ReadonlyPaths = host.ReadonlyPaths
	if host.ReadonlyPaths == nil {
		spec.Linux.ReadonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
	}
}

// filter sets the seccomp profile.
func (s security) filter(spec *specs.Spec) {
	switch {
	case s.unconfined:
		return
	case s.profile == nil:
		spec.Linux.Seccomp = ctdseccomp.DefaultProfile(spec)
		return
	}
	var caps []string
	if spec.Process.Capabilities != nil {
		caps = spec.Process.Capabilities.Bounding
	}
	spec.Linux.Seccomp = s.profile.spec(caps)
}

// defaultCaps are what Docker gives.
func defaultCaps() []string {
	return []string{
		"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
		"CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
	}
}

// capSet is a container's capabilities.
type capSet []string

// capabilities applies CapAdd and CapDrop as Docker does.
func capabilities(host *container.HostConfig) (capSet, error) {
	known, err := ctdcap.Current()
	if err != nil {
		return nil, model.Wrap(model.Internal, err, "read own capabilities")
	}
	normal := func(names []string) (list []string, all bool, err error) {
		for _, n := range names {
			n = strings.ToUpper(n)
			if n == "ALL" {
				all = true
				continue
			}
			if !strings.HasPrefix(n, "CAP_") {
				n = "CAP_" + n
			}
			if !slices.Contains(ctdcap.Known(), n) {
				return nil, false, model.Errorf(model.Invalid, "invalid capability: %q", n)
			}
			list = append(list, n)
		}
		return list, all, nil
	}
	add, addAll, err := normal(host.CapAdd)
	if err != nil {
		return nil, err
	}
	drop, dropAll, err := normal(host.CapDrop)
	if err != nil {
		return nil, err
	}
	if host.Privileged {
		return known, nil
	}
	set := defaultCaps()
	switch {
	case addAll:
		set = slices.Clone(known)
	case dropAll:
		set = nil
	}
	for _, c := range add {
		if !slices.Contains(set, c) {
			set = append(set, c)
		}
	}
	if !dropAll || addAll {
		set = slices.DeleteFunc(set, func(c string) bool { return slices.Contains(drop, c) })
	}
	return set, nil
}

// spec returns the OCI form. A process of another user than root has no effective ones;
// what its programs may gain stays bounded by the set.
func (c capSet) spec(unprivileged bool) *specs.LinuxCapabilities {
	out := &specs.LinuxCapabilities{Bounding: c}
	if !unprivileged {
		out.Effective, out.Permitted = c, c
	}
	return out
}

// seccompProfile is a profile as Docker writes them, where rules may depend on
// capabilities and architectures.
type seccompProfile struct {
	DefaultAction   specs.LinuxSeccompAction `json:"defaultAction"`
	DefaultErrnoRet *uint                    `json:"defaultErrnoRet"`
	Architectures   []specs.Arch             `json:"architectures"`
	ArchMap         []struct {
		Arch      specs.Arch   `json:"architecture"`
		SubArches []specs.Arch `json:"subArchitectures"`
	} `json:"archMap"`
	Flags    []specs.LinuxSeccompFlag `json:"flags"`
	Syscalls []struct {
		specs.LinuxSyscall
		Name     string        `json:"name"`
		Includes seccompFilter `json:"includes"`
		Excludes seccompFilter `json:"excludes"`
	} `json:"syscalls"`
}

type seccompFilter struct {
	Caps   []string `json:"caps"`
	Arches []string `json:"arches"`
}

func (p *seccompProfile) spec(caps []string) *specs.LinuxSeccomp {
	out := &specs.LinuxSeccomp{DefaultAction: p.DefaultAction, DefaultErrnoRet: p.DefaultErrnoRet, Architectures: p.Architectures, Flags: p.Flags}
	for _, a := range p.ArchMap {
		if a.Arch == nativeArch() {
			out.Architectures = append([]specs.Arch{a.Arch}, a.SubArches...)
		}
	}
	has := func(f seccompFilter) (caps_, arch bool) {
		caps_ = len(f.Caps) > 0 && !slices.ContainsFunc(f.Caps, func(c string) bool { return !slices.Contains(caps, c) })
		return caps_, slices.Contains(f.Arches, goArch())
	}
	for _, s := range p.Syscalls {
		inCaps, inArch := has(s.Includes)
		exCaps, exArch := has(s.Excludes)
		if exCaps || exArch || len(s.Includes.Caps) > 0 && !inCaps || len(s.Includes.Arches) > 0 && !inArch {
			continue
		}
		call := s.LinuxSyscall
		if s.Name != "" {
			call.Names = append(call.Names, s.Name)
		}
		out.Syscalls = append(out.Syscalls, call)
	}
	return out
}
