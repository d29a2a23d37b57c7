package ops

import (
	"context"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/orch"
	"github.com/skep-dev/skep/core/store"
)

// GetTask returns a task.
func (o *Ops) GetTask(ctx context.Context, req *api.GetTaskRequest) (*api.GetTaskResponse, error) {
	if err := needID(req.GetTaskId()); err != nil {
		return nil, fail(err)
	}
	state, err := o.state.Read(ctx)
	if err != nil {
		return nil, fail(err)
	}
	t := state.Task(req.GetTaskId())
	if t == nil {
		return nil, fail(notFound("task", req.GetTaskId()))
	}
	return &api.GetTaskResponse{Task: t}, nil
}

// ListTasks returns the tasks that match all filters.
func (o *Ops) ListTasks(ctx context.Context, req *api.ListTasksRequest) (*api.ListTasksResponse, error) {
	f := req.GetFilters()
	s, err := o.state.Read(ctx)
	if err != nil {
		return nil, fail(err)
	}
	resp := new(api.ListTasksResponse)
	for t := range candidates(s, f) {
		name := model.TaskName(t)
		if within(name, f.GetNames()) && begins(name, f.GetNamePrefixes()) && begins(t.GetId(), f.GetIdPrefixes()) &&
			labelled(t.GetServiceAnnotations().GetLabels(), f.GetLabels()) &&
			within(t.GetServiceId(), f.GetServiceIds()) && within(t.GetNodeId(), f.GetNodeIds()) &&
			within(t.GetDesiredState(), f.GetDesiredStates()) && within(runtimeOf(t.GetSpec()), f.GetRuntimes()) &&
			(!f.GetUpToDate() || upToDate(s, t)) {
			resp.Tasks = append(resp.Tasks, t)
		}
	}
	return resp, nil
}

// candidates yields a superset of the tasks that match, by the narrowest index.
func candidates(s *store.Snapshot, f *api.ListTasksRequest_Filters) func(func(*api.Task) bool) {
	switch {
	case len(f.GetServiceIds()) == 1:
		return s.TasksByService(f.GetServiceIds()[0])
	case len(f.GetNodeIds()) == 1:
		return s.TasksByNode(f.GetNodeIds()[0])
	default:
		return s.Tasks()
	}
}

// runtimeOf returns the runtime by which filters call a task or service.
func runtimeOf(spec *api.TaskSpec) string {
	switch r := spec.GetRuntime().(type) {
	case *api.TaskSpec_Attachment:
		return "attachment"
	case *api.TaskSpec_Generic:
		return r.Generic.GetKind()
	default:
		return "container"
	}
}

// upToDate reports whether a task is what its service now asks for, or of its job's
// present iteration. A task of an older spec that need not be replaced is up to date.
func upToDate(s *store.Snapshot, t *api.Task) bool {
	service := s.Service(t.GetServiceId())
	if service == nil {
		return false
	}
	if status := service.GetJobStatus(); status != nil {
		return t.GetJobIteration() != nil && t.GetJobIteration().GetIndex() == status.GetJobIteration().GetIndex()
	}
	return !orch.Dirty(service, t, s.Node(t.GetNodeId()))
}

// RemoveTask deletes a task from the state.
func (o *Ops) RemoveTask(ctx context.Context, req *api.RemoveTaskRequest) (*api.RemoveTaskResponse, error) {
	if err := needID(req.GetTaskId()); err != nil {
		return nil, fail(err)
	}
	err := o.update(ctx, func(tx *store.Tx) error {
		if tx.Snapshot().Task(req.GetTaskId()) == nil {
			return notFound("task", req.GetTaskId())
		}
		return tx.Remove(model.Tasks, req.GetTaskId())
	})
	if err != nil {
		return nil, fail(err)
	}
	return new(api.RemoveTaskResponse), nil
}
