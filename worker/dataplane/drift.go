package dataplane

import (
	"fmt"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
)

// Kinds of differences, as they appear in metrics.
const (
	kindLink    = "link"
	kindForward = "forward"
	kindRules   = "rules"
	kindNames   = "names"
)

// drift collects how the kernel differs from the plan.
type drift struct {
	// repair lets differences be mended; else they are only named.
	repair bool
	// repairs counts them; nil while something is made for the first time.
	repairs *repairCounter
	// whole is set while everything is compared: what is there already was not just made.
	whole bool
	// networks are those that what is looked at now belongs to.
	networks []string
	under    *underlay // nil until somebody asked
	found    []string
	details  []*skepv1.NetworkDifference // of found
}

// at says which networks what is looked at from now on belongs to.
func (x *drift) at(networks ...string) { x.networks = networks }

// note records a difference that is not for us to mend.
func (x *drift) note(kind, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	x.found = append(x.found, text)
	x.details = append(x.details, &skepv1.NetworkDifference{Kind: kind, NetworkIds: x.networks, Text: text})
}

// add records a difference and reports whether to mend it.
func (x *drift) add(kind, format string, args ...any) bool {
	x.note(kind, format, args...)
	if x.repair && x.repairs != nil {
		x.repairs.count(kind)
	}
	return x.repair
}

// say records a difference that nothing here can mend; while others are mended it is not counted.
func (x *drift) say(kind, format string, args ...any) {
	if !x.repair {
		x.note(kind, format, args...)
	}
}

// repairCounter counts what was mended, by kind and in all.
type repairCounter struct {
	*prometheus.CounterVec

	total atomic.Uint64
}

func (c *repairCounter) count(kind string) {
	c.WithLabelValues(kind).Inc()
	c.total.Add(1)
}

// metrics are the data plane's; a nil registerer keeps them to itself.
type metrics struct {
	repairs *repairCounter
	apply   prometheus.Histogram
	failed  prometheus.Counter
	taken   prometheus.Gauge
	queries *prometheus.CounterVec
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		repairs: &repairCounter{CounterVec: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "skep_network_repairs_total",
			Help: "Differences between kernel and plan that were found and mended, by kind.",
		}, []string{"kind"})},
		apply: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "skep_network_apply_duration_seconds",
			Help:    "Time from an update to the kernel that matches it.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 14),
		}),
		failed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "skep_network_apply_failures_total",
			Help: "Updates and checks after which the kernel did not match the plan.",
		}),
		taken: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "skep_network_ports_taken",
			Help: "Published ports that are not published on this node, since somebody else listens there.",
		}),
		queries: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "skep_network_dns_queries_total",
			Help: "Questions of containers, by who answered.",
		}, []string{"answered"}),
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.repairs, m.apply, m.failed, m.taken, m.queries} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register network metrics: %w", err)
		}
	}
	return m, nil
}
