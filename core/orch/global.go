package orch

import (
	"maps"
	"slices"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// global decides for a service that wants one task on every node that is eligible.
func (w *work) global() {
	constraints, err := model.ParseConstraints(w.service.GetSpec().GetTask().GetPlacement().GetConstraints())
	if err != nil {
		w.note(w.ServiceID, "%v", err)
		return
	}
	byNode := make(map[string]*slot)
	for _, s := range w.slots(true) {
		byNode[s.node] = s
		if w.Nodes[s.node] == nil {
			w.drop(s)
		}
	}
	var updatable []*slot
	for _, id := range slices.Sorted(maps.Keys(w.Nodes)) {
		n, s := w.Nodes[id], byNode[id]
		if s == nil {
			s = &slot{node: id}
		}
		availability := n.GetSpec().GetAvailability()
		switch {
		case availability == api.NodeSpec_DRAIN || n.GetStatus().GetState() == api.NodeStatus_DOWN ||
			!model.MatchAll(constraints, n):
			w.shutdown(s)
		case availability == api.NodeSpec_PAUSE:
			w.stopEnded(s)
		default:
			w.occupyNode(s)
			updatable = append(updatable, s)
		}
	}
	if w.update(updatable) { // what was decided was for a spec that is none any more
		w.reset()
		w.global()
		return
	}
	for _, s := range updatable {
		w.promote(s, api.TaskState_RUNNING)
	}
}

// occupyNode sees to it that an eligible node has a task, unless the restart policy
// forbids one.
func (w *work) occupyNode(s *slot) {
	w.restart(s)
	if len(s.live()) > 0 {
		return
	}
	newest := s.newest()
	// Told to stop (the node was drained, say) is no reason to stay away.
	if newest != nil && newest.endedItself() && !w.restartable(s, newest) {
		return
	}
	w.create(s)
}

// shutdown stops everything on a node.
func (w *work) shutdown(s *slot) {
	for _, i := range s.live() {
		w.desire(i, api.TaskState_SHUTDOWN)
	}
}

// stopEnded keeps tasks that have ended on a paused node from being started again.
func (w *work) stopEnded(s *slot) {
	for _, i := range s.live() {
		if i.stopped() {
			w.desire(i, api.TaskState_SHUTDOWN)
		}
	}
}
