package dataplane

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/netplan"
	"github.com/skep-dev/skep/worker/wireguard"
)

const (
	// cryptPrefix begins the names of the namespaces of encrypted networks.
	cryptPrefix = ".wg-"
	// tunnelTimeout bounds starting and ending a userspace device.
	tunnelTimeout = 30 * time.Second
)

// router is the hardware address of the namespace's end of every link of an encrypted
// network: containers know one neighbour, whoever is behind it.
func router() net.HardwareAddr { return net.HardwareAddr{0x02, 0x53, 0xff, 0, 0, 1} }

// router6 is the router's address for IPv6.
func router6() net.IP { return net.ParseIP("fe80::1") }

// tunnel is a WireGuard device.
type tunnel interface {
	Read() (wireguard.Config, error)
	Write(c wireguard.Changes) error
}

// crypt is an encrypted network on this node: a namespace of its own that routes between
// the links of the node's containers and a WireGuard device, and has no other way out. That of
// the ingress network has a bridge and a VXLAN device instead of routes (inTunnel).
type crypt struct {
	*fabric

	id, name string
	tunnel   tunnel
	wg       netlink.Link                     // its link when last looked at, nil without one
	blocked  error                            // why the node takes no part in the ingress network; nil if it does
	peers    map[wireguard.Key]netip.AddrPort // where the managers say they are
	unwatch  func()                           // nil while the device's end is not watched for
}

func (c *crypt) close() {
	if c.unwatch != nil {
		c.unwatch()
	}
	c.fabric.close()
}

func (d *Dataplane) cryptNS(network string) string {
	return filepath.Join(d.cfg.ExecDir, cryptPrefix+network[:min(12, len(network))])
}

func cryptSocket(ns string) string { return ns + ".sock" }

// cryptLabels tell the managers how this node can encrypt, and by which key.
func (d *Dataplane) cryptLabels() []string {
	if len(d.encryption) == 0 {
		return nil
	}
	public := d.private.Public()
	out := []string{
		model.EncryptionLabel + "=" + strings.Join(d.encryption, ","), fmt.Sprintf("%s=%x", model.WireGuardKeyLabel, public[:]),
	}
	if d.canESP() {
		d.mu.Lock()
		defer d.mu.Unlock()
		out = append(out, model.ESPEpochLabel+"="+d.esp.memory.Epoch)
	}
	return out
}

// recoverKey takes over the key that the devices of a former process have, or makes one.
func (d *Dataplane) recoverKey() error {
	d.encryption = d.encryptions()
	spaces, err := filepath.Glob(filepath.Join(d.cfg.ExecDir, cryptPrefix+"*"))
	if err != nil {
		return err
	}
	for _, path := range spaces {
		if d.private = keyOfDevice(path); !d.private.IsZero() {
			return nil
		}
	}
	d.private, err = wireguard.NewPrivateKey()
	return err
}

// keyOfDevice returns the private key of the device in a namespace, zero without one.
func keyOfDevice(path string) wireguard.Key {
	if !pinned(path) {
		return wireguard.Key{}
	}
	t, running := wireguard.Find(cryptSocket(path))
	if running {
		if c, err := t.Read(); err == nil {
			return c.Private
		}
	}
	kernel := &wireguard.Kernel{Within: func(f func() error) error { return withinPath(path, func(netns.NsHandle) error { return f() }) }}
	c, err := kernel.Read()
	if err != nil {
		return wireguard.Key{} // it has no device
	}
	return c.Private
}

// encryptions probes how this node can encrypt.
func (d *Dataplane) encryptions() []string {
	var out []string
	if err := d.probeESP(); err == nil {
		out = append(out, model.ESP)
	}
	if err := d.probeWireGuard(); err == nil {
		out = append(out, model.WireGuard)
	}
	if f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0); err == nil {
		_ = f.Close()
		if len(d.cfg.WireGuard) > 0 {
			out = append(out, model.UserspaceWireGuard)
		}
	}
	return out
}

