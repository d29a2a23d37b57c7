package dataplane

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/netplan"
)

// The routing mesh works in a namespace of its own, so that nothing of the ingress network,
// whose addresses a LAN may have too, lies in the host's. A pair of links joins both.

const (
	toHost    = "host"    // the mesh's end of the pair, in its namespace
	toIngress = "ingress" // both ends of its leg into the ingress network
)

// loopbackMetric is that of the host's second route to ::1: the first one, by the loopback
// link, is what everything else takes.
const loopbackMetric = 2048

// ingressLink is the host's end of the pair. It carries the daemon's mark, as the local
// bridge does.
func (d *Dataplane) ingressLink() string { return "ing" + strings.TrimPrefix(d.bridge, "skep") }

func (d *Dataplane) meshNS() string { return filepath.Join(d.cfg.ExecDir, ".mesh") }

// hop is one end of the pair between host and mesh: each end knows the other's address and
// nothing besides, so no subnet is taken.
type hop struct{ v4, v6 netip.Addr }

func (h hop) of(f nftables.TableFamily) netip.Addr {
	if f == nftables.TableFamilyIPv6 {
		return h.v6
	}
	return h.v4
}

// hops returns the ends of the pair: the host's has the local bridge's address, the mesh's
// one of the local network that no container gets. Callers hold mu.
func (d *Dataplane) hops() (host, inner hop) {
	sum := sha256.Sum256([]byte(d.bridge))
	unique := [16]byte{0xfd} // a local address of RFC 4193
	copy(unique[1:6], sum[:])
	unique[15] = 1
	host = hop{d.state.Address.Addr(), netip.AddrFrom16(unique)}
	return host, hop{d.state.Mesh, host.v6.Next()}
}

// claimHop chooses the mesh's address in the local network. Callers hold mu.
func (d *Dataplane) claimHop() error {
	if d.state.Mesh.IsValid() && d.state.Address.Contains(d.state.Mesh) && d.state.Mesh != d.state.Address.Addr() {
		return nil
	}
	addr, err := d.allocate()
	if err != nil {
		return err
	}
	d.state.Mesh, d.state.Last = addr, addr
	return d.save()
}

// openMesh makes the mesh's namespace unless it is there; nil if it is not and may not be
// made. Callers hold mu.
func (d *Dataplane) openMesh(x *drift) (*fabric, error) {
	if m := d.mesh.space; m != nil && pinned(d.meshNS()) {
		return m, nil
	}
	fresh := !pinned(d.meshNS())
	if fresh && !x.add(kindLink, "routing mesh: its namespace is missing") {
		return nil, nil //nolint:nilnil // nothing is to be mended
	}
	if d.mesh.space != nil {
		d.mesh.space.close()
		d.mesh.space = nil
	}
	if err := makeNamespace(d.meshNS()); err != nil {
		return nil, err
	}
	ns, h, err := openAt(d.meshNS())
	if err != nil {
		return nil, err
	}
	m := &fabric{ns: ns, h: h}
	if fresh {
		for _, w := range d.mesh.all() {
			w.gen = 0
		}
		if err := within(ns, passesOn); err != nil {
			m.close()
			return nil, errors.Join(err, removeNamespace(d.meshNS()))
		}
	}
	d.mesh.space = m
	return m, nil
}

// passesOn sets up the calling thread's namespace for the mesh. Its links have the addresses
// that they are given and no others. Nothing is for itself, so looking for sockets and for the
// way back of each packet would only take time; what begins elsewhere than at a published port
// is dropped anyway.
func passesOn() error {
	return sysctls(
		[2]string{"net/ipv6/conf/default/disable_ipv6", "1"}, [2]string{"net/ipv4/ip_early_demux", "0"},
		[2]string{"net/ipv4/conf/all/rp_filter", "0"}, [2]string{"net/ipv4/conf/default/rp_filter", "0"})
}

