package orch

import (
	"bytes"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// dirty reports whether a task differs from what the service now asks for.
func (w *work) dirty(i *item) bool {
	if now := (comparison{w.service.GetSpec(), i.GetDesiredState()}); now != i.compared {
		i.compared, i.differs = now, Dirty(w.service, i.Task, w.Nodes[i.GetNodeId()])
	}
	return i.differs
}

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

// sameTask compares task specs, without the pull options and the placement if told so. It
// copies neither: it is asked about every task of another revision at every decision.
func sameTask(a, b *api.TaskSpec, anyPull, anyPlacement bool) bool {
	if proto.Equal(a, b) {
		return true
	}
	return equalBut(a.ProtoReflect(), b.ProtoReflect(), func(name protoreflect.Name) bool {
		return name == "container" && anyPull || name == "placement" && anyPlacement
	}) && (!anyPull || (a.GetContainer() != nil) == (b.GetContainer() != nil) &&
		equalBut(a.GetContainer().ProtoReflect(), b.GetContainer().ProtoReflect(), func(name protoreflect.Name) bool {
			return name == "pull_options"
		}))
}

// equalBut compares messages of one type without some fields. None is as an empty one.
func equalBut(a, b protoreflect.Message, omit func(protoreflect.Name) bool) bool {
	fields := a.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if omit(f.Name()) {
			continue
		}
		has := a.Has(f)
		if has != b.Has(f) || has && !a.Get(f).Equal(b.Get(f)) {
			return false
		}
	}
	return bytes.Equal(a.GetUnknown(), b.GetUnknown())
}
