package ops

import (
	"context"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/lifecycle"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// GetConfig returns a config with its data.
func (o *Ops) GetConfig(ctx context.Context, req *api.GetConfigRequest) (*api.GetConfigResponse, error) {
	if err := needID(req.GetConfigId()); err != nil {
		return nil, fail(err)
	}
	state, err := o.state.Read(ctx)
	if err != nil {
		return nil, fail(err)
	}
	c := state.Config(req.GetConfigId())
	if c == nil {
		return nil, fail(notFound("config", req.GetConfigId()))
	}
	return &api.GetConfigResponse{Config: c}, nil
}

// ListConfigs returns the configs that match.
func (o *Ops) ListConfigs(ctx context.Context, req *api.ListConfigsRequest) (*api.ListConfigsResponse, error) {
	resp := new(api.ListConfigsResponse)
	state, err := o.state.Read(ctx)
	if err != nil {
		return nil, fail(err)
	}
	for c := range state.Configs() {
		a := c.GetSpec().GetAnnotations()
		if matchNamed(req.GetFilters(), c.GetId(), a.GetName(), a.GetLabels()) {
			resp.Configs = append(resp.Configs, c)
		}
	}
	return resp, nil
}

// CreateConfig stores a config.
func (o *Ops) CreateConfig(ctx context.Context, req *api.CreateConfigRequest) (*api.CreateConfigResponse, error) {
	spec := model.Clone(req.GetSpec())
	if err := validateConfig(spec); err != nil {
		return nil, fail(err)
	}
	id, err := o.newID()
	if err != nil {
		return nil, fail(err)
	}
	config := &api.Config{Id: id, Spec: spec}
	err = o.update(ctx, func(tx *store.Tx) error {
		if name := spec.GetAnnotations().GetName(); tx.Snapshot().IDByName(model.Configs, name) != "" {
			return model.Errorf(model.Exists, "config %s already exists", name)
		}
		return tx.Create(config)
	})
	if err != nil {
		return nil, fail(err)
	}
	return &api.CreateConfigResponse{Config: config}, nil
}

func validateConfig(spec *api.ConfigSpec) error {
	if spec == nil {
		return invalid("no config spec given")
	}
	if err := validPayloadName(spec.GetAnnotations()); err != nil {
		return err
	}
	if n := len(spec.GetData()); n == 0 || n > model.MaxConfig {
		return invalid("config data must be larger than 0 and less than %d bytes", model.MaxConfig+1)
	}
	return lifecycle.CheckPayload(spec.GetTemplating(), spec.GetData())
}

// UpdateConfig changes a config's labels.
func (o *Ops) UpdateConfig(ctx context.Context, req *api.UpdateConfigRequest) (*api.UpdateConfigResponse, error) {
	if err := needUpdate(req.GetConfigId(), req.GetConfigVersion(), req.GetSpec() != nil); err != nil {
		return nil, fail(err)
	}
	var updated *api.Config
	err := o.update(ctx, func(tx *store.Tx) error {
		old := tx.Snapshot().Config(req.GetConfigId())
		if old == nil {
			return notFound("config", req.GetConfigId())
		}
		updated = model.Clone(old)
		updated.Meta = at(old.GetMeta(), req.GetConfigVersion())
		wanted := model.Clone(req.GetSpec())
		if wanted.Data == nil {
			wanted.Data = old.GetSpec().GetData()
		}
		if updated.Spec.Annotations == nil {
			updated.Spec.Annotations = new(api.Annotations)
		}
		updated.Spec.Annotations.Labels = wanted.GetAnnotations().GetLabels()
		if !proto.Equal(wanted, updated.GetSpec()) {
			return invalid("only updates to Labels are allowed")
		}
		return tx.Update(updated)
	})
	if err != nil {
		return nil, fail(err)
	}
	return &api.UpdateConfigResponse{Config: updated}, nil
}

// RemoveConfig deletes a config that no service's spec uses.
func (o *Ops) RemoveConfig(ctx context.Context, req *api.RemoveConfigRequest) (*api.RemoveConfigResponse, error) {
	if err := needID(req.GetConfigId()); err != nil {
		return nil, fail(err)
	}
	err := o.update(ctx, func(tx *store.Tx) error {
		old := tx.Snapshot().Config(req.GetConfigId())
		if old == nil {
			return notFound("config", req.GetConfigId())
		}
		users := referencedBy(tx.Snapshot(), func(c *api.ContainerSpec) bool {
			for _, r := range c.GetConfigs() {
				if r.GetConfigId() == old.GetId() {
					return true
				}
			}
			return false
		})
		if err := inUse("config", old.GetSpec().GetAnnotations().GetName(), users); err != nil {
			return err
		}
		return tx.Remove(model.Configs, old.GetId())
	})
	if err != nil {
		return nil, fail(err)
	}
	return new(api.RemoveConfigResponse), nil
}