// ensureMeshLinks makes or mends the pair between host and mesh, and the mesh's leg into
// the ingress network, which is the bridge given in f. Callers hold mu.
func (d *Dataplane) ensureMeshLinks(m, f *fabric, bridge int, addr netip.Prefix, x *drift) error {
	_, _, mtu, err := d.underlay(x)
	if err != nil {
		return err
	}
	mtu = d.insideMTU(d.want.Ingress(), mtu)
	if x.repair {
		if err := d.claimHop(); err != nil {
			return err
		}
	}
	if err := errors.Join(d.ensurePair(m, mtu, x), d.ensureLeg(m, f, bridge, mtu, addr, x)); err != nil || !x.repair {
		return err
	}
	six := d.want.Node().GetIngressAddr6() != ""
	forward := func() error {
		err := sysctl("net/ipv4/ip_forward", "1")
		if six {
			err = errors.Join(err, forward6())
		}
		return err
	}
	return errors.Join(within(m.ns, forward), within(d.hostNS, func() error {
		// The node's own loopback may ask for published ports.
		return errors.Join(forward(), sysctl("net/ipv4/conf/"+d.ingressLink()+"/route_localnet", "1"))
	}))
}

// ensurePair makes or mends the links between host and mesh.
func (d *Dataplane) ensurePair(m *fabric, mtu int, x *drift) error {
	out, name := &fabric{ns: d.hostNS, h: d.host}, d.ingressLink()
	host, inner := d.hops()
	near, err := out.find(name)
	if err != nil {
		return err
	}
	far, err := m.find(toHost)
	if err != nil {
		return err
	}
	whole := near != nil && far != nil && inner.v4.IsValid() && far.Attrs().ParentIndex == near.Attrs().Index &&
		slices.Equal(near.Attrs().HardwareAddr, mac(host.v4)) && slices.Equal(far.Attrs().HardwareAddr, mac(inner.v4))
	if !whole {
		if !x.add(kindLink, "routing mesh: link %s is missing or another", name) {
			return nil
		}
		d.mesh.former = near != nil
		if err := errors.Join(out.remove(near), m.remove(far)); err != nil {
			return fmt.Errorf("remove stale link: %w", err)
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU, attrs.HardwareAddr = name, mtu, mac(host.v4)
		if near, far, err = out.pair(attrs, m, toHost, mac(inner.v4)); err != nil {
			return err
		}
	}
	ends := []end{{out, near, host, inner, false}, {m, far, inner, host, true}}
	var errs []error
	for _, e := range ends {
		errs = append(errs, ensureMTU(e.h, e.link, mtu, x, "routing mesh"), e.address(x, netip.PrefixFrom(e.own.v4, 32), e.other.v4))
		if d.want.Node().GetIngressAddr6() != "" {
			errs = append(errs, e.address(x, netip.PrefixFrom(e.own.v6, 128), e.other.v6))
		}
		errs = append(errs, e.raise(x))
	}
	for _, e := range ends { // once both are up
		errs = append(errs, e.ways(x, e.other.v4))
		if d.want.Node().GetIngressAddr6() != "" {
			errs = append(errs, e.ways(x, e.other.v6))
		}
	}
	if d.want.Node().GetIngressAddr6() != "" {
		errs = append(errs, ends[0].loopback6(x))
	}
	return errors.Join(errs...)
}

// ensureLeg makes or mends the pair of links between mesh and ingress network.
func (d *Dataplane) ensureLeg(m, f *fabric, bridge, mtu int, addr netip.Prefix, x *drift) error {
	outer, err := f.find(toIngress)
	if err != nil {
		return err
	}
	leg, err := m.find(toIngress)
	if err != nil {
		return err
	}
	mac := netplan.MAC(addr.Addr())
	whole := leg != nil && outer != nil && leg.Attrs().ParentIndex == outer.Attrs().Index && slices.Equal(leg.Attrs().HardwareAddr, mac[:])
	if !whole {
		if !x.add(kindLink, "routing mesh: its link into the ingress network is missing or has another address than %s", addr) {
			return nil
		}
		if err := errors.Join(m.remove(leg), f.remove(outer)); err != nil {
			return fmt.Errorf("remove stale link: %w", err)
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU, attrs.MasterIndex, attrs.Flags = toIngress, mtu, bridge, net.FlagUp
		if outer, leg, err = f.pair(attrs, m, toIngress, mac[:]); err != nil {
			return err
		}
	}
	if outer.Attrs().MasterIndex != bridge && x.add(kindLink, "routing mesh: link is not in its bridge") {
		if err := f.h.LinkSetMasterByIndex(outer, bridge); err != nil {
			return fmt.Errorf("put link into the ingress network: %w", err)
		}
		whole = false // as a port
	}
	if err := f.ensurePort(outer.Attrs().Index, mac, !whole, x, "routing mesh"); err != nil {
		return err
	}
	e := end{fabric: m, link: leg}
	errs := []error{ensureMTU(f.h, outer, mtu, x, "routing mesh"), ensureMTU(m.h, leg, mtu, x, "routing mesh"), e.address(x, addr, netip.Addr{})}
	if six, err := netip.ParsePrefix(d.want.Node().GetIngressAddr6()); err == nil {
		errs = append(errs, e.address(x, six, netip.Addr{}))
	}
	return errors.Join(append(errs, e.raise(x))...)
}

// pair makes a link as attrs say, whose other end is in another namespace.
func (f *fabric) pair(attrs netlink.LinkAttrs, far *fabric, name string, hardware net.HardwareAddr) (here, there netlink.Link, err error) {
	if err := f.h.LinkAdd(&netlink.Veth{
		LinkAttrs: attrs, PeerName: name, PeerHardwareAddr: hardware, PeerNamespace: netlink.NsFd(int(far.ns)), PeerMTU: uint32(attrs.MTU),
	}); err != nil {
		return nil, nil, fmt.Errorf("make link %s: %w", attrs.Name, err)
	}
	if here, err = f.h.LinkByName(attrs.Name); err != nil {
		return nil, nil, fmt.Errorf("find link %s: %w", attrs.Name, err)
	}
	if there, err = far.h.LinkByName(name); err != nil {
		return nil, nil, fmt.Errorf("find link %s: %w", name, err)
	}
	return here, there, nil
}

// remove deletes a link, if there is one.
func (f *fabric) remove(link netlink.Link) error {
	if link == nil {
		return nil
	}
	err := f.h.LinkDel(link)
	if errors.Is(err, unix.ENODEV) {
		return nil // its other end took it along
	}
	return err
}

// end is one end of a link of the mesh.
type end struct {
	*fabric

	link       netlink.Link
	own, other hop
	// all leads everything that no other route leads to the other end.
	all bool
}

func (e end) name() string { return e.link.Attrs().Name }

// address gives the link an address, and that of its peer if it is valid.
func (e end) address(x *drift, own netip.Prefix, peer netip.Addr) error {
	have, err := dump(func() ([]netlink.Addr, error) { return e.h.AddrList(e.link, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", e.name(), err)
	}
	if slices.ContainsFunc(have, func(a netlink.Addr) bool { return a.IP.Equal(own.Addr().AsSlice()) }) ||
		!x.add(kindLink, "routing mesh: %s has no address %s", e.name(), own) {
		return nil
	}
	a := &netlink.Addr{IPNet: ipNet(own)}
	if peer.IsValid() {
		a.Peer = single(peer)
	}
	if own.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD // nobody else has it
		err := within(e.ns, func() error {
			conf := "net/ipv6/conf/" + e.name() + "/"
			if peer.IsValid() { // its neighbour is known, so it needs no address to ask from
				const noAddress = "1" // IN6_ADDR_GEN_MODE_NONE
				if err := sysctl(conf+"addr_gen_mode", noAddress); err != nil {
					return err
				}
			}
			return sysctl(conf+"disable_ipv6", "0")
		})
		if err != nil {
			return err
		}
	}
	if err := e.h.AddrAdd(e.link, a); err != nil {
		return fmt.Errorf("address %s: %w", e.name(), err)
	}
	return nil
}

func (e end) raise(x *drift) error {
	if e.link.Attrs().Flags&net.FlagUp != 0 || !x.add(kindLink, "routing mesh: %s is down", e.name()) {
		return nil
	}
	if err := e.h.LinkSetUp(e.link); err != nil {
		return fmt.Errorf("raise %s: %w", e.name(), err)
	}
	return nil
}

// ways makes or mends the routes to the other end and over it, and its hardware address.
func (e end) ways(x *drift, other netip.Addr) error {
	index, family := e.link.Attrs().Index, netlink.FAMILY_V4
	if other.Is6() {
		family = netlink.FAMILY_V6
	}
	routes, err := dump(func() ([]netlink.Route, error) { return e.h.RouteList(e.link, family) })
	if err != nil {
		return fmt.Errorf("list routes of %s: %w", e.name(), err)
	}
	to := netlink.Route{LinkIndex: index, Dst: single(other), Scope: netlink.SCOPE_LINK}
	if !slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.Dst != nil && r.Dst.String() == to.Dst.String() }) &&
		x.add(kindLink, "routing mesh: the route to %s is missing", other) {
		if err := e.h.RouteReplace(&to); err != nil {
			return fmt.Errorf("route %s: %w", other, err)
		}
	}
	over := netlink.Route{LinkIndex: index, Gw: other.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}
	if e.all && !slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.Gw.Equal(over.Gw) }) &&
		x.add(kindLink, "routing mesh: the route over %s is missing", other) {
		if err := e.h.RouteReplace(&over); err != nil {
			return fmt.Errorf("route over %s: %w", other, err)
		}
	}
	return ensureNeighbour(e.h, index, other, mac(e.other.v4), x, "routing mesh: %s does not know its neighbour %s", e.name(), other)
}

