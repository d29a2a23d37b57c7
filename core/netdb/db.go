package netdb

import (
	"maps"
	"slices"
	"time"

	"github.com/skep-dev/skep/api/networkdb"
)

// DB is a node's replica.
type DB struct {
	self string
	// networkClock orders node and network events, tableClock rows. Both follow every time
	// that is heard.
	networkClock, tableClock uint64
	nodes                    map[string]*node // the others, by name
	attachments              int              // of all nodes
	mine                     map[string]*membership
	left                     map[string]attachment // networks that this node left
	rows                     map[string]map[rowKey]*row
	count, bytes             int // of rows
	refused                  uint64
}

// follow raises a clock to a time that was heard, unless nobody can have counted that far.
func follow(clock *uint64, heard uint64) bool {
	if heard > *clock && heard-*clock > maxStep {
		return false
	}
	*clock = max(*clock, heard)
	return true
}

type standing int

const (
	active standing = iota
	// failed nodes are out of reach: their rows are hidden until they are back or forgotten.
	failed
	// left nodes said so, or were replaced by another at their address.
	left
)

// node is another node.
type node struct {
	addr     string // with port
	standing standing
	listed   bool      // the transport has it for alive
	since    time.Time // when it failed or left
	time     uint64    // of its last event
	networks map[string]*attachment
}

// attachment is a node's part in a network.
type attachment struct {
	time    uint64
	leaving bool
	reap    time.Time // set when leaving
}

// membership is this node's own part in a network.
type membership struct {
	time uint64
	// synced is set once others were asked for all rows.
	synced bool
	queue  queue
}

// Broadcast is a message for all nodes. A newer one replaces another of the same Name.
type Broadcast struct {
	Name string
	Msg  []byte
}

// New returns an empty replica of a node. Its clocks begin at epoch, which shall be greater
// than any time that a former process of the same name used: seconds since 1970 are.
func New(self string, epoch uint64) *DB {
	return &DB{
		self: self, networkClock: epoch, tableClock: epoch, nodes: map[string]*node{}, mine: map[string]*membership{},
		left: map[string]attachment{}, rows: map[string]map[rowKey]*row{},
	}
}

// NodeUp takes over that the transport found a node, or has it back. Another node at the same
// address is one's former process: if the transport has lost it, it has left. If it has both for
// alive it may tell of the older one last, so the other is out of reach until one is lost or
// speaks.
func (d *DB) NodeUp(name, addr string, now time.Time) {
	if name == d.self {
		return
	}
	n := d.nodes[name]
	if n == nil {
		if len(name) > maxName || len(d.nodes) >= maxNodes && !d.evict() {
			d.refused++
			return
		}
		n = &node{networks: map[string]*attachment{}}
		d.nodes[name] = n
	}
	for other, o := range d.nodes {
		switch {
		case o.addr != addr || o == n:
		case !o.listed:
			d.nodeLeft(other, o, now)
		case o.standing == active:
			o.standing, o.since = failed, now
		}
	}
	n.addr, n.listed, n.standing = addr, true, active
}

// evict forgets the node that has been gone for longest, and reports whether there was one.
func (d *DB) evict() bool {
	var oldest string
	for name, n := range d.nodes {
		if o := d.nodes[oldest]; !n.listed && n.standing != active && (o == nil || n.standing > o.standing || n.standing == o.standing && n.since.Before(o.since)) {
			oldest = name
		}
	}
	if oldest == "" {
		return false
	}
	d.nodeLeft(oldest, d.nodes[oldest], d.nodes[oldest].since)
	delete(d.nodes, oldest)
	return true
}

// NodeDown takes over that the transport lost a node. One that is left at its address is the
// only one there.
func (d *DB) NodeDown(name string, now time.Time) {
	n := d.nodes[name]
	if n == nil {
		return
	}
	n.listed = false
	if n.standing == active {
		n.standing, n.since = failed, now
	}
	for other, o := range d.nodes {
		if o.addr != n.addr || other == name || !o.listed {
			continue
		}
		if o.standing == failed {
			o.standing = active
		}
		d.nodeLeft(name, n, now)
	}
}

