package node

import (
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
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
