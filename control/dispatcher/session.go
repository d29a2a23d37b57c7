package dispatcher

import (
	"context"
	"crypto/rand"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
)

// The errors that nodes look for.
func errStopped() error       { return status.Error(codes.Aborted, "dispatcher is stopped") }
func errNotRegistered() error { return status.Error(codes.NotFound, "node not registered") }
func errSession() error       { return status.Error(codes.InvalidArgument, "session invalid") }

// Session registers the calling node, or finds its session, and keeps it informed about
// itself and the managers until the session ends.
func (d *Dispatcher) Session(req *api.SessionRequest, stream api.Dispatcher_SessionServer) error {
	ctx := stream.Context()
	nodeID, addr, err := d.cfg.Caller(ctx)
	if err != nil {
		return err
	}
	t, n, session, err := d.register(nodeID, req.GetSessionId())
	if err != nil {
		return err
	}
	if nodeID == d.cfg.NodeID { // it calls itself: what counts is where others reach it
		for _, m := range d.cfg.Members() {
			if m.GetNodeId() == nodeID {
				addr = m.GetAddr()
			}
		}
	}
	if host, _, err := net.SplitHostPort(addr); err == nil {
		addr = host
	}
	ready := &nodeReport{state: api.NodeStatus_READY, addr: addr, description: req.GetDescription()}
	if err := d.reportAndWait(ctx, t, nodeID, ready); err != nil {
		return err
	}
	d.cfg.Log.Debug("session opened", slog.String("node_id", nodeID), slog.String("session_id", session))
	for {
		d.mu.Lock()
		changed, valid := n.changed, n.session == session && d.term == t
		d.mu.Unlock()
		if !valid {
			return errSession()
		}
		msg := d.sessionMessage(nodeID, session)
		if msg.GetNode() == nil {
			return status.Error(codes.Aborted, "node must disconnect")
		}
		if err := stream.Send(msg); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-n.ended:
			return d.whyEnded(t, n, nodeID)
		case <-t.ctx.Done():
			return errStopped()
		case <-ctx.Done():
			d.lostStream(t, n, session)
			return ctx.Err()
		}
	}
}

// whyEnded is the error of a stream whose session is over: replaced by a newer one, or
// ended by this manager.
func (d *Dispatcher) whyEnded(t *term, n *node, nodeID string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if now := t.nodes[nodeID]; now != nil && now != n {
		return errSession()
	}
	return status.Error(codes.Aborted, "node must disconnect")
}

// register finds or makes the session of a node.
func (d *Dispatcher) register(nodeID, session string) (*term, *node, string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	t := d.term
	if t == nil {
		return nil, nil, "", errStopped()
	}
	if d.cfg.State.View().Node(nodeID) == nil {
		return nil, nil, "", status.Error(codes.Unknown, "node not found")
	}
	now := time.Now()
	n := t.nodes[nodeID]
	if n != nil && session != "" && n.session == session {
		n.deadline = now.Add(d.grace(d.period()))
		return t, n, session, nil
	}
	fresh := &node{changed: make(chan struct{}), ended: make(chan struct{})}
	if n != nil {
		fresh.paid = n.paid
		if fresh.paid.Before(now) {
			fresh.paid = now
		}
		if fresh.paid = fresh.paid.Add(ratePause); fresh.paid.Sub(now) > rateLimit*ratePause {
			return nil, nil, "", status.Errorf(codes.Unavailable, "node %s exceeded rate limit count of registrations", nodeID)
		}
		n.session = "" // the old streams find out
		n.end()
	}
	var err error
	if fresh.session, err = model.NewID(rand.Reader); err != nil {
		return nil, nil, "", err
	}
	fresh.deadline = now.Add(d.grace(d.period()))
	t.nodes[nodeID] = fresh
	d.metrics.sessions.Set(float64(len(t.nodes)))
	return t, fresh, fresh.session, nil
}

// check returns a node's registration if the session is its current one.
func (d *Dispatcher) check(nodeID, session string) (*term, *node, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.term == nil {
		return nil, nil, errStopped()
	}
	n := d.term.nodes[nodeID]
	if n == nil {
		return nil, nil, errNotRegistered()
	}
	if session == "" || n.session != session {
		return nil, nil, errSession()
	}
	return d.term, n, nil
}

// lostStream shortens the patience with a node whose connection broke: it must be back
// within the grace of one lost node, or it counts as lost.
func (d *Dispatcher) lostStream(t *term, n *node, session string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.term != t || n.session != session {
		return
	}
	if soon := time.Now().Add(d.grace(d.period())); soon.Before(n.deadline) {
		n.deadline = soon
	}
}