// probeWireGuard makes a device of the kernel in a namespace of its own.
func (d *Dataplane) probeWireGuard() error {
	return tryWithin(filepath.Join(d.cfg.ExecDir, ".probe-wg"), func(ns netns.NsHandle) error { return wireguard.MakeKernel(d.host, ns, 1420) })
}

// apart reports whether a network has a namespace of its own: one that WireGuard encrypts.
func apart(n *skepv1.OverlayNetwork) bool { return n.GetEncrypted() && !netplan.ByESP(n) }

// refuseCrypt says why this node does not serve an encrypted network, nil if it does.
func (d *Dataplane) refuseCrypt(n *skepv1.OverlayNetwork) error {
	if netplan.ByESP(n) {
		return d.refuseESP(n)
	}
	how := n.GetEncryption()
	can := slices.Contains(d.encryption, how) || how == model.WireGuard && slices.Contains(d.encryption, model.UserspaceWireGuard)
	switch {
	case !n.GetEncrypted():
		return nil
	case how != model.WireGuard || n.GetEncryptionPort() == 0:
		return model.Errorf(model.Unimplemented, "network %s is encrypted by %q, which this node does not know", n.GetName(), how)
	case inTunnel(n) && !kernelHasIPv6():
		return model.Errorf(model.Unimplemented, "network %s is encrypted by %s, for which this node's kernel lacks IPv6", n.GetName(), how)
	case !can:
		return model.Errorf(model.Unimplemented, "network %s is encrypted by %s, which this node cannot do", n.GetName(), how)
	}
	return nil
}

// ensureCrypt makes or mends namespace and device of an encrypted network. Callers hold mu.
func (d *Dataplane) ensureCrypt(n *skepv1.OverlayNetwork, x *drift) error {
	if err := d.refuseCrypt(n); err != nil {
		return err
	}
	c, err := d.openCrypt(n, x)
	if err != nil || c == nil {
		return err
	}
	_, _, inside, err := d.underlay(x)
	if err != nil {
		return err
	}
	mtu := insideMTU(n, inside)
	if inTunnel(n) {
		mtu = max(mtu+vxlanExtra6, leastMTU6)
	}
	c.wg, err = d.ensureTunnel(c, mtu, x)
	if err != nil || c.wg == nil {
		return err
	}
	err = d.ensureDevice(c, n, true, x)
	if inTunnel(n) {
		return errors.Join(err, d.ensureVTEP(c, n, x))
	}
	for _, g := range netplan.Segments(n) {
		c.links[g.VNI] = segmentLinks{}
	}
	return err
}

// wireguardExtra is what WireGuard adds to a packet more than VXLAN: 60 and 50 bytes.
const wireguardExtra = 10

// openCrypt returns the open namespace of an encrypted network; nil if it is not there and
// shall not be made.
func (d *Dataplane) openCrypt(n *skepv1.OverlayNetwork, x *drift) (*crypt, error) {
	path := d.cryptNS(n.GetId())
	if c := d.crypts[n.GetId()]; c != nil {
		if pinned(path) {
			return c, nil
		}
		c.close()
		delete(d.crypts, n.GetId())
	}
	if !pinned(path) && !x.add(kindLink, "network %s: its namespace is missing", n.GetName()) {
		return nil, nil //nolint:nilnil // nothing is to be mended
	}
	if err := makeNamespace(path); err != nil {
		return nil, err
	}
	ns, h, err := openAt(path)
	if err != nil {
		return nil, err
	}
	c := &crypt{
		fabric: &fabric{ns: ns, h: h, links: map[uint32]segmentLinks{}, routed: !inTunnel(n), sockets: h}, id: n.GetId(), name: n.GetName(),
		peers: map[wireguard.Key]netip.AddrPort{},
	}
	setUp := routesOnly
	if inTunnel(n) {
		setUp = bridgesOnly
	}
	if err := within(ns, setUp); err != nil {
		c.close()
		return nil, err
	}
	d.crypts[n.GetId()] = c
	return c, nil
}

