package dataplane

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/model"
)

// freeNetwork chooses a private network that no address or route of this machine overlaps,
// nor any of those taken.
func freeNetwork(h *netlink.Handle, taken ...netip.Prefix) (netip.Prefix, error) {
	routes, err := dump(func() ([]netlink.Route, error) { return h.RouteList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		if addr, ok := netip.AddrFromSlice(r.Dst.IP.To4()); ok {
			if ones, _ := r.Dst.Mask.Size(); ones > 0 {
				taken = append(taken, netip.PrefixFrom(addr, ones))
			}
		}
	}
	var candidates []netip.Prefix
	for i := 17; i <= 31; i++ {
		candidates = append(candidates, netip.PrefixFrom(netip.AddrFrom4([4]byte{172, byte(i), 0, 1}), 16))
	}
	for i := 0; i < 256; i += 16 {
		candidates = append(candidates, netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 168, byte(i), 1}), 20))
	}
	for _, c := range candidates {
		free := true
		for _, t := range taken {
			free = free && !c.Overlaps(t)
		}
		if free {
			return c, nil
		}
	}
	return netip.Prefix{}, model.Errorf(model.Exhausted, "no private network is free for containers; name one with --bip")
}

// claimNetwork chooses a free network and takes it by making the bridge, one daemon of
// this network namespace after the other: two that looked at the same time, or before
// either had a container, would choose the same. Callers hold mu.
func (d *Dataplane) claimNetwork() error {
	if err := unix.Flock(int(d.hostNS), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock network namespace: %w", err)
	}
	defer unix.Flock(int(d.hostNS), unix.LOCK_UN) //nolint:errcheck // closing it would unlock it as well
	address, err := freeNetwork(d.host)
	if err != nil {
		return err
	}
	d.state.Address = address
	return d.ensureBridge(&drift{repair: true})
}

// ensureBridge makes the bridge and the table, or mends them. Callers hold mu.
func (d *Dataplane) ensureBridge(x *drift) error {
	link, err := d.host.LinkByName(d.bridge)
	if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
		if !x.add(kindLink, "local network: bridge %s is missing", d.bridge) {
			return nil
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = d.bridge
		if err := d.host.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil && !errors.Is(err, syscall.EEXIST) {
			return fmt.Errorf("make bridge %s: %w", d.bridge, err)
		}
		link, err = d.host.LinkByName(d.bridge)
	}
	if err != nil {
		return fmt.Errorf("find bridge %s: %w", d.bridge, err)
	}
	have, err := dump(func() ([]netlink.Addr, error) { return d.host.AddrList(link, netlink.FAMILY_V4) })
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", d.bridge, err)
	}
	own := d.state.Address
	if !slices.ContainsFunc(have, func(a netlink.Addr) bool { return a.IP.Equal(own.Addr().AsSlice()) }) &&
		x.add(kindLink, "local network: bridge has no address %s", own) {
		if err := d.host.AddrAdd(link, &netlink.Addr{IPNet: ipNet(own)}); err != nil && !errors.Is(err, syscall.EEXIST) {
			return fmt.Errorf("address bridge %s: %w", d.bridge, err)
		}
	}
	if link.Attrs().Flags&net.FlagUp == 0 && x.add(kindLink, "local network: bridge is down") {
		if err := d.host.LinkSetUp(link); err != nil {
			return fmt.Errorf("raise bridge %s: %w", d.bridge, err)
		}
	}
	if x.repair {
		err := within(d.hostNS, func() error {
			return errors.Join(sysctl("net/ipv4/ip_forward", "1"), sysctl("net/ipv4/conf/"+d.bridge+"/route_localnet", "1"))
		})
		if err != nil {
			return err
		}
	}
	return d.ensureTable(x)
}

