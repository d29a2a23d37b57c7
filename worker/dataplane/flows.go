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
