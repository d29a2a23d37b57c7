package dataplane

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/netplan"
)

// defaultVXLANPort is IANA's.
const defaultVXLANPort = 4789

// Encapsulated packets leave from these ports, the last one excluded, each connection inside
// from one of them: enough for links and queues that hash ports. From one of all ports the
// host's connection table would have two entries for each connection, for half a minute.
const (
	firstSourcePort = 49152
	lastSourcePort  = firstSourcePort + 32
)

// switchNS is the namespace that holds the bridges of overlay networks. Names that begin
// with a dot are no containers.
func (d *Dataplane) switchNS() string { return filepath.Join(d.cfg.ExecDir, ".switch") }

func bridgeName(vni uint32) string { return fmt.Sprintf("br%d", vni) }
func vxlanName(vni uint32) string  { return fmt.Sprintf("vx%d", vni) }
func espName(vni uint32) string    { return fmt.Sprintf(espLink+"%d", vni) }

// deviceName names the VXLAN device of a network's segment.
func deviceName(n *skepv1.OverlayNetwork, vni uint32) string {
	if netplan.ByESP(n) {
		return espName(vni)
	}
	return vxlanName(vni)
}

// segmentNames returns the names of the links that are the segments of some networks.
func segmentNames(networks []*skepv1.OverlayNetwork) map[string]bool {
	out := map[string]bool{}
	for _, n := range networks {
		for _, g := range netplan.Segments(n) {
			if out[bridgeName(g.VNI)] = true; !isBridge(n) {
				out[deviceName(n, g.VNI)] = true
			}
		}
	}
	return out
}

// portName names the switch's end of a container's link to a network.
func portName(containerID, network string) string {
	sum := sha256.Sum256([]byte(containerID + "/" + network))
	return "p" + hex.EncodeToString(sum[:7])
}

// fabric is an open switch namespace.
type fabric struct {
	ns netns.NsHandle
	h  *netlink.Handle
	// links of the segments that are there, by VNI.
	links map[uint32]segmentLinks
	// routed is set where containers' links are no ports of a bridge.
	routed bool
	// sockets is of the namespace that encapsulated packets leave from and come to.
	sockets *netlink.Handle
	marks   watched    // of what ESP encrypts
	rt      *rtnl      // opened when it is needed
	seen    *portsSeen // set while everything is compared
}

// openFabric makes the switch namespace unless it is there. Callers hold mu and close it.
func (d *Dataplane) openFabric() (*fabric, error) {
	fresh := !pinned(d.switchNS())
	if err := makeNamespace(d.switchNS()); err != nil {
		return nil, err
	}
	ns, h, err := openAt(d.switchNS())
	if err != nil {
		return nil, err
	}
	f := &fabric{ns: ns, h: h, links: map[uint32]segmentLinks{}, sockets: d.host}
	if !fresh {
		return f, nil
	}
	if err := within(ns, bridgesOnly); err != nil {
		f.close()
		return nil, errors.Join(err, removeNamespace(d.switchNS()))
	}
	return f, nil
}

// bridgesOnly sets up the calling thread's namespace for bridges. Frames of networks with the
// same addresses must not meet in one connection table, and bridges talk to nobody themselves.
func bridgesOnly() error {
	return sysctls(
		[2]string{"net/bridge/bridge-nf-call-iptables", "0"}, [2]string{"net/bridge/bridge-nf-call-ip6tables", "0"},
		[2]string{"net/bridge/bridge-nf-call-arptables", "0"}, [2]string{"net/ipv6/conf/default/disable_ipv6", "1"})
}

// rtnl returns the socket for requests of our own.
func (f *fabric) rtnl() (*rtnl, error) {
	var err error
	if f.rt == nil {
		f.rt, err = openRTNL(f.ns)
	}
	return f.rt, err
}

func (f *fabric) close() {
	f.h.Close()
	if f.rt != nil {
		_ = f.rt.close()
	}
	_ = f.ns.Close() // a read-only descriptor
}

