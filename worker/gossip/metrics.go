package gossip

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/skep-dev/skep/core/netdb"
)

// collector shows what a Gossip holds now.
type collector struct {
	g                      *Gossip
	members, rows, refused *prometheus.Desc
}

func newCollector(g *Gossip) *collector {
	return &collector{
		g:       g,
		members: prometheus.NewDesc("skep_gossip_members", "Other nodes in Docker's gossip, Docker Engines and Skep's.", nil, nil),
		rows:    prometheus.NewDesc("skep_gossip_rows", "Rows in the tables of Docker's gossip, by who published them.", []string{"owner"}, nil),
		refused: prometheus.NewDesc("skep_gossip_refused_total", "What other nodes gossiped and was ignored because of a limit, since this node takes part.", nil, nil),
	}
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(out chan<- *prometheus.Desc) {
	out <- c.members
	out <- c.rows
	out <- c.refused
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(out chan<- prometheus.Metric) {
	var s netdb.Stats
	if now := c.g.current(); now != nil {
		s = now.stats()
	}
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	gauge(c.members, float64(s.Nodes))
	gauge(c.rows, float64(s.Own), "self")
	gauge(c.rows, float64(s.Others), "other")
	out <- prometheus.MustNewConstMetric(c.refused, prometheus.CounterValue, float64(s.Refused))
}
