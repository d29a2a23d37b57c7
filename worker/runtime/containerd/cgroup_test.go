package containerd

import (
	"math"
	"os"
	"slices"
	"strings"
	"testing"

	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/blkiodev"
	"github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TestStatsV2 reads recorded files of a cgroup2 hierarchy as the shim does, and shows them
// as Docker would.
func TestStatsV2(t *testing.T) {
	for dir, want := range map[string]container.StatsResponse{
		"full": {
			CPUStats: container.CPUStats{
				CPUUsage:       container.CPUUsage{TotalUsage: 1_234_567_000, UsageInUsermode: 1_000_000_000, UsageInKernelmode: 234_567_000},
				ThrottlingData: container.ThrottlingData{Periods: 40, ThrottledPeriods: 7, ThrottledTime: 350_000_000},
			},
			MemoryStats: container.MemoryStats{
				Usage: 5455872, Limit: 32 << 20, Failcnt: 2,
				Stats: map[string]uint64{
					"anon": 1048576, "file": 4096000, "kernel_stack": 16384, "slab": 150000, "sock": 4096, "shmem": 8192,
					"file_mapped": 1228800, "file_dirty": 12288, "file_writeback": 20480,
					"inactive_anon": 1040384, "active_anon": 16384, "inactive_file": 3000320, "active_file": 1087488,
					"unevictable": 24576, "pgfault": 1500, "pgmajfault": 3,
				},
			},
			PidsStats: container.PidsStats{Current: 3, Limit: 77},
			BlkioStats: container.BlkioStats{IoServiceBytesRecursive: []container.BlkioStatEntry{
				{Major: 254, Op: "read", Value: 8192},
				{Major: 254, Op: "write", Value: 4096},
				{Major: 7, Minor: 1, Op: "read", Value: 512},
				{Major: 7, Minor: 1, Op: "write", Value: 0},
			}},
		},
		// Controllers that are not there leave no files.
		"bare": {CPUStats: container.CPUStats{CPUUsage: container.CPUUsage{TotalUsage: 42_000, UsageInUsermode: 40_000, UsageInKernelmode: 2_000}}},
	} {
		m, err := cgroup2.Load("/one", cgroup2.WithMountpoint("testdata/cgroup2/"+dir))
		if err != nil {
			t.Fatal(err)
		}
		stats, err := m.Stat()
		if err != nil {
			t.Fatal(err)
		}
		var got container.StatsResponse
		fillV2(&got, stats)
		if dir == "bare" { // all of them zero
			for _, v := range got.MemoryStats.Stats {
				if v != 0 {
					t.Errorf("%s: %v", dir, got.MemoryStats.Stats)
				}
			}
			got.MemoryStats.Stats = nil
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s: %s", dir, d)
		}
	}
}

func TestStatsV1(t *testing.T) {
	var got container.StatsResponse
	fillV1(&got, &cgroup1.Metrics{
		CPU: &cgroup1.CPUStat{
			Usage:      &cgroup1.CPUUsage{Total: 10, Kernel: 3, User: 7, PerCPU: []uint64{4, 6}},
			Throttling: &cgroup1.Throttle{Periods: 5, ThrottledPeriods: 2, ThrottledTime: 9},
		},
		Memory: &cgroup1.MemoryStat{Usage: &cgroup1.MemoryEntry{Usage: 100, Max: 200, Limit: math.MaxInt64 &^ 4095, Failcnt: 1}, TotalInactiveFile: 30, RSS: 60},
		Pids:   &cgroup1.PidsStat{Current: 2, Limit: 50},
		Blkio:  &cgroup1.BlkIOStat{IoServiceBytesRecursive: []*cgroup1.BlkIOEntry{{Op: "Read", Major: 254, Value: 11}}},
	})
	if got.CPUStats.CPUUsage.TotalUsage != 10 || got.CPUStats.CPUUsage.UsageInKernelmode != 3 || got.CPUStats.CPUUsage.UsageInUsermode != 7 ||
		!slices.Equal(got.CPUStats.CPUUsage.PercpuUsage, []uint64{4, 6}) || got.CPUStats.ThrottlingData.ThrottledTime != 9 {
		t.Errorf("%+v", got.CPUStats)
	}
	if m := got.MemoryStats; m.Usage != 100 || m.MaxUsage != 200 || m.Failcnt != 1 || m.Stats["total_inactive_file"] != 30 || m.Stats["rss"] != 60 {
		t.Errorf("%+v", m)
	}
	want := []container.BlkioStatEntry{{Major: 254, Op: "read", Value: 11}}
	if d := cmp.Diff(want, got.BlkioStats.IoServiceBytesRecursive); d != "" || got.PidsStats != (container.PidsStats{Current: 2, Limit: 50}) {
		t.Errorf("%s, %+v", d, got.PidsStats)
	}
	fillV1(&got, &cgroup1.Metrics{}) // nothing there is nothing told, and no crash
}

// TestLimits translates every limit; what cgroup v2 has no file for is discarded with a warning.
func TestLimits(t *testing.T) {
	null := unix.Mkdev(1, 3)
	var st unix.Stat_t
	if unix.Stat("/dev/null", &st) != nil || st.Rdev != null {
		t.Skip("needs /dev/null")
	}
	swap, swapless := new(int64(64<<20)), !swapLimit()
	if swapless {
		swap = nil
	}
	r := container.Resources{
		CPUShares: 512, NanoCPUs: 1.5e9, CpusetCpus: "0-1", CpusetMems: "0", Memory: 32 << 20, MemoryReservation: 16 << 20, MemorySwap: 64 << 20,
		MemorySwappiness: new(int64(10)), OomKillDisable: new(true), PidsLimit: new(int64(77)), BlkioWeight: 300, CPURealtimeRuntime: 1000, CPURealtimePeriod: 2000,
		BlkioWeightDevice:   []*blkiodev.WeightDevice{{Path: "/dev/null", Weight: 200}},
		BlkioDeviceReadBps:  []*blkiodev.ThrottleDevice{{Path: "/dev/null", Rate: 1 << 20}, {Path: "/nowhere", Rate: 1}},
		BlkioDeviceWriteBps: []*blkiodev.ThrottleDevice{{Path: "/dev/null", Rate: 2 << 20}}, BlkioDeviceReadIOps: []*blkiodev.ThrottleDevice{{Path: "/dev/null", Rate: 3}},
		BlkioDeviceWriteIOps: []*blkiodev.ThrottleDevice{{Path: "/dev/null", Rate: 4}},
	}
	device := func(rate uint64) []specs.LinuxThrottleDevice {
		d := specs.LinuxThrottleDevice{Rate: rate}
		d.Major, d.Minor = 1, 3
		return []specs.LinuxThrottleDevice{d}
	}
	weight := specs.LinuxWeightDevice{Weight: new(uint16(200))}
	weight.Major, weight.Minor = 1, 3
	want := &specs.LinuxResources{
		CPU: &specs.LinuxCPU{
			Shares: new(uint64(512)), Quota: new(int64(150_000)), Period: new(uint64(100_000)), Cpus: "0-1", Mems: "0",
			RealtimeRuntime: new(int64(1000)), RealtimePeriod: new(uint64(2000)),
		},
		Memory: &specs.LinuxMemory{
			Limit: new(int64(32 << 20)), Reservation: new(int64(16 << 20)), Swap: swap, Swappiness: new(uint64(10)), DisableOOMKiller: new(true),
		},
		Pids: &specs.LinuxPids{Limit: new(int64(77))},
		BlockIO: &specs.LinuxBlockIO{
			Weight: new(uint16(300)), WeightDevice: []specs.LinuxWeightDevice{weight}, ThrottleReadBpsDevice: device(1 << 20),
			ThrottleWriteBpsDevice: device(2 << 20), ThrottleReadIOPSDevice: device(3), ThrottleWriteIOPSDevice: device(4),
		},
	}
	if warnings := discard(&r, true); len(warnings) != 0 {
		t.Errorf("cgroup v1 warns: %q", warnings)
	}
	if d := cmp.Diff(want, linuxResources(&container.HostConfig{Resources: r})); d != "" {
		t.Error(d)
	}
	warnings := discard(&r, false)
	for _, what := range []string{"swappiness", "OomKillDisable", "realtime"} {
		if !slices.ContainsFunc(warnings, func(w string) bool { return strings.Contains(w, what) }) {
			t.Errorf("no warning of %s in %q", what, warnings)
		}
	}
	want.CPU.RealtimePeriod, want.CPU.RealtimeRuntime, want.Memory.Swappiness, want.Memory.DisableOOMKiller = nil, nil, nil, nil
	if d := cmp.Diff(want, linuxResources(&container.HostConfig{Resources: r})); d != "" {
		t.Errorf("on cgroup v2: %s", d)
	}
	if got := linuxResources(&container.HostConfig{}); got.Pids != nil || got.BlockIO != nil || got.Memory.Limit != nil || got.CPU.Quota != nil {
		t.Errorf("no limits: %+v", got)
	}
	if os.Getenv(cgroup2Env) != "" && (cgroupV1() || !swapLimit()) {
		t.Error("cgroup v2 was not noticed")
	}
}