// closeSwitch removes the namespace with all networks.
func (d *Dataplane) closeSwitch() error {
	f := d.fabric
	if f == nil {
		return removeNamespace(d.switchNS())
	}
	d.fabric = nil
	// The namespace's end is asynchronous; VXLAN identifiers are free only without its links.
	errs := []error{f.keepOnly(nil, &drift{repair: true})}
	f.close()
	return errors.Join(append(errs, removeNamespace(d.switchNS()))...)
}

// underlay returns what VXLAN needs to know about this node: its address, port and the
// MTU that is left inside. It is looked up once for each comparison: a node has links for
// each container.
func (d *Dataplane) underlay(x *drift) (src netip.Addr, port, mtu int, err error) {
	if x.under == nil {
		u := &underlay{}
		u.src, u.port, u.mtu, u.err = d.lookUpUnderlay()
		x.under = u
	}
	return x.under.src, x.under.port, x.under.mtu, x.under.err
}

// underlay is what one comparison knows of the network between nodes.
type underlay struct {
	src       netip.Addr
	port, mtu int
	err       error
}

func (d *Dataplane) lookUpUnderlay() (src netip.Addr, port, mtu int, err error) {
	node := d.want.Node()
	if src, err = netip.ParseAddr(node.GetDataAddr()); err != nil {
		return src, 0, 0, fmt.Errorf("address for data %q: %w", node.GetDataAddr(), err)
	}
	port = int(node.GetVxlanPort())
	if port == 0 {
		port = defaultVXLANPort
	}
	mtu = 1500
	addrs, err := dump(func() ([]netlink.Addr, error) { return d.host.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return src, 0, 0, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && ip.Unmap() == src {
			link, err := d.host.LinkByIndex(a.LinkIndex)
			if err != nil {
				return src, 0, 0, fmt.Errorf("find link of %s: %w", src, err)
			}
			mtu = link.Attrs().MTU
			break
		}
	}
	// A node that reaches itself over loopback learns nothing about the others' links.
	mtu = min(mtu, 9000)
	if src.Is4() {
		return src, port, mtu - 50, nil
	}
	return src, port, mtu - 70, nil
}

// insideMTU returns the MTU in a network: what it says, else what is left where that much is
// left inside VXLAN.
func insideMTU(n *skepv1.OverlayNetwork, vxlan int) int {
	switch {
	case n.GetMtu() != 0:
		return int(n.GetMtu())
	case isBridge(n):
		return plainMTU
	case netplan.ByESP(n):
		return espMTU(vxlan)
	case inTunnel(n):
		return tunnelMTU(vxlan) - vxlanExtra6
	case n.GetEncrypted():
		return vxlan - wireguardExtra
	}
	return vxlan
}

// enginesExtra is what Docker Engines leave for VXLAN.
const enginesExtra = 50

// insideMTU returns the MTU in a network on this node. Docker Engines take it from what the
// network says is between nodes, 1500 if it says nothing: what is larger would not arrive there.
func (d *Dataplane) insideMTU(n *skepv1.OverlayNetwork, vxlan int) int {
	mtu := insideMTU(n, vxlan)
	if isBridge(n) || !d.want.Shared(n.GetId()) {
		return mtu
	}
	engines := plainMTU
	if n.GetMtu() != 0 {
		engines = int(n.GetMtu())
	}
	return min(mtu, engines-enginesExtra)
}

// ensureNetwork makes or mends bridge and VXLAN device of each segment of a network.
// Callers hold mu.
func (d *Dataplane) ensureNetwork(f *fabric, n *skepv1.OverlayNetwork, x *drift) error {
	if isBridge(n) {
		return d.ensureBridgeNetwork(f, n, x)
	}
	src, port, mtu, err := d.underlay(x)
	if err != nil {
		return err
	}
	want := netlink.Vxlan{LinkAttrs: netlink.NewLinkAttrs(), SrcAddr: src.AsSlice(), Port: port}
	if netplan.ByESP(n) {
		if err := d.refuseESP(n); err != nil {
			return err
		}
		want.Port = model.ESPPort
	}
	want.MTU = d.insideMTU(n, mtu)
	return f.ensureSegments(n, want, x)
}

// ensureSegments makes or mends a bridge and a VXLAN device like the one given for each segment
// of a network.
func (f *fabric) ensureSegments(n *skepv1.OverlayNetwork, want netlink.Vxlan, x *drift) error {
	var errs []error
	for _, g := range netplan.Segments(n) {
		what := fmt.Sprintf("network %s, VXLAN %d", n.GetName(), g.VNI)
		bridge, err := f.ensureBridge(g.VNI, want.MTU, x, what)
		if err != nil || bridge == nil {
			errs = append(errs, err)
			continue
		}
		want.Name, want.VxlanId, want.Proxy = deviceName(n, g.VNI), int(g.VNI), true
		vxlan, err := f.ensureVXLAN(bridge, &want, x, what)
		if err != nil || vxlan == nil {
			errs = append(errs, err)
			continue
		}
		if hasIPv6(n) {
			errs = append(errs, f.ensureIPv6(want.Name, x, what))
		}
		f.links[g.VNI] = segmentLinks{bridge: bridge.Attrs().Index, vxlan: vxlan.Attrs().Index}
	}
	return errors.Join(errs...)
}

// segments returns the links of a network's segments, zero where there are none.
func (f *fabric) segments(n *skepv1.OverlayNetwork) []segmentLinks {
	var out []segmentLinks
	for _, g := range netplan.Segments(n) {
		out = append(out, f.links[g.VNI])
	}
	return out
}

// find returns a link, or nil.
func (f *fabric) find(name string) (netlink.Link, error) {
	link, err := f.h.LinkByName(name)
	if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
		return nil, nil //nolint:nilnil // absence is an answer here
	}
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", name, err)
	}
	return link, nil
}

