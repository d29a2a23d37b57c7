package dataplane

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/lifecycle"
)

const (
	// Sizes of the kernel's struct inet_diag_req_v2, of what is read of inet_diag_msg, and of all
	// of it, after which come attributes.
	sockRequestBytes = 56
	sockAnswerBytes  = 24
	sockMessageBytes = 72
	// attrOnly6 is INET_DIAG_SKV6ONLY, which the kernel tells of sockets of IPv6 without being asked.
	attrOnly6 = 11
	// States of sockets; one of datagrams that is not connected has that of a closed one.
	stateListen = 10
	stateBound  = 7
)

// Listening returns the sockets of a container that listen, or take datagrams of anybody.
// The kernel is asked for these only, so that it need not look at every connection there is.
func (d *Dataplane) Listening(containerID string) ([]lifecycle.Socket, error) {
	ns, err := netns.GetFromPath(d.netns(containerID))
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close() //nolint:errcheck // a read-only descriptor
	r, err := openNetlink(ns, unix.NETLINK_INET_DIAG)
	if err != nil {
		return nil, err
	}
	defer r.close() //nolint:errcheck // nothing is lost with it
	var out []lifecycle.Socket
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		for protocol, state := range map[byte]uint32{unix.IPPROTO_TCP: stateListen, unix.IPPROTO_UDP: stateBound} {
			request := make([]byte, sockRequestBytes)
			request[0], request[1] = family, protocol
			binary.NativeEndian.PutUint32(request[4:], 1<<state)
			var some []lifecycle.Socket
			err := again(func() error {
				some = nil
				return r.dump(nl.SOCK_DIAG_BY_FAMILY, request, func(_ uint16, body []byte) {
					if s, ok := socketOf(protocol, body); ok {
						some = append(some, s)
					}
				})
			})
			if err != nil && (family == unix.AF_INET || !errors.Is(err, unix.ENOENT)) { // a kernel without IPv6
				return nil, fmt.Errorf("list sockets: %w", err)
			}
			out = append(out, some...)
		}
	}
	return out, nil
}

// socketOf reads a socket as the kernel tells it.
func socketOf(protocol byte, body []byte) (lifecycle.Socket, bool) {
	if len(body) < sockAnswerBytes {
		return lifecycle.Socket{}, false
	}
	port := binary.BigEndian.Uint16(body[4:])
	addr := netip.AddrFrom4([4]byte(body[8:12]))
	if body[0] == unix.AF_INET6 {
		addr = netip.AddrFrom16([16]byte(body[8:24]))
	}
	return lifecycle.Socket{Protocol: protocol, Addr: netip.AddrPortFrom(addr, port), Only6: only6(body)}, true
}

// only6 reports whether a socket takes nothing of IPv4, as far as the kernel says so.
func only6(body []byte) bool {
	if len(body) < sockMessageBytes {
		return false
	}
	attrs, err := nl.ParseRouteAttr(body[sockMessageBytes:])
	return err == nil && slices.ContainsFunc(attrs, func(a syscall.NetlinkRouteAttr) bool {
		return a.Attr.Type == attrOnly6 && len(a.Value) == 1 && a.Value[0] == 1
	})
}
