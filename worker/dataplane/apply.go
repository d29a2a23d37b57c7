package dataplane

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netns"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/netplan"
)

// Apply takes over an update of the managers and returns when the kernel matches it. An
// error says what could not be programmed; the update counts all the same, and the next
// one or the next check tries again. Updates must come one after the other, in order.
func (d *Dataplane) Apply(ctx context.Context, u *skepv1.NetworkUpdate) error {
	start := time.Now()
	d.mu.Lock()
	err := d.apply(u)
	d.broken = err != nil
	close(d.changed)
	d.changed = make(chan struct{})
	d.publishAgain()
	d.mu.Unlock()
	if err != nil {
		d.metrics.failed.Inc()
		d.cfg.Log.LogAttrs(ctx, slog.LevelWarn, "network update not programmed", slog.Uint64("version", u.GetVersion()), slog.Any("error", err))
		return fmt.Errorf("program networks of version %d: %w", u.GetVersion(), err)
	}
	d.metrics.apply.Observe(time.Since(start).Seconds())
	return nil
}

// Version returns the version of the last update taken over; zero before the first.
func (d *Dataplane) Version() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.want.Version()
}

// apply does the work of Apply in the order of a Plan. Callers hold mu.
func (d *Dataplane) apply(u *skepv1.NetworkUpdate) error {
	u = d.withBridges(u)
	p := d.want.Merge(u)
	whole := u.GetComplete() || p.Node || len(p.Networks) > 0 || d.broken
	// Written before anything is taken away: a name must not come back with the next process.
	// New ways lead nobody anywhere yet.
	written := make(chan error, 1)
	go func() { written <- d.journal.add(p.Update, d.want) }()
	var errs []error
	held := false
	if !whole {
		var err error
		held, err = d.updateESP(p.Update, false)
		errs = append(errs, err, d.forward(p.Route, true))
	}
	errs = append(errs, <-written)
	d.names.leave(p)
	if whole {
		errs = append(errs, d.converge(&drift{repair: true}))
	} else {
		errs = append(errs, d.updateCrypts(p.Encrypted, false), d.balance(p.Balance), d.updateMesh(p.Publish, p.Keep), d.updateArrivals(p))
	}
	d.names.merge(p)
	errs = append(errs, d.end(p.End))
	if !whole {
		errs = append(errs, d.forward(p.Unroute, false), d.updateCrypts(p.Encrypted, true))
	}
	if held {
		_, err := d.updateESP(p.Update, true)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// forward programs the ways to some endpoints, or removes them where nothing else is in
// their place by now. Callers hold mu.
func (d *Dataplane) forward(list []netplan.Forward, put bool) error {
	entries := map[*fabric][]netplan.Entry{}
	for _, f := range list {
		n := d.want.Network(f.Network)
		in := d.fabricOf(n)
		if in == nil || in.routed || in.links[f.VNI] == (segmentLinks{}) {
			continue
		}
		if put {
			entries[in] = slices.AppendSeq(entries[in], entriesOf(n, f))
		} else {
			entries[in] = append(entries[in], d.want.Stale(f)...)
		}
	}
	var errs []error
	for in, list := range entries {
		errs = append(errs, in.program(list, put))
	}
	return errors.Join(errs...)
}

// entriesOf yields what the way to an endpoint becomes in the kernel: through a tunnel, nodes
// are known by their addresses there.
func entriesOf(n *skepv1.OverlayNetwork, f netplan.Forward) iter.Seq[netplan.Entry] {
	if inTunnel(n) {
		f.Node = netplan.TunnelAddr(f.NodeID)
	}
	return f.Entries()
}

// balance changes services in the sandboxes of their networks. Callers hold mu.
func (d *Dataplane) balance(list []netplan.Balance) error {
	if len(list) == 0 {
		return nil
	}
	var errs []error
	for _, s := range d.sandboxes {
		networks := s.networks()
		mine := make([]netplan.Balance, 0, len(list))
		for _, b := range list {
			if slices.Contains(networks, b.Network) {
				mine = append(mine, b)
			}
		}
		if len(mine) == 0 {
			continue
		}
		ns, err := netns.GetFromPath(d.netns(s.id))
		if err != nil {
			errs = append(errs, fmt.Errorf("open network namespace: %w", err))
			continue
		}
		errs = append(errs, s.balancer.update(ns, mine), ns.Close())
	}
	return errors.Join(errs...)
}

// end ends connections to what is gone, in the sandboxes that could have some, and at the
// node's edge. Callers hold mu.
func (d *Dataplane) end(list []netplan.End) error {
	if len(list) == 0 {
		return nil
	}
	byNetwork := map[string]gone{}
	for _, e := range list {
		if byNetwork[e.Network] == nil {
			byNetwork[e.Network] = gone{}
		}
		byNetwork[e.Network][e.Addr] = true
	}
	var errs []error
	for _, s := range d.sandboxes {
		g := gone{}
		for _, id := range s.networks() {
			for a := range byNetwork[id] {
				g[a] = true
			}
		}
		if len(g) == 0 {
			continue
		}
		ns, err := netns.GetFromPath(d.netns(s.id))
		if err != nil {
			errs = append(errs, fmt.Errorf("open network namespace: %w", err))
			continue
		}
		ended, err := endFlows(ns, g)
		errs = append(errs, err, endSockets(ns, ended), ns.Close())
	}
	if in := d.want.Ingress(); in != nil && d.mesh.space != nil && len(byNetwork[in.GetId()]) > 0 {
		ended, err := endFlows(d.mesh.space.ns, byNetwork[in.GetId()])
		host, _ := d.hops()
		errs = append(errs, err, endClients(d.hostNS, ended, host))
	}
	return errors.Join(errs...)
}

// converge compares everything with the plan and mends it if x allows. Callers hold mu.
func (d *Dataplane) converge(x *drift) error {
	var errs []error
	x.whole = true
	defer d.forgetSeen()
	needed, encrypted := d.needed()
	sealed := byESP(needed)
	x.at(sealed...)
	if err := d.ensureESP(sealed, x); err != nil {
		// Without what encrypts them their devices must not be made.
		errs = append(errs, err)
		needed = slices.DeleteFunc(needed, netplan.ByESP)
	}
	if len(needed) > 0 {
		f, err := d.openSwitch()
		if err != nil {
			return err
		}
		errs = append(errs, again(f.look)) // without it ports are set up as new ones
		for _, n := range needed {
			x.at(n.GetId())
			errs = append(errs, d.ensureNetwork(f, n, x))
		}
		errs = append(errs, d.syncForwards(f, needed, x))
	}
	for _, n := range encrypted {
		x.at(n.GetId())
		errs = append(errs, d.ensureCrypt(n, x))
	}
	for _, id := range sortedKeys(d.sandboxes) {
		x.at(d.sandboxes[id].networks()...)
		errs = append(errs, d.ensureSandbox(d.sandboxes[id], x))
	}
	for _, n := range encrypted { // now that the links are there
		x.at(n.GetId())
		errs = append(errs, d.ensureRoutes(n.GetId(), x))
	}
	x.at(d.want.Ingress().GetId())
	errs = append(errs, d.ensureMesh(x))
	x.at()
	errs = append(errs, d.tidyCrypts(x))
	if len(needed) > 0 {
		errs = append(errs, d.tidySwitch(x))
	} else if d.fabric != nil && x.repair && len(sealed) == 0 {
		errs = append(errs, d.closeSwitch())
	}
	errs = append(errs, d.tidyESP(x))
	if slices.ContainsFunc(leases(d.state.Leases), func(a netip.Addr) bool { return a.IsValid() }) {
		err := d.ensureBridge(x)
		d.ready = err == nil
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// forgetSeen ends a comparison: what was seen may change from now on.
func (d *Dataplane) forgetSeen() {
	if d.fabric != nil {
		d.fabric.seen = nil
	}
	for _, c := range d.crypts {
		c.seen = nil
	}
}

// Check compares the kernel with the plan and names every difference, without mending any.
func (d *Dataplane) Check(ctx context.Context) ([]string, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	x := &drift{}
	d.mu.Lock()
	defer d.mu.Unlock()
	err := d.converge(x)
	return x.found, err
}
