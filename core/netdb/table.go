package netdb

import (
	"bytes"
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/skep-dev/skep/api/networkdb"
)

// Row is one entry of a table, as its owner publishes it.
type Row struct {
	Table, Key string
	Value      []byte
}

type rowKey struct{ table, key string }

func (k rowKey) compare(o rowKey) int {
	return cmp.Or(cmp.Compare(k.table, o.table), cmp.Compare(k.key, o.key))
}

// row is what is known of an entry.
type row struct {
	owner   string
	time    uint64
	value   []byte
	deleted bool
	reap    time.Time // set when deleted
}

// Set makes rows those that this node publishes in a network that it is in: new ones are
// created, changed ones updated, and others of its own deleted.
func (d *DB) Set(network string, rows []Row, now time.Time) {
	m := d.mine[network]
	if m == nil {
		return
	}
	wanted := make(map[rowKey]bool, len(rows))
	for _, r := range rows {
		k := rowKey{r.Table, r.Key}
		wanted[k] = true
		switch had := d.rows[network][k]; {
		case had == nil || had.deleted || had.owner != d.self:
			d.publish(network, k, networkdb.TableEvent_CREATE, r.Value, now)
		case !bytes.Equal(had.value, r.Value):
			d.publish(network, k, networkdb.TableEvent_UPDATE, r.Value, now)
		}
	}
	for _, k := range d.sortedKeys(network) {
		if r := d.rows[network][k]; r.owner == d.self && !r.deleted && !wanted[k] {
			d.publish(network, k, networkdb.TableEvent_DELETE, r.value, now)
		}
	}
}

// publish makes an own row what it shall be, and has the members of its network hear of it.
// Limits do not hold for what this node publishes itself.
func (d *DB) publish(network string, k rowKey, kind networkdb.TableEvent_Type, value []byte, now time.Time) {
	d.tableClock++
	r := &row{owner: d.self, time: d.tableClock, value: value}
	e := &networkdb.TableEvent{
		Type: kind, LTime: r.time, NodeName: d.self, NetworkId: network, TableName: k.table, Key: k.key, Value: value,
	}
	if kind == networkdb.TableEvent_DELETE {
		r.deleted, r.reap = true, now.Add(tombstoneAge)
		e.ResidualReapTime = seconds(tombstoneAge)
	}
	d.putRow(network, k, r)
	d.mine[network].queue.put(k, encode(networkdb.MessageType_TABLE_EVENT, e), true)
}

// hearRow takes a table event over; syncing says that it came by bulk synchronization.
func (d *DB) hearRow(e *networkdb.TableEvent, syncing bool, now time.Time) {
	if !follow(&d.tableClock, e.GetLTime()) {
		d.refused++
		return
	}
	network, k := e.GetNetworkId(), rowKey{e.GetTableName(), e.GetKey()}
	m, had := d.mine[network], d.rows[network][rowKey{e.GetTableName(), e.GetKey()}]
	switch {
	case m == nil:
		return
	case e.GetNodeName() == d.self || had != nil && had.owner == d.self && !had.deleted:
		d.defend(e, had, now)
		return
	case !d.attached(e.GetNodeName(), network) || had != nil && e.GetLTime() <= had.time:
		return
	case had == nil && (d.count >= maxRows || d.bytes >= maxBytes):
		d.refused++
		return
	}
	r := &row{owner: e.GetNodeName(), time: e.GetLTime(), value: e.GetValue()}
	relay := true
	switch e.GetType() {
	case networkdb.TableEvent_CREATE, networkdb.TableEvent_UPDATE:
	case networkdb.TableEvent_DELETE:
		left := time.Duration(e.GetResidualReapTime()) * time.Second
		if left <= 0 || left > tombstoneAge {
			left = tombstoneAge
		}
		r.deleted, r.reap = true, now.Add(left)
		relay = had != nil || syncing && left > relayAge
	default:
		return
	}
	d.putRow(network, k, r)
	if !relay || !m.synced || syncing && len(m.queue) > relaysWhileSyncing || d.nodes[r.owner].standing != active {
		return
	}
	if !m.queue.put(k, encode(networkdb.MessageType_TABLE_EVENT, e), false) {
		d.refused++
	}
}

