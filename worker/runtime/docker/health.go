package docker

import (
	"time"

	"github.com/moby/moby/api/types/container"
)

// Docker's defaults for health checks.
const (
	defaultInterval      = 30 * time.Second
	defaultTimeout       = 30 * time.Second
	defaultStartInterval = 5 * time.Second
	defaultRetries       = 3
	maxHealthLog         = 5
)

// Check is a health check with every default filled in.
type Check struct {
	// Shell is set for CMD-SHELL: Argv is then one string for the container's shell.
	Shell bool
	Argv  []string

	Interval, Timeout, StartPeriod, StartInterval time.Duration

	Retries int
}

// HealthCheck reads a merged health configuration; it reports false when there is no check.
func HealthCheck(h *container.HealthConfig) (Check, bool) {
	if h == nil || len(h.Test) < 2 || h.Test[0] == "NONE" {
		return Check{}, false
	}
	c := Check{
		Shell:         h.Test[0] == "CMD-SHELL",
		Argv:          h.Test[1:],
		Interval:      or(h.Interval, defaultInterval),
		Timeout:       or(h.Timeout, defaultTimeout),
		StartPeriod:   h.StartPeriod,
		StartInterval: or(h.StartInterval, defaultStartInterval),
		Retries:       h.Retries,
	}
	if h.Test[0] != "CMD" && h.Test[0] != "CMD-SHELL" {
		c.Argv = h.Test
	}
	if c.Retries <= 0 {
		c.Retries = defaultRetries
	}
	return c, true
}

func or(d, fallback time.Duration) time.Duration {
	if d == 0 {
		return fallback
	}
	return d
}

// Delay returns how long to wait before the next probe of a container that has been up
// for uptime: the start interval while it is starting within its start period.
func (c Check) Delay(h container.Health, uptime time.Duration) time.Duration {
	if h.Status == container.Starting && uptime < c.StartPeriod {
		return c.StartInterval
	}
	return c.Interval
}

// Judge returns the health after one more result. Failures within the start period do
// not count until the first success.
func (c Check) Judge(h container.Health, r container.HealthcheckResult, uptime time.Duration) container.Health {
	log := append([]*container.HealthcheckResult{}, h.Log...)
	h.Log = append(log, &r)
	if extra := len(h.Log) - maxHealthLog; extra > 0 {
		h.Log = h.Log[extra:]
	}
	if r.ExitCode == 0 {
		h.FailingStreak, h.Status = 0, container.Healthy
		return h
	}
	if h.Status == container.Starting && uptime < c.StartPeriod {
		return h
	}
	h.FailingStreak++
	if h.FailingStreak >= c.Retries {
		h.Status = container.Unhealthy
	}
	return h
}
