package containerd

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/moby/moby/api/types/container"
)

// Stats implements runtime.Inspector.
func (e *Engine) Stats(ctx context.Context, ref string) (*container.StatsResponse, error) {
	c, err := e.find(ref)
	if err != nil {
		return nil, err
	}
	s := e.view(c)
	out := &container.StatsResponse{ID: s.ID, Name: "/" + s.Name, OSType: "linux"}
	if !isRunning(s) {
		return out, nil
	}
	resp, err := e.client.TaskService().Metrics(e.ns(ctx), &tasks.MetricsRequest{Filters: []string{"id==" + s.ID}})
	if err != nil {
		if gone(errgrpc.ToNative(err)) {
			return out, nil
		}
		return nil, fmt.Errorf("read metrics of container: %w", errgrpc.ToNative(err))
	}
	if len(resp.Metrics) == 0 { // it ended meanwhile
		return out, nil
	}
	v, err := typeurl.UnmarshalAny(resp.Metrics[0].Data)
	if err != nil {
		return nil, fmt.Errorf("read metrics of container: %w", err)
	}
	out.Read = time.Now().UTC()
	switch m := v.(type) {
	case *cgroup1.Metrics:
		fillV1(out, m)
	case *cgroup2.Metrics:
		fillV2(out, m)
	default:
		return nil, fmt.Errorf("read metrics of container: unknown kind %T", v)
	}
	if total := memTotal(); out.MemoryStats.Limit == 0 || out.MemoryStats.Limit > uint64(total) {
		out.MemoryStats.Limit = uint64(total)
	}
	out.CPUStats.OnlineCPUs = uint32(cpus())
	out.CPUStats.SystemUsage = systemCPU()
	if !s.Host.NetworkMode.IsHost() {
		out.Networks = networkStats(s.Pid)
	}
	return out, nil
}

func fillV1(out *container.StatsResponse, m *cgroup1.Metrics) {
	if cpu := m.CPU; cpu != nil {
		if u := cpu.Usage; u != nil {
			out.CPUStats.CPUUsage = container.CPUUsage{TotalUsage: u.Total, PercpuUsage: u.PerCPU, UsageInKernelmode: u.Kernel, UsageInUsermode: u.User}
		}
		if t := cpu.Throttling; t != nil {
			out.CPUStats.ThrottlingData = container.ThrottlingData{Periods: t.Periods, ThrottledPeriods: t.ThrottledPeriods, ThrottledTime: t.ThrottledTime}
		}
	}
	if mem := m.Memory; mem != nil {
		if u := mem.Usage; u != nil {
			out.MemoryStats.Usage, out.MemoryStats.MaxUsage, out.MemoryStats.Limit, out.MemoryStats.Failcnt = u.Usage, u.Max, u.Limit, u.Failcnt
		}
		out.MemoryStats.Stats = map[string]uint64{
			"cache": mem.Cache, "rss": mem.RSS, "mapped_file": mem.MappedFile, "pgfault": mem.PgFault, "pgmajfault": mem.PgMajFault,
			"inactive_anon": mem.InactiveAnon, "active_anon": mem.ActiveAnon, "inactive_file": mem.InactiveFile, "active_file": mem.ActiveFile,
			"unevictable": mem.Unevictable, "hierarchical_memory_limit": mem.HierarchicalMemoryLimit,
			"total_cache": mem.TotalCache, "total_rss": mem.TotalRSS, "total_inactive_file": mem.TotalInactiveFile,
			"total_active_file": mem.TotalActiveFile, "total_inactive_anon": mem.TotalInactiveAnon, "total_active_anon": mem.TotalActiveAnon,
		}
	}
	if p := m.Pids; p != nil {
		out.PidsStats = container.PidsStats{Current: p.Current, Limit: p.Limit}
	}
	if b := m.Blkio; b != nil {
		entries := func(list []*cgroup1.BlkIOEntry) []container.BlkioStatEntry {
			var o []container.BlkioStatEntry
			for _, x := range list {
				o = append(o, container.BlkioStatEntry{Major: x.Major, Minor: x.Minor, Op: strings.ToLower(x.Op), Value: x.Value})
			}
			return o
		}
		out.BlkioStats.IoServiceBytesRecursive = entries(b.IoServiceBytesRecursive)
		out.BlkioStats.IoServicedRecursive = entries(b.IoServicedRecursive)
	}
}

