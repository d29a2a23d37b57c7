package replica

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	transaction prometheus.Histogram
	snapshot    prometheus.Histogram
	isLeader    prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		transaction: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "swarm_raft_transaction_latency_seconds",
			Help: "Time from the call of an update until its entry is applied.",
		}),
		snapshot: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "swarm_raft_snapshot_latency_seconds",
			Help: "Time to encode, seal and write a snapshot.",
		}),
		isLeader: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "swarm_manager_leader",
			Help: "1 while this manager leads, else 0.",
		}),
	}
	if reg != nil {
		reg.MustRegister(m.transaction, m.snapshot, m.isLeader)
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
