package store

import (
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// Tx is a set of changes on top of a snapshot. Reading through Snapshot sees them.
// A Tx that is dropped leaves no trace.
type Tx struct {
	head    *Snapshot
	version uint64
	now     time.Time
	actions []*api.StoreAction
	events  []model.Event
}

// Begin opens a transaction on base, which must be a committed state. Records written get version as their
// Meta.Version and now as their time; version must exceed that of every record in base.
func Begin(base *Snapshot, version uint64, now time.Time) *Tx {
	return &Tx{head: base.copy(), version: version, now: now}
}

// Snapshot returns the state with the changes made so far. It changes with further
// changes, so it must not be iterated over while changing, and must not outlive the
// transaction, unlike Commit's.
func (tx *Tx) Snapshot() *Snapshot { return tx.head }

// Now returns the time that the transaction stamps on records.
func (tx *Tx) Now() time.Time { return tx.now }

// Empty reports whether nothing was changed.
func (tx *Tx) Empty() bool { return len(tx.actions) == 0 }

// Actions returns the changes as they are written to the raft log.
func (tx *Tx) Actions() []*api.StoreAction { return tx.actions }

// Events returns the changes in order.
func (tx *Tx) Events() []model.Event { return tx.events }

// Commit returns the new state with the given raft index. The Tx must not be used afterwards.
func (tx *Tx) Commit(index uint64) *Snapshot {
	tx.head.index = index
	return tx.head
}

// Create adds a record, whose id must be set. It takes the record over and fills in
// its Meta. Exists when the id or a unique name is taken.
func (tx *Tx) Create(o model.Object) error {
	table := model.TableOf(o)
	if o.GetId() == "" {
		return model.Errorf(model.Internal, "create %s: no id", table)
	}
	if err := tx.checkCreate(table, o); err != nil {
		return err
	}
	stamp := timestamppb.New(tx.now)
	setMeta(o, &api.Meta{Version: &api.Version{Index: tx.version}, CreatedAt: stamp, UpdatedAt: stamp})
	tx.write(model.Create, table, nil, o)
	return nil
}

// Update replaces a record by an edited clone, which it takes over. NotFound when it
// does not exist, ErrSequence when o's version is not the stored one, Exists when its
// new name is taken.
func (tx *Tx) Update(o model.Object) error {
	table := model.TableOf(o)
	old := tx.head.Get(table, o.GetId())
	if old == nil {
		return model.Errorf(model.NotFound, "%s %s not found", table, o.GetId())
	}
	if o.GetMeta().GetVersion().GetIndex() != old.GetMeta().GetVersion().GetIndex() {
		return model.ErrSequence
	}
	if err := tx.checkUpdate(table, o); err != nil {
		return err
	}
	meta := model.Clone(old.GetMeta()) // keeps what a newer version of the program put there
	if meta == nil {
		meta = new(api.Meta)
	}
	meta.Version = &api.Version{Index: tx.version}
	meta.UpdatedAt = timestamppb.New(tx.now)
	setMeta(o, meta)
	tx.write(model.Update, table, old, o)
	return nil
}

// Remove deletes a record. NotFound when it does not exist.
func (tx *Tx) Remove(table model.Table, id string) error {
	old := tx.head.Get(table, id)
	if old == nil {
		return model.Errorf(model.NotFound, "%s %s not found", table, id)
	}
	tx.write(model.Remove, table, old, nil)
	return nil
}

// Apply makes the changes of a plan, in order, and stops at the first that fails.
func (tx *Tx) Apply(changes []model.Change) error {
	for _, c := range changes {
		var err error
		switch c.Kind {
		case model.Create:
			err = tx.Create(c.Object)
		case model.Update:
			err = tx.Update(c.Object)
		case model.Remove:
			err = tx.Remove(model.TableOf(c.Object), c.Object.GetId())
		default:
			err = model.Errorf(model.Internal, "change of unknown kind %d", c.Kind)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (tx *Tx) checkName(table model.Table, o model.Object) error {
	name := model.NameOf(o)
	if name == "" {
		return nil
	}
	if id := tx.head.IDByName(table, name); id != "" && id != o.GetId() {
		return model.Errorf(model.Exists, "name conflicts with an existing object: %s %s already exists", table, name)
	}
	return nil
}

// checkCreate refuses a record that no member of the swarm would take.
func (tx *Tx) checkCreate(table model.Table, o model.Object) error {
	if tx.head.Get(table, o.GetId()) != nil {
		return model.Errorf(model.Exists, "%s %s already exists", table, o.GetId())
	}
	if r, ok := o.(*api.Resource); ok && tx.head.IDByName(model.Extensions, r.GetKind()) == "" {
		return model.Errorf(model.Invalid, "resource kind %q is not the name of an extension", r.GetKind())
	}
	return tx.checkName(table, o)
}

// checkUpdate is checkCreate for a record that is there.
func (tx *Tx) checkUpdate(table model.Table, o model.Object) error {
	if table == model.Extensions {
		return model.Errorf(model.Invalid, "an extension cannot be changed")
	}
	return tx.checkName(table, o)
}

// write puts one change into the head and records it.
func (tx *Tx) write(kind model.ChangeKind, table model.Table, old, updated model.Object) {
	tx.head.put(table, old, updated)
	tx.events = append(tx.events, model.Event{Kind: kind, Table: table, Old: old, New: updated})
	target := updated
	action := api.StoreActionKind_STORE_ACTION_UPDATE
	switch kind {
	case model.Create:
		action = api.StoreActionKind_STORE_ACTION_CREATE
	case model.Remove:
		action = api.StoreActionKind_STORE_ACTION_REMOVE
		target = old
	case model.Update:
	}
	tx.actions = append(tx.actions, storeAction(action, target))
}

// copy returns a writable copy that shares everything with s. It only reads s, so that
// several goroutines may copy the same snapshot.
func (s *Snapshot) copy() *Snapshot {
	c := *s
	for t := range c.tables {
		c.tables[t].owned = false
		c.names[t].owned = false
	}
	c.hostnames.owned = false
	c.tasksByService.owned = false
	c.tasksByNode.owned = false
	return &c
}

// put replaces old by updated (either may be nil) in the table and every index. Where a
// key stays, only its value is replaced, which is what most changes come to.
func (s *Snapshot) put(table model.Table, old, updated model.Object) {
	if updated == nil {
		s.tables[table].remove(old.GetId())
	} else {
		s.tables[table].set(updated.GetId(), updated)
	}
	if before, after := strings.ToLower(model.NameOf(old)), strings.ToLower(model.NameOf(updated)); before != after {
		move(&s.names[table], before, after, idOf(updated))
	}
	switch table {
	case model.Nodes:
		if before, after := hostKey(old), hostKey(updated); before != after {
			move(&s.hostnames, before, after, struct{}{})
		}
	case model.Tasks:
		was, _ := old.(*api.Task)
		is, _ := updated.(*api.Task)
		move(&s.tasksByService, taskKey(was.GetServiceId(), was), taskKey(is.GetServiceId(), is), is)
		move(&s.tasksByNode, taskKey(was.GetNodeId(), was), taskKey(is.GetNodeId(), is), is)
	default:
	}
}

// move takes an entry of an index from one key to another; "" is no entry.
func move[V any](index *tree[V], before, after string, v V) {
	if before != "" && before != after {
		index.remove(before)
	}
	if after != "" {
		index.set(after, v)
	}
}

func idOf(o model.Object) string {
	if o == nil {
		return ""
	}
	return o.GetId()
}

// hostKey returns a node's key in the index of host names, or "".
func hostKey(o model.Object) string {
	n, _ := o.(*api.Node)
	if h := n.GetDescription().GetHostname(); h != "" {
		return h + "\x00" + n.GetId()
	}
	return ""
}

// taskKey returns a task's key in the index by an owner, or "".
func taskKey(owner string, task *api.Task) string {
	if owner == "" {
		return ""
	}
	return owner + "\x00" + task.GetId()
}

func setMeta(o model.Object, meta *api.Meta) {
	switch o := o.(type) {
	case *api.Node:
		o.Meta = meta
	case *api.Service:
		o.Meta = meta
	case *api.Network:
		o.Meta = meta
	case *api.Task:
		o.Meta = meta
	case *api.Cluster:
		o.Meta = meta
	case *api.Secret:
		o.Meta = meta
	case *api.Resource:
		o.Meta = meta
	case *api.Extension:
		o.Meta = meta
	case *api.Config:
		o.Meta = meta
	case *api.Volume:
		o.Meta = meta
	}
}
