package dockerapi

import (
	"strconv"
	"time"

	"github.com/moby/moby/api/types/events"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/convert"
)

// follower turns changes of this manager's state into events. Without a manager it
// never has any.
type follower struct{ cursor *replica.Cursor }

func (a *API) follow() follower {
	cursor, err := a.manager.Follow()
	if err != nil {
		return follower{} // not a manager: nothing to follow
	}
	return follower{cursor}
}

func (f follower) live() bool { return f.cursor != nil }

func (f follower) changed() <-chan struct{} {
	if f.cursor == nil {
		return nil
	}
	return f.cursor.Changed()
}

// take returns the events since the last call. After a restored raft snapshot what
// happened between is not known and nothing is told of it.
func (f follower) take(now time.Time) []events.Message {
	changes, _ := f.cursor.Drain()
	var list []events.Message
	for _, change := range changes {
		if m, ok := swarmEvent(change, now); ok {
			list = append(list, m)
		}
	}
	return list
}

// swarmEvent returns Docker's event for a change; tasks, volumes and the cluster have none.
func swarmEvent(change model.Event, now time.Time) (events.Message, bool) {
	m := events.Message{Scope: "swarm", Actor: events.Actor{ID: change.ID(), Attributes: make(map[string]string)}}
	object := change.New
	if object == nil {
		object = change.Old
	}
	attributes := m.Actor.Attributes
	switch o := object.(type) {
	case *api.Node:
		m.Type = events.NodeEventType
		attributes["name"] = o.GetSpec().GetAnnotations().GetName()
		if attributes["name"] == "" {
			attributes["name"] = o.GetDescription().GetHostname()
		}
		if change.Kind == model.Update {
			nodeChanges(attributes, change)
		}
	case *api.Service:
		m.Type = events.ServiceEventType
		attributes["name"] = o.GetSpec().GetAnnotations().GetName()
		if change.Kind == model.Update {
			serviceChanges(attributes, change)
		}
	case *api.Network:
		m.Type = events.NetworkEventType
		attributes["name"] = o.GetSpec().GetAnnotations().GetName()
	case *api.Secret:
		m.Type = events.SecretEventType
		attributes["name"] = o.GetSpec().GetAnnotations().GetName()
	case *api.Config:
		m.Type = events.ConfigEventType
		attributes["name"] = o.GetSpec().GetAnnotations().GetName()
	default:
		return m, false
	}
	at := now
	switch change.Kind {
	case model.Create:
		m.Action, at = events.ActionCreate, object.GetMeta().GetCreatedAt().AsTime()
	case model.Update:
		m.Action, at = events.ActionUpdate, object.GetMeta().GetUpdatedAt().AsTime()
	case model.Remove:
		m.Action = events.ActionRemove
	}
	m.Time, m.TimeNano = at.Unix(), at.UnixNano()
	return m, true
}

// differ notes an attribute's old and new value if they differ.
func differ(attributes map[string]string, key, old, updated string) {
	if old != updated {
		attributes[key+".old"], attributes[key+".new"] = old, updated
	}
}

func nodeChanges(attributes map[string]string, change model.Event) {
	a, okOld := change.Old.(*api.Node)
	b, okNew := change.New.(*api.Node)
	if !okOld || !okNew {
		return
	}
	old, updated := convert.DockerNode(a), convert.DockerNode(b)
	differ(attributes, "availability", string(old.Spec.Availability), string(updated.Spec.Availability))
	differ(attributes, "role", string(old.Spec.Role), string(updated.Spec.Role))
	differ(attributes, "state", string(old.Status.State), string(updated.Status.State))
	if old.ManagerStatus != nil && updated.ManagerStatus != nil {
		differ(attributes, "leader", strconv.FormatBool(old.ManagerStatus.Leader), strconv.FormatBool(updated.ManagerStatus.Leader))
		differ(attributes, "reachability", string(old.ManagerStatus.Reachability), string(updated.ManagerStatus.Reachability))
	}
}

func serviceChanges(attributes map[string]string, change model.Event) {
	old, okOld := change.Old.(*api.Service)
	updated, okNew := change.New.(*api.Service)
	if !okOld || !okNew {
		return
	}
	differ(attributes, "image", old.GetSpec().GetTask().GetContainer().GetImage(), updated.GetSpec().GetTask().GetContainer().GetImage())
	if a, b := old.GetSpec().GetReplicated(), updated.GetSpec().GetReplicated(); a != nil && b != nil {
		differ(attributes, "replicas", strconv.FormatUint(a.GetReplicas(), 10), strconv.FormatUint(b.GetReplicas(), 10))
	}
	was, is := convert.UpdateState(old.GetUpdateStatus().GetState()), convert.UpdateState(updated.GetUpdateStatus().GetState())
	if updated.GetUpdateStatus() != nil && was != is {
		attributes["updatestate.new"] = string(is)
		if old.GetUpdateStatus() != nil {
			attributes["updatestate.old"] = string(was)
		}
	}
}
