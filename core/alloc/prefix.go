package alloc

import (
	"encoding/binary"
	"net/netip"
)

// prefixes is a set of prefixes, with repetition, that finds overlaps in as many steps
// as a prefix has bits.
type prefixes struct{ v4, v6 *branch }

// branch is one bit of a prefix: how many prefixes end here, and how many further down.
type branch struct {
	here, below int
	next        [2]*branch
}

func newPrefixes() *prefixes { return &prefixes{v4: new(branch), v6: new(branch)} }

func (s *prefixes) root(p netip.Prefix) *branch {
	if p.Addr().Is4() {
		return s.v4
	}
	return s.v6
}

func bit(a []byte, i int) int { return int(a[i/8]>>(7-i%8)) & 1 }

// add counts a prefix n times: 1 to add it, -1 to remove it.
func (s *prefixes) add(p netip.Prefix, n int) {
	b, addr := s.root(p), p.Masked().Addr().AsSlice()
	for i := range p.Bits() {
		b.below += n
		side := bit(addr, i)
		if b.next[side] == nil {
			b.next[side] = new(branch)
		}
		b, b.next[side] = b.next[side], prune(b.next[side], n)
	}
	b.here += n
}

// prune drops a branch from the tree when the last prefix of it is being removed.
func prune(b *branch, n int) *branch {
	if b.here+b.below+n == 0 {
		return nil
	}
	return b
}

// overlaps reports whether any prefix of the set shares an address with p.
func (s *prefixes) overlaps(p netip.Prefix) bool {
	b, addr := s.root(p), p.Masked().Addr().AsSlice()
	for i := range p.Bits() {
		if b.here > 0 {
			return true
		}
		if b = b.next[bit(addr, i)]; b == nil {
			return false
		}
	}
	return b.here+b.below > 0
}

// plus returns the address n after a.
func plus(a netip.Addr, n uint64) netip.Addr {
	if a.Is4() {
		b := a.As4()
		binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+uint32(n))
		return netip.AddrFrom4(b)
	}
	b := a.As16()
	low := binary.BigEndian.Uint64(b[8:])
	binary.BigEndian.PutUint64(b[8:], low+n)
	if low+n < low {
		binary.BigEndian.PutUint64(b[:8], binary.BigEndian.Uint64(b[:8])+1)
	}
	return netip.AddrFrom16(b)
}

// minus returns how far a is after base, if that is a number.
func minus(a, base netip.Addr) (uint64, bool) {
	if a.Is4() && base.Is4() {
		x, y := a.As4(), base.As4()
		return uint64(binary.BigEndian.Uint32(x[:])) - uint64(binary.BigEndian.Uint32(y[:])), !a.Less(base)
	}
	x, y := a.As16(), base.As16()
	same := binary.BigEndian.Uint64(x[:8]) == binary.BigEndian.Uint64(y[:8])
	return binary.BigEndian.Uint64(x[8:]) - binary.BigEndian.Uint64(y[8:]), same && a.Is6() == base.Is6() && !a.Less(base)
}

// last returns the number of the last address of a prefix, at most 2^63-1.
func last(p netip.Prefix) uint64 { return 1<<min(p.Addr().BitLen()-p.Bits(), 63) - 1 }

// nth returns the nth prefix of a length within p.
func nth(p netip.Prefix, bits int, n uint64) netip.Prefix {
	shift := p.Addr().BitLen() - bits
	if shift < 64 {
		return netip.PrefixFrom(plus(p.Masked().Addr(), n<<shift), bits)
	}
	b := p.Masked().Addr().As16()
	binary.BigEndian.PutUint64(b[:8], binary.BigEndian.Uint64(b[:8])+n<<(shift-64))
	return netip.PrefixFrom(netip.AddrFrom16(b), bits)
}

// index is the inverse of nth.
func index(p, sub netip.Prefix) (uint64, bool) {
	if p.Addr().Is4() != sub.Addr().Is4() || sub.Bits() < p.Bits() || !p.Contains(sub.Addr()) {
		return 0, false
	}
	shift := p.Addr().BitLen() - sub.Bits()
	if shift < 64 {
		n, ok := minus(sub.Masked().Addr(), p.Masked().Addr())
		return n >> shift, ok
	}
	x, y := sub.Masked().Addr().As16(), p.Masked().Addr().As16()
	return (binary.BigEndian.Uint64(x[:8]) - binary.BigEndian.Uint64(y[:8])) >> (shift - 64), true
}
