package node

import (
	"crypto/rand"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/wire"
)

// TestFacts: a node says which one it is while it is in a swarm, and whether it manages.
func TestFacts(t *testing.T) {
	swarm := new(membership)
	registry := prometheus.NewRegistry()
	registry.MustRegister(newNodeFacts(swarm))
	want := map[string]string{"swarm_node_manager": "0"}
	if diff := cmp.Diff(want, gathered(t, gatherer{registry, swarm})); diff != "" {
		t.Error("in no swarm:", diff)
	}
	root, err := pki.NewRoot(rand.Reader, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	id, boot, err := found(t.Context(), new(api.ClusterSpec), root)
	if err != nil {
		t.Fatal(err)
	}
	material, err := wire.NewMaterial(root, id.ChainPEM, id.Key)
	if err != nil {
		t.Fatal(err)
	}
	swarm.member = &member{creds: new(wire.Credentials)}
	swarm.member.creds.Set(material)
	want = map[string]string{"swarm_node_manager": "1", "swarm_node_info": "1 node_id=" + swarm.member.creds.NodeID() + " swarm_id=" + boot.ClusterID}
	if diff := cmp.Diff(want, gathered(t, gatherer{registry, swarm})); diff != "" {
		t.Error("a manager:", diff)
	}
}

func gathered(t *testing.T, g prometheus.Gatherer) map[string]string {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := make(map[string]string)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			text := "0"
			if m.GetGauge().GetValue() == 1 {
				text = "1"
			}
			for _, l := range m.GetLabel() {
				text += " " + l.GetName() + "=" + l.GetValue()
			}
			out[f.GetName()] = text
		}
	}
	return out
}
