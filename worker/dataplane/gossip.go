package dataplane

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"github.com/skep-dev/skep/core/netplan"
	"github.com/skep-dev/skep/worker/gossip"
)

// publishPause is how long changes are collected before Docker Engines hear of them.
const publishPause = 50 * time.Millisecond

// Publish tells g what Docker Engines shall know of this node's containers, and of each
// change, until ctx ends.
func (d *Dataplane) Publish(ctx context.Context, g *gossip.Gossip) error {
	var p netplan.Publisher
	pause := time.NewTimer(0)
	defer pause.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-pause.C:
		}
		rows, changed := d.rows(&p)
		g.SetRows(rows)
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
		pause.Reset(publishPause)
	}
}

// rows returns what to publish now, and what is closed when that may have changed.
func (d *Dataplane) rows(p *netplan.Publisher) (gossip.Rows, <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.want.Node()
	if !n.GetGossip() {
		p.Rows(d.want, nil)
		return gossip.Rows{}, d.published
	}
	var attached []netplan.Attached
	for _, id := range sortedKeys(d.sandboxes) {
		s := d.sandboxes[id]
		for _, o := range s.Overlays {
			if d.bridges[o.NetworkID] != nil {
				continue // a network of this node alone
			}
			names := slices.Concat([]string{id[:min(len(id), 12)], s.Hostname}, o.Aliases)
			names = slices.DeleteFunc(names, func(name string) bool { return name == "" })
			slices.Sort(names)
			attached = append(attached, netplan.Attached{Network: o.NetworkID, Addr: o.Address.Addr(), Names: slices.Compact(names)})
		}
	}
	r := gossip.Rows{NodeID: n.GetId(), Networks: p.Rows(d.want, attached)}
	for _, text := range n.GetGossipPeers() {
		if a, err := netip.ParseAddr(text); err == nil {
			r.Peers = append(r.Peers, a)
		}
	}
	return r, d.published
}

// publishAgain has Publish look again. Callers hold mu.
func (d *Dataplane) publishAgain() {
	close(d.published)
	d.published = make(chan struct{})
}
