// Package alloc gives services and tasks what they need of the network before a node
// is chosen: endpoints with their published ports, and attachments to networks.
//
// Its deciders are functions of stored records that return edited copies; they change
// nothing, keep no state and do not block. Only networks local to each node (bridge,
// host, none) can be attached so far; what needs an overlay network waits, with the
// reason in its status.
package alloc

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// Networks finds a network by id or else by name; nil when there is none.
type Networks func(idOrName string) *api.Network

// pendingMessage is the status message of a task that waits for a node.
const pendingMessage = "pending task scheduling"

// local reports whether a network driver works on each node by itself.
func local(driver string) bool {
	switch driver {
	case "bridge", "host", "none", "null", "ipvlan", "macvlan":
		return true
	}
	return false
}

// Network returns the edited copy of a network that lacks its driver state, or nil when
// there is nothing to do or it is not local to nodes.
func Network(n *api.Network) *api.Network {
	driver := n.GetSpec().GetDriverConfig().GetName()
	if n.GetDriverState() != nil && n.GetIpam().GetDriver() != nil || !local(driver) {
		return nil
	}
	n = model.Clone(n)
	n.DriverState = &api.Driver{Name: driver}
	n.Ipam = &api.IPAMOptions{Driver: &api.Driver{}}
	return n
}

// Service returns the edited copy of a service whose endpoint does not match its spec,
// or nil when there is nothing to do.
func Service(s *api.Service) *api.Service {
	spec := s.GetSpec().GetEndpoint()
	if spec == nil {
		spec = &api.EndpointSpec{}
	}
	want := &api.Endpoint{Spec: model.Clone(spec)}
	for _, p := range spec.GetPorts() {
		want.Ports = append(want.Ports, model.Clone(p))
	}
	if have := s.GetEndpoint(); have != nil && proto.Equal(want, have) {
		return nil
	}
	s = model.Clone(s)
	s.Endpoint = want
	return s
}

// Task gives a new task of a service (nil for a task without one) its endpoint and
// networks and moves it from NEW to PENDING. If that cannot be done it writes the
// reason into the task's status and leaves it NEW. It edits t, which must not be
// stored, and reports whether it changed anything.
func Task(t *api.Task, s *api.Service, networks Networks, now time.Time) bool {
	if t.GetStatus().GetState() != api.TaskState_NEW {
		return false
	}
	attachments, err := attach(t, s, networks)
	if err == nil {
		err = published(s)
	}
	if err != nil {
		if t.GetStatus().GetErr() == err.Error() {
			return false
		}
		t.Status.Err = err.Error()
		return true
	}
	t.Networks = attachments
	if s.GetEndpoint() != nil {
		t.Endpoint = model.Clone(s.GetEndpoint())
	}
	t.Status = &api.TaskStatus{
		State: api.TaskState_PENDING, Message: pendingMessage, Timestamp: timestamppb.New(now),
	}
	return true
}

// attach makes the attachments that a task's spec asks for.
func attach(t *api.Task, s *api.Service, networks Networks) ([]*api.NetworkAttachment, error) {
	wanted := t.GetSpec().GetNetworks()
	if len(wanted) == 0 {
		wanted = s.GetSpec().GetNetworks() //nolint:staticcheck // old clients put them there
	}
	var out []*api.NetworkAttachment
	for _, w := range wanted {
		n := networks(w.GetTarget())
		if n == nil {
			return nil, fmt.Errorf("network %s not found", w.GetTarget())
		}
		if !local(n.GetDriverState().GetName()) {
			return nil, fmt.Errorf("network %s needs an overlay, which skep does not provide yet", n.GetSpec().GetAnnotations().GetName())
		}
		out = append(out, &api.NetworkAttachment{
			Network: model.Clone(n), Aliases: w.GetAliases(), DriverAttachmentOpts: w.GetDriverAttachmentOpts(),
		})
	}
	return out, nil
}

// published refuses ports that only the routing mesh could publish.
func published(s *api.Service) error {
	for _, p := range s.GetSpec().GetEndpoint().GetPorts() {
		if p.GetPublishMode() == api.PortConfig_INGRESS {
			return fmt.Errorf("port %d is published in ingress mode, which skep does not provide yet: use mode=host", p.GetTargetPort())
		}
	}
	return nil
}
