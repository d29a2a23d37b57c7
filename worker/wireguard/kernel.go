package wireguard

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// Kernel is a device of the kernel. It ends with its namespace.
type Kernel struct {
	// Within runs a function in the network namespace of the link.
	Within func(func() error) error
}

// MakeKernel makes a kernel device in a namespace, with its UDP socket in that of h. The
// error is netlink.ErrNotImplemented or EOPNOTSUPP where the kernel has none.
func MakeKernel(h *netlink.Handle, in netns.NsHandle, mtu int) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.Namespace = Link, mtu, netlink.NsFd(int(in))
	if err := h.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs}); err != nil {
		return fmt.Errorf("make WireGuard device: %w", err)
	}
	return nil
}

// ask opens a client in the link's namespace.
func (k *Kernel) ask(f func(c *wgctrl.Client) error) error {
	return k.Within(func() error {
		c, err := wgctrl.New()
		if err != nil {
			return fmt.Errorf("reach kernel WireGuard: %w", err)
		}
		return errors.Join(f(c), c.Close())
	})
}

// Read returns what the device has.
func (k *Kernel) Read() (Config, error) {
	out := Config{Peers: map[Key]Peer{}}
	err := k.ask(func(c *wgctrl.Client) error {
		d, err := c.Device(Link)
		if err != nil {
			return fmt.Errorf("read WireGuard device: %w", err)
		}
		out.Private, out.Port = Key(d.PrivateKey), uint16(d.ListenPort)
		for _, p := range d.Peers {
			peer := Peer{Preshared: Key(p.PresharedKey)}
			if p.Endpoint != nil {
				at := p.Endpoint.AddrPort()
				peer.Endpoint = netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
			}
			for _, a := range p.AllowedIPs {
				if addr, ok := netip.AddrFromSlice(a.IP); ok {
					ones, _ := a.Mask.Size()
					peer.Allowed = append(peer.Allowed, netip.PrefixFrom(addr.Unmap(), ones))
				}
			}
			slices.SortFunc(peer.Allowed, netip.Prefix.Compare)
			out.Peers[Key(p.PublicKey)] = peer
		}
		return nil
	})
	return out, err
}

// Write makes changes.
func (k *Kernel) Write(changes Changes) error {
	var have Config
	if slices.ContainsFunc(changes.Peers, func(p Change) bool { return len(p.Drop) > 0 }) {
		var err error
		if have, err = k.Read(); err != nil {
			return err
		}
	}
	var config wgtypes.Config
	if !changes.Private.IsZero() {
		private := wgtypes.Key(changes.Private)
		config.PrivateKey = &private
	}
	if changes.Port != 0 {
		port := int(changes.Port)
		config.ListenPort = &port
	}
	for _, key := range changes.Remove {
		config.Peers = append(config.Peers, wgtypes.PeerConfig{PublicKey: wgtypes.Key(key), Remove: true})
	}
	// Kernels before 6.16 cannot drop single addresses: the others are said again.
	for _, p := range changes.Peers {
		if len(p.Drop) > 0 {
			config.Peers = append(config.Peers, wgtypes.PeerConfig{
				PublicKey: wgtypes.Key(p.Key), UpdateOnly: true, ReplaceAllowedIPs: true,
				AllowedIPs: ipNets(missing(have.Peers[p.Key].Allowed, p.Drop)),
			})
		}
	}
	for _, p := range changes.Peers {
		peer := wgtypes.PeerConfig{PublicKey: wgtypes.Key(p.Key), UpdateOnly: !p.New, AllowedIPs: ipNets(p.Add)}
		if !p.Preshared.IsZero() {
			shared := wgtypes.Key(p.Preshared)
			peer.PresharedKey = &shared
		}
		if p.Endpoint.IsValid() {
			peer.Endpoint = net.UDPAddrFromAddrPort(p.Endpoint)
		}
		config.Peers = append(config.Peers, peer)
	}
	return k.ask(func(c *wgctrl.Client) error {
		if err := c.ConfigureDevice(Link, config); err != nil {
			return fmt.Errorf("program WireGuard device: %w", err)
		}
		return nil
	})
}

func ipNets(list []netip.Prefix) []net.IPNet {
	out := make([]net.IPNet, 0, len(list))
	for _, p := range list {
		out = append(out, net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())})
	}
	return out
}
