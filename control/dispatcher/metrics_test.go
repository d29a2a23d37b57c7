package dispatcher

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/skep-dev/skep/api"
)

// TestSchedulingDelay: the delay runs from a task's creation to the first report that it
// runs, and counts once.
func TestSchedulingDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, aTask("a", "n1", api.TaskState_ASSIGNED))
		registry := prometheus.NewRegistry()
		r.d.metrics = newMetrics(registry)
		r.lead()
		defer r.stop()
		_, id := r.register("n1")
		time.Sleep(3 * time.Second)
		for _, state := range []api.TaskState{api.TaskState_STARTING, api.TaskState_RUNNING, api.TaskState_RUNNING, api.TaskState_COMPLETE} {
			if err := r.report("n1", id, "a", state); err != nil {
				t.Fatal(err)
			}
		}
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() != "swarm_dispatcher_scheduling_delay_seconds" {
				continue
			}
			if h := f.GetMetric()[0].GetHistogram(); h.GetSampleCount() != 1 || h.GetSampleSum() != 3 {
				t.Errorf("%d delays of %v s together, want one of 3 s", h.GetSampleCount(), h.GetSampleSum())
			}
			return
		}
		t.Error("the metric is not there")
	})
}
