package ops

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
)

// blacklistMemory is how long after its certificate's expiry a removed node is remembered.
const blacklistMemory = 7 * 24 * time.Hour

// GetNode returns a node with its manager status.
func (o *Ops) GetNode(ctx context.Context, req *api.GetNodeRequest) (*api.GetNodeResponse, error) {
	if err := needID(req.GetNodeId()); err != nil {
		return nil, fail(err)
	}
	state, err := o.state.Read(ctx)
	if err != nil {
		return nil, fail(err)
	}
	n := state.Node(req.GetNodeId())
	if n == nil {
		return nil, fail(notFound("node", req.GetNodeId()))
	}
	return &api.GetNodeResponse{Node: withManagerStatus(n, o.members.Members())}, nil
}

// ListNodes returns the nodes that match all filters.
func (o *Ops) ListNodes(ctx context.Context, req *api.ListNodesRequest) (*api.ListNodesResponse, error) {
	f := req.GetFilters()
	resp := new(api.ListNodesResponse)
	state, err := o.state.Read(ctx)
	if err != nil {
		return nil, fail(err)
	}
	members := o.members.Members()
	for n := range state.Nodes() {
		hostname := n.GetDescription().GetHostname()
		if within(hostname, f.GetNames()) && begins(hostname, f.GetNamePrefixes()) && begins(n.GetId(), f.GetIdPrefixes()) &&
			labelled(n.GetDescription().GetEngine().GetLabels(), f.GetLabels()) &&
			labelled(n.GetSpec().GetAnnotations().GetLabels(), f.GetNodeLabels()) &&
			within(n.GetRole(), f.GetRoles()) && within(n.GetSpec().GetMembership(), f.GetMemberships()) {
			resp.Nodes = append(resp.Nodes, withManagerStatus(n, members))
		}
	}
	return resp, nil
}

// withManagerStatus returns the node as raft sees it now; what is stored of it is ignored.
func withManagerStatus(n *api.Node, members []*api.RaftMember) *api.Node {
	m := memberOf(n.GetId(), members)
	if m == nil && n.GetManagerStatus() == nil {
		return n
	}
	c := model.Clone(n)
	c.ManagerStatus = nil
	if m != nil {
		c.ManagerStatus = &api.ManagerStatus{
			RaftId: m.GetRaftId(), Addr: m.GetAddr(),
			Leader: m.GetStatus().GetLeader(), Reachability: m.GetStatus().GetReachability(),
		}
	}
	return c
}

func memberOf(nodeID string, members []*api.RaftMember) *api.RaftMember {
	for _, m := range members {
		if m.GetNodeId() == nodeID {
			return m
		}
	}
	return nil
}

// UpdateNode changes role, availability, membership and labels of a node.
func (o *Ops) UpdateNode(ctx context.Context, req *api.UpdateNodeRequest) (*api.UpdateNodeResponse, error) {
	if err := needUpdate(req.GetNodeId(), req.GetNodeVersion(), req.GetSpec() != nil); err != nil {
		return nil, fail(err)
	}
	members, voters := o.members.Members(), o.members.Voters()
	var updated *api.Node
	err := o.update(ctx, func(tx *store.Tx) error {
		old := tx.Snapshot().Node(req.GetNodeId())
		if old == nil {
			return notFound("node", req.GetNodeId())
		}
		if err := checkPromotion(old, req.GetSpec()); err != nil {
			return err
		}
		if old.GetSpec().GetDesiredRole() == api.NodeRole_MANAGER && req.GetSpec().GetDesiredRole() == api.NodeRole_WORKER {
			if err := checkDemotion(tx.Snapshot(), old.GetId(), members, voters); err != nil {
				return err
			}
		}
		updated = model.Clone(old)
		updated.Spec = model.Clone(req.GetSpec())
		updated.Meta = at(old.GetMeta(), req.GetNodeVersion())
		return tx.Update(updated)
	})
	if err != nil {
		return nil, fail(err)
	}
	return &api.UpdateNodeResponse{Node: withManagerStatus(updated, members)}, nil
}

// checkPromotion refuses managers that are not Skep's: they could not lead, since they know
// nothing of Skep's networks and services.
func checkPromotion(n *api.Node, spec *api.NodeSpec) error {
	promoted := spec.GetDesiredRole() == api.NodeRole_MANAGER && n.GetSpec().GetDesiredRole() != api.NodeRole_MANAGER
	if !promoted || !model.Foreign(n.GetDescription()) {
		return nil
	}
	return model.Errorf(model.Precondition, "node %s runs Docker Engine %s, which can be a worker of a Skep swarm but not a manager: promote a Skep node",
		n.GetId(), n.GetDescription().GetEngine().GetEngineVersion())
}

