package ops

import (
	"context"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/store"
)

// ListServiceStatuses counts the tasks of services, all wanted services at once so
// that `service ls` needs no task list. Unknown ids get zeros.
func (o *Ops) ListServiceStatuses(ctx context.Context, req *api.ListServiceStatusesRequest) (*api.ListServiceStatusesResponse, error) {
	s, err := o.state.Read(ctx)
	if err != nil {
		return nil, fail(err)
	}
	resp := new(api.ListServiceStatusesResponse)
	for _, id := range req.GetServices() {
		resp.Statuses = append(resp.Statuses, serviceStatus(s, id))
	}
	return resp, nil
}

func serviceStatus(s *store.Snapshot, id string) *api.ListServiceStatusesResponse_ServiceStatus {
	status := &api.ListServiceStatusesResponse_ServiceStatus{ServiceId: id}
	service := s.Service(id)
	if service == nil {
		return status
	}
	spec := service.GetSpec()
	status.DesiredTasks = spec.GetReplicated().GetReplicas() + spec.GetReplicatedJob().GetMaxConcurrent()
	for t := range s.TasksByService(id) {
		if isJob(spec) && t.GetJobIteration().GetIndex() != service.GetJobStatus().GetJobIteration().GetIndex() {
			continue
		}
		state := t.GetStatus().GetState()
		if state == api.TaskState_RUNNING {
			status.RunningTasks++
		}
		if isJob(spec) && state == api.TaskState_COMPLETE {
			status.CompletedTasks++
		}
		if spec.GetGlobal() != nil && t.GetDesiredState() == api.TaskState_RUNNING {
			status.DesiredTasks++
		}
		if spec.GetGlobalJob() != nil && t.GetDesiredState() == api.TaskState_COMPLETE && state < api.TaskState_COMPLETE {
			status.DesiredTasks++
		}
	}
	return status
}
