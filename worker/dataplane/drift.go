package dataplane

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
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
	repairs *prometheus.CounterVec
	found   []string
}

// add records a difference and reports whether to mend it.
func (x *drift) add(kind, format string, args ...any) bool {
	x.found = append(x.found, fmt.Sprintf(format, args...))
	if x.repair && x.repairs != nil {
		x.repairs.WithLabelValues(kind).Inc()
	}
	return x.repair
}

// metrics are the data plane's; a nil registerer keeps them to itself.
type metrics struct {
	repairs *prometheus.CounterVec
	apply   prometheus.Histogram
	failed  prometheus.Counter
	taken   prometheus.Gauge
	queries *prometheus.CounterVec
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		repairs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "skep_network_repairs_total",
			Help: "Differences between kernel and plan that were found and mended, by kind.",
		}, []string{"kind"}),
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
