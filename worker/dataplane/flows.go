package dataplane

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

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

// endFlows ends the connections of a namespace to addresses that are gone, and returns those
// of TCP. Forgetting a connection lets its next segment reach another backend, which resets
// it; clients that only wait must be told (endSockets).
func endFlows(ns netns.NsHandle, g gone) (ended []*netlink.ConntrackFlow, err error) {
	families := map[netlink.InetFamily]bool{}
	for a := range g {
		if a.Is4() {
			families[unix.AF_INET] = true
		} else {
			families[unix.AF_INET6] = true
		}
	}
	err = within(ns, func() error {
		var errs []error
		for f := range families {
			flows, err := endFamily(f, g)
			ended, errs = append(ended, flows...), append(errs, err)
		}
		return errors.Join(errs...)
	})
	return ended, err
}

func endFamily(f netlink.InetFamily, g gone) ([]*netlink.ConntrackFlow, error) {
	ending, err := flowsOf(f, g)
	if err != nil || len(ending) == 0 {
		return nil, err
	}
	_, err = netlink.ConntrackDeleteFilters(netlink.ConntrackTable, f, g)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("end connections: %w", err)
	}
	return slices.DeleteFunc(ending, func(f *netlink.ConntrackFlow) bool { return f.Forward.Protocol != unix.IPPROTO_TCP }), nil
}

// flowsOf returns the connections of the calling thread's namespace that match.
func flowsOf(f netlink.InetFamily, match netlink.CustomConntrackFilter) ([]*netlink.ConntrackFlow, error) {
	flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, f)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list connections: %w", err)
	}
	return slices.DeleteFunc(flows, func(f *netlink.ConntrackFlow) bool { return !match.MatchConntrackFlow(f) }), nil
}

// endSockets tells clients in a namespace that their connections have ended.
func endSockets(ns netns.NsHandle, flows []*netlink.ConntrackFlow) error {
	if len(flows) == 0 {
		return nil
	}
	return within(ns, func() error {
		for _, flow := range flows {
			// Kernels without the means to do so leave these clients to their timeouts, and
			// most of these sockets are closed by now.
			_ = netlink.SocketDestroy(
				&net.TCPAddr{IP: flow.Forward.SrcIP, Port: int(flow.Forward.SrcPort)},
				&net.TCPAddr{IP: flow.Forward.DstIP, Port: int(flow.Forward.DstPort)})
		}
		return nil
	})
}

// answers is who a flow's answers come from and go to.
type answers struct{ from, to netip.AddrPort }

// behind matches flows whose answers are those given.
type behind map[answers]bool

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (b behind) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	from, ok := netip.AddrFromSlice(f.Reverse.SrcIP)
	to, ok2 := netip.AddrFromSlice(f.Reverse.DstIP)
	return ok && ok2 && f.Forward.Protocol == unix.IPPROTO_TCP &&
		b[answers{netip.AddrPortFrom(from.Unmap(), f.Reverse.SrcPort), netip.AddrPortFrom(to.Unmap(), f.Reverse.DstPort)}]
}

// endClients tells clients in the host's namespace that their connections, which the mesh
// knows as flows, have ended.
func endClients(ns netns.NsHandle, flows []*netlink.ConntrackFlow, host hop) error {
	list := map[netlink.InetFamily]behind{}
	for _, f := range flows {
		from, ok := netip.AddrFromSlice(f.Forward.SrcIP)
		to, ok2 := netip.AddrFromSlice(f.Forward.DstIP)
		family := netlink.InetFamily(unix.AF_INET)
		switch from = from.Unmap(); {
		case !ok || !ok2 || from != host.v4 && from != host.v6:
			continue // it came from elsewhere
		case from.Is6():
			family = unix.AF_INET6
		}
		if list[family] == nil {
			list[family] = behind{}
		}
		list[family][answers{netip.AddrPortFrom(to.Unmap(), f.Forward.DstPort), netip.AddrPortFrom(from, f.Forward.SrcPort)}] = true
	}
	var errs []error
	for family, match := range list {
		var clients []*netlink.ConntrackFlow
		err := within(ns, func() (err error) { clients, err = flowsOf(family, match); return err })
		errs = append(errs, err, endSockets(ns, clients))
	}
	return errors.Join(errs...)
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
