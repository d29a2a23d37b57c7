package ops

import (
	"cmp"
	"context"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// CreateExtension stores a kind of resources.
func (o *Ops) CreateExtension(ctx context.Context, req *api.CreateExtensionRequest) (*api.CreateExtensionResponse, error) {
	if req.GetAnnotations().GetName() == "" {
		return nil, fail(invalid("extension name must be provided"))
	}
	if err := notOwn("extension", req.GetAnnotations().GetName()); err != nil {
		return nil, fail(err)
	}
	id, err := o.newID()
	if err != nil {
		return nil, fail(err)
	}
	e := &api.Extension{Id: id, Annotations: model.Clone(req.GetAnnotations()), Description: req.GetDescription()}
	err = o.update(ctx, func(tx *store.Tx) error {
		if name := e.GetAnnotations().GetName(); tx.Snapshot().IDByName(model.Extensions, name) != "" {
			return model.Errorf(model.Exists, "extension %s already exists", name)
		}
		return tx.Create(e)
	})
	if err != nil {
		return nil, fail(err)
	}
	return &api.CreateExtensionResponse{Extension: e}, nil
}

// GetExtension returns a kind of resources.
func (o *Ops) GetExtension(ctx context.Context, req *api.GetExtensionRequest) (*api.GetExtensionResponse, error) {
	if err := needID(req.GetExtensionId()); err != nil {
		return nil, fail(err)
	}
	state, err := o.state.Read(ctx)
	if err != nil {
		return nil, fail(err)
	}
	e, ok := state.Get(model.Extensions, req.GetExtensionId()).(*api.Extension)
	if !ok {
		return nil, fail(notFound("extension", req.GetExtensionId()))
	}
	return &api.GetExtensionResponse{Extension: e}, nil
}

// RemoveExtension deletes a kind of which there are no resources.
func (o *Ops) RemoveExtension(ctx context.Context, req *api.RemoveExtensionRequest) (*api.RemoveExtensionResponse, error) {
	if err := needID(req.GetExtensionId()); err != nil {
		return nil, fail(err)
	}
	err := o.update(ctx, func(tx *store.Tx) error {
		e, ok := tx.Snapshot().Get(model.Extensions, req.GetExtensionId()).(*api.Extension)
		if !ok {
			return notFound("extension", req.GetExtensionId())
		}
		if err := notOwn("extension", e.GetAnnotations().GetName()); err != nil {
			return err
		}
		for r := range resources(tx.Snapshot()) {
			if r.GetKind() == e.GetAnnotations().GetName() {
				return invalid("extension '%s' is in use by resource '%s'", e.GetAnnotations().GetName(), r.GetAnnotations().GetName())
			}
		}
		return tx.Remove(model.Extensions, e.GetId())
	})
	if err != nil {
		return nil, fail(err)
	}
	return new(api.RemoveExtensionResponse), nil
}

// notOwn refuses what others want to do with an extension or a resource of Skep's.
func notOwn(what, name string) error {
	if model.IsOwn(name) {
		return model.Errorf(model.Denied, `%s %s is Skep's own, as all whose names begin with "skep.": skep has a command for what it keeps there`, what, name)
	}
	return nil
}

func resources(s *store.Snapshot) func(func(*api.Resource) bool) {
	return func(yield func(*api.Resource) bool) {
		for object := range s.All(model.Resources) {
			if r, ok := object.(*api.Resource); ok && !yield(r) {
				return
			}
		}
	}
}

// CreateResource stores a resource of a kind that exists.
func (o *Ops) CreateResource(ctx context.Context, req *api.CreateResourceRequest) (*api.CreateResourceResponse, error) {
	switch {
	case req.GetAnnotations().GetName() == "":
		return nil, fail(invalid("resource must have a name"))
	case req.GetKind() == "":
		return nil, fail(invalid("resource must belong to an extension"))
	}
	if err := cmp.Or(notOwn("resource", req.GetAnnotations().GetName()), notOwn("extension", req.GetKind())); err != nil {
		return nil, fail(err)
	}
	id, err := o.newID()
	if err != nil {
		return nil, fail(err)
	}
	r := &api.Resource{Id: id, Annotations: model.Clone(req.GetAnnotations()), Kind: req.GetKind(), Payload: proto.CloneOf(req.GetPayload())}
	err = o.update(ctx, func(tx *store.Tx) error {
		if name := r.GetAnnotations().GetName(); tx.Snapshot().IDByName(model.Resources, name) != "" {
			return model.Errorf(model.Exists, "resource %s already exists", name)
		}
		return tx.Create(r)
	})
	if err != nil {
		return nil, fail(err)
	}
	return &api.CreateResourceResponse{Resource: r}, nil
}

// GetResource returns a resource.
func (o *Ops) GetResource(ctx context.Context, req *api.GetResourceRequest) (*api.GetResourceResponse, error) {
	if err := needID(req.GetResourceId()); err != nil {
		return nil, fail(err)
	}
	state, err := o.state.Read(ctx)
	if err != nil {
		return nil, fail(err)
	}
	r, ok := state.Get(model.Resources, req.GetResourceId()).(*api.Resource)
	if !ok {
		return nil, fail(notFound("resource", req.GetResourceId()))
	}
	return &api.GetResourceResponse{Resource: r}, nil
}

// ListResources returns the resources that match.
func (o *Ops) ListResources(ctx context.Context, req *api.ListResourcesRequest) (*api.ListResourcesResponse, error) {
	f := req.GetFilters()
	resp := new(api.ListResourcesResponse)
	state, err := o.state.Read(ctx)
	if err != nil {
		return nil, fail(err)
	}
	for r := range resources(state) {
		a := r.GetAnnotations()
		if (f.GetKind() == "" || f.GetKind() == r.GetKind()) && matchNamed(f, r.GetId(), a.GetName(), a.GetLabels()) {
			resp.Resources = append(resp.Resources, r)
		}
	}
	return resp, nil
}

// UpdateResource changes a resource's labels and payload; what is absent stays.
func (o *Ops) UpdateResource(ctx context.Context, req *api.UpdateResourceRequest) (*api.UpdateResourceResponse, error) {
	if err := needUpdate(req.GetResourceId(), req.GetResourceVersion(), true); err != nil {
		return nil, fail(err)
	}
	var updated *api.Resource
	err := o.update(ctx, func(tx *store.Tx) error {
		old, ok := tx.Snapshot().Get(model.Resources, req.GetResourceId()).(*api.Resource)
		if !ok {
			return notFound("resource", req.GetResourceId())
		}
		if err := notOwn("extension", old.GetKind()); err != nil {
			return err
		}
		updated = model.Clone(old)
		updated.Meta = at(old.GetMeta(), req.GetResourceVersion())
		if a := req.GetAnnotations(); a != nil {
			if a.GetName() != old.GetAnnotations().GetName() {
				return invalid("resource %s cannot be renamed", old.GetAnnotations().GetName())
			}
			updated.Annotations = model.Clone(a)
		}
		if req.GetPayload() != nil {
			updated.Payload = proto.CloneOf(req.GetPayload())
		}
		return tx.Update(updated)
	})
	if err != nil {
		return nil, fail(err)
	}
	return &api.UpdateResourceResponse{Resource: updated}, nil
}

// RemoveResource deletes a resource.
func (o *Ops) RemoveResource(ctx context.Context, req *api.RemoveResourceRequest) (*api.RemoveResourceResponse, error) {
	if err := needID(req.GetResourceId()); err != nil {
		return nil, fail(err)
	}
	err := o.update(ctx, func(tx *store.Tx) error {
		if r, ok := tx.Snapshot().Get(model.Resources, req.GetResourceId()).(*api.Resource); ok {
			if err := notOwn("extension", r.GetKind()); err != nil {
				return err
			}
		}
		return tx.Remove(model.Resources, req.GetResourceId())
	})
	if err != nil {
		return nil, fail(err)
	}
	return new(api.RemoveResourceResponse), nil
}
