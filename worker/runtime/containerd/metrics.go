package containerd

import (
	"errors"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the engine's; a nil registerer keeps them to itself.
type metrics struct {
	registerer prometheus.Registerer
	duration   *prometheus.HistogramVec
	failures   *prometheus.CounterVec
	restarts   prometheus.Counter
	health     *prometheus.CounterVec
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		registerer: r,
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "skep_runtime_operation_duration_seconds",
			Help:    "Time that an operation on a container took, by operation.",
			Buckets: prometheus.ExponentialBuckets(0.005, 2, 12),
		}, []string{"operation"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "skep_runtime_operation_failures_total",
			Help: "Operations on containers that failed, by operation.",
		}, []string{"operation"}),
		restarts: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "skep_runtime_containerd_starts_total",
			Help: "Times that this process started its containerd again.",
		}),
		health: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "skep_runtime_health_checks_total",
			Help: "Health checks run, by result.",
		}, []string{"result"}),
	}
	if r == nil {
		return m, nil
	}
	for _, c := range m.all() {
		if err := r.Register(c); err != nil {
			m.unregister()
			return nil, fmt.Errorf("register runtime metrics: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) all() []prometheus.Collector {
	return []prometheus.Collector{m.duration, m.failures, m.restarts, m.health}
}

func (m *metrics) unregister() {
	if m.registerer == nil {
		return
	}
	for _, c := range m.all() {
		m.registerer.Unregister(c)
	}
}

// observe records how an operation that began at start went.
func (m *metrics) observe(operation string, start time.Time, err error) {
	m.duration.WithLabelValues(operation).Observe(time.Since(start).Seconds())
	if err != nil && !errors.Is(err, errNotModified) {
		m.failures.WithLabelValues(operation).Inc()
	}
}
