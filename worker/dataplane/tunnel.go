package dataplane

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/netplan"
	"github.com/skep-dev/skep/worker/wireguard"
)

// The ingress network carries clients' addresses and tells tasks, by hardware addresses, which
// node an answer goes to. So one that WireGuard encrypts is a network of bridges like a clear
// one; its VXLAN packets go from node to node through WireGuard. The VXLAN device's socket is
// in the network's namespace, so there is no other way to it.

const (
	// vxlanExtra6 is what VXLAN adds to a packet over IPv6.
	vxlanExtra6 = 70
	// leastMTU6 is the smallest that a link with IPv6 may have.
	leastMTU6 = 1280
	// wireguardBlock is what WireGuard fills packets up to, within the link's MTU.
	wireguardBlock = 16
)

// inTunnel reports whether a network's VXLAN packets go through WireGuard.
func inTunnel(n *skepv1.OverlayNetwork) bool {
	return n.GetIngress() && n.GetEncrypted() && n.GetEncryption() == model.WireGuard
}

// kernelHasIPv6 is false where it was switched off when the kernel was started.
func kernelHasIPv6() bool {
	_, err := os.Stat("/proc/net/if_inet6")
	return err == nil
}

// refuseMesh says why this node takes no part in an ingress network, nil if it does.
func (d *Dataplane) refuseMesh(in *skepv1.OverlayNetwork) error {
	if err := d.refuseCrypt(in); err != nil {
		return err
	}
	if c := d.crypts[in.GetId()]; c != nil {
		return c.blocked
	}
	return nil
}

// tunnelMTU returns what WireGuard leaves where that much is left inside VXLAN. A link with
// IPv6 cannot have less than 1280, and would let packets be filled up beyond what is left.
func tunnelMTU(vxlan int) int {
	left := vxlan - wireguardExtra
	if left < leastMTU6 {
		left -= left % wireguardBlock
	}
	return left
}

// ensureVTEP makes or mends what a network in a tunnel has beside the device: the node's
// address there, and bridge and VXLAN device of each segment with the ways to others.
func (d *Dataplane) ensureVTEP(c *crypt, n *skepv1.OverlayNetwork, x *drift) error {
	_, port, inside, err := d.underlay(x)
	if err != nil {
		return err
	}
	own := netplan.TunnelAddr(d.want.Node().GetId())
	if err := c.ensureOwn(own, x); err != nil {
		return err
	}
	// Checksums are not left out: without them userspace WireGuard hands packets on one by one.
	want := netlink.Vxlan{LinkAttrs: netlink.NewLinkAttrs(), SrcAddr: own.AsSlice(), Port: port}
	want.MTU = insideMTU(n, inside)
	if x.whole {
		if err := again(c.look); err != nil {
			return err
		}
	}
	return errors.Join(c.ensureSegments(n, want, x), d.syncForwards(c.fabric, []*skepv1.OverlayNetwork{n}, x))
}

// ensureOwn gives the device of a tunnel its address, and the way to the others.
func (c *crypt) ensureOwn(own netip.Addr, x *drift) error {
	have, err := dump(func() ([]netlink.Addr, error) { return c.h.AddrList(c.wg, netlink.FAMILY_V6) })
	if err != nil {
		return fmt.Errorf("list addresses of network %s: %w", c.name, err)
	}
	if !slices.ContainsFunc(have, func(a netlink.Addr) bool { return a.IP.Equal(own.AsSlice()) }) {
		if !x.add(kindLink, "network %s: its tunnel has no address %s", c.name, own) {
			return nil
		}
		if err := within(c.ns, func() error { return sysctl("net/ipv6/conf/"+wireguard.Link+"/disable_ipv6", "0") }); err != nil {
			return err
		}
		if err := c.h.AddrAdd(c.wg, &netlink.Addr{IPNet: single(own), Flags: unix.IFA_F_NODAD}); err != nil {
			return fmt.Errorf("address the tunnel of network %s: %w", c.name, err)
		}
	}
	routes, err := c.routes()
	if err != nil {
		return err
	}
	others := netplan.TunnelNetwork()
	if routes[others] != c.wg.Attrs().Index && x.add(kindForward, "network %s: the way to other nodes is missing", c.name) {
		if err := c.h.RouteReplace(&netlink.Route{LinkIndex: c.wg.Attrs().Index, Dst: ipNet(others)}); err != nil {
			return fmt.Errorf("network %s: route to other nodes: %w", c.name, err)
		}
	}
	return nil
}
