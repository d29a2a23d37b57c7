package node

import (
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/skep-dev/skep/core/pki"
)

// gatherer gathers the daemon's metrics and, while this node is a manager, the manager's,
// which come and go with the role.
type gatherer struct {
	base  *prometheus.Registry
	swarm *membership
}

// Gather implements prometheus.Gatherer.
func (g gatherer) Gather() ([]*dto.MetricFamily, error) {
	all := prometheus.Gatherers{g.base}
	if m := g.swarm.current(); m != nil {
		if role := m.manager.Load(); role != nil {
			all = append(all, role.registry)
		}
	}
	return all.Gather()
}

// nodeFacts tells, under Docker's names, which node of which swarm this is.
type nodeFacts struct {
	swarm   *membership
	info    *prometheus.Desc
	manager *prometheus.Desc
}

func newNodeFacts(swarm *membership) *nodeFacts {
	return &nodeFacts{
		swarm:   swarm,
		info:    prometheus.NewDesc("swarm_node_info", "Information related to the swarm", []string{"swarm_id", "node_id"}, nil),
		manager: prometheus.NewDesc("swarm_node_manager", "Whether this node is a manager or not", nil, nil),
	}
}

// Describe implements prometheus.Collector.
func (f *nodeFacts) Describe(out chan<- *prometheus.Desc) {
	out <- f.info
	out <- f.manager
}

// Collect implements prometheus.Collector.
func (f *nodeFacts) Collect(out chan<- prometheus.Metric) {
	manages := 0.0
	if m := f.swarm.current(); m != nil {
		out <- prometheus.MustNewConstMetric(f.info, prometheus.GaugeValue, 1, m.creds.ClusterID(), m.creds.NodeID())
		if m.creds.Role() == pki.ManagerRole {
			manages = 1
		}
	}
	out <- prometheus.MustNewConstMetric(f.manager, prometheus.GaugeValue, manages)
}
