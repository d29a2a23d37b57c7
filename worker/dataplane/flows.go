package dataplane

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// gone matches connections whose answers come from an address that nothing has any more.
type gone map[netip.Addr]bool

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (g gone) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	a, ok := netip.AddrFromSlice(f.Reverse.SrcIP)
	return ok && g[a.Unmap()]
}

// endFlows ends the connections of a namespace to addresses that are gone. Forgetting a
// connection lets its next segment reach another backend, which resets it; clients that
// only wait are told through their socket.
func endFlows(ns netns.NsHandle, g gone) error {
	families := map[netlink.InetFamily]bool{}
	for a := range g {
		if a.Is4() {
			families[unix.AF_INET] = true
		} else {
			families[unix.AF_INET6] = true
		}
	}
	return within(ns, func() error {
		var errs []error
		for f := range families {
			errs = append(errs, endFamily(f, g))
		}
		return errors.Join(errs...)
	})
}

func endFamily(f netlink.InetFamily, g gone) error {
	flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, f)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("list connections: %w", err)
	}
	var ending []*netlink.ConntrackFlow
	for _, flow := range flows {
		if g.MatchConntrackFlow(flow) {
			ending = append(ending, flow)
		}
	}
	if len(ending) == 0 {
		return nil
	}
	_, err = netlink.ConntrackDeleteFilters(netlink.ConntrackTable, f, g)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("end connections: %w", err)
	}
	for _, flow := range ending {
		if flow.Forward.Protocol != unix.IPPROTO_TCP {
			continue
		}
		// Kernels without the means to do so leave these clients to their timeouts, and
		// most of these sockets are closed by now.
		_ = netlink.SocketDestroy(
			&net.TCPAddr{IP: flow.Forward.SrcIP, Port: int(flow.Forward.SrcPort)},
			&net.TCPAddr{IP: flow.Forward.DstIP, Port: int(flow.Forward.DstPort)})
	}
	return nil
}

// unled matches flows of datagrams to ports of this node that lead to the node itself.
type unled struct {
	ports map[uint16]bool
	own   map[netip.Addr]bool // the node's addresses
}

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (u unled) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	to, ok := netip.AddrFromSlice(f.Forward.DstIP)
	return ok && f.Forward.Protocol == unix.IPPROTO_UDP && u.ports[f.Forward.DstPort] && u.own[to.Unmap()] && f.Reverse.SrcIP.Equal(f.Forward.DstIP)
}

// forgetUnled forgets where datagrams to ports went that lead somewhere only now: a client
// that goes on sending from one port would never reach it.
func forgetUnled(ns netns.NsHandle, ports map[uint16]bool) error {
	if len(ports) == 0 {
		return nil
	}
	u := unled{ports, map[netip.Addr]bool{}}
	err := within(ns, func() error {
		addrs, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
		if err != nil {
			return fmt.Errorf("list addresses: %w", err)
		}
		for _, a := range addrs {
			if ip, ok := netip.AddrFromSlice(a.IP); ok {
				u.own[ip.Unmap()] = true
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return forget(ns, u)
}

// led matches flows of datagrams to ports of this node that lead to the mesh.
type led struct {
	ports map[uint16]bool
	to    hop
}

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (l led) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	to, ok := netip.AddrFromSlice(f.Reverse.SrcIP)
	return ok && f.Forward.Protocol == unix.IPPROTO_UDP && l.ports[f.Forward.DstPort] && (to.Unmap() == l.to.v4 || to == l.to.v6)
}

// forgetLed forgets where datagrams to ports went that are published no more.
func forgetLed(ns netns.NsHandle, ports map[uint16]bool, to hop) error {
	if len(ports) == 0 {
		return nil
	}
	return forget(ns, led{ports, to})
}

// through matches flows that were translated to an address of a network.
type through netip.Prefix

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (p through) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	to, ok := netip.AddrFromSlice(f.Reverse.SrcIP)
	return ok && netip.Prefix(p).Contains(to.Unmap()) && !f.Reverse.SrcIP.Equal(f.Forward.DstIP)
}

// forget forgets the flows of a namespace that match.
func forget(ns netns.NsHandle, match netlink.CustomConntrackFilter) error {
	return within(ns, func() error {
		var errs []error
		for _, f := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
			if _, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, f, match); err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
				errs = append(errs, fmt.Errorf("forget connections: %w", err))
			}
		}
		return errors.Join(errs...)
	})
}
