package dataplane

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/moby/moby/api/types/network"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/netplan"
	"github.com/skep-dev/skep/worker/runtime"
)

// announceTimeout bounds how long a container waits for a network that the managers have
// not told this node about yet.
const announceTimeout = 20 * time.Second

// sandbox is what this process holds of a container on overlay networks.
type sandbox struct {
	id string
	lease
	dns      *resolver
	balancer balancer
	answers  *answering // nil unless it is in the ingress network
	arrivals arrivals
}

func (s *sandbox) networks() []string {
	var out []string
	for _, o := range s.Overlays {
		out = append(out, o.NetworkID)
	}
	return out
}

// awaitNetworks waits until all networks of a request are known, and refuses those that
// this node cannot serve.
func (d *Dataplane) awaitNetworks(ctx context.Context, overlays []runtime.OverlayRequest) error {
	ctx, cancel := context.WithTimeout(ctx, announceTimeout)
	defer cancel()
	for {
		d.mu.Lock()
		missing, changed := "", d.changed
		var refused error
		for _, o := range overlays {
			n := d.want.Network(o.NetworkID)
			switch {
			case n == nil:
				missing = o.Name
			case d.refuseCrypt(n) != nil:
				refused = d.refuseCrypt(n)
			case netplan.VNI(n, o.Address.Addr()) == 0:
				refused = model.Errorf(model.Invalid, "address %s is in no subnet of network %s", o.Address, o.Name)
			}
		}
		d.mu.Unlock()
		if refused != nil || missing == "" {
			return refused
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return model.Errorf(model.Unavailable, "no manager has told this node about network %s yet", missing)
		}
	}
}

// addOverlays connects a container to its networks. Callers hold mu and have saved the lease.
func (d *Dataplane) addOverlays(id string, l lease) error {
	x := &drift{repair: true}
	moved := d.setLocals(id, l, true)
	var fresh []*skepv1.OverlayNetwork
	guarded := false
	for _, o := range l.Overlays {
		n := d.want.Network(o.NetworkID)
		if apart(n) {
			var err error
			if f := d.fabricOf(n); !inTunnel(n) || f == nil || slices.Contains(f.segments(n), segmentLinks{}) {
				err = d.ensureCrypt(n, x) // else the node itself is in the network
			}
			if err == nil && inTunnel(n) {
				err = d.refuseMesh(n)
			}
			if err != nil {
				return err
			}
			continue
		}
		f, err := d.openSwitch()
		if err != nil {
			return err
		}
		before := f.segments(n)
		if netplan.ByESP(n) && !guarded && slices.Contains(before, segmentLinks{}) {
			switched, _ := d.needed()
			if err := d.ensureESP(byESP(switched), x); err != nil {
				return err
			}
			guarded = true
		}
		if err := d.ensureNetwork(f, n, x); err != nil {
			return err
		}
		if !slices.Equal(before, f.segments(n)) {
			fresh = append(fresh, n)
		}
	}
	// A network's first sandbox brings all its entries; another one only takes away its own.
	if err := errors.Join(d.syncForwards(d.fabric, fresh, x), d.forward(moved, false)); err != nil {
		return err
	}
	s := d.sandboxes[id]
	if s == nil {
		s = &sandbox{id: id, arrivals: arrivals{looked: true}} // its namespace is new
		d.sandboxes[id] = s
	}
	s.lease = l
	errs := []error{d.ensureSandbox(s, x)}
	for _, o := range l.Overlays { // now that its link is there
		errs = append(errs, d.ensureRoutes(o.NetworkID, x))
	}
	return errors.Join(errs...)
}

// openSwitch returns the open switch namespace. Callers hold mu.
func (d *Dataplane) openSwitch() (*fabric, error) {
	if d.fabric != nil {
		if pinned(d.switchNS()) {
			return d.fabric, nil
		}
		d.fabric.close()
		d.fabric = nil
	}
	f, err := d.openFabric()
	if err != nil {
		return nil, err
	}
	d.fabric = f
	return f, nil
}

// setLocals tells the states which addresses are here, or no longer.
func (d *Dataplane) setLocals(id string, l lease, here bool) []netplan.Forward {
	var moved []netplan.Forward
	for _, o := range l.Overlays {
		if !here {
			moved = append(moved, d.want.UnsetLocal(o.NetworkID, o.Address.Addr())...)
			d.names.unsetLocal(o.NetworkID, o.Address.Addr())
			continue
		}
		local := netplan.Local{Addr: o.Address.Addr(), Addr6: o.Address6.Addr(), Names: ownNames(id, l, o)}
		moved = append(moved, d.want.SetLocal(o.NetworkID, local)...)
		d.names.setLocal(o.NetworkID, local)
	}
	return moved
}