func (f *fabric) ensureBridge(vni uint32, mtu int, x *drift, what string) (netlink.Link, error) {
	name := bridgeName(vni)
	link, err := f.find(name)
	if err != nil {
		return nil, err
	}
	if link == nil {
		if !x.add(kindLink, "%s: bridge is missing", what) {
			return nil, nil //nolint:nilnil // nothing is to be mended
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = name, mtu
		// Without one of its own, a bridge takes its ports' addresses in turn and forgets its
		// neighbours each time.
		attrs.HardwareAddr = net.HardwareAddr{0x02, 0x53, 0x00, byte(vni >> 16), byte(vni >> 8), byte(vni)}
		off := false
		if err := f.h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &off}); err != nil && !errors.Is(err, syscall.EEXIST) {
			return nil, fmt.Errorf("make bridge %s: %w", name, err)
		}
		if link, err = f.h.LinkByName(name); err != nil {
			return nil, fmt.Errorf("find bridge %s: %w", name, err)
		}
	} else if link.Attrs().Flags&net.FlagUp == 0 && !x.add(kindLink, "%s: bridge is down", what) {
		return link, nil
	}
	if link.Attrs().Flags&net.FlagUp == 0 {
		if err := f.h.LinkSetUp(link); err != nil {
			return nil, fmt.Errorf("raise bridge %s: %w", name, err)
		}
	}
	return link, ensureMTU(f.h, link, mtu, x, what)
}

// ensureMTU mends the MTU of a link, which changes with that of the link between nodes.
func ensureMTU(h *netlink.Handle, link netlink.Link, mtu int, x *drift, what string) error {
	if link.Attrs().MTU == mtu || !x.add(kindLink, "%s: %s has MTU %d instead of %d", what, link.Attrs().Name, link.Attrs().MTU, mtu) {
		return nil
	}
	if err := h.LinkSetMTU(link, mtu); err != nil {
		return fmt.Errorf("set MTU of %s: %w", link.Attrs().Name, err)
	}
	return nil
}

func hasIPv6(n *skepv1.OverlayNetwork) bool {
	return slices.ContainsFunc(n.GetSubnets(), func(s *skepv1.OverlaySubnet) bool { return strings.Contains(s.GetSubnet(), ":") })
}

