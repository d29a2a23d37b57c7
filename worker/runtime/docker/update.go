package docker

import "github.com/moby/moby/api/types/container"

// UpdateResources changes host as `docker update` asks: members of u that are zero
// leave what is there.
func UpdateResources(host *container.HostConfig, u container.UpdateConfig) {
	r := &host.Resources
	set(&r.CPUShares, u.CPUShares)
	set(&r.Memory, u.Memory)
	set(&r.MemorySwap, u.MemorySwap)
	set(&r.MemoryReservation, u.MemoryReservation)
	set(&r.NanoCPUs, u.NanoCPUs)
	set(&r.CPUPeriod, u.CPUPeriod)
	set(&r.CPUQuota, u.CPUQuota)
	set(&r.CPURealtimePeriod, u.CPURealtimePeriod)
	set(&r.CPURealtimeRuntime, u.CPURealtimeRuntime)
	set(&r.CpusetCpus, u.CpusetCpus)
	set(&r.CpusetMems, u.CpusetMems)
	set(&r.BlkioWeight, u.BlkioWeight)
	set(&r.PidsLimit, u.PidsLimit)
	set(&host.RestartPolicy, u.RestartPolicy)
}

func set[T comparable](to *T, value T) {
	var zero T
	if value != zero {
		*to = value
	}
}