func fillV2(out *container.StatsResponse, m *cgroup2.Metrics) {
	if cpu := m.CPU; cpu != nil {
		const µs = 1000
		out.CPUStats.CPUUsage = container.CPUUsage{TotalUsage: cpu.UsageUsec * µs, UsageInKernelmode: cpu.SystemUsec * µs, UsageInUsermode: cpu.UserUsec * µs}
		out.CPUStats.ThrottlingData = container.ThrottlingData{Periods: cpu.NrPeriods, ThrottledPeriods: cpu.NrThrottled, ThrottledTime: cpu.ThrottledUsec * µs}
	}
	if mem := m.Memory; mem != nil {
		out.MemoryStats.Usage, out.MemoryStats.Limit = mem.Usage, mem.UsageLimit
		out.MemoryStats.Stats = map[string]uint64{
			"anon": mem.Anon, "file": mem.File, "kernel_stack": mem.KernelStack, "slab": mem.Slab, "sock": mem.Sock, "shmem": mem.Shmem,
			"file_mapped": mem.FileMapped, "file_dirty": mem.FileDirty, "file_writeback": mem.FileWriteback,
			"inactive_anon": mem.InactiveAnon, "active_anon": mem.ActiveAnon, "inactive_file": mem.InactiveFile, "active_file": mem.ActiveFile,
			"unevictable": mem.Unevictable, "pgfault": mem.Pgfault, "pgmajfault": mem.Pgmajfault,
		}
	}
	if e := m.MemoryEvents; e != nil { // what Docker shows as failures
		out.MemoryStats.Failcnt = e.Oom
	}
	if p := m.Pids; p != nil {
		out.PidsStats = container.PidsStats{Current: p.Current, Limit: p.Limit}
	}
	if io := m.Io; io != nil {
		for _, x := range io.Usage {
			out.BlkioStats.IoServiceBytesRecursive = append(out.BlkioStats.IoServiceBytesRecursive,
				container.BlkioStatEntry{Major: x.Major, Minor: x.Minor, Op: "read", Value: x.Rbytes},
				container.BlkioStatEntry{Major: x.Major, Minor: x.Minor, Op: "write", Value: x.Wbytes})
		}
	}
}

// systemCPU returns the nanoseconds that all CPUs of the machine have spent, idle included.
func systemCPU() uint64 {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	first, _, _ := strings.Cut(string(b), "\n")
	fields := strings.Fields(first)
	if len(fields) < 8 {
		return 0
	}
	const tick = uint64(time.Second) / 100
	var sum uint64
	for _, f := range fields[1:8] {
		n, err := strconv.ParseUint(f, 10, 64)
		if err != nil {
			return 0
		}
		sum += n
	}
	return sum * tick
}

// networkStats reads the counters of a process's network namespace.
func networkStats(pid int) map[string]container.NetworkStats {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/dev", pid))
	if err != nil {
		return nil
	}
	return parseNetDev(b)
}

func parseNetDev(b []byte) map[string]container.NetworkStats {
	out := map[string]container.NetworkStats{}
	scan := bufio.NewScanner(bytes.NewReader(b))
	for scan.Scan() {
		name, rest, ok := strings.Cut(scan.Text(), ":")
		f := strings.Fields(rest)
		if name = strings.TrimSpace(name); !ok || len(f) < 12 || name == "lo" {
			continue
		}
		n := func(i int) uint64 {
			v, err := strconv.ParseUint(f[i], 10, 64)
			if err != nil {
				return 0
			}
			return v
		}
		out[name] = container.NetworkStats{
			RxBytes: n(0), RxPackets: n(1), RxErrors: n(2), RxDropped: n(3),
			TxBytes: n(8), TxPackets: n(9), TxErrors: n(10), TxDropped: n(11),
		}
	}
	return out
}
