package ops

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// Labels of secrets that were rotated.
const (
	// labelVersion is the number of a value; a secret without it has the first.
	labelVersion = "skep.secret.version"
	// labelFormer is on a former value and says whose it was.
	labelFormer = "skep.secret.former"
)

// Secrets changes the values of secrets. It implements skepv1.SecretsServer and has no
// state.
//
// A stored secret never changes. A rotation stores another one under the name and renames
// the former to NAME.N, so that whoever names the secret from then on gets the new value; in
// the same transaction the services that use it refer to the new one, and roll by their own
// update settings. One former value is kept for a rollback.
type Secrets struct {
	skepv1.UnimplementedSecretsServer

	state  replica.State
	random io.Reader
}

// NewSecrets returns a Secrets that takes ids from random.
func NewSecrets(state replica.State, random io.Reader) *Secrets {
	return &Secrets{state: state, random: random}
}

// Rotate stores a new value.
func (r *Secrets) Rotate(ctx context.Context, req *skepv1.RotateSecretRequest) (*skepv1.RotateSecretResponse, error) {
	if err := needID(req.GetSecretId()); err != nil {
		return nil, fail(err)
	}
	id, err := model.NewID(r.random)
	if err != nil {
		return nil, fail(err)
	}
	var resp *skepv1.RotateSecretResponse
	_, err = r.state.Update(ctx, func(tx *store.Tx) error {
		resp = new(skepv1.RotateSecretResponse)
		old, err := rotatable(tx.Snapshot(), req.GetSecretId())
		if err != nil {
			return err
		}
		if err := checkSecretData(old.GetSpec().GetTemplating(), req.GetData()); err != nil {
			return err
		}
		name := old.GetSpec().GetAnnotations().GetName()
		version, last := versionOf(tx.Snapshot(), old), uint64(0)
		var unused []*api.Secret
		for s := range formerOf(tx.Snapshot(), name) {
			last = max(last, numberOf(s))
			if !inAnyUse(tx.Snapshot(), s.GetId()) {
				unused = append(unused, s)
			}
		}
		for _, s := range unused {
			resp.Removed = append(resp.Removed, s.GetSpec().GetAnnotations().GetName())
			if err := tx.Remove(model.Secrets, s.GetId()); err != nil {
				return err
			}
		}
		last = max(last, version)
		next := &api.Secret{Id: id, Spec: model.Clone(old.GetSpec())}
		next.Spec.Data = slices.Clone(req.GetData())
		setLabel(next, labelVersion, strconv.FormatUint(last+1, 10))
		if resp.FormerName, err = retire(tx, old, version); err != nil {
			return err
		}
		if err := tx.Create(next); err != nil {
			return err
		}
		resp.SecretId, resp.Version = id, last+1
		resp.Services, err = moveServices(tx, old.GetId(), next)
		return err
	})
	if err != nil {
		return nil, fail(err)
	}
	return resp, nil
}

// Rollback exchanges a secret with its newest former value.
func (r *Secrets) Rollback(ctx context.Context, req *skepv1.RollbackSecretRequest) (*skepv1.RotateSecretResponse, error) {
	if err := needID(req.GetSecretId()); err != nil {
		return nil, fail(err)
	}
	var resp *skepv1.RotateSecretResponse
	_, err := r.state.Update(ctx, func(tx *store.Tx) error {
		resp = new(skepv1.RotateSecretResponse)
		now, err := rotatable(tx.Snapshot(), req.GetSecretId())
		if err != nil {
			return err
		}
		name := now.GetSpec().GetAnnotations().GetName()
		var back *api.Secret
		for s := range formerOf(tx.Snapshot(), name) {
			if back == nil || s.GetMeta().GetVersion().GetIndex() > back.GetMeta().GetVersion().GetIndex() {
				back = s
			}
		}
		if back == nil {
			return model.Errorf(model.Precondition, "secret %s has no former value: it was never rotated", name)
		}
		if resp.FormerName, err = retire(tx, now, versionOf(tx.Snapshot(), now)); err != nil {
			return err
		}
		back = model.Clone(back)
		back.Spec.Annotations.Name = name
		delete(back.GetSpec().GetAnnotations().GetLabels(), labelFormer)
		if err := tx.Update(back); err != nil {
			return err
		}
		resp.SecretId, resp.Version = back.GetId(), numberOf(back)
		resp.Services, err = moveServices(tx, now.GetId(), back)
		return err
	})
	if err != nil {
		return nil, fail(err)
	}
	return resp, nil
}

// rotatable returns the secret whose value can be changed.
func rotatable(s *store.Snapshot, id string) (*api.Secret, error) {
	secret := s.Secret(id)
	if secret == nil {
		return nil, notFound("secret", id)
	}
	a := secret.GetSpec().GetAnnotations()
	if d := secret.GetSpec().GetDriver(); d != nil {
		return nil, model.Errorf(model.Precondition, "secret %s gets its value from the driver %s: change it there, and run `docker service update --force` on the services that use it", a.GetName(), d.GetName())
	}
	if of := a.GetLabels()[labelFormer]; of != "" {
		return nil, model.Errorf(model.Precondition, "secret %s is a former value of %s: name that one", a.GetName(), of)
	}
	return secret, nil
}

