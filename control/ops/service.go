package ops

import (
	"context"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// CreateService stores a new service; the orchestrators make its tasks.
func (o *Ops) CreateService(ctx context.Context, req *api.CreateServiceRequest) (*api.CreateServiceResponse, error) {
	spec := model.Clone(req.GetSpec())
	if err := validateService(spec); err != nil {
		return nil, fail(err)
	}
	id, err := o.newID()
	if err != nil {
		return nil, fail(err)
	}
	service := &api.Service{Id: id, Spec: spec, SpecVersion: new(api.Version)}
	err = o.update(ctx, func(tx *store.Tx) error {
		if name := spec.GetAnnotations().GetName(); tx.Snapshot().IDByName(model.Services, name) != "" {
			return model.Errorf(model.Exists, "name conflicts with an existing object: service %s already exists", name)
		}
		if err := checkService(tx.Snapshot(), spec, id); err != nil {
			return err
		}
		if isJob(spec) {
			service.JobStatus = &api.JobStatus{JobIteration: new(api.Version), LastExecution: timestamppb.New(tx.Now())}
		}
		return tx.Create(service)
	})
	if err != nil {
		return nil, fail(err)
	}
	return &api.CreateServiceResponse{Service: service}, nil
}

// GetService returns a service; with InsertDefaults its spec says what applies where
// the user said nothing.
func (o *Ops) GetService(ctx context.Context, req *api.GetServiceRequest) (*api.GetServiceResponse, error) {
	if err := needID(req.GetServiceId()); err != nil {
		return nil, fail(err)
	}
	state, err := o.state.Read(ctx)
	if err != nil {
		return nil, fail(err)
	}
	service := state.Service(req.GetServiceId())
	if service == nil {
		return nil, fail(notFound("service", req.GetServiceId()))
	}
	if req.GetInsertDefaults() {
		service = model.Clone(service)
		insertDefaults(service.GetSpec())
	}
	return &api.GetServiceResponse{Service: service}, nil
}

// ListServices returns the services that match all filters.
func (o *Ops) ListServices(ctx context.Context, req *api.ListServicesRequest) (*api.ListServicesResponse, error) {
	f := req.GetFilters()
	resp := new(api.ListServicesResponse)
	state, err := o.state.Read(ctx)
	if err != nil {
		return nil, fail(err)
	}
	for s := range state.Services() {
		a := s.GetSpec().GetAnnotations()
		if within(a.GetName(), f.GetNames()) && begins(a.GetName(), f.GetNamePrefixes()) && begins(s.GetId(), f.GetIdPrefixes()) &&
			labelled(a.GetLabels(), f.GetLabels()) && within(runtimeOf(s.GetSpec().GetTask()), f.GetRuntimes()) {
			resp.Services = append(resp.Services, s)
		}
	}
	return resp, nil
}

// UpdateService replaces a service's spec, or returns to the previous one.
func (o *Ops) UpdateService(ctx context.Context, req *api.UpdateServiceRequest) (*api.UpdateServiceResponse, error) {
	if err := needUpdate(req.GetServiceId(), req.GetServiceVersion(), req.GetSpec() != nil); err != nil {
		return nil, fail(err)
	}
	spec := model.Clone(req.GetSpec())
	if err := validateService(spec); err != nil {
		return nil, fail(err)
	}
	var updated *api.Service
	err := o.update(ctx, func(tx *store.Tx) error {
		old := tx.Snapshot().Service(req.GetServiceId())
		if old == nil {
			return notFound("service", req.GetServiceId())
		}
		if err := checkService(tx.Snapshot(), spec, old.GetId()); err != nil {
			return err
		}
		if err := checkUnchanged(old.GetSpec(), spec); err != nil {
			return err
		}
		updated = model.Clone(old)
		updated.Meta = at(old.GetMeta(), req.GetServiceVersion())
		if req.GetRollback() == api.UpdateServiceRequest_PREVIOUS {
			if err := rollBack(updated, timestamppb.New(tx.Now())); err != nil {
				return err
			}
		} else {
			replaceSpec(updated, spec, req.GetServiceVersion())
		}
		if status := updated.GetJobStatus(); isJob(updated.GetSpec()) && status != nil {
			status.JobIteration = &api.Version{Index: status.GetJobIteration().GetIndex() + 1}
			status.LastExecution = timestamppb.New(tx.Now())
		}
		return tx.Update(updated)
	})
	if err != nil {
		return nil, fail(err)
	}
	return &api.UpdateServiceResponse{Service: updated}, nil
}

// replaceSpec makes spec the service's and remembers the present one. The new spec's
// version is that of the service before the update.
func replaceSpec(s *api.Service, spec *api.ServiceSpec, version *api.Version) {
	s.PreviousSpec, s.PreviousSpecVersion = s.GetSpec(), s.GetSpecVersion()
	s.Spec, s.SpecVersion = spec, model.Clone(version)
	s.UpdateStatus = nil
}

// rollBack exchanges the service's spec with its previous one.
func rollBack(s *api.Service, now *timestamppb.Timestamp) error {
	if s.GetPreviousSpec() == nil {
		return model.Errorf(model.Precondition, "service %s does not have a previous spec", s.GetId())
	}
	s.Spec, s.PreviousSpec = s.GetPreviousSpec(), s.GetSpec()
	s.SpecVersion, s.PreviousSpecVersion = s.GetPreviousSpecVersion(), s.GetSpecVersion()
	s.UpdateStatus = &api.UpdateStatus{
		State:     api.UpdateStatus_ROLLBACK_STARTED,
		StartedAt: now,
		Message:   "manually requested rollback",
	}
	return nil
}

// checkUnchanged refuses an update of what a service keeps for its life.
func checkUnchanged(old, spec *api.ServiceSpec) error {
	if old.GetAnnotations().GetName() != spec.GetAnnotations().GetName() {
		return model.Errorf(model.Unimplemented, "renaming services is not supported")
	}
	if modeOf(old) != modeOf(spec) {
		return model.Errorf(model.Unimplemented, "service mode change is not allowed")
	}
	return nil
}

// modeOf returns the name of a service's mode as Docker spells it.
func modeOf(spec *api.ServiceSpec) string {
	switch spec.GetMode().(type) {
	case *api.ServiceSpec_Global:
		return "global"
	case *api.ServiceSpec_ReplicatedJob:
		return "replicated-job"
	case *api.ServiceSpec_GlobalJob:
		return "global-job"
	default:
		return "replicated"
	}
}

func isJob(spec *api.ServiceSpec) bool {
	return spec.GetReplicatedJob() != nil || spec.GetGlobalJob() != nil
}

// RemoveService deletes a service at once; the orchestrators remove its tasks.
func (o *Ops) RemoveService(ctx context.Context, req *api.RemoveServiceRequest) (*api.RemoveServiceResponse, error) {
	if err := needID(req.GetServiceId()); err != nil {
		return nil, fail(err)
	}
	err := o.update(ctx, func(tx *store.Tx) error {
		if tx.Snapshot().Service(req.GetServiceId()) == nil {
			return notFound("service", req.GetServiceId())
		}
		return tx.Remove(model.Services, req.GetServiceId())
	})
	if err != nil {
		return nil, fail(err)
	}
	return new(api.RemoveServiceResponse), nil
}