// routesOnly sets up the calling thread's namespace for an encrypted network. It routes, answers
// for whom it has a way to, and takes packets from nobody but those whose way leads back.
func routesOnly() error {
	return sysctls(
		[2]string{"net/ipv4/ip_forward", "1"}, [2]string{"net/ipv6/conf/all/forwarding", "1"},
		[2]string{"net/ipv4/conf/all/rp_filter", "1"}, [2]string{"net/ipv4/conf/default/rp_filter", "1"},
		[2]string{"net/ipv4/conf/all/send_redirects", "0"}, [2]string{"net/ipv4/conf/default/send_redirects", "0"})
}

// sysctls gives files their values; what the kernel does not have is passed over.
func sysctls(settings ...[2]string) error {
	var errs []error
	for _, s := range settings {
		if err := sysctl(s[0], s[1]); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// ensureTunnel finds, starts or starts again the device of an encrypted network, and
// returns its link.
func (d *Dataplane) ensureTunnel(c *crypt, mtu int, x *drift) (netlink.Link, error) {
	p, running := wireguard.Find(cryptSocket(d.cryptNS(c.id)))
	link, err := c.find(wireguard.Link)
	if err != nil {
		return nil, err
	}
	_, kernel := link.(*netlink.Wireguard)
	if link == nil || !kernel && !running {
		if !x.add(kindLink, "network %s: its WireGuard device is missing", c.name) {
			return nil, nil //nolint:nilnil // nothing is to be mended
		}
		if p, err = d.makeTunnel(c, p, mtu); err != nil {
			return nil, err
		}
		if link, err = c.h.LinkByName(wireguard.Link); err != nil {
			return nil, fmt.Errorf("find WireGuard device of network %s: %w", c.name, err)
		}
	}
	if p == nil {
		c.tunnel = &wireguard.Kernel{Within: func(f func() error) error { return within(c.ns, f) }}
	} else {
		c.tunnel = p
		if err := d.watchTunnel(c, p); err != nil {
			return nil, err
		}
	}
	if link.Attrs().MTU != mtu && x.add(kindLink, "network %s: its WireGuard device has another MTU than %d", c.name, mtu) {
		if err := c.h.LinkSetMTU(link, mtu); err != nil {
			return nil, fmt.Errorf("set MTU of network %s: %w", c.name, err)
		}
	}
	if link.Attrs().Flags&net.FlagUp == 0 && x.add(kindLink, "network %s: its WireGuard device is down", c.name) {
		if err := c.h.LinkSetUp(link); err != nil {
			return nil, fmt.Errorf("raise WireGuard device of network %s: %w", c.name, err)
		}
	}
	return link, nil
}

// watchTunnel has everything looked at when the device of a network ends unasked.
func (d *Dataplane) watchTunnel(c *crypt, p *wireguard.Process) (err error) {
	if c.unwatch != nil {
		return nil
	}
	c.unwatch, err = p.Watch(func() {
		select {
		case d.ended <- struct{}{}:
		default: // somebody is about to look
		}
	})
	return err
}

// makeTunnel makes the device of an encrypted network: the kernel's, which is nil, or a
// process. One that runs without its link, old if it is not nil, ends first.
func (d *Dataplane) makeTunnel(c *crypt, old *wireguard.Process, mtu int) (*wireguard.Process, error) {
	ctx, cancel := context.WithTimeout(context.Background(), tunnelTimeout) //nolint:forbidigo // bounded; there is no caller to cancel it
	defer cancel()
	if c.unwatch != nil {
		c.unwatch()
		c.unwatch = nil
	}
	if old != nil {
		if err := old.Close(ctx); err != nil {
			return nil, err
		}
	}
	if slices.Contains(d.encryption, model.WireGuard) {
		return nil, wireguard.MakeKernel(d.host, c.ns, mtu)
	}
	path := d.cryptNS(c.id)
	serving := wireguard.Serving{Namespace: path, Socket: cryptSocket(path), MTU: mtu}
	return wireguard.Start(ctx, d.cfg.WireGuard, d.hostNS, serving, filepath.Join(d.cfg.Dir, "wireguard.log"))
}

// device returns what the WireGuard device of a network shall have.
func (d *Dataplane) device(n *skepv1.OverlayNetwork) (wireguard.Config, map[wireguard.Key]netip.AddrPort) {
	want := wireguard.Config{Private: d.private, Port: uint16(n.GetEncryptionPort()), Peers: map[wireguard.Key]wireguard.Peer{}}
	at := map[wireguard.Key]netip.AddrPort{}
	for _, p := range d.want.Peers(n.GetId()) {
		if len(p.Public) != len(wireguard.Key{}) || !p.Addr.IsValid() {
			continue // a node that cannot say how to encrypt to it is sent nothing
		}
		peer := wireguard.Peer{Endpoint: netip.AddrPortFrom(p.Addr, want.Port)}
		if len(p.Preshared) == len(peer.Preshared) {
			peer.Preshared = wireguard.Key(p.Preshared)
		}
		if inTunnel(n) {
			p.Addresses = []netip.Addr{netplan.TunnelAddr(p.Node)}
		}
		for _, a := range p.Addresses {
			peer.Allowed = append(peer.Allowed, netip.PrefixFrom(a, a.BitLen()))
		}
		key := wireguard.Key(p.Public)
		want.Peers[key], at[key] = peer, peer.Endpoint
	}
	return want, at
}

// ensureDevice makes a network's WireGuard device have the peers it shall have. What is
// gone stays unless all is set, for those who are still led there.
func (d *Dataplane) ensureDevice(c *crypt, n *skepv1.OverlayNetwork, all bool, x *drift) error {
	have, err := c.tunnel.Read()
	if err != nil {
		return fmt.Errorf("network %s: %w", c.name, err)
	}
	want, at := d.device(n)
	moved := map[wireguard.Key]bool{}
	for k, to := range at {
		moved[k] = c.peers[k].IsValid() && c.peers[k] != to
	}
	changes := wireguard.Diff(want, have, moved)
	if !all {
		changes = additions(changes)
	}
	if changes.Empty() {
		c.peers, c.blocked = at, nil
		return nil
	}
	if !x.add(kindForward, "network %s: its WireGuard device differs: %d nodes to remove, %d to change", c.name, len(changes.Remove), len(changes.Peers)) {
		return nil
	}
	switch err := c.tunnel.Write(changes); {
	case errors.Is(err, unix.EADDRINUSE):
		err = model.Errorf(model.Conflict, "network %s: UDP port %d is in use on this node: free it, or create the network with another --opt %s",
			c.name, want.Port, model.EncryptionPortOption)
		if inTunnel(n) { // every node is in it, and nobody shall wait for this one
			c.blocked, err = err, nil
		}
		return err
	case err != nil:
		return fmt.Errorf("network %s: %w", c.name, err)
	}
	c.peers, c.blocked = at, nil
	return nil
}

// additions returns changes without what they take away. An address that moves is given to
// its new peer, which takes it from the old one.
func additions(c wireguard.Changes) wireguard.Changes {
	c.Remove = nil
	peers := make([]wireguard.Change, 0, len(c.Peers))
	for _, p := range c.Peers {
		p.Drop = nil
		if !p.Empty() {
			peers = append(peers, p)
		}
	}
	c.Peers = peers
	return c
}

// updateCrypts programs what an update changed in encrypted networks. Callers hold mu.
func (d *Dataplane) updateCrypts(ids []string, all bool) error {
	var errs []error
	for _, id := range ids {
		n, c := d.want.Network(id), d.crypts[id]
		if n == nil || c == nil || c.wg == nil {
			continue // nobody here is in it
		}
		errs = append(errs, d.ensureDevice(c, n, all, &drift{repair: true}))
	}
	return errors.Join(errs...)
}

// ensureRoutes makes the routes of a namespace that routes those to the node's own containers,
// whose links are there, and to everybody else through the device. Callers hold mu.
func (d *Dataplane) ensureRoutes(id string, x *drift) error {
	c, n := d.crypts[id], d.want.Network(id)
	if c == nil || c.wg == nil || !c.routed {
		return nil // named already, or not one
	}
	want := map[netip.Prefix]int{}
	for _, s := range n.GetSubnets() {
		if p, err := netip.ParsePrefix(s.GetSubnet()); err == nil {
			want[p.Masked()] = c.wg.Attrs().Index
		}
	}
	var errs []error
	for id, l := range d.state.Leases {
		for _, o := range l.Overlays {
			if o.NetworkID != c.id {
				continue
			}
			link, err := c.find(portName(id, c.id))
			if err != nil || link == nil {
				errs = append(errs, err)
				continue
			}
			for _, a := range []netip.Addr{o.Address.Addr(), o.Address6.Addr()} {
				if a.IsValid() {
					want[netip.PrefixFrom(a, a.BitLen())] = link.Attrs().Index
				}
			}
		}
	}
	have, err := c.routes()
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	for p, link := range want {
		if have[p] == link || !x.add(kindForward, "network %s: the way to %s is missing or wrong", c.name, p) {
			continue
		}
		route := &netlink.Route{LinkIndex: link, Dst: ipNet(p), Scope: netlink.SCOPE_LINK}
		if err := c.h.RouteReplace(route); err != nil {
			errs = append(errs, fmt.Errorf("network %s: route to %s: %w", c.name, p, err))
		}
	}
	for p, link := range have {
		if _, stays := want[p]; stays || !x.add(kindForward, "network %s: the way to %s is there without reason", c.name, p) {
			continue
		}
		if err := c.h.RouteDel(&netlink.Route{LinkIndex: link, Dst: ipNet(p), Scope: netlink.SCOPE_NOWHERE}); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("network %s: remove route to %s: %w", c.name, p, err))
		}
	}
	return errors.Join(errs...)
}

