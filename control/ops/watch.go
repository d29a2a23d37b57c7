package ops

import (
	"strings"

	"google.golang.org/grpc"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
)

// Watcher streams changes of this manager's copy of the state. It implements
// api.WatchServer. Watching from a version of the past is refused: the log is not kept
// for it.
type Watcher struct {
	api.UnimplementedWatchServer

	state replica.State
}

// NewWatcher returns a Watcher on a state.
func NewWatcher(state replica.State) *Watcher { return &Watcher{state: state} }

// Watch sends first an empty message with the version from which it watches, then one
// message for each batch of changes. A slow client reads batches that grow; nothing
// is dropped. When the state is replaced as a whole the stream ends with Unavailable.
func (w *Watcher) Watch(req *api.WatchRequest, stream grpc.ServerStreamingServer[api.WatchMessage]) error {
	for _, e := range req.GetEntries() {
		if err := validateEntry(e); err != nil {
			return fail(err)
		}
	}
	cursor := w.state.Follow()
	now := cursor.Snapshot().Index()
	if from := req.GetResumeFrom(); from != nil && from.GetIndex() != now {
		return fail(model.Errorf(model.Unimplemented, "watch: resuming from version %d is not implemented by skep; list the objects and watch from now", from.GetIndex()))
	}
	if err := stream.Send(&api.WatchMessage{Version: &api.Version{Index: now}}); err != nil {
		return err
	}
	for {
		changes, reset, err := cursor.Next(stream.Context())
		if err != nil {
			return fail(err)
		}
		if reset {
			return fail(model.Errorf(model.Unavailable, "watch: this manager's state was replaced by a snapshot; list the objects and watch again"))
		}
		message := &api.WatchMessage{Version: &api.Version{Index: cursor.Snapshot().Index()}}
		for _, change := range changes {
			if event := watchEvent(req, change); event != nil {
				message.Events = append(message.Events, event)
			}
		}
		if len(message.GetEvents()) == 0 {
			continue
		}
		if err := stream.Send(message); err != nil {
			return err
		}
	}
}

// watchEvent returns the event of a change that an entry of the request asks for, or nil.
func watchEvent(req *api.WatchRequest, change model.Event) *api.WatchMessage_Event {
	object := change.New
	if object == nil {
		object = change.Old
	}
	action := watchAction(change.Kind)
	for _, e := range req.GetEntries() {
		if e.GetKind() != change.Table.String() || (e.GetAction() != 0 && e.GetAction()&action == 0) || !selected(object, e.GetFilters()) {
			continue
		}
		event := &api.WatchMessage_Event{Action: action, Object: watched(object)}
		if req.GetIncludeOldObject() && change.Kind == model.Update {
			event.OldObject = watched(change.Old)
		}
		return event
	}
	return nil
}

func watchAction(kind model.ChangeKind) api.WatchActionKind {
	switch kind {
	case model.Create:
		return api.WatchActionKind_WATCH_ACTION_CREATE
	case model.Update:
		return api.WatchActionKind_WATCH_ACTION_UPDATE
	case model.Remove:
		return api.WatchActionKind_WATCH_ACTION_REMOVE
	default:
		return api.WatchActionKind_WATCH_ACTION_UNKNOWN
	}
}

// watched wraps an object; secrets lose their data and the cluster its keys.
func watched(object model.Object) *api.Object {
	switch o := object.(type) {
	case *api.Node:
		return &api.Object{Object: &api.Object_Node{Node: o}}
	case *api.Service:
		return &api.Object{Object: &api.Object_Service{Service: o}}
	case *api.Network:
		return &api.Object{Object: &api.Object_Network{Network: o}}
	case *api.Task:
		return &api.Object{Object: &api.Object_Task{Task: o}}
	case *api.Cluster:
		return &api.Object{Object: &api.Object_Cluster{Cluster: redactCluster(o)}}
	case *api.Secret:
		return &api.Object{Object: &api.Object_Secret{Secret: redacted(o)}}
	case *api.Resource:
		return &api.Object{Object: &api.Object_Resource{Resource: o}}
	case *api.Extension:
		return &api.Object{Object: &api.Object_Extension{Extension: o}}
	case *api.Config:
		return &api.Object{Object: &api.Object_Config{Config: o}}
	case *api.Volume:
		return &api.Object{Object: &api.Object_Volume{Volume: o}}
	default:
		return new(api.Object)
	}
}

