package fake

import (
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"github.com/skep-dev/skep/worker/runtime/docker"
)

func (e *Engine) startHealth(c *record) {
	c.health = nil
	check, ok := docker.HealthCheck(c.config.Healthcheck)
	if !ok {
		return
	}
	c.health = &container.Health{Status: container.Starting}
	e.probeLater(c, check)
}

func (e *Engine) stopHealth(c *record) {
	if c.probe != nil {
		c.probe.Stop()
	}
	if c.health != nil {
		c.health.Status = container.Unhealthy
	}
}

func (e *Engine) probeLater(c *record, check docker.Check) {
	epoch := c.epoch
	c.probe = time.AfterFunc(check.Delay(*c.health, time.Since(c.startedAt)), func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		if c.epoch != epoch || !c.running() {
			return
		}
		now := time.Now()
		up := now.Sub(c.startedAt)
		result := container.HealthcheckResult{Start: now, End: now}
		if c.probeFails || up < c.script.HealthyAfter || c.script.UnhealthyAfter >= 0 && up >= c.script.UnhealthyAfter {
			result.ExitCode, result.Output = 1, "scripted failure"
		}
		before := c.health.Status
		next := check.Judge(*c.health, result, up)
		c.health = &next
		if next.Status != before {
			e.emit(c, events.ActionHealthStatus+events.Action(": "+next.Status))
		}
		e.probeLater(c, check)
	})
}

func copyHealth(h *container.Health) *container.Health {
	if h == nil {
		return nil
	}
	out := *h
	return &out
}
