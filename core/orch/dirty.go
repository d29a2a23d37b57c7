package orch

import (
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// dirty reports whether a task differs from what the service now asks for.
func (w *work) dirty(i *item) bool { return Dirty(w.service, i.Task, w.Nodes[i.GetNodeId()]) }

// Dirty reports whether a task of a service differs from what the service now asks for, so
// that it has to be replaced. The node is the task's and may be nil.
func Dirty(s *api.Service, t *api.Task, n *api.Node) bool {
	if s.GetSpecVersion() != nil && t.GetSpecVersion() != nil &&
		s.GetSpecVersion().GetIndex() == t.GetSpecVersion().GetIndex() {
		return false
	}
	want, have := s.GetSpec().GetTask(), t.GetSpec()
	if !sameEndpoint(s.GetSpec().GetEndpoint(), t.GetEndpoint().GetSpec()) {
		return true
	}
	state := t.GetStatus().GetState()
	pulled := t.GetDesiredState() <= api.TaskState_RUNNING && state >= api.TaskState_READY && state <= api.TaskState_RUNNING
	if sameTask(want, have, pulled, false) {
		return false
	}
	// A task may stay where the new placement allows it as well.
	if n != nil && sameTask(want, have, pulled, true) {
		constraints, err := model.ParseConstraints(want.GetPlacement().GetConstraints())
		return err != nil || !model.MatchAll(constraints, n)
	}
	return true
}

func sameEndpoint(a, b *api.EndpointSpec) bool {
	if a == nil {
		a = &api.EndpointSpec{}
	}
	if b == nil {
		b = &api.EndpointSpec{}
	}
	return proto.Equal(a, b)
}

// sameTask compares task specs, without the pull options and the placement if told so.
func sameTask(a, b *api.TaskSpec, anyPull, anyPlacement bool) bool {
	a, b = model.Clone(a), model.Clone(b)
	for _, t := range [...]*api.TaskSpec{a, b} {
		if c := t.GetContainer(); c != nil && anyPull {
			c.PullOptions = nil
		}
		if t != nil && anyPlacement {
			t.Placement = nil
		}
	}
	return proto.Equal(a, b)
}
