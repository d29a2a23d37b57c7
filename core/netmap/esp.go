package netmap

import (
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"net/netip"

	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
)

// reservedSPIs are not for associations (RFC 4303, 2.1).
const reservedSPIs = 256

// espKeys are what a node must know to talk to another: for each of the cluster's keys, newest
// first, one for each direction. All are received with. The second is sent with: everybody has
// been told the newest one before it becomes the second, and still has the second when it
// becomes the third. None without the addresses and epochs of both. In an update they are
// derived once for all networks.
func (m *Map) espKeys(node, other string) []*skepv1.EspKey {
	keys, known := m.derived[other]
	if !known {
		if m.derived == nil {
			m.derived = map[string][]*skepv1.EspKey{}
		}
		keys = m.deriveESP(node, other)
		m.derived[other] = keys
	}
	return keys
}

func (m *Map) deriveESP(node, other string) []*skepv1.EspKey {
	a, b := m.nodes[node], m.nodes[other]
	if a == nil || b == nil || epoch(a.stored) == "" || epoch(b.stored) == "" {
		return nil
	}
	at, err := netip.ParseAddr(a.addr())
	if err != nil {
		return nil
	}
	there, err := netip.ParseAddr(b.addr())
	if err != nil {
		return nil
	}
	out := make([]*skepv1.EspKey, 0, len(m.keys))
	for i, k := range m.keys {
		out = append(out, &skepv1.EspKey{
			Generation: k.GetLamportTime(), Sending: i == min(1, len(m.keys)-1),
			OutSpi: spi(at, there, k.GetLamportTime()), OutKey: espKey(k.GetKey(), node, other, a, b),
			InSpi: spi(there, at, k.GetLamportTime()), InKey: espKey(k.GetKey(), other, node, b, a),
		})
	}
	return out
}

// espKey derives the key of what one node sends to another. No two senders have the same one,
// nor has one sender after it has forgotten how far it had counted, or with another address at
// either end, whose association counts anew: numbers of packets, which must not be used twice
// with a key, are safe from each other's.
func espKey(secret []byte, from, to string, a, b *node) []byte {
	info := fmt.Sprintf("skep esp %q %q %q %q %q %q", from, to, epoch(a.stored), epoch(b.stored), a.addr(), b.addr())
	key, err := hkdf.Key(sha256.New, secret, nil, info, model.ESPKeySize)
	if err != nil {
		panic(fmt.Sprintf("netmap: derive key: %v", err)) // lengths are constant
	}
	return key
}

// spi is Docker's index of what one address sends to another with the key of a time.
func spi(from, to netip.Addr, time uint64) uint32 {
	h := fnv.New32a()
	a, b := from.As16(), to.As16()
	_, _ = h.Write(a[:]) // a hash never fails
	_, _ = h.Write(binary.BigEndian.AppendUint32(nil, uint32(time)))
	_, _ = h.Write(b[:])
	if sum := h.Sum32(); sum >= reservedSPIs {
		return sum
	}
	return h.Sum32() + reservedSPIs
}
