package ops

import (
	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/sched"
	"github.com/skep-dev/skep/core/store"
)

// scheduler is the Refuse that asks the scheduler itself, about the nodes and tasks of
// one snapshot.
func scheduler(s *store.Snapshot) func(*api.Task) []*skepv1.Refusal {
	var state *sched.State // made for the first task that waits: most explanations need none
	return func(t *api.Task) []*skepv1.Refusal {
		if state == nil {
			state = sched.New(s.Nodes(), s.Tasks())
		}
		var list []*skepv1.Refusal
		refusals, _ := state.Explain(t)
		for _, r := range refusals {
			refusal := &skepv1.Refusal{Filter: r.Filter, Reason: r.Reason, NodeIds: r.Nodes}
			for _, id := range r.Nodes {
				refusal.NodeNames = append(refusal.NodeNames, s.Node(id).GetDescription().GetHostname())
			}
			list = append(list, refusal)
		}
		return list
	}
}
