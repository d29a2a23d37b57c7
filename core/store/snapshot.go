package store

import (
	"cmp"
	"iter"
	"strings"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// Snapshot is one version of the whole state.
type Snapshot struct {
	// index is the raft index that made this version; 0 for the empty state.
	index  uint64
	tables [model.TableCount]tree[model.Object]
	// names maps "<lower case name>" to id, for tables whose names are unique.
	names [model.TableCount]tree[string]
	// hostnames holds "<hostname>\x00<node id>".
	hostnames tree[struct{}]
	// tasksByService holds "<service id>\x00<task id>", tasksByNode likewise.
	tasksByService, tasksByNode tree[*api.Task]
}

// Empty returns the state of a swarm before its first entry.
func Empty() *Snapshot { return new(Snapshot) }

// Index returns the raft index of the last entry applied.
func (s *Snapshot) Index() uint64 { return s.index }

// Get returns a record of a table, or nil.
func (s *Snapshot) Get(table model.Table, id string) model.Object {
	o, _ := s.tables[table].get(id)
	return o
}

// All yields the records of a table in the order of their ids.
func (s *Snapshot) All(table model.Table) iter.Seq[model.Object] {
	return func(yield func(model.Object) bool) {
		s.tables[table].scan(func(_ string, o model.Object) bool { return yield(o) })
	}
}

// Len returns the number of records in a table.
func (s *Snapshot) Len(table model.Table) int { return s.tables[table].len() }

// IDByName returns the id of the record with a name, compared without case, or "".
// Only services, networks, secrets, configs, clusters, volumes, extensions and
// resources have unique names.
func (s *Snapshot) IDByName(table model.Table, name string) string {
	id, _ := s.names[table].get(strings.ToLower(name))
	return id
}

func get[T model.Object](s *Snapshot, table model.Table, id string) (none T) {
	o, ok := s.tables[table].get(id)
	if !ok {
		return none
	}
	t, ok := o.(T)
	if !ok {
		return none
	}
	return t
}

func all[T model.Object](s *Snapshot, table model.Table) iter.Seq[T] {
	return func(yield func(T) bool) {
		s.tables[table].scan(func(_ string, o model.Object) bool {
			t, ok := o.(T)
			return !ok || yield(t)
		})
	}
}

// Node returns a node, or nil.
func (s *Snapshot) Node(id string) *api.Node { return get[*api.Node](s, model.Nodes, id) }

// Nodes yields all nodes.
func (s *Snapshot) Nodes() iter.Seq[*api.Node] { return all[*api.Node](s, model.Nodes) }

// NodesByHostname yields the nodes with exactly this hostname.
func (s *Snapshot) NodesByHostname(hostname string) iter.Seq[*api.Node] {
	return func(yield func(*api.Node) bool) {
		prefix := hostname + "\x00"
		s.hostnames.ascend(prefix, func(key string, _ struct{}) bool {
			id, ok := strings.CutPrefix(key, prefix)
			return ok && yield(s.Node(id))
		})
	}
}

// Service returns a service, or nil.
func (s *Snapshot) Service(id string) *api.Service { return get[*api.Service](s, model.Services, id) }

// Services yields all services.
func (s *Snapshot) Services() iter.Seq[*api.Service] { return all[*api.Service](s, model.Services) }

// Task returns a task, or nil.
func (s *Snapshot) Task(id string) *api.Task { return get[*api.Task](s, model.Tasks, id) }

// Tasks yields all tasks.
func (s *Snapshot) Tasks() iter.Seq[*api.Task] { return all[*api.Task](s, model.Tasks) }

// TasksByService yields the tasks of one service in the order of their ids.
func (s *Snapshot) TasksByService(serviceID string) iter.Seq[*api.Task] {
	return byPrefix(s.tasksByService, serviceID+"\x00")
}

// TasksByNode yields the tasks assigned to one node in the order of their ids.
func (s *Snapshot) TasksByNode(nodeID string) iter.Seq[*api.Task] {
	return byPrefix(s.tasksByNode, nodeID+"\x00")
}

func byPrefix(index tree[*api.Task], prefix string) iter.Seq[*api.Task] {
	return func(yield func(*api.Task) bool) {
		index.ascend(prefix, func(key string, task *api.Task) bool {
			return strings.HasPrefix(key, prefix) && yield(task)
		})
	}
}

// Network returns a network, or nil.
func (s *Snapshot) Network(id string) *api.Network { return get[*api.Network](s, model.Networks, id) }

// Networks yields all networks.
func (s *Snapshot) Networks() iter.Seq[*api.Network] { return all[*api.Network](s, model.Networks) }

// Cluster returns the swarm's cluster object, or nil before there is one.
func (s *Snapshot) Cluster() *api.Cluster {
	for c := range all[*api.Cluster](s, model.Clusters) {
		return c
	}
	return nil
}

// Secret returns a secret, or nil.
func (s *Snapshot) Secret(id string) *api.Secret { return get[*api.Secret](s, model.Secrets, id) }

// Secrets yields all secrets.
func (s *Snapshot) Secrets() iter.Seq[*api.Secret] { return all[*api.Secret](s, model.Secrets) }

// Config returns a config, or nil.
func (s *Snapshot) Config(id string) *api.Config { return get[*api.Config](s, model.Configs, id) }

// Configs yields all configs.
func (s *Snapshot) Configs() iter.Seq[*api.Config] { return all[*api.Config](s, model.Configs) }

// Compare orders records by id, for sorted output.
func Compare[T model.Object](a, b T) int { return cmp.Compare(a.GetId(), b.GetId()) }
