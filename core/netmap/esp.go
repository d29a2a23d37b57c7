package netmap

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"net/netip"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
)

// reservedSPIs are not for associations (RFC 4303, 2.1).
const reservedSPIs = 256

// espSecret is one of the cluster's keys, ready to derive keys for ESP from.
type espSecret struct {
	time uint64
	// expand is the second half of HKDF: the first one is the same for all keys.
	expand hash.Hash
}

// espSecrets makes the cluster's keys ready, newest first.
func espSecrets(keys []*api.EncryptionKey) []espSecret {
	var out []espSecret
	for _, k := range keys {
		prk, err := hkdf.Extract(sha256.New, k.GetKey(), nil)
		if err != nil {
			panic(fmt.Sprintf("netmap: derive key: %v", err)) // the hash is constant
		}
		out = append(out, espSecret{k.GetLamportTime(), hmac.New(sha256.New, prk)})
	}
	return out
}

// espEnd is what the keys for ESP between a node and others depend on.
type espEnd struct {
	at netip.Addr
	// name is a hash of the node's id, epoch and address: it stands for them in keys.
	name [sha256.Size]byte
}

// espEnd returns the node's end, nil if it has no address or epoch.
func (n *node) espEnd(id string) *espEnd {
	if n == nil {
		return nil
	}
	if !n.endKnown {
		n.end, n.endKnown = nil, true
		at, err := netip.ParseAddr(n.addr())
		if err == nil && epoch(n.stored) != "" {
			n.end = &espEnd{at, sha256.Sum256(fmt.Appendf(nil, "skep esp %q %q %q", id, epoch(n.stored), n.addr()))}
		}
	}
	return n.end
}

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
		keys = m.deriveESP(m.nodes[node].espEnd(node), m.nodes[other].espEnd(other))
		m.derived[other] = keys
	}
	return keys
}

func (m *Map) deriveESP(here, there *espEnd) []*skepv1.EspKey {
	if here == nil || there == nil {
		return nil
	}
	// There are as many of them as pairs of nodes, so they share their memory.
	out, records, keys := make([]*skepv1.EspKey, len(m.secrets)), make([]skepv1.EspKey, len(m.secrets)), make([]byte, 0, 2*len(m.secrets)*sha256.Size)
	for i, s := range m.secrets {
		k := &records[i]
		k.Generation, k.Sending = s.time, i == min(1, len(m.secrets)-1)
		k.OutSpi, k.InSpi = spi(here.at, there.at, s.time), spi(there.at, here.at, s.time)
		k.OutKey, keys = s.key(keys, here, there)
		k.InKey, keys = s.key(keys, there, here)
		out[i] = k
	}
	return out
}

// key derives the key of what one node sends to another, in the memory behind buf. No two senders
// have the same one, nor has one sender after it has forgotten how far it had counted, or with
// another address at either end, whose association counts anew: numbers of packets, which must
// not be used twice with a key, are safe from each other's.
func (s espSecret) key(buf []byte, from, to *espEnd) (key, rest []byte) {
	s.expand.Reset()
	_, _ = s.expand.Write(from.name[:]) // a hash never fails
	_, _ = s.expand.Write(to.name[:])
	_, _ = s.expand.Write([]byte{1}) // HKDF's first block is enough
	sum := s.expand.Sum(buf)
	return sum[:model.ESPKeySize:model.ESPKeySize], sum[len(sum):]
}

// spi is Docker's index of what one address sends to another with the key of a time: FNV-1a of
// both and the time between them.
func spi(from, to netip.Addr, time uint64) uint32 {
	const offset, prime = 2166136261, 16777619
	a, b := from.As16(), to.As16()
	var data [16 + 4 + 16]byte
	copy(data[:], a[:])
	binary.BigEndian.PutUint32(data[16:], uint32(time))
	copy(data[20:], b[:])
	sum := uint32(offset)
	for _, c := range data {
		sum = (sum ^ uint32(c)) * prime
	}
	if sum >= reservedSPIs {
		return sum
	}
	return sum + reservedSPIs
}