// ownNames returns the names of a container in a network.
func ownNames(id string, l lease, o runtime.OverlayRequest) []string {
	names := append([]string{id, id[:min(12, len(id))]}, o.Aliases...)
	for _, n := range []string{l.Name, l.Hostname} {
		if n = strings.TrimPrefix(n, "/"); n != "" {
			names = append(names, n)
		}
	}
	return names
}

// ensureSandbox makes or mends links, rules and resolver of a container. Callers hold mu.
func (d *Dataplane) ensureSandbox(s *sandbox, x *drift) error {
	path := d.netns(s.id)
	ns, h, err := openAt(path)
	if err != nil {
		return err
	}
	defer ns.Close() //nolint:errcheck // a read-only descriptor
	defer h.Close()
	_, _, underlay, err := d.underlay(x)
	if err != nil && slices.ContainsFunc(s.Overlays, func(o runtime.OverlayRequest) bool { return d.bridges[o.NetworkID] == nil }) {
		return err
	}
	var errs []error
	var balances []netplan.Balance
	for _, o := range s.Overlays {
		n := d.want.Network(o.NetworkID)
		if n == nil {
			continue // removed while in use: the container keeps what it has
		}
		p := port{sandbox: s, overlay: o, name: s.interfaceOf(o.NetworkID), vni: netplan.VNI(n, o.Address.Addr()), mtu: d.insideMTU(n, underlay)}
		if err := p.ensure(d.fabricOf(n), ns, h, x); err != nil {
			errs = append(errs, fmt.Errorf("connect to network %s: %w", n.GetName(), err))
		}
		balances = append(balances, d.want.Balances(o.NetworkID)...)
	}
	errs = append(errs, d.ensureWayOut(h, s, x), d.ensureSource(ns, h, s, x), d.ensureArrivals(ns, s, x))
	if s.dns == nil && x.add(kindNames, "container %.12s: nobody answers its questions", s.id) {
		if s.dns, err = d.listen(ns, s); err != nil {
			errs = append(errs, err)
		}
	}
	s.balancer.plan(balances, s.dns.ports())
	errs = append(errs, s.balancer.ensure(ns, x, fmt.Sprintf("container %.12s", s.id)))
	return errors.Join(errs...)
}

// ensureWayOut makes the link to the local network unless it is there.
func (d *Dataplane) ensureWayOut(h *netlink.Handle, s *sandbox, x *drift) error {
	name := s.interfaceOf(wayOut)
	if _, err := h.LinkByName(name); err == nil || !s.Addr.IsValid() {
		return nil
	}
	if !x.add(kindLink, "container %.12s: %s to the local network is missing", s.id, name) {
		return nil
	}
	if err := d.ensureBridge(x); err != nil {
		return err
	}
	return d.connect(s.id, s.Addr, name)
}

// port is a container's link to one network.
type port struct {
	*sandbox

	overlay runtime.OverlayRequest
	name    string
	vni     uint32
	mtu     int
}

// ensure makes or mends both ends of the link.
func (p *port) ensure(f *fabric, ns netns.NsHandle, h *netlink.Handle, x *drift) error {
	if f == nil {
		return nil // it could not be opened, which was said
	}
	bridge, ok := f.links[p.vni]
	if !ok {
		return nil // the missing bridge was named already
	}
	what := fmt.Sprintf("container %.12s, network %s", p.id, p.overlay.Name)
	outer := portName(p.id, p.overlay.NetworkID)
	link, err := f.find(outer)
	if err != nil {
		return err
	}
	eth, err := h.LinkByName(p.name)
	if err != nil {
		eth = nil
	}
	fresh := link == nil || eth == nil
	if fresh {
		if !x.add(kindLink, "%s: link is missing", what) {
			return nil
		}
		if link, err = p.make(f, ns, bridge.bridge, link); err != nil {
			return err
		}
		if eth, err = h.LinkByName(p.name); err != nil {
			return fmt.Errorf("find %s: %w", p.name, err)
		}
	}
	if link.Attrs().MasterIndex != bridge.bridge && x.add(kindLink, "%s: link is not in its bridge", what) {
		if err := f.h.LinkSetMasterByIndex(link, bridge.bridge); err != nil {
			return fmt.Errorf("put %s into its bridge: %w", outer, err)
		}
		fresh = true // as a port
	}
	if !f.routed {
		if err := f.ensurePort(link.Attrs().Index, netplan.MAC(p.overlay.Address.Addr()), fresh, x, what); err != nil {
			return err
		}
	}
	if err := errors.Join(ensureMTU(f.h, link, p.mtu, x, what), ensureMTU(h, eth, p.mtu, x, what)); err != nil {
		return err
	}
	if link.Attrs().Flags&net.FlagUp == 0 && x.add(kindLink, "%s: link is down", what) {
		if err := f.h.LinkSetUp(link); err != nil {
			return fmt.Errorf("raise %s: %w", outer, err)
		}
	}
	if err := p.address(ns, h, eth, f.routed, x, what); err != nil || !f.routed || !x.repair {
		return err
	}
	return p.ensureRouted(f, h, link, eth)
}

