package store

import (
	"io"

	"google.golang.org/protobuf/types/known/anypb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// DefineKind makes the extension that resources of a kind need, unless it is there. Its id
// is taken from random.
func (tx *Tx) DefineKind(random io.Reader, kind, description string) error {
	if tx.Snapshot().IDByName(model.Extensions, kind) != "" {
		return nil
	}
	id, err := model.NewID(random)
	if err != nil {
		return err
	}
	return tx.Create(&api.Extension{Id: id, Annotations: &api.Annotations{Name: kind}, Description: description})
}

// OnlyOf returns the resource of a kind that has one, which is called as the kind is. What
// others have called so is returned as foreign. Either is nil when it is not there.
func (s *Snapshot) OnlyOf(kind string) (only, foreign *api.Resource) {
	r, ok := s.Get(model.Resources, s.IDByName(model.Resources, kind)).(*api.Resource)
	switch {
	case !ok:
		return nil, nil
	case r.GetKind() != kind:
		return nil, r
	default:
		return r, nil
	}
}

// CreateOnly makes the resource of a kind that has one, and the kind unless it is there. It
// takes the place of what others have called so. Ids are taken from random.
func (tx *Tx) CreateOnly(random io.Reader, kind, description string, payload *anypb.Any) error {
	if _, foreign := tx.Snapshot().OnlyOf(kind); foreign != nil {
		if err := tx.Remove(model.Resources, foreign.GetId()); err != nil {
			return err
		}
	}
	if err := tx.DefineKind(random, kind, description); err != nil {
		return err
	}
	id, err := model.NewID(random)
	if err != nil {
		return err
	}
	return tx.Create(&api.Resource{Id: id, Annotations: &api.Annotations{Name: kind}, Kind: kind, Payload: payload})
}