// loopback6 lets answers from the other end in that are for ::1, as the node's own connections
// to its published ports find it translated back: the kernel looks for a route to ::1 by the
// link that a packet came in at. From outside it takes none for ::1, whatever the routes.
func (e end) loopback6(x *drift) error {
	to := &netlink.Route{
		LinkIndex: e.link.Attrs().Index, Dst: single(netip.IPv6Loopback()), Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL,
		Priority: loopbackMetric, Family: netlink.FAMILY_V6,
	}
	routes, err := dump(func() ([]netlink.Route, error) {
		return e.h.RouteListFiltered(netlink.FAMILY_V6, to, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_OIF|netlink.RT_FILTER_DST)
	})
	if err != nil {
		return fmt.Errorf("list routes of %s: %w", e.name(), err)
	}
	if len(routes) > 0 || !x.add(kindLink, "routing mesh: answers to the node's own loopback have no route") {
		return nil
	}
	if err := e.h.RouteReplace(to); err != nil {
		return fmt.Errorf("route answers to loopback: %w", err)
	}
	return nil
}

// forward6 lets the calling thread's namespace forward IPv6. A host that forwards takes no
// routes from routers' advertisements any more unless each link says so.
func forward6() error {
	const all = "net/ipv6/conf/all/forwarding"
	if data, err := os.ReadFile(filepath.Join("/proc/sys", all)); err != nil || len(data) > 0 && data[0] != '0' {
		return err
	}
	links, err := os.ReadDir("/proc/sys/net/ipv6/conf")
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	for _, l := range links {
		file := "net/ipv6/conf/" + l.Name() + "/accept_ra"
		if data, err := os.ReadFile(filepath.Join("/proc/sys", file)); err != nil || !strings.HasPrefix(string(data), "1") {
			continue
		}
		if err := sysctl(file, "2"); err != nil {
			return err
		}
	}
	return sysctl(all, "1")
}

// removeMesh removes what ensureMesh made. Callers hold mu.
func (d *Dataplane) removeMesh(x *drift) error {
	link, err := (&fabric{h: d.host}).find(d.ingressLink())
	if err != nil {
		return err
	}
	if link == nil && d.mesh.v4.host.rules == nil && !pinned(d.meshNS()) {
		return nil // there is none
	}
	if !x.add(kindLink, "routing mesh: there is no ingress network, but its links or rules") {
		return nil
	}
	var errs []error
	if link != nil {
		errs = append(errs, d.host.LinkDel(link))
	}
	for _, f := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyIPv6} {
		errs = append(errs, d.hostRules(f, nil).remove(d.hostNS))
	}
	if m := d.mesh.space; m != nil {
		// The namespace's end is asynchronous; its leg must not be found afterwards.
		leg, err := m.find(toIngress)
		errs = append(errs, err, m.remove(leg))
		m.close()
	}
	errs = append(errs, removeNamespace(d.meshNS()))
	d.open(nil)
	refused := d.mesh.refused
	d.mesh = newMesh()
	d.mesh.refused = refused
	return errors.Join(errs...)
}
