package netdb

import (
	"maps"
	"slices"
	"time"

	"github.com/skep-dev/skep/api/networkdb"
)

// Join makes this node a member of a network, which it must not be yet.
func (d *DB) Join(network string) Broadcast {
	d.networkClock++
	d.mine[network] = &membership{time: d.networkClock, queue: queue{}}
	delete(d.left, network)
	return d.networkEvent(networkdb.NetworkEvent_JOIN, network)
}

// Synced takes over that others were asked for all rows of a network.
func (d *DB) Synced(network string) {
	if m := d.mine[network]; m != nil {
		m.synced = true
	}
}

// Leave ends this node's part in a network, with all its rows.
func (d *DB) Leave(network string, now time.Time) Broadcast {
	d.networkClock++
	delete(d.mine, network)
	d.left[network] = attachment{time: d.networkClock, leaving: true, reap: now.Add(leavingAge)}
	for k := range d.rows[network] {
		d.removeRow(network, k)
	}
	return d.networkEvent(networkdb.NetworkEvent_LEAVE, network)
}

func (d *DB) networkEvent(kind networkdb.NetworkEvent_Type, network string) Broadcast {
	return Broadcast{d.self + "/" + network, encode(networkdb.MessageType_NETWORK_EVENT, &networkdb.NetworkEvent{
		Type: kind, LTime: d.networkClock, NodeName: d.self, NetworkId: network,
	})}
}

// hearNetwork takes a network event over and reports whether others shall hear of it.
func (d *DB) hearNetwork(e *networkdb.NetworkEvent, now time.Time) bool {
	if !follow(&d.networkClock, e.GetLTime()) {
		d.refused++
		return false
	}
	n := d.nodes[e.GetNodeName()]
	if n == nil {
		return false
	}
	a := n.networks[e.GetNetworkId()]
	if a != nil && e.GetLTime() <= a.time {
		return false
	}
	switch e.GetType() {
	case networkdb.NetworkEvent_JOIN:
		if a != nil {
			*a = attachment{time: e.GetLTime()}
			return true
		}
		if n.standing != active {
			return false
		}
		if d.attachments >= maxAttachments {
			d.refused++
			return false
		}
		n.networks[e.GetNetworkId()] = &attachment{time: e.GetLTime()}
		d.attachments++
		return true
	case networkdb.NetworkEvent_LEAVE:
		if a == nil {
			return false
		}
		*a = attachment{time: e.GetLTime(), leaving: true, reap: now.Add(leavingAge)}
		d.dropRows(e.GetNetworkId(), e.GetNodeName())
		return true
	default:
		return false
	}
}

// State returns who is in which network as far as this node knows, for one other node. Of a
// node that joins, its own part counts as new.
func (d *DB) State(join bool) []byte {
	if join {
		d.networkClock++
		for _, m := range d.mine {
			m.time = d.networkClock
		}
		for id, a := range d.left {
			a.time = d.networkClock
			d.left[id] = a
		}
	}
	p := &networkdb.NetworkPushPull{LTime: d.networkClock, NodeName: d.self}
	size := 0
	add := func(name, id string, time uint64, leaving bool) {
		if size += len(name) + len(id) + entryOverhead; size > maxSync {
			return
		}
		p.Networks = append(p.Networks, &networkdb.NetworkEntry{NetworkId: id, LTime: time, NodeName: name, Leaving: leaving})
	}
	for _, id := range d.Networks() {
		add(d.self, id, d.mine[id].time, false)
	}
	for _, id := range slices.Sorted(maps.Keys(d.left)) {
		add(d.self, id, d.left[id].time, true)
	}
	for _, name := range slices.Sorted(maps.Keys(d.nodes)) {
		n := d.nodes[name]
		if n.standing != active {
			continue
		}
		for _, id := range slices.Sorted(maps.Keys(n.networks)) {
			add(name, id, n.networks[id].time, n.networks[id].leaving)
		}
	}
	return encode(networkdb.MessageType_PUSH_PULL, p)
}

// Merge takes over another node's State.
func (d *DB) Merge(state []byte, now time.Time) error {
	m, err := decodeMessage(state)
	if err != nil {
		return err
	}
	p, ok := m.(*networkdb.NetworkPushPull)
	if !ok {
		return nil
	}
	d.hearNode(&networkdb.NodeEvent{Type: networkdb.NodeEvent_JOIN, LTime: p.GetLTime(), NodeName: p.GetNodeName()}, now)
	for _, n := range p.GetNetworks() {
		e := &networkdb.NetworkEvent{Type: networkdb.NetworkEvent_JOIN, LTime: n.GetLTime(), NodeName: n.GetNodeName(), NetworkId: n.GetNetworkId()}
		if n.GetLeaving() {
			e.Type = networkdb.NetworkEvent_LEAVE
		}
		if sane(e) {
			d.hearNetwork(e, now)
		}
	}
	return nil
}