// make adds the pair of links; stale is an end whose other end is gone.
func (p *port) make(f *fabric, ns netns.NsHandle, bridge int, stale netlink.Link) (netlink.Link, error) {
	if stale != nil {
		if err := f.h.LinkDel(stale); err != nil {
			return nil, fmt.Errorf("remove stale link: %w", err)
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.MasterIndex, attrs.Flags = portName(p.id, p.overlay.NetworkID), p.mtu, bridge, net.FlagUp
	if f.routed {
		attrs.MasterIndex, attrs.HardwareAddr = 0, router()
	}
	mac := netplan.MAC(p.overlay.Address.Addr())
	if err := f.h.LinkAdd(&netlink.Veth{
		LinkAttrs: attrs, PeerName: p.name, PeerHardwareAddr: mac[:], PeerNamespace: netlink.NsFd(int(ns)), PeerMTU: uint32(p.mtu),
	}); err != nil {
		return nil, fmt.Errorf("make link: %w", err)
	}
	link, err := f.h.LinkByName(attrs.Name)
	if err != nil {
		return nil, fmt.Errorf("find link: %w", err)
	}
	return link, nil
}

// address gives the container's end its addresses and raises it.
func (p *port) address(ns netns.NsHandle, h *netlink.Handle, eth netlink.Link, routed bool, x *drift, what string) error {
	have, err := dump(func() ([]netlink.Addr, error) { return h.AddrList(eth, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", p.name, err)
	}
	for _, want := range []netip.Prefix{p.overlay.Address, p.overlay.Address6} {
		there := slices.ContainsFunc(have, func(a netlink.Addr) bool {
			ip, ok := netip.AddrFromSlice(a.IP)
			return ok && ip.Unmap() == want.Addr()
		})
		if !want.IsValid() || there || !x.add(kindLink, "%s: address %s is missing", what, want) {
			continue
		}
		flags := 0
		if want.Addr().Is6() {
			flags = unix.IFA_F_NODAD // the swarm gave it to nobody else
			if routed {
				flags |= unix.IFA_F_NOPREFIXROUTE
			}
			if err := within(ns, func() error { return sysctl("net/ipv6/conf/"+p.name+"/disable_ipv6", "0") }); err != nil {
				return err
			}
		}
		if err := h.AddrAdd(eth, &netlink.Addr{IPNet: ipNet(want), Flags: flags}); err != nil && !errors.Is(err, syscall.EEXIST) {
			return fmt.Errorf("address %s: %w", p.name, err)
		}
	}
	if eth.Attrs().Flags&net.FlagUp == 0 && x.add(kindLink, "%s: %s is down", what, p.name) {
		if err := h.LinkSetUp(eth); err != nil {
			return fmt.Errorf("raise %s: %w", p.name, err)
		}
	}
	return nil
}

// endpointID names a container's end in a network.
func endpointID(containerID, network string) string {
	sum := sha256.Sum256([]byte(containerID + "/" + network))
	return hex.EncodeToString(sum[:])
}

// endpoints describes a container's networks to people.
func endpoints(l lease, containerID string) map[string]*network.EndpointSettings {
	if len(l.Overlays) == 0 {
		return nil
	}
	out := map[string]*network.EndpointSettings{}
	for _, o := range l.Overlays {
		mac := netplan.MAC(o.Address.Addr())
		e := &network.EndpointSettings{
			IPAMConfig: &network.EndpointIPAMConfig{IPv4Address: o.Address.Addr()},
			NetworkID:  o.NetworkID, EndpointID: endpointID(containerID, o.NetworkID),
			IPAddress: o.Address.Addr(), IPPrefixLen: o.Address.Bits(), MacAddress: network.HardwareAddr(mac[:]),
			Aliases: o.Aliases, DNSNames: ownNames(containerID, l, o),
		}
		if o.Address6.IsValid() {
			e.IPAMConfig.IPv6Address = o.Address6.Addr()
			e.GlobalIPv6Address, e.GlobalIPv6PrefixLen = o.Address6.Addr(), o.Address6.Bits()
		}
		out[o.Name] = e
	}
	return out
}
