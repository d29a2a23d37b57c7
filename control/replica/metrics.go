package replica

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	transaction prometheus.Histogram
	snapshot    prometheus.Histogram
	write       prometheus.Histogram
	isLeader    prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		transaction: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "swarm_raft_transaction_latency_seconds",
			Help: "Time from the proposal of an update's entry until it is applied.",
		}),
		snapshot: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "swarm_raft_snapshot_latency_seconds",
			Help: "Time to encode, seal and write a snapshot.",
		}),
		write: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "swarm_store_write_tx_latency_seconds",
			Help: "Time from the call of an update until its answer, with its wait for the log.",
		}),
		isLeader: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "swarm_manager_leader",
			Help: "1 while this manager leads, else 0.",
		}),
	}
	if reg != nil {
		reg.MustRegister(m.transaction, m.snapshot, m.write, m.isLeader)
	}
	return m
}

func (m *metrics) leader(leading bool) {
	if leading {
		m.isLeader.Set(1)
		return
	}
	m.isLeader.Set(0)
}

// applied notes how long an entry of an update took through the log.
func (m *metrics) applied(p *pending) {
	if !p.conf {
		m.transaction.Observe(time.Since(p.proposed).Seconds())
	}
}
