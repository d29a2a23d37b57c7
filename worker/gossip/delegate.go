package gossip

import (
	"errors"
	"log/slog"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/skep-dev/skep/core/netdb"
)

// The methods by which memberlist asks and tells a cluster. It calls them from goroutines of
// its own, some while it holds its lock: they take the cluster's lock and never call back.

// NodeMeta implements memberlist.Delegate.
func (c *cluster) NodeMeta(int) []byte { return []byte{} }

// NotifyMsg implements memberlist.Delegate.
func (c *cluster) NotifyMsg(msg []byte) {
	c.mu.Lock()
	a, err := c.db.Receive(msg, time.Now())
	c.mu.Unlock()
	if err != nil {
		c.log.Debug("gossip message ignored", slog.Any("error", err))
		return
	}
	c.pass(a.Broadcasts...)
	if a.Sync == nil {
		return
	}
	if a.Sync.Unsolicited {
		c.mu.Lock()
		c.answer(a.Sync)
		c.mu.Unlock()
		return
	}
	c.answered(a.Sync)
}

// GetBroadcasts implements memberlist.Delegate.
func (c *cluster) GetBroadcasts(overhead, limit int) [][]byte {
	return c.broadcasts.GetBroadcasts(overhead, limit)
}

// LocalState implements memberlist.Delegate.
func (c *cluster) LocalState(join bool) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.db.State(join)
}

// MergeRemoteState implements memberlist.Delegate.
func (c *cluster) MergeRemoteState(state []byte, _ bool) {
	c.mu.Lock()
	err := c.db.Merge(state, time.Now())
	c.mu.Unlock()
	if err != nil {
		c.log.Debug("gossip state ignored", slog.Any("error", err))
	}
}

// NotifyAlive implements memberlist.AliveDelegate: what it refuses is as if it had not come.
func (c *cluster) NotifyAlive(n *memberlist.Node) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(n.Meta) > memberlist.MetaMaxSize || len(n.Name) > maxName || c.members[n.Name] == nil && len(c.members) >= maxMembers {
		return errors.New("too much")
	}
	return nil
}

// NotifyJoin implements memberlist.EventDelegate.
func (c *cluster) NotifyJoin(n *memberlist.Node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n.Name == c.name {
		return
	}
	known := *n // memberlist changes its own
	c.members[n.Name] = &known
	c.size.Store(int64(len(c.members)))
	c.db.NodeUp(n.Name, n.Address(), time.Now())
	if e, asked := c.early[n.Name]; asked {
		delete(c.early, n.Name)
		c.respond(e.sync)
	}
}

// NotifyLeave implements memberlist.EventDelegate.
func (c *cluster) NotifyLeave(n *memberlist.Node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.members, n.Name)
	c.size.Store(int64(len(c.members)))
	c.db.NodeDown(n.Name, time.Now())
}

// NotifyUpdate implements memberlist.EventDelegate.
func (c *cluster) NotifyUpdate(n *memberlist.Node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.members[n.Name] != nil {
		known := *n
		c.members[n.Name] = &known
	}
}

// broadcast is an event on its way to all nodes.
type broadcast struct{ netdb.Broadcast }

// Invalidates implements memberlist.Broadcast.
func (b broadcast) Invalidates(o memberlist.Broadcast) bool {
	other, ok := o.(broadcast)
	return ok && other.Broadcast.Name == b.Broadcast.Name
}

// Name implements memberlist.NamedBroadcast.
func (b broadcast) Name() string { return b.Broadcast.Name }

// Message implements memberlist.Broadcast.
func (b broadcast) Message() []byte { return b.Msg }

// Finished implements memberlist.Broadcast.
func (b broadcast) Finished() {}

// pass queues events for all nodes. Too many drop the oldest: those are told by push and pull.
func (c *cluster) pass(list ...netdb.Broadcast) {
	for _, b := range list {
		c.broadcasts.QueueBroadcast(broadcast{b})
	}
	if c.broadcasts.NumQueued() > maxBroadcasts {
		c.broadcasts.Prune(maxBroadcasts)
	}
}