// defend answers what others say of this node's own rows, perhaps after a former process of
// the same name: they hear what is true as something newer.
func (d *DB) defend(e *networkdb.TableEvent, had *row, now time.Time) {
	k := rowKey{e.GetTableName(), e.GetKey()}
	gone := had == nil || had.deleted
	switch {
	case had != nil && (e.GetLTime() <= had.time || had.owner != d.self):
	case gone && e.GetType() == networkdb.TableEvent_DELETE:
	case gone && (d.count >= maxRows || d.bytes >= maxBytes || len(d.mine[e.GetNetworkId()].queue) >= maxRelays):
		d.refused++
	case gone:
		d.publish(e.GetNetworkId(), k, networkdb.TableEvent_DELETE, e.GetValue(), now)
	case e.GetNodeName() == d.self && e.GetType() != networkdb.TableEvent_DELETE && bytes.Equal(e.GetValue(), had.value):
		had.time = e.GetLTime() // it is what others have
	default:
		d.publish(e.GetNetworkId(), k, networkdb.TableEvent_UPDATE, had.value, now)
	}
}

func (d *DB) attached(name, network string) bool {
	n := d.nodes[name]
	if n == nil {
		return false
	}
	a := n.networks[network]
	return a != nil && !a.leaving
}

// visible reports whether a row is there for readers: its owner is in reach.
func (d *DB) visible(r *row) bool {
	if r.deleted {
		return false
	}
	n := d.nodes[r.owner]
	return r.owner == d.self || n != nil && n.standing == active
}

// Published is a row that somebody else published.
type Published struct {
	Row

	Network string
	// Owner is the node's gossip name.
	Owner string
}

// Others returns the rows of a network that other nodes in reach published, sorted.
func (d *DB) Others(network string) []Published {
	var out []Published
	for _, k := range d.sortedKeys(network) {
		if r := d.rows[network][k]; r.owner != d.self && d.visible(r) {
			out = append(out, Published{Row{k.table, k.key, r.value}, network, r.owner})
		}
	}
	return out
}

// Sync returns a message with all rows of those networks that this node is in. Of the first
// of two nodes it is unsolicited, and answered by the other's; time identifies it.
func (d *DB) Sync(networks []string, unsolicited bool, now time.Time) (msg []byte, time uint64) {
	d.tableClock++
	m := &networkdb.BulkSyncMessage{LTime: d.tableClock, Unsolicited: unsolicited, NodeName: d.self}
	for _, id := range slices.Compact(slices.Sorted(slices.Values(networks))) {
		if d.mine[id] != nil {
			m.Networks = append(m.Networks, id)
		}
	}
	var events [][]byte
	size := 0
	add := func(own bool) {
		for _, id := range m.GetNetworks() {
			for _, k := range d.sortedKeys(id) {
				if (d.rows[id][k].owner == d.self) != own || size > maxSync {
					continue
				}
				if e := d.syncEvent(id, k, now); e != nil {
					events = append(events, encode(networkdb.MessageType_TABLE_EVENT, e))
					size += len(events[len(events)-1])
				}
			}
		}
	}
	add(true)
	add(false) // what finds no room, its owner tells
	m.Payload = compound(events)
	return encode(networkdb.MessageType_BULK_SYNC, m), m.GetLTime()
}

// syncEvent is a row in a bulk synchronization; nil for one that is not told.
func (d *DB) syncEvent(network string, k rowKey, now time.Time) *networkdb.TableEvent {
	r := d.rows[network][k]
	e := &networkdb.TableEvent{
		Type: networkdb.TableEvent_CREATE, LTime: r.time, NodeName: r.owner, NetworkId: network, TableName: k.table, Key: k.key, Value: r.value,
	}
	if r.deleted {
		e.Type, e.ResidualReapTime = networkdb.TableEvent_DELETE, seconds(r.reap.Sub(now))
		if e.GetResidualReapTime() <= 0 {
			return nil
		}
		return e
	}
	if !d.visible(r) {
		return nil
	}
	return e
}