// checkFormer refuses a label by which a secret would become a former value of another one. A
// former value may keep its label, or lose it, and is a secret like others then.
func checkFormer(spec, old *api.SecretSpec) error {
	of, set := spec.GetAnnotations().GetLabels()[labelFormer]
	if was, had := old.GetAnnotations().GetLabels()[labelFormer]; !set || had && of == was {
		return nil
	}
	return invalid("label %s of secret %s: only `skep secret rotate` gives it, to former values", labelFormer, spec.GetAnnotations().GetName())
}

// retire renames a secret that gives its name to another value, and returns its new name.
func retire(tx *store.Tx, secret *api.Secret, version uint64) (string, error) {
	old := model.Clone(secret)
	name := old.GetSpec().GetAnnotations().GetName()
	former := fmt.Sprintf("%s.%d", name, version)
	if err := validPayloadName(&api.Annotations{Name: former}); err != nil {
		return "", invalid("the former value of secret %s would be called %s, which is longer than a name may be", name, former)
	}
	setLabel(old, labelVersion, strconv.FormatUint(version, 10))
	setLabel(old, labelFormer, name)
	old.Spec.Annotations.Name = former
	if tx.Snapshot().IDByName(model.Secrets, former) != "" {
		return "", model.Errorf(model.Exists, "the former value of secret %s would be called %s, but there is a secret of this name", name, former)
	}
	return former, tx.Update(old)
}

// moveServices makes the services that refer to a secret refer to another one.
func moveServices(tx *store.Tx, from string, to *api.Secret) ([]*skepv1.RotatedService, error) {
	var users []*api.Service
	for s := range tx.Snapshot().Services() {
		if usesSecret(s.GetSpec().GetTask().GetContainer(), from) {
			users = append(users, s)
		}
	}
	var moved []*skepv1.RotatedService
	for _, old := range users {
		service, spec := model.Clone(old), model.Clone(old.GetSpec())
		for _, ref := range spec.GetTask().GetContainer().GetSecrets() {
			if ref.GetSecretId() == from {
				ref.SecretId, ref.SecretName = to.GetId(), to.GetSpec().GetAnnotations().GetName()
			}
		}
		// A job's iteration stays: a rotation is no reason to run it again.
		replaceSpec(service, spec, old.GetMeta().GetVersion())
		if err := tx.Update(service); err != nil {
			return nil, err
		}
		moved = append(moved, &skepv1.RotatedService{Id: old.GetId(), Name: spec.GetAnnotations().GetName(), Job: isJob(spec)})
	}
	return moved, nil
}

// formerOf lists the former values of a secret.
func formerOf(s *store.Snapshot, name string) func(yield func(*api.Secret) bool) {
	return func(yield func(*api.Secret) bool) {
		for secret := range s.Secrets() {
			if secret.GetSpec().GetAnnotations().GetLabels()[labelFormer] == name && !yield(secret) {
				return
			}
		}
	}
}

// inAnyUse reports whether a service refers to a secret, or a task still may need it.
func inAnyUse(s *store.Snapshot, id string) bool {
	if len(referencedBy(s, func(c *api.ContainerSpec) bool { return usesSecret(c, id) })) > 0 {
		return true
	}
	for t := range s.Tasks() {
		if t.GetDesiredState() <= api.TaskState_RUNNING && t.GetStatus().GetState() <= api.TaskState_RUNNING && usesSecret(t.GetSpec().GetContainer(), id) {
			return true
		}
	}
	return false
}

func usesSecret(c *api.ContainerSpec, id string) bool {
	for _, ref := range c.GetSecrets() {
		if ref.GetSecretId() == id {
			return true
		}
	}
	return false
}

// versionOf returns the number of the value that has the name now. Who edits the labels of a
// secret loses the number; then it follows those of the former values.
func versionOf(s *store.Snapshot, secret *api.Secret) uint64 {
	if n := numberOf(secret); n > 0 {
		return n
	}
	var last uint64
	for former := range formerOf(s, secret.GetSpec().GetAnnotations().GetName()) {
		last = max(last, numberOf(former))
	}
	return last + 1
}

// numberOf returns the number on a secret's label, zero without one.
func numberOf(s *api.Secret) uint64 {
	n, err := strconv.ParseUint(s.GetSpec().GetAnnotations().GetLabels()[labelVersion], 10, 32)
	if err != nil {
		return 0
	}
	return n
}

func setLabel(s *api.Secret, key, value string) {
	if s.Spec.Annotations.Labels == nil {
		s.Spec.Annotations.Labels = map[string]string{}
	}
	s.Spec.Annotations.Labels[key] = value
}
