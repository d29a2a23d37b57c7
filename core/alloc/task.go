package alloc

import (
	"net/netip"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// pendingMessage is the status message of a task that waits for a node.
const pendingMessage = "pending task scheduling"

// ended reports whether a task will not use its addresses any more.
func ended(t *api.Task) bool {
	return t.GetDesiredState() > api.TaskState_RUNNING && t.GetStatus().GetState() > api.TaskState_RUNNING
}

// claims returns what an attachment holds in the network.
func (n *network) claims(a *api.NetworkAttachment) []claim {
	var out []claim
	for _, cidr := range a.GetAddresses() {
		out = append(out, n.addresses(cidr)...)
	}
	return out
}

func (s *State) attachmentClaims(attachments []*api.NetworkAttachment) []claim {
	var out []claim
	for _, a := range attachments {
		if n := s.networks[a.GetNetwork().GetId()]; n != nil {
			out = append(out, n.claims(a)...)
		}
	}
	return out
}

// setTask notes the stored record of a task.
func (s *State) setTask(id string, stored *api.Task) {
	o := owner{model.Tasks, id}
	switch {
	case stored == nil || ended(stored):
		s.setClaims(o, nil)
	case len(stored.GetNetworks()) > 0 || s.claims[o] != nil:
		s.setClaims(o, s.attachmentClaims(stored.GetNetworks()))
	}
}

// setNode notes the stored record of a node.
func (s *State) setNode(id string, stored *api.Node) {
	if stored == nil || stored.GetStatus().GetState() == api.NodeStatus_DOWN {
		delete(s.present, id)
	} else {
		s.present[id] = stored
	}
	s.setClaims(owner{model.Nodes, id}, s.attachmentClaims(stored.GetAttachments()))
}

// Task gives a new task of a service (nil for a task without one) its endpoint and
// networks and moves it from NEW to PENDING. service is the error that Service returned
// for it. If the task cannot be served, its status says why, it stays NEW and the error
// is a *BlockedError. Task edits t, which must not be stored, and reports whether it
// changed anything.
func (s *State) Task(t *api.Task, v *api.Service, service error, now time.Time) (bool, error) {
	if t.GetStatus().GetState() != api.TaskState_NEW {
		return false, nil
	}
	g := &grant{State: s, owner: owner{model.Tasks, t.GetId()}}
	err := service
	var attachments []*api.NetworkAttachment
	if err == nil {
		attachments, err = g.attach(t, v)
	}
	if err != nil {
		g.undo(0)
		return explain(t, err), err
	}
	g.keep()
	t.Networks = attachments
	if v.GetEndpoint() != nil {
		t.Endpoint = model.Clone(v.GetEndpoint())
	}
	t.Status = &api.TaskStatus{
		State: api.TaskState_PENDING, Message: pendingMessage, Timestamp: timestamppb.New(now),
	}
	return true, nil
}

// explain writes into a task's status why it waits.
func explain(t *api.Task, err error) bool {
	if b, ok := err.(*BlockedError); ok && b.Text == "" || t.GetStatus().GetErr() == err.Error() { //nolint:errorlint // made here
		return false
	}
	t.Status.Err = err.Error()
	return true
}

// attach makes the attachments that a task needs: the ingress network's first, if its
// service is published through the mesh, then those that its spec names.
func (g *grant) attach(t *api.Task, v *api.Service) ([]*api.NetworkAttachment, error) {
	var out []*api.NetworkAttachment
	if meshed(v) {
		n, err := g.mesh()
		if err != nil {
			return nil, err
		}
		addrs, err := g.addresses(n, nil)
		if err != nil {
			return nil, err
		}
		out = append(out, &api.NetworkAttachment{Network: n.record, Addresses: addrs})
	}
	wanted := t.GetSpec().GetNetworks()
	if len(wanted) == 0 {
		wanted = attachmentsOf(v.GetSpec())
	}
	networks, err := g.attached(wanted)
	if err != nil {
		return nil, err
	}
	for _, n := range networks {
		a := &api.NetworkAttachment{Network: n.record}
		var requested []string
		for _, w := range wanted {
			if g.find(w.GetTarget()) == n {
				a.Aliases = append(a.Aliases, w.GetAliases()...)
				a.DriverAttachmentOpts = w.GetDriverAttachmentOpts()
				requested = append(requested, w.GetAddresses()...)
			}
		}
		if n.overlay() {
			if a.Addresses, err = g.requested(n, requested); err != nil {
				return nil, err
			}
		}
		out = append(out, a)
	}
	return out, nil
}

// requested gives the owner the addresses that it asks for, and any of the families for
// which it asks none.
func (g *grant) requested(n *network, texts []string) ([]string, error) {
	var wanted []string
	for _, text := range texts {
		a, err := netip.ParseAddr(text)
		if err != nil {
			p, err := netip.ParsePrefix(text)
			if err != nil {
				return nil, blocked(n.record.GetId(), "network %s: the requested address %q is no IP address", nameOf(n.record), text)
			}
			a = p.Addr()
		}
		i := slices.IndexFunc(n.subnets, func(sub *subnet) bool { return sub.prefix.Contains(a) })
		if i < 0 {
			return nil, blocked(n.record.GetId(), "network %s: the requested address %s is in none of its subnets", nameOf(n.record), a)
		}
		v, ok := n.subnets[i].number(a)
		if ok && !n.subnets[i].host(v) {
			return nil, blocked(n.record.GetId(), "network %s: the requested address %s belongs to the subnet itself", nameOf(n.record), a)
		}
		if !ok || !g.want(n.subnets[i].pool, v) {
			return nil, blocked(n.record.GetId(), "network %s: the requested address %s is in use: ask for another one, or for none", nameOf(n.record), a)
		}
		wanted = append(wanted, n.subnets[i].cidr(v))
	}
	return g.addresses(n, wanted)
}

// Node returns the edited copy of a node that lacks an address in the ingress network or in
// one of others, or that has one in another network; nil when there is nothing to do. Others
// are the networks of a Docker Engine's tasks: it balances from an address in each. It has
// none in networks that it cannot take part in. The error is a *BlockedError; the copy then
// has what there was.
func (s *State) Node(v *api.Node, others ...string) (*api.Node, error) {
	ids := []string{s.ingress}
	for _, id := range others {
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	g := &grant{State: s, owner: owner{model.Nodes, v.GetId()}}
	var want []*api.NetworkAttachment
	var legacy *api.NetworkAttachment
	var failed error
	for _, id := range ids {
		n := s.networks[id]
		if n == nil || !n.ready() || !n.overlay() || model.Foreign(v.GetDescription()) && model.Unshared(n.record) != "" {
			continue
		}
		var present []string
		for _, a := range v.GetAttachments() {
			if a.GetNetwork().GetId() == id {
				present = a.GetAddresses()
			}
		}
		addrs, err := g.addresses(n, present)
		if err != nil {
			failed = err
			continue
		}
		a := &api.NetworkAttachment{Network: n.record, Addresses: addrs}
		want = append(want, a)
		if id == s.ingress {
			legacy = a
		}
	}
	g.keep()
	edited := &api.Node{Attachments: want, Attachment: legacy}                        //nolint:staticcheck // Docker Engines fall back to it
	have := &api.Node{Attachments: v.GetAttachments(), Attachment: v.GetAttachment()} //nolint:staticcheck // as above
	if proto.Equal(edited, have) {
		return nil, failed
	}
	v = model.Clone(v)
	v.Attachments, v.Attachment = want, legacy //nolint:staticcheck // as above
	return v, failed
}