func (d *Dataplane) removeBridge() error {
	link, err := d.host.LinkByName(d.bridge)
	if err != nil {
		return nil //nolint:nilerr // there is none
	}
	return d.host.LinkDel(link)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// mac derives a hardware address from an IP address, so that neighbours' caches stay right
// when a container comes back.
func mac(a netip.Addr) net.HardwareAddr {
	b := a.As4()
	return net.HardwareAddr{0x02, 0x53, b[0], b[1], b[2], b[3]}
}

// connect links a container's namespace to the bridge by name. Callers hold mu.
func (d *Dataplane) connect(containerID string, addr netip.Addr, name string) error {
	path := d.netns(containerID)
	h, err := handleAt(path)
	if err != nil {
		return err
	}
	defer h.Close()
	if _, err := h.LinkByName(name); err != nil {
		if err := d.addVeth(path, addr, name, len(d.state.Leases[containerID].Overlays) > 0); err != nil {
			return err
		}
	}
	eth, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	prefix := netip.PrefixFrom(addr, d.state.Address.Bits())
	if err := h.AddrAdd(eth, &netlink.Addr{IPNet: ipNet(prefix)}); err != nil && !errors.Is(err, syscall.EEXIST) {
		return fmt.Errorf("address %s: %w", name, err)
	}
	if err := h.LinkSetUp(eth); err != nil {
		return fmt.Errorf("raise %s: %w", name, err)
	}
	route := &netlink.Route{LinkIndex: eth.Attrs().Index, Gw: d.state.Address.Addr().AsSlice()}
	if err := h.RouteAdd(route); err != nil && !errors.Is(err, syscall.EEXIST) {
		return fmt.Errorf("add default route: %w", err)
	}
	return nil
}

// addVeth makes a pair of links: one end on the bridge, name in the namespace. The way out
// of a container that has networks of its own is apart from the others': who shares no
// network with it must not reach it on this one.
func (d *Dataplane) addVeth(path string, addr netip.Addr, name string, apart bool) error {
	bridge, err := d.host.LinkByName(d.bridge)
	if err != nil {
		return fmt.Errorf("find bridge %s: %w", d.bridge, err)
	}
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close() //nolint:errcheck // a read-only descriptor
	attrs := netlink.NewLinkAttrs()
	b := addr.As4()
	attrs.Name = fmt.Sprintf("%.6s%02x%02x%02x%02x", vethPrefix(d.bridge), b[0], b[1], b[2], b[3])
	attrs.MasterIndex = bridge.Attrs().Index
	attrs.Flags = net.FlagUp
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: name, PeerHardwareAddr: mac(addr), PeerNamespace: netlink.NsFd(int(ns))}
	err = d.host.LinkAdd(veth)
	if errors.Is(err, syscall.EEXIST) {
		// The kernel has not yet reaped the link of the address's last holder.
		if old, findErr := d.host.LinkByName(attrs.Name); findErr == nil {
			if err := d.host.LinkDel(old); err != nil {
				return fmt.Errorf("remove stale link: %w", err)
			}
		}
		err = d.host.LinkAdd(veth)
	}
	if err != nil {
		return fmt.Errorf("make link to the bridge: %w", err)
	}
	if apart {
		if err := d.host.LinkSetIsolated(veth, true); err != nil {
			return fmt.Errorf("set %s apart from other links of the bridge: %w", attrs.Name, err)
		}
	}
	return nil
}

// vethPrefix tells the links of several daemons in one namespace apart.
func vethPrefix(bridge string) string {
	if len(bridge) > 4 {
		return "sk" + bridge[len(bridge)-4:]
	}
	return "sk" + bridge
}

// ensureNeighbour makes or mends what a link knows of the hardware address of one address; the
// rest says what it means that it does not.
func ensureNeighbour(h *netlink.Handle, index int, a netip.Addr, hardware net.HardwareAddr, x *drift, format string, args ...any) error {
	family := netlink.FAMILY_V4
	if a.Is6() {
		family = netlink.FAMILY_V6
	}
	have, err := dump(func() ([]netlink.Neigh, error) { return h.NeighList(index, family) })
	if err != nil {
		return fmt.Errorf("list neighbours: %w", err)
	}
	known := slices.ContainsFunc(have, func(n netlink.Neigh) bool {
		return n.IP.Equal(a.AsSlice()) && n.State&unix.NUD_PERMANENT != 0 && slices.Equal(n.HardwareAddr, hardware)
	})
	if known || !x.add(kindLink, format, args...) {
		return nil
	}
	if err := h.NeighSet(&netlink.Neigh{LinkIndex: index, Family: family, State: unix.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: hardware}); err != nil {
		return fmt.Errorf("set neighbour %s: %w", a, err)
	}
	return nil
}