func validateEntry(e *api.WatchRequest_WatchEntry) error {
	for t := range model.TableCount {
		if model.Table(t).String() != e.GetKind() {
			continue
		}
		for _, f := range e.GetFilters() {
			switch f.GetBy().(type) {
			case *api.SelectBy_Custom, *api.SelectBy_CustomPrefix, nil:
				return model.Errorf(model.Unimplemented, "watch: this selector of %ss is not implemented by skep", e.GetKind())
			}
		}
		return nil
	}
	return invalid("watch: unknown kind %q", e.GetKind())
}

// selected reports whether an object satisfies all filters.
func selected(object model.Object, filters []*api.SelectBy) bool {
	for _, f := range filters {
		if !selectedBy(object, f) {
			return false
		}
	}
	return true
}

func selectedBy(object model.Object, f *api.SelectBy) bool {
	task, _ := object.(*api.Task)
	node, _ := object.(*api.Node)
	resource, _ := object.(*api.Resource)
	switch by := f.GetBy().(type) {
	case *api.SelectBy_Id:
		return object.GetId() == by.Id
	case *api.SelectBy_IdPrefix:
		return strings.HasPrefix(object.GetId(), by.IdPrefix)
	case *api.SelectBy_Name:
		return strings.EqualFold(nameOf(object), by.Name)
	case *api.SelectBy_NamePrefix:
		return strings.HasPrefix(strings.ToLower(nameOf(object)), strings.ToLower(by.NamePrefix))
	case *api.SelectBy_ServiceId:
		return task != nil && task.GetServiceId() == by.ServiceId
	case *api.SelectBy_NodeId:
		return task != nil && task.GetNodeId() == by.NodeId
	case *api.SelectBy_Slot:
		return task != nil && task.GetServiceId() == by.Slot.GetServiceId() && task.GetSlot() == by.Slot.GetSlot()
	case *api.SelectBy_DesiredState:
		return task != nil && task.GetDesiredState() == by.DesiredState
	case *api.SelectBy_Role:
		return node != nil && node.GetRole() == by.Role
	case *api.SelectBy_Membership:
		return node != nil && node.GetSpec().GetMembership() == by.Membership
	case *api.SelectBy_Kind:
		return resource != nil && resource.GetKind() == by.Kind
	default:
		return references(object, f)
	}
}

// references reports whether a service or task uses the network, secret or config of a selector.
func references(object model.Object, f *api.SelectBy) bool {
	var spec *api.TaskSpec
	switch o := object.(type) {
	case *api.Service:
		spec = o.GetSpec().GetTask()
	case *api.Task:
		spec = o.GetSpec()
	default:
		return false
	}
	for _, n := range spec.GetNetworks() {
		if id := f.GetReferencedNetworkId(); id != "" && n.GetTarget() == id {
			return true
		}
	}
	for _, s := range spec.GetContainer().GetSecrets() {
		if id := f.GetReferencedSecretId(); id != "" && s.GetSecretId() == id {
			return true
		}
	}
	for _, c := range spec.GetContainer().GetConfigs() {
		if id := f.GetReferencedConfigId(); id != "" && c.GetConfigId() == id {
			return true
		}
	}
	return false
}

// nameOf returns the name by which an object is selected.
func nameOf(object model.Object) string {
	switch o := object.(type) {
	case *api.Node:
		return o.GetDescription().GetHostname()
	case *api.Task:
		return model.TaskName(o)
	default:
		return model.NameOf(o)
	}
}