// checkDemotion refuses what would end the swarm. It counts wanted managers, not
// present ones, so that demotions under way are taken into account.
func checkDemotion(s *store.Snapshot, nodeID string, members, voters []*api.RaftMember) error {
	if memberOf(nodeID, members) == nil {
		return model.Errorf(model.NotFound, "can't find manager in raft memberlist")
	}
	managers := 0
	for n := range s.Nodes() {
		if n.GetSpec().GetDesiredRole() == api.NodeRole_MANAGER {
			managers++
		}
	}
	if managers <= 1 {
		return model.Errorf(model.Precondition, "attempting to demote the last manager of the swarm")
	}
	if voter := memberOf(nodeID, voters); voter != nil && !quorumWithout(voter, voters) {
		return model.Errorf(model.Precondition, "can't remove member from the raft: this would result in a loss of quorum")
	}
	return nil
}

// quorumWithout reports whether a quorum of reachable voters would be left without one.
func quorumWithout(removed *api.RaftMember, voters []*api.RaftMember) bool {
	reachable := 0
	for _, m := range voters {
		if m.GetRaftId() != removed.GetRaftId() && m.GetStatus().GetReachability() == api.RaftMemberStatus_REACHABLE {
			reachable++
		}
	}
	return reachable > (len(voters)-1)/2
}

// RemoveNode deletes a node that is down, or any with force, orphans its tasks and
// bars its certificate.
func (o *Ops) RemoveNode(ctx context.Context, req *api.RemoveNodeRequest) (*api.RemoveNodeResponse, error) {
	if err := needID(req.GetNodeId()); err != nil {
		return nil, fail(err)
	}
	members := o.members.Members()
	err := o.update(ctx, func(tx *store.Tx) error {
		n := tx.Snapshot().Node(req.GetNodeId())
		if n == nil {
			return notFound("node", req.GetNodeId())
		}
		if memberOf(n.GetId(), members) != nil {
			return model.Errorf(model.Precondition, "node %s is a cluster manager and is a member of the raft cluster. It must be demoted to worker before removal", n.GetId())
		}
		if !req.GetForce() && n.GetStatus().GetState() == api.NodeStatus_READY {
			return model.Errorf(model.Precondition, "node %s is not down and can't be removed", n.GetId())
		}
		if err := o.blacklist(tx, n); err != nil {
			return err
		}
		if err := orphanTasks(tx, n.GetId()); err != nil {
			return err
		}
		return tx.Remove(model.Nodes, n.GetId())
	})
	if err != nil {
		return nil, fail(err)
	}
	return new(api.RemoveNodeResponse), nil
}

// blacklist refuses a removed node's certificate, and has those who stay change the keys of
// encrypted networks.
func (o *Ops) blacklist(tx *store.Tx, n *api.Node) error {
	old := tx.Snapshot().Cluster()
	if old == nil {
		return nil
	}
	c := model.Clone(old)
	if c.BlacklistedCertificates == nil {
		c.BlacklistedCertificates = make(map[string]*api.BlacklistedCertificate)
	}
	c.BlacklistedCertificates[n.GetId()] = pki.Blacklisted(n)
	if len(c.GetNetworkBootstrapKeys()) > 0 {
		if err := pki.AskRotation(tx, o.random, pki.RotateOne); err != nil {
			return err
		}
	}
	purgeBlacklist(c, tx.Now())
	return tx.Update(c)
}

// purgeBlacklist forgets removed nodes whose certificates expired long ago. It changes c.
func purgeBlacklist(c *api.Cluster, now time.Time) {
	for id, entry := range c.GetBlacklistedCertificates() {
		if entry.GetExpiry() != nil && entry.GetExpiry().AsTime().Add(blacklistMemory).Before(now) {
			delete(c.BlacklistedCertificates, id)
		}
	}
}

func orphanTasks(tx *store.Tx, nodeID string) error {
	var tasks []*api.Task
	for t := range tx.Snapshot().TasksByNode(nodeID) {
		if t.GetStatus().GetState() < api.TaskState_COMPLETE {
			tasks = append(tasks, t)
		}
	}
	for _, t := range tasks {
		c := model.Clone(t)
		c.Status = &api.TaskStatus{
			Timestamp: timestamppb.New(tx.Now()), AppliedAt: timestamppb.New(tx.Now()),
			State: api.TaskState_ORPHANED, Message: "Task belonged to a node that has been deleted",
			RuntimeStatus: t.GetStatus().GetRuntimeStatus(), PortStatus: t.GetStatus().GetPortStatus(),
		}
		if err := tx.Update(c); err != nil {
			return err
		}
	}
	return nil
}