// routes returns the routes of the namespace, without those that the kernel keeps itself.
func (c *crypt) routes() (map[netip.Prefix]int, error) {
	list, err := dump(func() ([]netlink.Route, error) { return c.h.RouteList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	out := map[netip.Prefix]int{}
	for _, r := range list {
		if r.Dst == nil || r.Type != unix.RTN_UNICAST {
			continue
		}
		a, ok := netip.AddrFromSlice(r.Dst.IP)
		ones, _ := r.Dst.Mask.Size()
		if ok && !a.Unmap().IsLinkLocalUnicast() && !a.IsMulticast() {
			out[netip.PrefixFrom(a.Unmap(), ones)] = r.LinkIndex
		}
	}
	return out, nil
}

// ensureRouted sets up both ends of a container's link to an encrypted network: the
// namespace answers for all others, and knows the container.
func (p *port) ensureRouted(f *fabric, h *netlink.Handle, link, eth netlink.Link) error {
	name := link.Attrs().Name
	err := within(f.ns, func() error {
		return sysctls([2]string{"net/ipv4/conf/" + name + "/proxy_arp", "1"}, [2]string{"net/ipv4/neigh/" + name + "/proxy_delay", "0"})
	})
	if err != nil {
		return err
	}
	mac := netplan.MAC(p.overlay.Address.Addr())
	neighbours := map[netip.Addr]bool{p.overlay.Address.Addr(): true}
	if p.overlay.Address6.IsValid() {
		neighbours[p.overlay.Address6.Addr()] = true
	}
	have, err := dump(func() ([]netlink.Neigh, error) { return f.h.NeighList(link.Attrs().Index, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list neighbours: %w", err)
	}
	for _, n := range have {
		if a, ok := netip.AddrFromSlice(n.IP); ok && n.State&unix.NUD_PERMANENT != 0 && bytes.Equal(n.HardwareAddr, mac[:]) {
			delete(neighbours, a.Unmap())
		}
	}
	for a := range neighbours {
		if err := f.h.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, IP: a.AsSlice(), HardwareAddr: mac[:], State: unix.NUD_PERMANENT}); err != nil {
			return fmt.Errorf("set neighbour %s: %w", a, err)
		}
	}
	// Should the link go, what is meant for the network must not take the way out.
	unreachable := &netlink.Route{Dst: ipNet(p.overlay.Address.Masked()), Type: unix.RTN_UNREACHABLE, Priority: math.MaxInt32}
	if err := h.RouteReplace(unreachable); err != nil {
		return fmt.Errorf("close the way out to %s: %w", p.overlay.Address.Masked(), err)
	}
	if !p.overlay.Address6.IsValid() {
		return nil
	}
	unreachable = &netlink.Route{Dst: ipNet(p.overlay.Address6.Masked()), Type: unix.RTN_UNREACHABLE, Priority: math.MaxInt32}
	if err := h.RouteReplace(unreachable); err != nil {
		return fmt.Errorf("close the way out to %s: %w", p.overlay.Address6.Masked(), err)
	}
	// Nobody answers for others in IPv6, so the container asks the router for everybody.
	index := eth.Attrs().Index
	if err := h.NeighSet(&netlink.Neigh{LinkIndex: index, IP: router6(), HardwareAddr: router(), State: unix.NUD_PERMANENT}); err != nil {
		return fmt.Errorf("set neighbour %s: %w", router6(), err)
	}
	if err := h.RouteReplace(&netlink.Route{LinkIndex: index, Dst: ipNet(p.overlay.Address6.Masked()), Gw: router6(), Flags: int(netlink.FLAG_ONLINK)}); err != nil {
		return fmt.Errorf("route %s: %w", p.overlay.Address6.Masked(), err)
	}
	return nil
}

// tidyCrypts removes the encrypted networks that no container of this node is on.
func (d *Dataplane) tidyCrypts(x *drift) error {
	keep := map[string]bool{}
	_, needed := d.needed()
	for _, n := range needed {
		keep[filepath.Base(d.cryptNS(n.GetId()))] = true
	}
	entries, err := os.ReadDir(d.cfg.ExecDir)
	if err != nil {
		return fmt.Errorf("list namespaces: %w", err)
	}
	var errs []error
	for _, e := range entries {
		name := e.Name()
		if !strings.HasPrefix(name, cryptPrefix) || strings.HasSuffix(name, ".sock") || strings.HasSuffix(name, ".sock+") || keep[name] ||
			!x.add(kindLink, "namespace %s serves no network", name) {
			continue
		}
		errs = append(errs, d.removeCrypt(filepath.Join(d.cfg.ExecDir, name)))
	}
	return errors.Join(errs...)
}

// removeCrypt ends the device of an encrypted network and removes its namespace.
func (d *Dataplane) removeCrypt(path string) error {
	for id, c := range d.crypts {
		if d.cryptNS(id) == path {
			c.close()
			delete(d.crypts, id)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), tunnelTimeout) //nolint:forbidigo // bounded; there is no caller to cancel it
	defer cancel()
	var errs []error
	if p, ok := wireguard.Find(cryptSocket(path)); ok {
		errs = append(errs, p.Close(ctx))
	}
	for _, name := range []string{cryptSocket(path), cryptSocket(path) + "+"} {
		if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		d.cfg.Log.Warn("encrypted network not removed", slog.String("namespace", path), slog.Any("error", err))
	}
	return errors.Join(append(errs, removeNamespace(path))...)
}

// fabricOf returns the open namespace that a network's links are in, nil without one.
func (d *Dataplane) fabricOf(n *skepv1.OverlayNetwork) *fabric {
	if !apart(n) {
		return d.fabric
	}
	if c := d.crypts[n.GetId()]; c != nil {
		return c.fabric
	}
	return nil
}
