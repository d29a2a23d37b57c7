package ops

import (
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/skep-dev/skep/api"
)

// The defaults that apply where a spec says nothing.
const (
	defaultStopGrace    = 10 * time.Second
	defaultRestartDelay = 5 * time.Second
	defaultMonitor      = 5 * time.Second
)

// insertDefaults shows in a spec, which it changes, what applies.
func insertDefaults(spec *api.ServiceSpec) {
	if c := spec.GetTask().GetContainer(); c != nil {
		if c.StopGracePeriod == nil {
			c.StopGracePeriod = durationpb.New(defaultStopGrace)
		}
		if c.DnsConfig == nil {
			c.DnsConfig = new(api.ContainerSpec_DNSConfig)
		}
	}
	if task := spec.GetTask(); task != nil {
		insertTaskDefaults(task)
	}
	spec.Update = updateDefaults(spec.GetUpdate())
	spec.Rollback = updateDefaults(spec.GetRollback())
}

func insertTaskDefaults(task *api.TaskSpec) {
	if task.Resources == nil {
		task.Resources = new(api.ResourceRequirements)
	}
	if task.Resources.Limits == nil {
		task.Resources.Limits = new(api.Resources)
	}
	if task.Resources.Reservations == nil {
		task.Resources.Reservations = new(api.Resources)
	}
	if task.Restart == nil {
		task.Restart = &api.RestartPolicy{Condition: api.RestartPolicy_ANY}
	}
	if task.Restart.Delay == nil {
		task.Restart.Delay = durationpb.New(defaultRestartDelay)
	}
	if task.Placement == nil {
		task.Placement = new(api.Placement)
	}
}

func updateDefaults(u *api.UpdateConfig) *api.UpdateConfig {
	if u == nil {
		return &api.UpdateConfig{
			Parallelism: 1, Delay: durationpb.New(0), Monitor: durationpb.New(defaultMonitor),
			FailureAction: api.UpdateConfig_PAUSE, Order: api.UpdateConfig_STOP_FIRST,
		}
	}
	if u.Monitor == nil {
		u.Monitor = durationpb.New(defaultMonitor)
	}
	return u
}
