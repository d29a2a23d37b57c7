package docker

import (
	"strings"

	"github.com/skep-dev/skep/core/model"
)

// Index finds containers by full id, name or unique id prefix. The zero value is not
// usable; its owner guards it.
type Index struct {
	names map[string]string // name without slash -> id
	ids   map[string]string // id -> name
}

// NewIndex returns an empty index.
func NewIndex() *Index {
	return &Index{names: map[string]string{}, ids: map[string]string{}}
}

// Add reserves id and name. It fails with Exists when another container has the name.
func (x *Index) Add(id, name string) error {
	if err := x.free(id, name); err != nil {
		return err
	}
	if old, ok := x.ids[id]; ok {
		delete(x.names, old)
	}
	x.names[name] = id
	x.ids[id] = name
	return nil
}

// Reserve takes a name for a container that keeps the one it has until Add gives it the new
// one, or Release gives that back. It fails as Add does.
func (x *Index) Reserve(id, name string) error {
	if err := x.free(id, name); err != nil {
		return err
	}
	x.names[name] = id
	return nil
}

// Release gives a name back that was reserved for a container. One that the container has by
// now stays.
func (x *Index) Release(id, name string) {
	if x.names[name] == id && x.ids[id] != name {
		delete(x.names, name)
	}
}

func (x *Index) free(id, name string) error {
	if other, ok := x.names[name]; ok && other != id {
		return model.Errorf(model.Exists,
			"Conflict. The container name %q is already in use by container %q. You have to remove (or rename) that container to be able to reuse that name.",
			"/"+name, other)
	}
	return nil
}

// Remove forgets a container; unknown ids are no error.
func (x *Index) Remove(id string) {
	if name, ok := x.ids[id]; ok {
		delete(x.names, name)
		delete(x.ids, id)
	}
}

// Name returns the name of a container, empty if the id is unknown.
func (x *Index) Name(id string) string { return x.ids[id] }

// HasName reports whether a name is taken.
func (x *Index) HasName(name string) bool {
	_, ok := x.names[name]
	return ok
}

// Resolve returns the full id that ref means. NotFound "No such container: X", or
// Invalid when a prefix is ambiguous.
func (x *Index) Resolve(ref string) (string, error) {
	if ref == "" {
		return "", model.Errorf(model.Invalid, "invalid container name or ID: value is empty")
	}
	if _, ok := x.ids[ref]; ok {
		return ref, nil
	}
	if id, ok := x.names[strings.TrimPrefix(ref, "/")]; ok {
		return id, nil
	}
	found := ""
	for id := range x.ids {
		if !strings.HasPrefix(id, ref) {
			continue
		}
		if found != "" {
			return "", model.Errorf(model.Invalid, "Multiple IDs found with provided prefix: %s", ref)
		}
		found = id
	}
	if found == "" {
		return "", model.Errorf(model.NotFound, "No such container: %s", ref)
	}
	return found, nil
}