// ensureIPv6 lets a VXLAN device have IPv6 neighbours, for which it answers, without an
// address of its own.
func (f *fabric) ensureIPv6(device string, x *drift, what string) error {
	conf := "net/ipv6/conf/" + device + "/"
	return within(f.ns, func() error {
		now, err := os.ReadFile(filepath.Join("/proc/sys", conf+"disable_ipv6"))
		if err != nil {
			return fmt.Errorf("look at IPv6 of %s: %w", device, err)
		}
		if strings.TrimSpace(string(now)) == "0" || !x.add(kindLink, "%s: device has no IPv6", what) {
			return nil
		}
		const noAddress = "1" // IN6_ADDR_GEN_MODE_NONE
		return errors.Join(sysctl(conf+"addr_gen_mode", noAddress), sysctl(conf+"accept_ra", "0"), sysctl(conf+"disable_ipv6", "0"))
	})
}

func (f *fabric) ensureVXLAN(bridge netlink.Link, want *netlink.Vxlan, x *drift, what string) (netlink.Link, error) {
	link, err := f.find(want.Name)
	if err != nil {
		return nil, err
	}
	have, _ := link.(*netlink.Vxlan)
	if link != nil && (have == nil || have.VxlanId != want.VxlanId || !have.SrcAddr.Equal(want.SrcAddr) || have.Port != want.Port ||
		have.Learning || !have.Proxy || have.MTU != want.MTU) {
		if !x.add(kindLink, "%s: device is another than it should be", what) {
			return nil, nil //nolint:nilnil // nothing is to be mended
		}
		if err := f.h.LinkDel(link); err != nil {
			return nil, fmt.Errorf("remove %s: %w", want.Name, err)
		}
		link = nil
	} else if link == nil && !x.add(kindLink, "%s: device is missing", what) {
		return nil, nil //nolint:nilnil // nothing is to be mended
	}
	fresh := link == nil
	if fresh {
		// Made from the namespace that its socket stays in.
		made := *want
		made.Namespace, made.PortLow, made.PortHigh = netlink.NsFd(int(f.ns)), firstSourcePort, lastSourcePort
		if err := f.sockets.LinkAdd(&made); err != nil {
			return nil, fmt.Errorf("make %s to port %d: %w", want.Name, want.Port, err)
		}
		if link, err = f.h.LinkByName(want.Name); err != nil {
			return nil, fmt.Errorf("find %s: %w", want.Name, err)
		}
	}
	if link.Attrs().MasterIndex != bridge.Attrs().Index && (fresh || x.add(kindLink, "%s: device is not in its bridge", what)) {
		if err := f.h.LinkSetMasterByIndex(link, bridge.Attrs().Index); err != nil {
			return nil, fmt.Errorf("put %s into its bridge: %w", want.Name, err)
		}
		fresh = true // as a port
	}
	if err := f.ensureVXLANPort(link.Attrs().Index, fresh, x, what); err != nil {
		return nil, err
	}
	if link.Attrs().Flags&net.FlagUp == 0 && (fresh || x.add(kindLink, "%s: device is down", what)) {
		if err := f.h.LinkSetUp(link); err != nil {
			return nil, fmt.Errorf("raise %s: %w", want.Name, err)
		}
	}
	return link, nil
}

// keepOnly removes the links of segments that are not named. A network that is made anew in
// another way has its number: what is left of the former one must not stay in its bridge.
func (f *fabric) keepOnly(names map[string]bool, x *drift) error {
	links, err := dump(func() ([]netlink.Link, error) { return f.h.LinkList() })
	if err != nil {
		return fmt.Errorf("list links of the switch: %w", err)
	}
	var errs []error
	for _, l := range links {
		name := l.Attrs().Name
		var vni uint32
		if _, err := fmt.Sscanf(name[min(2, len(name)):], "%d", &vni); err != nil || names[name] ||
			!strings.HasPrefix(name, "br") && !strings.HasPrefix(name, "vx") && !strings.HasPrefix(name, espLink) {
			continue
		}
		if !x.add(kindLink, "link %s of the switch serves no network", name) {
			continue
		}
		if at := f.links[vni]; at.bridge == l.Attrs().Index || at.vxlan == l.Attrs().Index {
			delete(f.links, vni)
		}
		errs = append(errs, f.h.LinkDel(l))
	}
	return errors.Join(errs...)
}

