package containerd

import (
	"os"
	"runtime"
	"strings"

	"github.com/moby/moby/api/types/blkiodev"
	"github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func cpus() int { return runtime.NumCPU() }

// cgroupV1 reports whether the machine uses cgroup v1, alone or beside v2.
func cgroupV1() bool {
	var st unix.Statfs_t
	return unix.Statfs("/sys/fs/cgroup", &st) == nil && st.Type != unix.CGROUP2_SUPER_MAGIC
}

// swapLimit reports whether swap use can be limited.
func swapLimit() bool {
	if !cgroupV1() {
		return true
	}
	_, err := os.Stat("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes")
	return err == nil
}

// discard takes away the limits that cgroup v2 has no file for, where the OCI runtimes
// would refuse to start, and returns a warning for each.
func discard(r *container.Resources, v1 bool) (warnings []string) {
	if v1 {
		return nil
	}
	if r.MemorySwappiness != nil && *r.MemorySwappiness != -1 {
		warnings = append(warnings, "Your kernel does not support memory swappiness capabilities or the cgroup is not mounted. Memory swappiness discarded.")
	}
	if r.OomKillDisable != nil && *r.OomKillDisable {
		warnings = append(warnings, "Your kernel does not support OomKillDisable. OomKillDisable discarded.")
	}
	if r.CPURealtimePeriod != 0 || r.CPURealtimeRuntime != 0 {
		warnings = append(warnings, "Your kernel does not support CPU realtime scheduling with cgroup v2. CPU realtime limits discarded.")
	}
	r.MemorySwappiness, r.OomKillDisable, r.CPURealtimePeriod, r.CPURealtimeRuntime = nil, nil, 0, 0
	return warnings
}

const cfsPeriod = 100_000 // µs

// linuxResources translates limits; members that are zero stay unset.
func linuxResources(host *container.HostConfig) *specs.LinuxResources {
	r := host.Resources
	out := &specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: r.CpusetCpus, Mems: r.CpusetMems}, Memory: &specs.LinuxMemory{}}
	if r.CPUShares > 0 {
		out.CPU.Shares = new(uint64(r.CPUShares))
	}
	if r.NanoCPUs > 0 {
		out.CPU.Period = new(uint64(cfsPeriod))
		out.CPU.Quota = new(r.NanoCPUs * cfsPeriod / 1e9)
	}
	if r.CPUPeriod > 0 {
		out.CPU.Period = new(uint64(r.CPUPeriod))
	}
	if r.CPUQuota != 0 {
		out.CPU.Quota = new(r.CPUQuota)
	}
	if r.CPURealtimePeriod > 0 {
		out.CPU.RealtimePeriod = new(uint64(r.CPURealtimePeriod))
	}
	if r.CPURealtimeRuntime != 0 {
		out.CPU.RealtimeRuntime = new(r.CPURealtimeRuntime)
	}
	if r.Memory > 0 {
		out.Memory.Limit = new(r.Memory)
	}
	if r.MemoryReservation > 0 {
		out.Memory.Reservation = new(r.MemoryReservation)
	}
	if r.MemorySwap != 0 && swapLimit() {
		out.Memory.Swap = new(r.MemorySwap)
	}
	if r.MemorySwappiness != nil && *r.MemorySwappiness >= 0 {
		out.Memory.Swappiness = new(uint64(*r.MemorySwappiness))
	}
	out.Memory.DisableOOMKiller = r.OomKillDisable
	if r.PidsLimit != nil && *r.PidsLimit > 0 {
		out.Pids = &specs.LinuxPids{Limit: new(*r.PidsLimit)}
	}
	out.BlockIO = blockIO(r)
	return out
}

func blockIO(r container.Resources) *specs.LinuxBlockIO {
	b := &specs.LinuxBlockIO{
		ThrottleReadBpsDevice:   throttle(r.BlkioDeviceReadBps),
		ThrottleWriteBpsDevice:  throttle(r.BlkioDeviceWriteBps),
		ThrottleReadIOPSDevice:  throttle(r.BlkioDeviceReadIOps),
		ThrottleWriteIOPSDevice: throttle(r.BlkioDeviceWriteIOps),
	}
	if r.BlkioWeight > 0 {
		b.Weight = new(r.BlkioWeight)
	}
	for _, w := range r.BlkioWeightDevice {
		var d specs.LinuxWeightDevice
		if major, minor, ok := deviceNumber(w.Path); ok {
			d.Major, d.Minor, d.Weight = major, minor, new(w.Weight)
			b.WeightDevice = append(b.WeightDevice, d)
		}
	}
	if b.Weight == nil && len(b.WeightDevice)+len(b.ThrottleReadBpsDevice)+len(b.ThrottleWriteBpsDevice)+
		len(b.ThrottleReadIOPSDevice)+len(b.ThrottleWriteIOPSDevice) == 0 {
		return nil
	}
	return b
}

func throttle(list []*blkiodev.ThrottleDevice) []specs.LinuxThrottleDevice {
	var out []specs.LinuxThrottleDevice
	for _, t := range list {
		var d specs.LinuxThrottleDevice
		if major, minor, ok := deviceNumber(t.Path); ok {
			d.Major, d.Minor, d.Rate = major, minor, t.Rate
			out = append(out, d)
		}
	}
	return out
}

func deviceNumber(path string) (major, minor int64, ok bool) {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return 0, 0, false
	}
	return int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev)), true
}

func rlimits(host *container.HostConfig) []specs.POSIXRlimit {
	var out []specs.POSIXRlimit
	for _, u := range host.Ulimits {
		out = append(out, specs.POSIXRlimit{Type: "RLIMIT_" + strings.ToUpper(u.Name), Soft: uint64(u.Soft), Hard: uint64(u.Hard)})
	}
	return out
}
