package store

import (
	"io"

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
