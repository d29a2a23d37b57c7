package manager

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
)

type metrics struct {
	placements prometheus.Counter
	conflicts  prometheus.Counter
	deciding   *prometheus.HistogramVec
	batch      prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer, state replica.State) *metrics {
	m := &metrics{
		placements: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "skep_manager_placements_total", Help: "Tasks that the scheduler put on a node.",
		}),
		conflicts: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "skep_manager_conflicts_total", Help: "Decisions dropped because the state had changed, and made again.",
		}),
		deciding: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "skep_manager_deciding_seconds", Help: "Time that one pass of a controller took, without the log.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 4, 8),
		}, []string{"controller"}),
		batch: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "swarm_store_batch_latency_seconds", Help: "Time that one entry of a controller's decisions took to be written.",
		}),
	}
	if reg != nil {
		reg.MustRegister(m.placements, m.conflicts, m.deciding, m.batch, newTotals(state))
	}
	return m
}

// totals counts the store's objects when it is asked to, under Docker's names.
type totals struct {
	state   replica.State
	objects map[model.Table]*prometheus.Desc
	nodes   *prometheus.Desc
	tasks   *prometheus.Desc
}

func newTotals(state replica.State) *totals {
	gauge := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, labels, nil)
	}
	return &totals{
		state: state,
		objects: map[model.Table]*prometheus.Desc{
			model.Services: gauge("swarm_manager_services_total", "The number of services in the cluster object store"),
			model.Networks: gauge("swarm_manager_networks_total", "The number of networks in the cluster object store"),
			model.Secrets:  gauge("swarm_manager_secrets_total", "The number of secrets in the cluster object store"),
			model.Configs:  gauge("swarm_manager_configs_total", "The number of configs in the cluster object store"),
		},
		nodes: gauge("swarm_manager_nodes", "The number of nodes", "state"),
		tasks: gauge("swarm_manager_tasks_total", "The number of tasks in the cluster object store", "state"),
	}
}

// Describe implements prometheus.Collector.
func (t *totals) Describe(out chan<- *prometheus.Desc) {
	for _, d := range t.objects {
		out <- d
	}
	out <- t.nodes
	out <- t.tasks
}

// Collect implements prometheus.Collector.
func (t *totals) Collect(out chan<- prometheus.Metric) {
	s := t.state.View()
	for table, d := range t.objects {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(s.Len(table)))
	}
	nodes := make(map[int32]int)
	for n := range s.Nodes() {
		nodes[int32(n.GetStatus().GetState())]++
	}
	for state := range api.NodeStatus_State_name {
		out <- prometheus.MustNewConstMetric(t.nodes, prometheus.GaugeValue, float64(nodes[state]),
			nodeStateName(api.NodeStatus_State(state)))
	}
	tasks := make(map[int32]int)
	for task := range s.Tasks() {
		tasks[int32(task.GetStatus().GetState())]++
	}
	for state := range api.TaskState_name {
		out <- prometheus.MustNewConstMetric(t.tasks, prometheus.GaugeValue, float64(tasks[state]),
			model.StateName(api.TaskState(state)))
	}
}

func nodeStateName(s api.NodeStatus_State) string {
	switch s {
	case api.NodeStatus_DOWN:
		return "down"
	case api.NodeStatus_READY:
		return "ready"
	case api.NodeStatus_DISCONNECTED:
		return "disconnected"
	case api.NodeStatus_UNKNOWN:
		return "unknown"
	default:
		return "unknown"
	}
}
