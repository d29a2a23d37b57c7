package dispatcher

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/skep-dev/skep/api"
)

type metrics struct {
	sessions prometheus.Gauge
	// scheduling has Docker's name and, like there, ends when the leader hears of the start:
	// clocks of two machines are never compared.
	scheduling prometheus.Histogram
	// convergence has one observation for each update of each node.
	convergence prometheus.Histogram
	repairs     prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		sessions: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "skep_dispatcher_sessions", Help: "Nodes with a session on this manager.",
		}),
		scheduling: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "swarm_dispatcher_scheduling_delay_seconds",
			Help: "Time from the creation of a task until the leader hears that it runs.",
		}),
		convergence: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "skep_dispatcher_network_convergence_seconds",
			Help:    "Time from a change of the networks until a node concerned has programmed it.",
			Buckets: prometheus.ExponentialBuckets(0.002, 2, 14),
		}),
		repairs: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "skep_dispatcher_network_repairs_total",
			Help: "Differences between kernel and plan that nodes have reported as mended.",
		}),
	}
	if reg != nil {
		reg.MustRegister(m.sessions, m.scheduling, m.convergence, m.repairs)
	}
	return m
}

// started returns the time that a task took to run by now, if it is a report of its start
// that replaces old.
func started(old, task *api.Task, now time.Time) (time.Duration, bool) {
	if task == nil || old.GetStatus().GetState() >= api.TaskState_RUNNING || task.GetStatus().GetState() != api.TaskState_RUNNING || old.GetMeta().GetCreatedAt() == nil {
		return 0, false
	}
	return now.Sub(old.GetMeta().GetCreatedAt().AsTime()), true
}
