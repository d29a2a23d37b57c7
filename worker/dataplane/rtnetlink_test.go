package dataplane

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzDecodeNeighbour holds that what was encoded is read, and that nothing read panics.
func FuzzDecodeNeighbour(f *testing.F) {
	seed := func(n neighbour) {
		r := &rtnl{}
		r.neighbour(unix.RTM_NEWNEIGH, 0, n)
		body := r.out[unix.SizeofNlMsghdr:]
		if got, ok := decodeNeighbour(body); !ok || got != n {
			f.Fatalf("%+v became %+v", n, got)
		}
		if size := binary.NativeEndian.Uint32(r.out); int(size) != len(r.out) {
			f.Fatalf("%d bytes say that they are %d", len(r.out), size)
		}
		f.Add(body)
	}
	seed(neighbour{family: unix.AF_BRIDGE, index: 7, state: static, flags: unix.NTF_SELF, addr: netip.MustParseAddr("192.0.2.1"), mac: [6]byte{2, 0x42, 1, 2, 3, 4}, hasMAC: true})
	seed(neighbour{family: unix.AF_INET6, index: 9, state: unix.NUD_PERMANENT, addr: netip.MustParseAddr("fd00::1")})
	f.Add([]byte{unix.AF_BRIDGE})
	f.Fuzz(func(_ *testing.T, body []byte) {
		n, ok := decodeNeighbour(body)
		if ok && n.hasMAC && len(body) < unix.SizeofNdMsg+10 {
			panic("read more than there is")
		}
	})
}

// FuzzDecodePort does so for ports of bridges.
func FuzzDecodePort(f *testing.F) {
	for _, flags := range []portFlags{containerPort(), vxlanPort(), {learning: true, suppress: true}} {
		r := &rtnl{}
		r.port(300, flags)
		body := r.out[unix.SizeofNlMsghdr:]
		if index, got, ok := decodePort(body); !ok || index != 300 || got != flags {
			f.Fatalf("%+v became %+v at %d", flags, got, index)
		}
		f.Add(body)
	}
	f.Fuzz(func(_ *testing.T, body []byte) {
		if _, flags, ok := decodePort(body); !ok && flags != (portFlags{}) {
			panic("flags of no port")
		}
	})
}
