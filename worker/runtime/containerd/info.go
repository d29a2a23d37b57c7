package containerd

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/worker/runtime"
)

// Info implements runtime.Engine.
func (e *Engine) Info(ctx context.Context) (runtime.Info, error) {
	v, err := e.client.Version(e.ns(ctx))
	if err != nil {
		return runtime.Info{}, fmt.Errorf("ask containerd for its version: %w", err)
	}
	out := runtime.Info{
		ContainerdVersion: v.Version, RuntimeName: e.oci.name, RuntimeVersion: e.oci.version, StorageDriver: snapshotter,
		CgroupVersion: "2", CgroupDriver: "cgroupfs", NCPU: cpus(), MemTotal: memTotal(), Architecture: unameArch(),
		OperatingSystem: operatingSystem(), Warnings: append([]string{}, e.oci.warnings...),
	}
	if cgroupV1() {
		out.CgroupVersion = "1"
		out.Warnings = append(out.Warnings, "WARNING: Support for cgroup v1 is deprecated and planned to be removed by no later than May 2029")
	}
	if !swapLimit() {
		out.Warnings = append(out.Warnings, "WARNING: No swap limit support")
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		out.KernelVersion = unix.ByteSliceToString(u.Release[:])
	}
	return out, nil
}

func memTotal() int64 {
	var si unix.Sysinfo_t
	if unix.Sysinfo(&si) != nil {
		return 0
	}
	return int64(si.Totalram) * int64(si.Unit)
}

func operatingSystem() string {
	f, err := os.Open("/etc/os-release")
	if err != nil {
		return "Linux"
	}
	defer func() { _ = f.Close() }() // only read from
	scan := bufio.NewScanner(f)
	for scan.Scan() {
		if v, ok := strings.CutPrefix(scan.Text(), "PRETTY_NAME="); ok {
			if s, err := strconv.Unquote(v); err == nil {
				return s
			}
			return v
		}
	}
	return "Linux"
}
