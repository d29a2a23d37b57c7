package dataplane

import (
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/skep-dev/skep/worker/runtime"
)

// wayOut stands for the local network among the names of a container's interfaces.
const wayOut = ""

// networkIDs are the networks of a lease in the order of a new container's interfaces: the
// local one comes last.
func (l lease) networkIDs() []string {
	var out []string
	for _, o := range l.Overlays {
		out = append(out, o.NetworkID)
	}
	if l.Addr.IsValid() {
		out = append(out, wayOut)
	}
	return out
}

// interfaceOf names a container's end of its link to a network; empty if it has none.
func (l lease) interfaceOf(network string) string {
	if l.Interfaces != nil {
		return l.Interfaces[network]
	}
	if i := slices.Index(l.networkIDs(), network); i >= 0 { // written by a daemon that knew no changes
		return fmt.Sprintf("eth%d", i)
	}
	return ""
}

// interfaces names the interfaces of a lease: those that it had keep their names.
func (l lease) interfaces(had lease) map[string]string {
	out, used := map[string]string{}, map[string]bool{}
	ids := l.networkIDs()
	for _, id := range ids {
		if name := had.interfaceOf(id); name != "" {
			out[id], used[name] = name, true
		}
	}
	next := 0
	for _, id := range ids {
		if out[id] != "" {
			continue
		}
		for used[fmt.Sprintf("eth%d", next)] {
			next++
		}
		out[id] = fmt.Sprintf("eth%d", next)
		used[out[id]] = true
	}
	return out
}

// shed takes a running container out of the networks that its new lease does not name any
// more. Callers hold mu and have saved the new lease.
func (d *Dataplane) shed(id string, had, l lease) error {
	if !pinned(d.netns(id)) {
		return nil // it had not got far
	}
	var errs []error
	left := had
	left.Overlays = slices.DeleteFunc(slices.Clone(had.Overlays), func(o runtime.OverlayRequest) bool {
		return slices.ContainsFunc(l.Overlays, func(n runtime.OverlayRequest) bool {
			return n.NetworkID == o.NetworkID && n.Address == o.Address && n.Address6 == o.Address6
		})
	})
	if had.Addr.IsValid() && !l.Addr.IsValid() && len(had.Ports) > 0 {
		errs = append(errs, d.publish(had, false))
	}
	for network, name := range had.interfaces(had) {
		if l.interfaceOf(network) != name || slices.ContainsFunc(left.Overlays, func(o runtime.OverlayRequest) bool { return o.NetworkID == network }) {
			errs = append(errs, d.unlink(id, name))
		}
	}
	if s := d.sandboxes[id]; s != nil && !sameNetworks(had, l) {
		// Its resolver answers for the networks that it had; the next one is made with the rest.
		s.dns.close()
		s.dns = nil
		s.balancer.v4.gen, s.balancer.v6.gen = 0, 0 // the rules name its ports
		if len(l.Overlays) == 0 {
			errs = append(errs, withinPath(d.netns(id), func(ns netns.NsHandle) error { return s.balancer.remove(ns) }))
			delete(d.sandboxes, id)
		}
	}
	if len(left.Overlays) > 0 {
		errs = append(errs, d.leave(id, left))
	}
	return errors.Join(errs...)
}

func sameNetworks(a, b lease) bool {
	return a.Addr.IsValid() == b.Addr.IsValid() && slices.EqualFunc(a.Overlays, b.Overlays, func(x, y runtime.OverlayRequest) bool {
		return x.NetworkID == y.NetworkID && x.Address == y.Address && x.Address6 == y.Address6 && slices.Equal(x.Aliases, y.Aliases)
	})
}

// unlink removes a container's interface with the other end of its link.
func (d *Dataplane) unlink(id, name string) error {
	h, err := handleAt(d.netns(id))
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(name)
	if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
		return nil
	}
	if err == nil {
		err = h.LinkDel(link)
	}
	if err != nil {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	return nil
}

// remove deletes the service rules of a sandbox.
func (b *balancer) remove(ns netns.NsHandle) error {
	var errs []error
	for _, w := range b.families() {
		if w.rules != nil {
			errs = append(errs, w.rules.remove(ns))
		}
	}
	return errors.Join(errs...)
}

// restore takes back a change of a connected container's networks that failed half-way.
// Callers hold mu.
func (d *Dataplane) restore(id string, had, l lease) error {
	d.state.Leases[id] = had
	return errors.Join(d.save(), d.shed(id, l, had), d.attach(id, had))
}

// isolate takes a container off all networks that it is on.
func (d *Dataplane) isolate(id string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	had, known := d.state.Leases[id]
	if !known {
		return nil
	}
	delete(d.state.Leases, id)
	err := errors.Join(d.save(), d.shed(id, had, lease{}))
	for _, r := range d.reserved[id] {
		r.close()
	}
	delete(d.reserved, id)
	return err
}
