package orch

import (
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// dirty reports whether a task differs from what the service now asks for.
func (w *work) dirty(i *item) bool {
	s := w.service
	if s.GetSpecVersion() != nil && i.GetSpecVersion() != nil &&
		s.GetSpecVersion().GetIndex() == i.GetSpecVersion().GetIndex() {
		return false
	}
	want, have := s.GetSpec().GetTask(), i.GetSpec()
	if !sameEndpoint(s.GetSpec().GetEndpoint(), i.GetEndpoint().GetSpec()) {
		return true
	}
	state := i.GetStatus().GetState()
	pulled := i.live() && state >= api.TaskState_READY && state <= api.TaskState_RUNNING
	if sameTask(want, have, pulled, false) {
		return false
	}
	// A task may stay where the new placement allows it as well.
	if n := w.Nodes[i.GetNodeId()]; n != nil && sameTask(want, have, pulled, true) {
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
