package netdb

import (
	"cmp"
	"slices"
)

// queue holds the events of a network that its members shall hear, by row: a newer event
// replaces an older one.
type queue map[rowKey]*queued

type queued struct {
	msg  []byte
	own  bool
	sent int
}

// put queues an event. One of others is refused when too many wait.
func (q queue) put(k rowKey, msg []byte, own bool) bool {
	if !own && q[k] == nil && len(q) >= maxRelays {
		return false
	}
	q[k] = &queued{msg: msg, own: own}
	return true
}

// take returns events for one packet, this node's own first, then those that were sent least
// often. Each is sent limit times in all. One that is larger than a packet goes alone.
func (q queue) take(limit int) [][]byte {
	type item struct {
		k rowKey
		*queued
	}
	items := make([]item, 0, len(q))
	for k, e := range q {
		items = append(items, item{k, e})
	}
	rank := func(e item) int {
		if e.own {
			return 0
		}
		return 1
	}
	slices.SortFunc(items, func(a, b item) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a.sent, b.sent), a.k.compare(b.k))
	})
	var out [][]byte
	room := packetSize - compoundHeader
	for _, e := range items {
		need := len(e.msg) + eventHeader
		if need > room && len(out) > 0 {
			continue
		}
		room -= need
		out = append(out, e.msg)
		if e.sent++; e.sent >= limit {
			delete(q, e.k)
		}
	}
	return out
}

// Gossip is a message for some members of a network.
type Gossip struct {
	Network string
	Members []string
	Msg     []byte
}

// Gossip returns what to tell some random members of each network now.
func (d *DB) Gossip() []Gossip {
	var out []Gossip
	for _, id := range d.Networks() {
		m := d.mine[id]
		if len(m.queue) == 0 {
			continue
		}
		members := d.Members(id)
		if len(members) == 0 {
			continue // this node's own events wait until somebody is there
		}
		out = append(out, Gossip{id, members, compound(m.queue.take(transmits(len(members))))})
	}
	return out
}

// transmits is how often an event is sent in a network with so many other members.
func transmits(members int) int {
	n := 1
	for limit := 10; limit < members+2; limit *= 10 {
		n++
	}
	return retransmitMult * n
}