// nodeLeft forgets what a node had.
func (d *DB) nodeLeft(name string, n *node, now time.Time) {
	for id := range n.networks {
		d.dropRows(id, name)
	}
	d.attachments -= len(n.networks)
	clear(n.networks)
	if n.standing != left {
		n.standing, n.since = left, now
	}
}

// Failed returns the addresses of the nodes that are out of reach, sorted.
func (d *DB) Failed() []string {
	var out []string
	for _, n := range d.nodes {
		if n.standing == failed && !n.listed {
			out = append(out, n.addr)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// Members returns the names of the other nodes in a network, sorted.
func (d *DB) Members(network string) []string {
	var out []string
	for name, n := range d.nodes {
		if a := n.networks[network]; a != nil && !a.leaving && n.standing == active {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// Common returns the ids of the networks that both this node and another are in, sorted.
func (d *DB) Common(name string) []string {
	n := d.nodes[name]
	if n == nil || n.standing != active {
		return nil
	}
	var out []string
	for id := range d.mine {
		if a := n.networks[id]; a != nil && !a.leaving {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

// Networks returns the ids of the networks that this node is in, sorted.
func (d *DB) Networks() []string { return slices.Sorted(maps.Keys(d.mine)) }

// Announce returns the event by which this node joins the others.
func (d *DB) Announce() Broadcast { return d.nodeEvent(networkdb.NodeEvent_JOIN) }

// Depart returns the event by which it leaves them.
func (d *DB) Depart() Broadcast { return d.nodeEvent(networkdb.NodeEvent_LEAVE) }

func (d *DB) nodeEvent(kind networkdb.NodeEvent_Type) Broadcast {
	d.networkClock++
	return Broadcast{d.self, encode(networkdb.MessageType_NODE_EVENT, &networkdb.NodeEvent{Type: kind, LTime: d.networkClock, NodeName: d.self})}
}

// hearNode takes a node event over and reports whether others shall hear of it.
func (d *DB) hearNode(e *networkdb.NodeEvent, now time.Time) bool {
	if !follow(&d.networkClock, e.GetLTime()) {
		d.refused++
		return false
	}
	n := d.nodes[e.GetNodeName()]
	if n == nil || !n.listed || e.GetLTime() <= n.time {
		return false
	}
	n.time = e.GetLTime()
	switch e.GetType() {
	case networkdb.NodeEvent_JOIN:
		changed := n.standing != active
		n.standing = active
		return changed
	case networkdb.NodeEvent_LEAVE:
		d.nodeLeft(e.GetNodeName(), n, now)
		return true
	default:
		return false
	}
}

// Reap forgets what has been remembered for long enough.
func (d *DB) Reap(now time.Time) {
	for id, table := range d.rows {
		for k, r := range table {
			if r.deleted && !now.Before(r.reap) {
				d.removeRow(id, k)
				if m := d.mine[id]; m != nil {
					delete(m.queue, k)
				}
			}
		}
	}
	for id, a := range d.left {
		if !now.Before(a.reap) {
			delete(d.left, id)
		}
	}
	for name, n := range d.nodes {
		for id, a := range n.networks {
			if a.leaving && !now.Before(a.reap) {
				delete(n.networks, id)
				d.attachments--
			}
		}
		if n.standing == failed && !n.listed && now.Sub(n.since) >= failedRowsAge {
			d.nodeLeft(name, n, n.since)
		}
		if n.standing == left && !n.listed && now.Sub(n.since) >= goneAge {
			delete(d.nodes, name)
		}
	}
}

// Stats counts what a replica holds.
type Stats struct {
	// Nodes are the other nodes in reach.
	Nodes int
	// Own and Others are the rows that can be read, by who published them.
	Own, Others int
	// Refused counts what was ignored because of a limit.
	Refused uint64
}

// Stats returns what the replica holds now.
func (d *DB) Stats() Stats {
	s := Stats{Refused: d.refused}
	for _, n := range d.nodes {
		if n.standing == active {
			s.Nodes++
		}
	}
	for _, table := range d.rows {
		for _, r := range table {
			switch {
			case r.deleted:
			case r.owner == d.self:
				s.Own++
			case d.visible(r):
				s.Others++
			}
		}
	}
	return s
}