// needed returns the networks that this node takes part in now, sorted: those of its
// sandboxes, and the ingress network if it can. Each that WireGuard encrypts has a namespace
// of its own, the others are in the switch.
func (d *Dataplane) needed() (switched, others []*skepv1.OverlayNetwork) {
	used := map[string]bool{}
	for _, l := range d.state.Leases {
		for _, o := range l.Overlays {
			used[o.NetworkID] = true
		}
	}
	if in := d.want.Ingress(); in != nil && d.want.Node().GetIngressAddr() != "" && d.refuseCrypt(in) == nil {
		used[in.GetId()] = true
	}
	for _, id := range d.want.Networks() {
		switch n := d.want.Network(id); {
		case !used[id]:
		case apart(n):
			others = append(others, n)
		default:
			switched = append(switched, n)
		}
	}
	return switched, others
}

// ways returns how packets of a network go to other nodes.
func (d *Dataplane) ways(n *skepv1.OverlayNetwork) netplan.Ways {
	w := d.want.Ways(n.GetId())
	if inTunnel(n) {
		return w.InTunnel()
	}
	return w
}

// syncForwards compares the forwarding of some networks with the plan.
func (d *Dataplane) syncForwards(f *fabric, networks []*skepv1.OverlayNetwork, x *drift) error {
	if len(networks) == 0 {
		return nil
	}
	served, ways := map[uint32]segmentLinks{}, map[uint32]netplan.Ways{}
	for _, n := range networks {
		for _, g := range netplan.Segments(n) {
			ways[g.VNI] = d.ways(n)
			if at, ok := f.links[g.VNI]; ok && !isBridge(n) {
				served[g.VNI] = at
			}
		}
	}
	differ, err := f.compareForwards(served, ways)
	if err != nil {
		return err
	}
	for _, vni := range slices.Sorted(maps.Keys(served)) {
		x.at(ways[vni].Network())
		err = errors.Join(err, f.tidyBridge(served[vni], x, fmt.Sprintf("VXLAN %d", vni)))
	}
	if !differ {
		return err
	}
	var want, have []netplan.Entry
	for _, n := range networks {
		for e := range d.ways(n).Entries() {
			if _, ok := served[e.VNI]; ok {
				want = append(want, e)
			}
		}
	}
	listed := again(func() error {
		have = nil
		return f.observe(served, func(e netplan.Entry) { have = append(have, e) }, func(neighbour) {})
	})
	if listed != nil {
		return errors.Join(err, listed)
	}
	put, remove := netplan.Diff(want, have)
	name := func(e netplan.Entry) string {
		if e.Addr.IsValid() {
			return e.Addr.String()
		}
		return net.HardwareAddr(e.MAC[:]).String()
	}
	put = slices.DeleteFunc(put, func(e netplan.Entry) bool {
		x.at(ways[e.VNI].Network())
		return !x.add(kindForward, "VXLAN %d: the way to %s is missing or wrong", e.VNI, name(e))
	})
	remove = slices.DeleteFunc(remove, func(e netplan.Entry) bool {
		x.at(ways[e.VNI].Network())
		return !x.add(kindForward, "VXLAN %d: the way to %s is there without reason", e.VNI, name(e))
	})
	return errors.Join(err, f.program(put, true), f.program(remove, false))
}

// compareForwards reports whether what some segments forward is other than what is wanted. It
// notes what their bridges know of ports.
func (f *fabric) compareForwards(served map[uint32]segmentLinks, ways map[uint32]netplan.Ways) (differ bool, err error) {
	wanted := 0
	for vni := range served {
		wanted += ways[vni].Count(vni)
	}
	err = again(func() error {
		if f.seen != nil {
			f.seen.reset()
		}
		found := 0
		differ = false
		err := f.observe(served, func(e netplan.Entry) {
			found++
			differ = differ || !ways[e.VNI].Wants(e)
		}, func(n neighbour) {
			if f.seen != nil {
				f.seen.learn(n)
			}
		})
		differ = differ || found != wanted
		return err
	})
	if err != nil && f.seen != nil {
		f.seen.known = nil
	}
	return differ, err
}
