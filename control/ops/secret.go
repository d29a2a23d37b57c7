package ops

import (
	"context"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/lifecycle"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// redacted returns a secret without its data.
func redacted(s *api.Secret) *api.Secret {
	c := model.Clone(s)
	if c.GetSpec() != nil {
		c.Spec.Data = nil
	}
	return c
}

// GetSecret returns a secret without its data.
func (o *Ops) GetSecret(ctx context.Context, req *api.GetSecretRequest) (*api.GetSecretResponse, error) {
	if err := needID(req.GetSecretId()); err != nil {
		return nil, fail(err)
	}
	state, err := o.state.Read(ctx)
	if err != nil {
		return nil, fail(err)
	}
	s := state.Secret(req.GetSecretId())
	if s == nil {
		return nil, fail(notFound("secret", req.GetSecretId()))
	}
	return &api.GetSecretResponse{Secret: redacted(s)}, nil
}

// ListSecrets returns the secrets that match, without data and without internal ones.
func (o *Ops) ListSecrets(ctx context.Context, req *api.ListSecretsRequest) (*api.ListSecretsResponse, error) {
	resp := new(api.ListSecretsResponse)
	state, err := o.state.Read(ctx)
	if err != nil {
		return nil, fail(err)
	}
	for s := range state.Secrets() {
		a := s.GetSpec().GetAnnotations()
		if !s.GetInternal() && matchNamed(req.GetFilters(), s.GetId(), a.GetName(), a.GetLabels()) {
			resp.Secrets = append(resp.Secrets, redacted(s))
		}
	}
	return resp, nil
}

// CreateSecret stores a secret.
func (o *Ops) CreateSecret(ctx context.Context, req *api.CreateSecretRequest) (*api.CreateSecretResponse, error) {
	spec := model.Clone(req.GetSpec())
	if err := o.validateSecret(ctx, spec); err != nil {
		return nil, fail(err)
	}
	if err := checkFormer(spec, nil); err != nil {
		return nil, fail(err)
	}
	id, err := o.newID()
	if err != nil {
		return nil, fail(err)
	}
	secret := &api.Secret{Id: id, Spec: spec}
	err = o.update(ctx, func(tx *store.Tx) error {
		if name := spec.GetAnnotations().GetName(); tx.Snapshot().IDByName(model.Secrets, name) != "" {
			return model.Errorf(model.Exists, "secret %s already exists", name)
		}
		return tx.Create(secret)
	})
	if err != nil {
		return nil, fail(err)
	}
	return &api.CreateSecretResponse{Secret: redacted(secret)}, nil
}

func (o *Ops) validateSecret(ctx context.Context, spec *api.SecretSpec) error {
	if spec == nil {
		return invalid("no secret spec given")
	}
	if err := validPayloadName(spec.GetAnnotations()); err != nil {
		return err
	}
	if spec.GetDriver() != nil {
		return o.validateDriver(ctx, spec)
	}
	return checkSecretData(spec.GetTemplating(), spec.GetData())
}

func checkSecretData(templating *api.Driver, data []byte) error {
	if n := len(data); n == 0 || n > model.MaxSecret {
		return invalid("secret data must be larger than 0 and less than %d bytes", model.MaxSecret+1)
	}
	return lifecycle.CheckPayload(templating, data)
}

// validateDriver checks a secret whose value a plugin on the managers' machines knows.
func (o *Ops) validateDriver(ctx context.Context, spec *api.SecretSpec) error {
	name := spec.GetDriver().GetName()
	switch {
	case name == "":
		return invalid("secret driver must have a name")
	case len(spec.GetData()) > 0:
		return invalid("secret %s has a driver, so it cannot have data: the driver %s gives its value", spec.GetAnnotations().GetName(), name)
	case o.secretDriver == nil:
		return model.Errorf(model.Internal, "plugin %q not found", name)
	}
	if err := lifecycle.CheckPayload(spec.GetTemplating(), nil); err != nil {
		return err
	}
	return o.secretDriver(ctx, name)
}

// UpdateSecret changes a secret's labels.
func (o *Ops) UpdateSecret(ctx context.Context, req *api.UpdateSecretRequest) (*api.UpdateSecretResponse, error) {
	if err := needUpdate(req.GetSecretId(), req.GetSecretVersion(), req.GetSpec() != nil); err != nil {
		return nil, fail(err)
	}
	var updated *api.Secret
	err := o.update(ctx, func(tx *store.Tx) error {
		old := tx.Snapshot().Secret(req.GetSecretId())
		if old == nil {
			return notFound("secret", req.GetSecretId())
		}
		updated = model.Clone(old)
		updated.Meta = at(old.GetMeta(), req.GetSecretVersion())
		wanted := model.Clone(req.GetSpec())
		if wanted.Data == nil { // what was read has none
			wanted.Data = old.GetSpec().GetData()
		}
		if updated.Spec.Annotations == nil {
			updated.Spec.Annotations = new(api.Annotations)
		}
		updated.Spec.Annotations.Labels = wanted.GetAnnotations().GetLabels()
		if !proto.Equal(wanted, updated.GetSpec()) {
			return invalid("only updates to Labels are allowed")
		}
		if err := checkFormer(wanted, old.GetSpec()); err != nil {
			return err
		}
		return tx.Update(updated)
	})
	if err != nil {
		return nil, fail(err)
	}
	return &api.UpdateSecretResponse{Secret: redacted(updated)}, nil
}

// RemoveSecret deletes a secret that no service's spec uses.
func (o *Ops) RemoveSecret(ctx context.Context, req *api.RemoveSecretRequest) (*api.RemoveSecretResponse, error) {
	if err := needID(req.GetSecretId()); err != nil {
		return nil, fail(err)
	}
	err := o.update(ctx, func(tx *store.Tx) error {
		old := tx.Snapshot().Secret(req.GetSecretId())
		if old == nil {
			return notFound("secret", req.GetSecretId())
		}
		users := referencedBy(tx.Snapshot(), func(c *api.ContainerSpec) bool { return usesSecret(c, old.GetId()) })
		if err := inUse("secret", old.GetSpec().GetAnnotations().GetName(), users); err != nil {
			return err
		}
		return tx.Remove(model.Secrets, old.GetId())
	})
	if err != nil {
		return nil, fail(err)
	}
	return new(api.RemoveSecretResponse), nil
}
