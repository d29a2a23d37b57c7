package model

import (
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
)

// Object is a stored record: one of *api.Node, Service, Task, Network, Cluster,
// Secret, Config, Volume, Resource, Extension.
type Object interface {
	proto.Message
	GetId() string
	GetMeta() *api.Meta
}

// Table names the kinds of stored records, in the order of a snapshot.
type Table int

// The tables.
const (
	Nodes Table = iota
	Services
	Networks
	Tasks
	Clusters
	Secrets
	Resources
	Extensions
	Configs
	Volumes
	tableCount
)

// TableCount is the number of tables.
const TableCount = int(tableCount)

// String returns the singular name of the table's records, as errors spell it.
func (t Table) String() string {
	names := [...]string{"node", "service", "network", "task", "cluster", "secret", "resource", "extension", "config", "volume"}
	if t < 0 || int(t) >= len(names) {
		return "unknown"
	}
	return names[t]
}

// TableOf returns the table of an object. It panics on a foreign type.
func TableOf(o Object) Table {
	switch o.(type) {
	case *api.Node:
		return Nodes
	case *api.Service:
		return Services
	case *api.Network:
		return Networks
	case *api.Task:
		return Tasks
	case *api.Cluster:
		return Clusters
	case *api.Secret:
		return Secrets
	case *api.Resource:
		return Resources
	case *api.Extension:
		return Extensions
	case *api.Config:
		return Configs
	case *api.Volume:
		return Volumes
	default:
		panic("model: not a stored object")
	}
}

// ChangeKind says what a change does.
type ChangeKind int

// The kinds of changes.
const (
	Create ChangeKind = iota + 1
	Update
	Remove
)

// Change is one edit of the stored state. Object is owned by the change and not
// modified after it was handed over. For an Update, Object.Meta.Version must be the
// version that was read; for a Remove only the id matters.
type Change struct {
	Kind   ChangeKind
	Object Object
}

// Event is an applied change. Old is nil for a Create, New is nil for a Remove.
type Event struct {
	Kind     ChangeKind
	Table    Table
	Old, New Object
}

// ID returns the id of the object that changed.
func (e Event) ID() string {
	if e.New != nil {
		return e.New.GetId()
	}
	return e.Old.GetId()
}

// Clone returns a deep copy to edit; stored records must never be changed.
func Clone[T proto.Message](m T) T { return proto.CloneOf(m) }
