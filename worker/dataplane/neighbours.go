package dataplane

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/netplan"
)

// segmentLinks are the links of one segment in the switch namespace.
type segmentLinks struct{ bridge, vxlan int }

// static is the state of a forwarding entry that was made by hand and never gets old.
const static = unix.NUD_NOARP | unix.NUD_REACHABLE

// neighbour is one entry of a forwarding table, of a bridge (with a master) or of a device,
// or of the neighbours of a link.
type neighbour struct {
	family        uint8
	index, master int
	state         uint16
	flags         uint8
	addr          netip.Addr // zero without one
	mac           [6]byte
	hasMAC        bool
}

// neighbour begins a request about a neighbour; its attributes follow.
func (r *rtnl) neighbour(kind, flags uint16, n neighbour) {
	r.request(kind, flags)
	r.out = append(r.out, n.family, 0, 0, 0)
	r.out = binary.NativeEndian.AppendUint32(r.out, uint32(n.index))
	r.out = binary.NativeEndian.AppendUint16(r.out, n.state)
	r.out = append(r.out, n.flags, 0)
	if n.addr.IsValid() {
		r.address(unix.NDA_DST, n.addr)
	}
	if n.hasMAC {
		r.attribute(unix.NDA_LLADDR, n.mac[:])
	}
	r.end()
}

// decodeNeighbour reads what the kernel tells of one.
func decodeNeighbour(body []byte) (n neighbour, ok bool) {
	if len(body) < unix.SizeofNdMsg {
		return n, false
	}
	n.family, n.index = body[0], int(int32(binary.NativeEndian.Uint32(body[4:])))
	n.state, n.flags = binary.NativeEndian.Uint16(body[8:]), body[10]
	attributes(body[unix.SizeofNdMsg:], func(kind uint16, value []byte) {
		switch kind {
		case unix.NDA_DST:
			a, _ := netip.AddrFromSlice(value)
			n.addr = a.Unmap()
		case unix.NDA_LLADDR:
			if n.hasMAC = len(value) == len(n.mac); n.hasMAC {
				n.mac = [6]byte(value)
			}
		case unix.NDA_MASTER:
			if len(value) == 4 {
				n.master = int(int32(binary.NativeEndian.Uint32(value)))
			}
		}
	})
	return n, true
}

// entry encodes a change to the ways to one endpoint. Only the VXLAN device knows them: the
// node of a hardware address, and the hardware address of an address, for which it answers.
// The bridge sends it all that it does not know itself.
func (r *rtnl) entry(e netplan.Entry, at segmentLinks, put bool) {
	kind, flags := uint16(unix.RTM_NEWNEIGH), uint16(unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	if !put {
		kind, flags = unix.RTM_DELNEIGH, 0
	}
	n := neighbour{family: unix.AF_BRIDGE, index: at.vxlan, state: static, flags: unix.NTF_SELF, addr: e.Node, mac: e.MAC, hasMAC: true}
	if !put {
		n.addr = netip.Addr{} // whatever it is
	}
	if e.Addr.IsValid() {
		n = neighbour{family: unix.AF_INET, index: at.vxlan, state: unix.NUD_PERMANENT, addr: e.Addr, mac: e.MAC, hasMAC: put}
		if e.Addr.Is6() {
			n.family = unix.AF_INET6
		}
	}
	r.neighbour(kind, flags, n)
}

// program sets or removes entries, many a write. Removing what is not there is no error.
func (f *fabric) program(entries []netplan.Entry, put bool) error {
	if len(entries) == 0 {
		return nil
	}
	r, err := f.rtnl()
	if err != nil {
		return err
	}
	var errs []error
	flush := func() {
		if put {
			errs = append(errs, r.flush("program forwarding"))
		} else {
			errs = append(errs, r.flush("program forwarding", unix.ENOENT))
		}
	}
	for _, e := range entries {
		at, ok := f.links[e.VNI]
		if !ok {
			if put {
				errs = append(errs, fmt.Errorf("forward to %s: VXLAN %d is not there", e.Node, e.VNI))
			}
			continue
		}
		if r.entry(e, at, put); r.full() {
			flush()
		}
	}
	flush()
	return errors.Join(errs...)
}

// observe calls seen with all that the segments forward to other nodes now, and held with
// what their bridges hold: the hardware addresses behind ports, and neighbours of their own.
func (f *fabric) observe(links map[uint32]segmentLinks, seen func(netplan.Entry), held func(neighbour)) error {
	r, err := f.rtnl()
	if err != nil {
		return err
	}
	vnis := map[int]uint32{}
	for vni, l := range links {
		vnis[l.vxlan] = vni
	}
	for _, family := range []uint8{unix.AF_BRIDGE, unix.AF_INET, unix.AF_INET6} {
		err := r.dump(unix.RTM_GETNEIGH, []byte{family, unix.SizeofNdMsg - 1: 0}, func(_ uint16, body []byte) {
			n, ok := decodeNeighbour(body)
			if !ok || !n.hasMAC {
				return
			}
			vni, ours := vnis[n.index]
			lasting := n.state&(unix.NUD_NOARP|unix.NUD_PERMANENT) != 0
			switch {
			case n.master != 0 || !ours:
				held(n)
			case family != unix.AF_BRIDGE && lasting:
				seen(netplan.Entry{VNI: vni, Addr: n.addr, MAC: n.mac})
			case family == unix.AF_BRIDGE && lasting:
				seen(netplan.Entry{VNI: vni, MAC: n.mac, Node: n.addr})
			case family == unix.AF_BRIDGE:
				seen(netplan.Entry{VNI: vni, MAC: n.mac}) // it would be forgotten
			}
		})
		if err != nil {
			return fmt.Errorf("list forwarding: %w", err)
		}
	}
	return nil
}
