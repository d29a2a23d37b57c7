package store

import (
	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// ApplyActions makes the next state from one entry of the raft log, all actions or
// none. It checks what SwarmKit's followers check, so that every member agrees:
// Exists, NotFound or Invalid leave the state as it was.
func ApplyActions(base *Snapshot, index uint64, actions []*api.StoreAction) (*Snapshot, []model.Event, error) {
	tx := &Tx{head: base.copy()}
	for _, a := range actions {
		if err := tx.applyAction(a); err != nil {
			return nil, nil, err
		}
	}
	return tx.Commit(index), tx.events, nil
}

func (tx *Tx) applyAction(a *api.StoreAction) error {
	o := Target(a)
	if o == nil || o.GetId() == "" {
		return model.Errorf(model.Invalid, "store action without target")
	}
	table := model.TableOf(o)
	old := tx.head.Get(table, o.GetId())
	kind := a.GetAction()
	if old == nil && (kind == api.StoreActionKind_STORE_ACTION_UPDATE || kind == api.StoreActionKind_STORE_ACTION_REMOVE) {
		return model.Errorf(model.NotFound, "%s %s not found", table, o.GetId())
	}
	switch kind {
	case api.StoreActionKind_STORE_ACTION_CREATE:
		if err := tx.checkCreate(table, o); err != nil {
			return err
		}
		tx.write(model.Create, table, nil, o)
	case api.StoreActionKind_STORE_ACTION_UPDATE:
		if err := tx.checkUpdate(table, o); err != nil {
			return err
		}
		tx.write(model.Update, table, old, o)
	case api.StoreActionKind_STORE_ACTION_REMOVE:
		tx.write(model.Remove, table, old, nil)
	case api.StoreActionKind_UNKNOWN:
		return model.Errorf(model.Invalid, "store action of unknown kind")
	default:
		return model.Errorf(model.Invalid, "store action of unknown kind")
	}
	return nil
}

// Encode returns the state as the store part of a raft snapshot. It shares the records.
func Encode(s *Snapshot) *api.StoreSnapshot {
	out := new(api.StoreSnapshot)
	for t := range model.TableCount {
		for o := range s.All(model.Table(t)) {
			switch o := o.(type) {
			case *api.Node:
				out.Nodes = append(out.Nodes, o)
			case *api.Service:
				out.Services = append(out.Services, o)
			case *api.Network:
				out.Networks = append(out.Networks, o)
			case *api.Task:
				out.Tasks = append(out.Tasks, o)
			case *api.Cluster:
				out.Clusters = append(out.Clusters, o)
			case *api.Secret:
				out.Secrets = append(out.Secrets, o)
			case *api.Resource:
				out.Resources = append(out.Resources, o)
			case *api.Extension:
				out.Extensions = append(out.Extensions, o)
			case *api.Config:
				out.Configs = append(out.Configs, o)
			case *api.Volume:
				out.Volumes = append(out.Volumes, o)
			}
		}
	}
	return out
}

// Decode returns the state of a raft snapshot taken at index. It takes the records over.
func Decode(in *api.StoreSnapshot, index uint64) *Snapshot {
	s := Empty()
	load(s, model.Nodes, in.GetNodes())
	load(s, model.Services, in.GetServices())
	load(s, model.Networks, in.GetNetworks())
	load(s, model.Tasks, in.GetTasks())
	load(s, model.Clusters, in.GetClusters())
	load(s, model.Secrets, in.GetSecrets())
	load(s, model.Resources, in.GetResources())
	load(s, model.Extensions, in.GetExtensions())
	load(s, model.Configs, in.GetConfigs())
	load(s, model.Volumes, in.GetVolumes())
	s.index = index
	return s
}

func load[T model.Object](s *Snapshot, table model.Table, records []T) {
	for _, o := range records {
		if old := s.Get(table, o.GetId()); old != nil {
			s.put(table, old, o)
			continue
		}
		s.put(table, nil, o)
	}
}

// Target returns the object of an action, or nil for one of an unknown kind.
func Target(a *api.StoreAction) model.Object {
	switch t := a.GetTarget().(type) {
	case *api.StoreAction_Node:
		return t.Node
	case *api.StoreAction_Service:
		return t.Service
	case *api.StoreAction_Task:
		return t.Task
	case *api.StoreAction_Network:
		return t.Network
	case *api.StoreAction_Cluster:
		return t.Cluster
	case *api.StoreAction_Secret:
		return t.Secret
	case *api.StoreAction_Resource:
		return t.Resource
	case *api.StoreAction_Extension:
		return t.Extension
	case *api.StoreAction_Config:
		return t.Config
	case *api.StoreAction_Volume:
		return t.Volume
	default:
		return nil
	}
}

func storeAction(kind api.StoreActionKind, o model.Object) *api.StoreAction {
	a := &api.StoreAction{Action: kind}
	switch o := o.(type) {
	case *api.Node:
		a.Target = &api.StoreAction_Node{Node: o}
	case *api.Service:
		a.Target = &api.StoreAction_Service{Service: o}
	case *api.Task:
		a.Target = &api.StoreAction_Task{Task: o}
	case *api.Network:
		a.Target = &api.StoreAction_Network{Network: o}
	case *api.Cluster:
		a.Target = &api.StoreAction_Cluster{Cluster: o}
	case *api.Secret:
		a.Target = &api.StoreAction_Secret{Secret: o}
	case *api.Resource:
		a.Target = &api.StoreAction_Resource{Resource: o}
	case *api.Extension:
		a.Target = &api.StoreAction_Extension{Extension: o}
	case *api.Config:
		a.Target = &api.StoreAction_Config{Config: o}
	case *api.Volume:
		a.Target = &api.StoreAction_Volume{Volume: o}
	}
	return a
}
