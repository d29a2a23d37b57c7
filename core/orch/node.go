package orch

import (
	"cmp"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// NodeView is all that the deciders about one node's tasks may look at.
type NodeView struct {
	Node *api.Node
	// Tasks are those assigned to the node, in any order.
	Tasks []*api.Task
	// Services by id, of Tasks.
	Services map[string]*api.Service
}

// orphanAfter is how long a node may be down before its tasks are given up.
const orphanAfter = 24 * time.Hour

// Orphan gives up the tasks of a node that has been down for a day. The time is counted
// from the last change of the node's record. Where two tasks must never run (FenceLabel)
// it gives none up: only the node itself, or its removal, says that they do not run.
func Orphan(v NodeView, now time.Time) model.Plan {
	var p model.Plan
	if v.Node.GetStatus().GetState() != api.NodeStatus_DOWN {
		return p
	}
	due := v.Node.GetMeta().GetUpdatedAt().AsTime().Add(orphanAfter)
	for _, t := range sorted(v.Tasks) {
		if state := t.GetStatus().GetState(); state < api.TaskState_ASSIGNED || state > api.TaskState_RUNNING ||
			fenced(v.Services[t.GetServiceId()]) {
			continue
		}
		if due.After(now) {
			p.Wake = due
			return p
		}
		t = model.Clone(t)
		t.Status.State = api.TaskState_ORPHANED
		t.Status.Timestamp = timestamppb.New(now)
		t.Status.AppliedAt = timestamppb.New(now)
		p.Changes = append(p.Changes, model.Change{Kind: model.Update, Object: t})
	}
	return p
}

// Messages of a task thrown off its node.
const (
	rejectedMessage = "task rejected by constraint enforcer"
	rejectedReason  = "assigned node no longer meets constraints"
)

// Enforce rejects the tasks of an active node that it may not have any more, since its
// labels or its resources changed. A rejected task counts as ended while its node still
// stops it; where two must never run (FenceLabel) the task is told to stop instead.
func Enforce(v NodeView, now time.Time) model.Plan {
	var p model.Plan
	if v.Node.GetSpec().GetAvailability() != api.NodeSpec_ACTIVE || v.Node.GetStatus().GetState() == api.NodeStatus_DOWN {
		return p
	}
	have := v.Node.GetDescription().GetResources()
	left := &claims{cpu: have.GetNanoCpus(), memory: have.GetMemoryBytes(), generic: make(map[string]int64)}
	for _, g := range have.GetGeneric() {
		left.generic[g.GetDiscreteResourceSpec().GetKind()] += g.GetDiscreteResourceSpec().GetValue()
		if n := g.GetNamedResourceSpec(); n != nil {
			left.generic[n.GetKind()]++
		}
	}
	for _, t := range sorted(v.Tasks) {
		state, desired := t.GetStatus().GetState(), t.GetDesiredState()
		if state < api.TaskState_ASSIGNED || state > api.TaskState_RUNNING ||
			desired < api.TaskState_ASSIGNED || desired > api.TaskState_COMPLETE {
			continue
		}
		placement := t.GetSpec().GetPlacement()
		if s := v.Services[t.GetServiceId()]; s != nil {
			placement = s.GetSpec().GetTask().GetPlacement()
		}
		constraints, err := model.ParseConstraints(placement.GetConstraints())
		if err == nil && model.MatchAll(constraints, v.Node) && left.take(t) {
			continue
		}
		t = model.Clone(t)
		if fenced(v.Services[t.GetServiceId()]) {
			t.DesiredState = api.TaskState_SHUTDOWN
		} else {
			t.Status.State = api.TaskState_REJECTED
		}
		t.Status.Message = rejectedMessage
		t.Status.Err = rejectedReason
		t.Status.Timestamp = timestamppb.New(now)
		t.Status.AppliedAt = timestamppb.New(now)
		p.Changes = append(p.Changes, model.Change{Kind: model.Update, Object: t})
	}
	return p
}

// claims is what a node has left of its resources.
type claims struct {
	cpu, memory int64
	generic     map[string]int64
}

// take claims what a task reserves and reports whether that was there.
func (c *claims) take(t *api.Task) bool {
	want := t.GetSpec().GetResources().GetReservations()
	if want.GetNanoCpus() > 0 && want.GetNanoCpus() > c.cpu || want.GetMemoryBytes() > 0 && want.GetMemoryBytes() > c.memory {
		return false
	}
	for _, g := range want.GetGeneric() {
		d := g.GetDiscreteResourceSpec()
		if d != nil && d.GetValue() > c.generic[d.GetKind()] {
			return false
		}
	}
	c.cpu -= want.GetNanoCpus()
	c.memory -= want.GetMemoryBytes()
	for _, g := range want.GetGeneric() {
		c.generic[g.GetDiscreteResourceSpec().GetKind()] -= g.GetDiscreteResourceSpec().GetValue()
	}
	return true
}

// sorted returns tasks, oldest first.
func sorted(tasks []*api.Task) []*api.Task {
	return slices.SortedFunc(slices.Values(tasks), func(a, b *api.Task) int {
		if c := created(a).Compare(created(b)); c != 0 {
			return c
		}
		return cmp.Compare(a.GetId(), b.GetId())
	})
}