func seconds(d time.Duration) int32 { return int32(d / time.Second) }

func (d *DB) sortedKeys(network string) []rowKey {
	return slices.SortedFunc(maps.Keys(d.rows[network]), rowKey.compare)
}

// dropRows forgets the rows of a node in a network.
func (d *DB) dropRows(network, owner string) {
	for k, r := range d.rows[network] {
		if r.owner == owner {
			d.removeRow(network, k)
			if m := d.mine[network]; m != nil {
				delete(m.queue, k)
			}
		}
	}
}

func (d *DB) putRow(network string, k rowKey, r *row) {
	d.removeRow(network, k)
	if d.rows[network] == nil {
		d.rows[network] = map[rowKey]*row{}
	}
	d.rows[network][k] = r
	d.count++
	d.bytes += size(k, r)
}

func (d *DB) removeRow(network string, k rowKey) {
	r := d.rows[network][k]
	if r == nil {
		return
	}
	d.count--
	d.bytes -= size(k, r)
	delete(d.rows[network], k)
	if len(d.rows[network]) == 0 {
		delete(d.rows, network)
	}
}

func size(k rowKey, r *row) int { return len(k.table) + len(k.key) + len(r.value) + rowOverhead }

// Answer is what a message leads to.
type Answer struct {
	// Broadcasts are to be passed on to all nodes.
	Broadcasts []Broadcast
	// Sync is set by a bulk synchronization.
	Sync *Sync
}

// Sync is a bulk synchronization that another node sent.
type Sync struct {
	From string
	// Networks are those that this node is in as well.
	Networks []string
	// Unsolicited asks for this node's rows; otherwise it answers this node's message, if Time
	// is greater than that one's.
	Unsolicited bool
	Time        uint64
}

// Receive takes over a message of another node.
func (d *DB) Receive(msg []byte, now time.Time) (Answer, error) {
	var a Answer
	m, err := decodeMessage(msg)
	if err != nil {
		return a, err
	}
	switch m := m.(type) {
	case *networkdb.NodeEvent:
		if d.hearNode(m, now) {
			a.Broadcasts = []Broadcast{{m.GetNodeName(), msg}}
		}
	case *networkdb.NetworkEvent:
		if m.GetNodeName() != d.self && d.hearNetwork(m, now) {
			a.Broadcasts = []Broadcast{{m.GetNodeName() + "/" + m.GetNetworkId(), msg}}
		}
	case *networkdb.TableEvent:
		d.hearRow(m, false, now)
	case *networkdb.CompoundMessage:
		for _, one := range m.GetMessages() {
			d.hearEvent(one.GetPayload(), false, now)
		}
	case *networkdb.BulkSyncMessage:
		if !follow(&d.tableClock, m.GetLTime()) {
			d.refused++
			return a, nil
		}
		for _, one := range decodeCompound(m.GetPayload()) {
			d.hearEvent(one, true, now)
		}
		a.Sync = &Sync{From: m.GetNodeName(), Unsolicited: m.GetUnsolicited(), Time: m.GetLTime()}
		for _, id := range d.Networks() {
			if slices.Contains(m.GetNetworks(), id) {
				a.Sync.Networks = append(a.Sync.Networks, id)
			}
		}
	}
	return a, nil
}

// hearEvent takes over a table event inside of another message; nothing else belongs there.
func (d *DB) hearEvent(msg []byte, syncing bool, now time.Time) {
	m, err := decodeMessage(msg)
	if err != nil {
		d.refused++
		return
	}
	if e, ok := m.(*networkdb.TableEvent); ok {
		d.hearRow(e, syncing, now)
	}
}
