package dispatcher

import (
	"context"
	"crypto/rand"
	"slices"
	"strings"
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/netplan"
	"github.com/skep-dev/skep/core/store"
	"github.com/skep-dev/skep/platform/wire"
)

// checkTimeout bounds how long nodes may take to compare and mend.
const checkTimeout = 10 * time.Second

// check is one check of all nodes under way.
type check struct {
	waiting map[string]bool
	answers map[string]*skepv1.CheckedRequest
	done    chan struct{} // closed when nobody is waited for
}

// answer notes what a node said, nil for nothing. Callers hold mu.
func (c *check) answer(nodeID string, a *skepv1.CheckedRequest) {
	if !c.waiting[nodeID] {
		return
	}
	delete(c.waiting, nodeID)
	if a != nil {
		c.answers[nodeID] = a
	}
	if len(c.waiting) == 0 {
		close(c.done)
	}
}

// order returns the oldest check that a node was not asked for yet, with the digest of
// what it has been told then, or nil. Callers hold mu.
func (n *networks) order(w *watcher) *skepv1.CheckOrder {
	if len(w.checks) == 0 {
		return nil
	}
	id := w.checks[0]
	if w.checks = w.checks[1:]; len(w.checks) > 0 {
		w.signal()
	}
	u, _ := n.table.Complete(w.nodeID)
	return &skepv1.CheckOrder{Id: id, Digest: netplan.Digest(u)}
}

// abandon ends waiting for a node that went away. Callers hold mu.
func (n *networks) abandon(nodeID string) {
	for _, c := range n.checks {
		c.answer(nodeID, nil)
	}
}

// Check has all nodes compare their kernels with what they should hold.
func (n *networks) Check(ctx context.Context, req *skepv1.CheckNetworksRequest) (*skepv1.CheckNetworksResponse, error) {
	s := n.d.cfg.State.View()
	only, err := networksOf(s, req.GetTarget())
	if err != nil {
		return nil, wire.ToStatus(err)
	}
	id, err := model.NewID(rand.Reader)
	if err != nil {
		return nil, err
	}
	c := n.ask(id)
	if c == nil {
		return nil, errStopped()
	}
	timer := time.NewTimer(checkTimeout)
	defer timer.Stop()
	select {
	case <-c.done:
	case <-timer.C:
	case <-ctx.Done():
	}
	n.mu.Lock()
	delete(n.checks, id)
	answers := c.answers
	c.answers = map[string]*skepv1.CheckedRequest{} // late answers go nowhere
	n.mu.Unlock()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	resp := new(skepv1.CheckNetworksResponse)
	for node := range s.Nodes() {
		resp.Nodes = append(resp.Nodes, verdict(s, node, answers[node.GetId()], only))
	}
	slices.SortFunc(resp.Nodes, func(a, b *skepv1.NodeNetworks) int {
		if c := strings.Compare(a.GetNodeName(), b.GetNodeName()); c != 0 {
			return c
		}
		return strings.Compare(a.GetNodeId(), b.GetNodeId())
	})
	return resp, nil
}

// ask sends a check to all nodes that listen; nil while not leading.
func (n *networks) ask(id string) *check {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.table == nil {
		return nil
	}
	c := &check{waiting: map[string]bool{}, answers: map[string]*skepv1.CheckedRequest{}, done: make(chan struct{})}
	n.checks[id] = c
	for nodeID, w := range n.watchers {
		c.waiting[nodeID] = true
		w.checks = append(w.checks, id)
		w.signal()
	}
	if len(c.waiting) == 0 {
		close(c.done)
	}
	return c
}

// Checked notes a node's answer. One that knows something else than it was told is told
// everything again.
func (n *networks) Checked(ctx context.Context, req *skepv1.CheckedRequest) (*skepv1.CheckedResponse, error) {
	nodeID, _, err := n.d.cfg.Caller(ctx)
	if err != nil {
		return nil, err
	}
	if _, _, err := n.d.check(nodeID, req.GetSessionId()); err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if c := n.checks[req.GetCheckId()]; c != nil {
		c.answer(nodeID, req)
	}
	for _, x := range req.GetDifferences() {
		if w := n.watchers[nodeID]; x.GetKind() == "state" && w != nil {
			x.Mended = true
			w.keys = nil
			w.signal()
		}
	}
	return new(skepv1.CheckedResponse), nil
}

// networksOf returns the ids of the networks that a target means, nil for all.
func networksOf(s *store.Snapshot, target string) (map[string]bool, error) {
	if target == "" {
		return nil, nil //nolint:nilnil // nil is the answer "all"
	}
	for _, id := range []string{target, s.IDByName(model.Networks, target)} {
		if s.Network(id) != nil {
			return map[string]bool{id: true}, nil
		}
	}
	for _, id := range []string{target, s.IDByName(model.Services, target)} {
		v := s.Service(id)
		if v == nil {
			continue
		}
		out := map[string]bool{}
		for _, a := range v.GetSpec().GetTask().GetNetworks() {
			out[a.GetTarget()] = true
		}
		for _, vip := range v.GetEndpoint().GetVirtualIps() {
			out[vip.GetNetworkId()] = true
		}
		return out, nil
	}
	return nil, model.Errorf(model.NotFound, "there is no network or service %s", target)
}

// verdict is what is known of one node's networks.
func verdict(s *store.Snapshot, node *api.Node, answer *skepv1.CheckedRequest, only map[string]bool) *skepv1.NodeNetworks {
	out := &skepv1.NodeNetworks{NodeId: node.GetId(), NodeName: node.GetDescription().GetHostname()}
	if answer == nil {
		switch {
		case node.GetStatus().GetState() != api.NodeStatus_READY:
			out.Unchecked = "the node is " + strings.ToLower(node.GetStatus().GetState().String())
		case model.Foreign(node.GetDescription()):
			out.Unchecked = "a Docker Engine: it keeps its networks itself"
		default:
			out.Unchecked, out.Missing = "no answer", true
		}
		return out
	}
	out.Error = answer.GetError()
	for _, x := range answer.GetDifferences() {
		if only != nil && x.GetKind() != "state" && !slices.ContainsFunc(x.GetNetworkIds(), func(id string) bool { return only[id] }) {
			continue
		}
		for _, id := range x.GetNetworkIds() {
			x.NetworkNames = append(x.NetworkNames, s.Network(id).GetSpec().GetAnnotations().GetName())
		}
		out.Differences = append(out.Differences, x)
	}
	return out
}
