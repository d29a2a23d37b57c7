package dataplane

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// portFlags are what a bridge does at one of its ports.
type portFlags struct{ learning, unknown, multicast, broadcast, suppress bool }

// A bridge knows what is behind the ports of containers and sends them nothing that is not
// for them. What it does not know goes to the VXLAN device and nowhere else. That answers
// questions for addresses of other nodes, and drops what it does not know either, and what
// is for all.
func containerPort() portFlags { return portFlags{multicast: true, broadcast: true} }
func vxlanPort() portFlags     { return portFlags{unknown: true, multicast: true, broadcast: true} }

// each calls f with the kernel's number of each and where its value is.
func (p *portFlags) each(f func(kind uint16, value *bool)) {
	f(unix.IFLA_BRPORT_LEARNING, &p.learning)
	f(unix.IFLA_BRPORT_UNICAST_FLOOD, &p.unknown)
	f(unix.IFLA_BRPORT_MCAST_FLOOD, &p.multicast)
	f(unix.IFLA_BRPORT_BCAST_FLOOD, &p.broadcast)
	f(unix.IFLA_BRPORT_NEIGH_SUPPRESS, &p.suppress)
}

// portsSeen is what the bridges of a fabric held when they were looked at.
type portsSeen struct {
	flags map[int]portFlags
	// known are the hardware addresses behind each port, true for those made by hand. It is
	// nil until the forwarding was listed.
	known map[int]map[[6]byte]bool
	// own are the neighbours of bridges themselves, by bridge.
	own map[int][]netip.Addr
}

func (s *portsSeen) reset() { s.known, s.own = map[int]map[[6]byte]bool{}, map[int][]netip.Addr{} }

// learn takes note of an entry of a bridge's table.
func (s *portsSeen) learn(n neighbour) {
	switch {
	case n.family != unix.AF_BRIDGE:
		s.own[n.index] = append(s.own[n.index], n.addr)
		return
	case n.master == 0 || n.state&unix.NUD_PERMANENT != 0:
		return // the port's own
	}
	if s.known[n.index] == nil {
		s.known[n.index] = map[[6]byte]bool{}
	}
	s.known[n.index][n.mac] = n.state&unix.NUD_NOARP != 0
}

// look lists how the bridges treat their ports.
func (f *fabric) look() error {
	r, err := f.rtnl()
	if err != nil {
		return err
	}
	seen := &portsSeen{flags: map[int]portFlags{}}
	body := [unix.SizeofIfInfomsg]byte{unix.AF_BRIDGE}
	err = r.dump(unix.RTM_GETLINK, body[:], func(_ uint16, body []byte) {
		if index, flags, ok := decodePort(body); ok {
			seen.flags[index] = flags
		}
	})
	if err != nil {
		return fmt.Errorf("list ports of the switch: %w", err)
	}
	f.seen = seen
	return nil
}

// decodePort reads what the kernel tells of a port of a bridge.
func decodePort(body []byte) (index int, flags portFlags, ok bool) {
	if len(body) < unix.SizeofIfInfomsg {
		return 0, flags, false
	}
	index = int(int32(binary.NativeEndian.Uint32(body[4:])))
	attributes(body[unix.SizeofIfInfomsg:], func(kind uint16, value []byte) {
		if kind != unix.IFLA_PROTINFO {
			return
		}
		ok = true
		attributes(value, func(kind uint16, value []byte) {
			flags.each(func(k uint16, to *bool) {
				if k == kind && len(value) == 1 {
					*to = value[0] != 0
				}
			})
		})
	})
	return index, flags, ok
}

// ensurePort makes or mends what a bridge does at a port of a container, behind which is mac.
func (f *fabric) ensurePort(index int, mac [6]byte, fresh bool, x *drift, what string) error {
	var strange [][6]byte
	if !fresh && f.seen != nil && f.seen.known != nil {
		known := f.seen.known[index]
		strange = slices.DeleteFunc(slices.Collect(maps.Keys(known)), func(m [6]byte) bool { return m == mac })
		if f.seen.flags[index] == containerPort() && known[mac] && len(strange) == 0 {
			return nil
		}
		if !x.add(kindLink, "%s: the bridge does not know what is behind its link, or sends it what is not for it", what) {
			return nil
		}
	}
	if !x.repair {
		return nil // it could not be listed, which was said
	}
	r, err := f.rtnl()
	if err != nil {
		return err
	}
	for _, m := range strange {
		r.neighbour(unix.RTM_DELNEIGH, 0, neighbour{family: unix.AF_BRIDGE, index: index, flags: unix.NTF_MASTER, mac: m, hasMAC: true})
	}
	r.neighbour(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE,
		neighbour{family: unix.AF_BRIDGE, index: index, state: static, flags: unix.NTF_MASTER, mac: mac, hasMAC: true})
	r.port(index, containerPort())
	return r.flush("set up port of "+what, unix.ENOENT)
}

// ensureVXLANPort makes or mends what a bridge does at a VXLAN device.
func (f *fabric) ensureVXLANPort(index int, fresh bool, x *drift, what string) error {
	if !fresh && f.seen != nil && (f.seen.flags[index] == vxlanPort() || !x.add(kindLink, "%s: the bridge sends its device more or less than it should", what)) {
		return nil
	}
	if !x.repair {
		return nil // it could not be listed, which was said
	}
	r, err := f.rtnl()
	if err != nil {
		return err
	}
	r.port(index, vxlanPort())
	return r.flush("set up port of " + what)
}

// port requests what a bridge shall do at a port.
func (r *rtnl) port(index int, flags portFlags) {
	r.request(unix.RTM_SETLINK, 0)
	body := [unix.SizeofIfInfomsg]byte{unix.AF_BRIDGE}
	binary.NativeEndian.PutUint32(body[4:], uint32(index))
	r.out = append(r.out, body[:]...)
	at := len(r.out)
	r.attribute(unix.IFLA_PROTINFO|unix.NLA_F_NESTED, nil)
	flags.each(func(kind uint16, value *bool) {
		v := byte(0)
		if *value {
			v = 1
		}
		r.attribute(kind, []byte{v})
	})
	binary.NativeEndian.PutUint16(r.out[at:], uint16(len(r.out)-at))
	r.end()
}

// tidyBridge removes what a bridge of a former version knew of other nodes.
func (f *fabric) tidyBridge(at segmentLinks, x *drift, what string) error {
	if f.seen == nil {
		return nil
	}
	ways, own := f.seen.known[at.vxlan], f.seen.own[at.bridge]
	if len(ways)+len(own) == 0 || !x.add(kindForward, "%s: its bridge knows %d ways to other nodes itself", what, max(len(ways), len(own))) {
		return nil
	}
	r, err := f.rtnl()
	if err != nil {
		return err
	}
	var errs []error
	remove := func(n neighbour) {
		if r.neighbour(unix.RTM_DELNEIGH, 0, n); r.full() {
			errs = append(errs, r.flush("tidy bridge", unix.ENOENT))
		}
	}
	for mac := range ways {
		remove(neighbour{family: unix.AF_BRIDGE, index: at.vxlan, flags: unix.NTF_MASTER, mac: mac, hasMAC: true})
	}
	for _, a := range own {
		n := neighbour{family: unix.AF_INET, index: at.bridge, addr: a}
		if a.Is6() {
			n.family = unix.AF_INET6
		}
		remove(n)
	}
	return errors.Join(append(errs, r.flush("tidy bridge", unix.ENOENT))...)
}