// networkKeys are the cluster's network keys for a node. Skep's nodes are told per network what
// they share with others, and not what that is derived from. Docker Engines insist on keys for
// encrypted overlays, though they are in none that Skep's nodes are in: theirs are others, which
// follow from the cluster's so that all have the same.
func networkKeys(c *api.Cluster, n *api.Node) []*api.EncryptionKey {
	foreign := model.Foreign(n.GetDescription())
	var out []*api.EncryptionKey
	for _, k := range c.GetNetworkBootstrapKeys() {
		switch {
		case k.GetSubsystem() != pki.OverlayKeys:
			out = append(out, k)
		case foreign:
			out = append(out, pki.DockerKey(k))
		}
	}
	return out
}

func (d *Dispatcher) sessionMessage(nodeID, session string) *api.SessionMessage {
	view := d.cfg.State.View()
	msg := &api.SessionMessage{
		SessionId:            session,
		Node:                 view.Node(nodeID),
		NetworkBootstrapKeys: networkKeys(view.Cluster(), view.Node(nodeID)),
		RootCA:               view.Cluster().GetRootCa().GetCaCert(),
		Managers:             d.managers(),
	}
	return msg
}

// period returns the heartbeat period asked of nodes, without jitter.
func (d *Dispatcher) period() time.Duration {
	period := d.cfg.State.View().Cluster().GetSpec().GetDispatcher().GetHeartbeatPeriod().AsDuration()
	if period <= 0 || period == defaultPeriod {
		return skepPeriod
	}
	return period
}

// grace returns how long a node may be silent.
func (d *Dispatcher) grace(period time.Duration) time.Duration { return graceFactor * period }

// Heartbeat keeps a session alive and says when the next beat is due.
func (d *Dispatcher) Heartbeat(ctx context.Context, req *api.HeartbeatRequest) (*api.HeartbeatResponse, error) {
	nodeID, _, err := d.cfg.Caller(ctx)
	if err != nil {
		return nil, err
	}
	_, n, err := d.check(nodeID, req.GetSessionId())
	if err != nil {
		return nil, err
	}
	period := d.period()
	period += time.Duration((mathrand.Float64() - 0.5) * 0.2 * float64(period))
	d.mu.Lock()
	n.deadline = time.Now().Add(d.grace(period))
	d.mu.Unlock()
	return &api.HeartbeatResponse{Period: durationpb.New(period)}, nil
}

// expire marks nodes down whose heartbeats have stopped, and tells the others when the
// managers changed. Time in which this process did not run (a paused machine, a stopped
// process) is nobody's silence: heartbeats could not be heard then.
func (d *Dispatcher) expire(ctx context.Context, t *term) error {
	began := time.Now()
	unknownChecked := false
	managers := d.managers()
	tick := time.NewTicker(expireTick)
	defer tick.Stop()
	for last := began; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			managers = d.membersChanged(t, managers)
			now := time.Now()
			deaf := max(0, now.Sub(last)-2*expireTick)
			last, began = now, began.Add(deaf)
			d.mu.Lock()
			for id, n := range t.nodes {
				n.deadline = n.deadline.Add(deaf)
				if now.Before(n.deadline) {
					continue
				}
				delete(t.nodes, id)
				n.session = ""
				n.end()
				d.metrics.sessions.Set(float64(len(t.nodes)))
				t.pending.node(id, &nodeReport{state: api.NodeStatus_DOWN, message: "heartbeat failure"})
				t.wakeWriter()
				d.cfg.Log.Warn("node lost", slog.String("node_id", id))
			}
			d.mu.Unlock()
			if !unknownChecked && now.Sub(began) > max(unknownGrace, 2*graceFactor*d.period()) {
				unknownChecked = true
				d.downUnknown(t)
			}
		}
	}
}

// downUnknown marks nodes down that did not come to this leader.
func (d *Dispatcher) downUnknown(t *term) {
	view := d.cfg.State.View()
	d.mu.Lock()
	defer d.mu.Unlock()
	for node := range view.Nodes() {
		if node.GetStatus().GetState() == api.NodeStatus_UNKNOWN && t.nodes[node.GetId()] == nil && node.GetDescription() != nil {
			t.pending.node(node.GetId(), &nodeReport{state: api.NodeStatus_DOWN, message: `heartbeat failure for node in "unknown" state`})
		}
	}
	t.wakeWriter()
}
