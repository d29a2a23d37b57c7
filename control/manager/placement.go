package manager

import (
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/sched"
	"github.com/skep-dev/skep/core/store"
)

// proposalsInFlight bounds the entries of one scheduling pass that wait for the log at
// a time; further ones wait.
const proposalsInFlight = 4

// runPlacement runs the scheduler. What comes while a pass is being written to the log
// is dealt with in the next one; otherwise nothing is waited for.
func (m *Manager) runPlacement(ctx context.Context) error {
	cursor := m.state.Follow()
	st := schedulerState(cursor.Snapshot())
	for {
		for st.Pending() {
			start := time.Now()
			plan := st.Schedule(start)
			m.metrics.deciding.WithLabelValues("placement").Observe(time.Since(start).Seconds())
			if err := m.place(ctx, st, plan.Changes); err != nil {
				return fmt.Errorf("place tasks: %w", err)
			}
			events, reset := cursor.Drain()
			st = advance(st, cursor.Snapshot(), events, reset)
		}
		events, reset, err := cursor.Next(ctx)
		if err != nil {
			return err
		}
		st = advance(st, cursor.Snapshot(), events, reset)
	}
}

func schedulerState(s *store.Snapshot) *sched.State { return sched.New(s.Nodes(), s.Tasks()) }

func advance(st *sched.State, s *store.Snapshot, events []model.Event, reset bool) *sched.State {
	if reset {
		return schedulerState(s)
	}
	for _, e := range events {
		st.Apply(e)
	}
	return st
}

// place proposes placements, in entries of a bounded size. A placement is dropped when
// its task has changed since, which an event will tell, or its node takes no tasks any
// more: then the scheduler is told.
func (m *Manager) place(ctx context.Context, st *sched.State, changes []model.Change) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(proposalsInFlight)
	var mu sync.Mutex
	var refused []*api.Task
	for len(changes) > 0 {
		entry := new(batch)
		n := 0
		for n < len(changes) && !entry.add(unit{changes: changes[n : n+1]}) {
			n++
		}
		part := changes[:min(n+1, len(changes))]
		changes = changes[len(part):]
		group.Go(func() error {
			var back []*api.Task
			placed := 0
			_, err := m.state.Update(ctx, func(tx *store.Tx) error {
				for _, c := range part {
					t, ok := c.Object.(*api.Task)
					if !ok || !same(tx.Snapshot(), t) {
						continue
					}
					if t.GetStatus().GetState() == api.TaskState_ASSIGNED {
						if !takesTasks(tx.Snapshot().Node(t.GetNodeId())) {
							back = append(back, tx.Snapshot().Task(t.GetId()))
							continue
						}
						placed++
					}
					if err := tx.Update(t); err != nil {
						return err
					}
				}
				return nil
			})
			m.metrics.placements.Add(float64(placed))
			mu.Lock()
			defer mu.Unlock()
			refused = append(refused, back...)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	for _, t := range refused {
		st.Refuse(t)
	}
	return nil
}

func takesTasks(n *api.Node) bool {
	return n.GetStatus().GetState() == api.NodeStatus_READY && n.GetSpec().GetAvailability() == api.NodeSpec_ACTIVE
}

// Refuse says for a task without node which nodes each filter of the scheduler keeps it
// from now. It is what ops.NewInsight wants.
func Refuse(s *store.Snapshot, t *api.Task, _ time.Time) []*skepv1.Refusal {
	refusals, _ := schedulerState(s).Explain(t)
	out := make([]*skepv1.Refusal, 0, len(refusals))
	for _, r := range refusals {
		names := make([]string, 0, len(r.Nodes))
		for _, id := range r.Nodes {
			names = append(names, s.Node(id).GetDescription().GetHostname())
		}
		out = append(out, &skepv1.Refusal{Filter: r.Filter, Reason: r.Reason, NodeIds: r.Nodes, NodeNames: names})
	}
	return out
}
