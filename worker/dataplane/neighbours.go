package dataplane

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/netplan"
)

// batchSize is how many requests go into one write; their answers are read together.
const batchSize = 100

// segmentLinks are the links of one segment in the switch namespace.
type segmentLinks struct{ bridge, vxlan int }

// entryRequest encodes one change to forwarding table or neighbours.
func entryRequest(e netplan.Entry, at segmentLinks, put bool) *nl.NetlinkRequest {
	kind, flags := unix.RTM_NEWNEIGH, unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_REPLACE
	if !put {
		kind, flags = unix.RTM_DELNEIGH, unix.NLM_F_ACK
	}
	req := nl.NewNetlinkRequest(kind, flags)
	msg := netlink.Ndmsg{Family: unix.AF_BRIDGE, Index: uint32(at.vxlan), State: unix.NUD_NOARP | unix.NUD_REACHABLE, Flags: unix.NTF_SELF | unix.NTF_MASTER}
	if e.Addr.IsValid() {
		msg = netlink.Ndmsg{Family: unix.AF_INET, Index: uint32(at.bridge), State: unix.NUD_PERMANENT}
		if e.Addr.Is6() {
			msg.Family = unix.AF_INET6
		}
	}
	req.AddData(&msg)
	if to := e.Addr; to.IsValid() {
		req.AddData(nl.NewRtAttr(netlink.NDA_DST, to.AsSlice()))
	} else if put {
		req.AddData(nl.NewRtAttr(netlink.NDA_DST, e.Node.AsSlice()))
	}
	if put || !e.Addr.IsValid() {
		req.AddData(nl.NewRtAttr(netlink.NDA_LLADDR, e.MAC[:]))
	}
	return req
}

// program sets or removes entries in a namespace, many a write. Removing what is not
// there is no error.
func program(ns netns.NsHandle, links map[uint32]segmentLinks, entries []netplan.Entry, put bool) error {
	var requests []*nl.NetlinkRequest
	for _, e := range entries {
		at, ok := links[e.VNI]
		if !ok {
			if put {
				return fmt.Errorf("forward to %s: VXLAN %d is not there", e.Node, e.VNI)
			}
			continue
		}
		requests = append(requests, entryRequest(e, at, put))
	}
	if len(requests) == 0 {
		return nil // an empty write is an error
	}
	socket, err := nl.GetNetlinkSocketAt(ns, netns.None(), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer socket.Close()
	timeout := unix.NsecToTimeval((10 * time.Second).Nanoseconds())
	if err := socket.SetReceiveTimeout(&timeout); err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	var errs []error
	for len(requests) > 0 {
		n := min(len(requests), batchSize)
		errs = append(errs, exchange(socket, requests[:n], put))
		requests = requests[n:]
	}
	return errors.Join(errs...)
}

// exchange writes requests at once and reads all their answers.
func exchange(socket *nl.NetlinkSocket, requests []*nl.NetlinkRequest, put bool) error {
	var buf []byte
	waiting := map[uint32]bool{}
	for _, r := range requests {
		buf = append(buf, r.Serialize()...)
		waiting[r.Seq] = true
	}
	if err := unix.Sendto(socket.GetFd(), buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("write netlink: %w", err)
	}
	var errs []error
	for len(waiting) > 0 {
		messages, _, err := socket.Receive()
		if err != nil {
			return errors.Join(append(errs, fmt.Errorf("read netlink: %w", err))...)
		}
		for _, m := range messages {
			if m.Header.Type != unix.NLMSG_ERROR || !waiting[m.Header.Seq] {
				continue
			}
			delete(waiting, m.Header.Seq)
			code := int32(nl.NativeEndian().Uint32(m.Data[:4]))
			if err := unix.Errno(-code); code != 0 && (put || !errors.Is(err, os.ErrNotExist)) {
				errs = append(errs, fmt.Errorf("program forwarding: %w", err))
			}
		}
	}
	return errors.Join(errs...)
}

// observe returns what the switch namespace forwards now.
func observe(h *netlink.Handle, links map[uint32]segmentLinks) ([]netplan.Entry, error) {
	vxlans, bridges := map[int]uint32{}, map[int]uint32{}
	for vni, l := range links {
		vxlans[l.vxlan], bridges[l.bridge] = vni, vni
	}
	var out []netplan.Entry
	table, err := dump(func() ([]netlink.Neigh, error) { return h.NeighList(0, unix.AF_BRIDGE) })
	if err != nil {
		return nil, fmt.Errorf("list forwarding table: %w", err)
	}
	// An address counts when both the VXLAN device and the bridge know it.
	type at struct {
		vni uint32
		mac [6]byte
	}
	bridged := map[at]bool{}
	for _, n := range table {
		vni, ours := vxlans[n.LinkIndex]
		if ours && n.MasterIndex != 0 && len(n.HardwareAddr) == 6 && n.State&unix.NUD_NOARP != 0 {
			bridged[at{vni, [6]byte(n.HardwareAddr)}] = true
		}
	}
	for _, n := range table {
		vni, ours := vxlans[n.LinkIndex]
		if !ours || n.MasterIndex != 0 || n.Flags&unix.NTF_SELF == 0 || len(n.HardwareAddr) != 6 {
			continue
		}
		e := netplan.Entry{VNI: vni, MAC: [6]byte(n.HardwareAddr)}
		if node, ok := netip.AddrFromSlice(n.IP); ok && bridged[at{vni, e.MAC}] {
			e.Node = node.Unmap()
		}
		out = append(out, e)
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		list, err := dump(func() ([]netlink.Neigh, error) { return h.NeighList(0, family) })
		if err != nil {
			return nil, fmt.Errorf("list neighbours: %w", err)
		}
		for _, n := range list {
			vni, ours := bridges[n.LinkIndex]
			addr, ok := netip.AddrFromSlice(n.IP)
			if ours && ok && n.State&unix.NUD_PERMANENT != 0 && len(n.HardwareAddr) == 6 {
				out = append(out, netplan.Entry{VNI: vni, Addr: addr.Unmap(), MAC: [6]byte(n.HardwareAddr)})
			}
		}
	}
	return out, nil
}
