package dispatcher

import (
	"context"
	"crypto/rand"
	"errors"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
	"github.com/skep-dev/skep/platform/wire"
)

// AttachNetwork makes a task that stands for a container which a node started by itself
// and wants in a network of the swarm. The node learns its addresses as an assignment.
func (d *Dispatcher) AttachNetwork(ctx context.Context, req *api.AttachNetworkRequest) (*api.AttachNetworkResponse, error) {
	nodeID, _, err := d.cfg.Caller(ctx)
	if err != nil {
		return nil, err
	}
	target := req.GetConfig().GetTarget()
	if target == "" {
		return nil, status.Error(codes.InvalidArgument, "no network given")
	}
	if err := boundNames(req.GetConfig().GetAliases()); err != nil {
		return nil, err
	}
	id, err := model.NewID(rand.Reader)
	if err != nil {
		return nil, err
	}
	cursor := d.cfg.State.Follow()
	_, err = d.cfg.State.Update(ctx, func(tx *store.Tx) error {
		s := tx.Snapshot()
		n := s.Network(target)
		if n == nil {
			n = s.Network(s.IDByName(model.Networks, target))
		}
		switch {
		case s.Node(nodeID) == nil:
			return model.Errorf(model.NotFound, "node %s not found", nodeID)
		case n == nil:
			return model.Errorf(model.NotFound, "network %s not found", target)
		case !n.GetSpec().GetAttachable():
			return model.Errorf(model.Denied, "network %s not manually attachable", target)
		case model.Foreign(s.Node(nodeID).GetDescription()) && model.Unshared(n) != "":
			return model.Errorf(model.Precondition, "network %s %s and does not reach Docker Engine", n.GetSpec().GetAnnotations().GetName(), model.Unshared(n))
		}
		return tx.Create(&api.Task{
			Id: id, NodeId: nodeID, DesiredState: api.TaskState_RUNNING,
			Spec: &api.TaskSpec{
				Runtime: &api.TaskSpec_Attachment{Attachment: &api.NetworkAttachmentSpec{ContainerId: req.GetContainerId()}},
				Networks: []*api.NetworkAttachmentConfig{{
					Target: n.GetId(), Addresses: req.GetConfig().GetAddresses(), Aliases: req.GetConfig().GetAliases(),
				}},
			},
			Status: &api.TaskStatus{State: api.TaskState_NEW, Timestamp: timestamppb.New(tx.Now()), Message: "created"},
		})
	})
	if err != nil {
		return nil, wire.ToStatus(err)
	}
	if reason := refusal(ctx, cursor, id); reason != "" {
		_, err := d.cfg.State.Update(ctx, func(tx *store.Tx) error {
			if tx.Snapshot().Task(id) == nil {
				return nil
			}
			return tx.Remove(model.Tasks, id)
		})
		return nil, wire.ToStatus(errors.Join(model.Errorf(model.Precondition, "%s", reason), err))
	}
	return &api.AttachNetworkResponse{AttachmentId: id}, nil
}

// Every node that has a network hears all names in it: what a container may have of them is
// bounded, far above what people need. No name of DNS is longer.
const (
	maxNames     = 128
	maxNameBytes = 255
)

// boundNames refuses more or longer names of a container than nodes are told.
func boundNames(names []string) error {
	if len(names) > maxNames {
		return status.Errorf(codes.InvalidArgument, "%d names of a container in a network, at most %d are allowed", len(names), maxNames)
	}
	for _, n := range names {
		if len(n) > maxNameBytes {
			return status.Errorf(codes.InvalidArgument, "a name of %d bytes of a container in a network, at most %d are allowed: %.40s...", len(n), maxNameBytes, n)
		}
	}
	return nil
}

// refusalTimeout bounds how long a call waits to see whether an attachment can have an
// address. Without a word by then it is up to the node how long to wait.
const refusalTimeout = 2 * time.Second

// refusal waits until a new attachment has its addresses and returns an empty text, or why it
// cannot have any.
func refusal(ctx context.Context, cursor *replica.Cursor, id string) string {
	ctx, cancel := context.WithTimeout(ctx, refusalTimeout)
	defer cancel()
	for {
		if t := cursor.Snapshot().Task(id); t != nil && (t.GetStatus().GetState() > api.TaskState_NEW || t.GetStatus().GetErr() != "") {
			if t.GetStatus().GetState() > api.TaskState_NEW {
				return ""
			}
			return t.GetStatus().GetErr()
		}
		if _, _, err := cursor.Next(ctx); err != nil {
			return ""
		}
	}
}

// DetachNetwork removes the task that AttachNetwork made.
func (d *Dispatcher) DetachNetwork(ctx context.Context, req *api.DetachNetworkRequest) (*api.DetachNetworkResponse, error) {
	nodeID, _, err := d.cfg.Caller(ctx)
	if err != nil {
		return nil, err
	}
	id := req.GetAttachmentId()
	if id == "" {
		return nil, status.Error(codes.InvalidArgument, "no attachment given")
	}
	_, err = d.cfg.State.Update(ctx, func(tx *store.Tx) error {
		if _, err := attachmentOf(tx, nodeID, id); err != nil {
			return err
		}
		return tx.Remove(model.Tasks, id)
	})
	if err != nil {
		return nil, wire.ToStatus(err)
	}
	return new(api.DetachNetworkResponse), nil
}

// attachmentOf returns a node's attachment.
func attachmentOf(tx *store.Tx, nodeID, id string) (*api.Task, error) {
	switch t := tx.Snapshot().Task(id); {
	case t == nil || t.GetSpec().GetAttachment() == nil:
		return nil, model.Errorf(model.NotFound, "attachment %s not found", id)
	case t.GetNodeId() != nodeID:
		return nil, model.Errorf(model.Denied, "attachment %s belongs to another node", id)
	default:
		return t, nil
	}
}

// RenameAttachments changes the names by which all nodes know a container of the calling one.
func (n *networks) RenameAttachments(ctx context.Context, req *skepv1.RenameAttachmentsRequest) (*skepv1.RenameAttachmentsResponse, error) {
	nodeID, _, err := n.d.cfg.Caller(ctx)
	if err != nil {
		return nil, err
	}
	for _, a := range req.GetAttachments() {
		if err := boundNames(a.GetAliases()); err != nil {
			return nil, err
		}
	}
	_, err = n.d.cfg.State.Update(ctx, func(tx *store.Tx) error {
		for _, a := range req.GetAttachments() {
			t, err := attachmentOf(tx, nodeID, a.GetAttachmentId())
			if err != nil {
				return err
			}
			if named(t, a.GetAliases()) {
				continue
			}
			t = model.Clone(t)
			for _, c := range t.GetSpec().GetNetworks() {
				c.Aliases = a.GetAliases()
			}
			for _, c := range t.GetNetworks() {
				c.Aliases = a.GetAliases()
			}
			if err := tx.Update(t); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, wire.ToStatus(err)
	}
	return new(skepv1.RenameAttachmentsResponse), nil
}

// named reports whether an attachment has these names already.
func named(t *api.Task, names []string) bool {
	return !slices.ContainsFunc(t.GetSpec().GetNetworks(), func(c *api.NetworkAttachmentConfig) bool { return !slices.Equal(c.GetAliases(), names) }) &&
		!slices.ContainsFunc(t.GetNetworks(), func(c *api.NetworkAttachment) bool { return !slices.Equal(c.GetAliases(), names) })
}
