package wireguard

import (
	"crypto/ecdh"
	"crypto/rand"
	"fmt"
	"net/netip"
	"slices"
)

// Key is a private, public or preshared key. The zero value is none.
type Key [32]byte

// IsZero reports whether there is no key.
func (k Key) IsZero() bool { return k == Key{} }

// NewPrivateKey makes a private key.
func NewPrivateKey() (Key, error) {
	private, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return Key{}, fmt.Errorf("make WireGuard key: %w", err)
	}
	k := Key(private.Bytes())
	k[0] &= 248
	k[31] = k[31]&127 | 64
	return k, nil
}

// Public returns the public key of a private one, zero for none.
func (k Key) Public() Key {
	private, err := ecdh.X25519().NewPrivateKey(k[:])
	if err != nil || k.IsZero() {
		return Key{}
	}
	return Key(private.PublicKey().Bytes())
}

// Peer is another node.
type Peer struct {
	// Preshared is mixed into each handshake.
	Preshared Key
	// Endpoint is where its packets go.
	Endpoint netip.AddrPort
	// Allowed are the addresses behind it, sorted: packets to them go there, and it may
	// send packets from no others.
	Allowed []netip.Prefix
}

// Config is all that a device has.
type Config struct {
	Private Key
	Port    uint16
	Peers   map[Key]Peer // by public key
}

// Changes turn one Config into another.
type Changes struct {
	// Private is set to replace the device's key, Port to listen elsewhere.
	Private Key
	Port    uint16
	Remove  []Key
	Peers   []Change
}

// Change is what becomes of one peer.
type Change struct {
	Key Key
	// New is set for a peer that is to be made; others are only changed.
	New bool
	// Preshared and Endpoint are set when they change.
	Preshared Key
	Endpoint  netip.AddrPort
	Add, Drop []netip.Prefix
}

// Empty reports whether there is nothing to change about the peer.
func (c Change) Empty() bool {
	return !c.New && c.Preshared.IsZero() && !c.Endpoint.IsValid() && len(c.Add)+len(c.Drop) == 0
}

// Empty reports whether there is nothing to do.
func (c Changes) Empty() bool {
	return c.Private.IsZero() && c.Port == 0 && len(c.Remove)+len(c.Peers) == 0
}

// Diff returns what makes a device that has one Config have another. A peer without
// preshared key in want keeps the one it has; where there is none yet it is left out, since
// its handshakes could not succeed. Where a peer's packets come from is learnt by the device,
// so its endpoint is no difference unless moved names it.
func Diff(want, have Config, moved map[Key]bool) Changes {
	var c Changes
	if want.Private != have.Private {
		c.Private = want.Private
	}
	if want.Port != have.Port {
		c.Port = want.Port
	}
	for k := range have.Peers {
		if _, stays := want.Peers[k]; !stays {
			c.Remove = append(c.Remove, k)
		}
	}
	slices.SortFunc(c.Remove, compareKeys)
	for k, w := range want.Peers {
		h, there := have.Peers[k]
		if !there && w.Preshared.IsZero() {
			continue
		}
		p := Change{Key: k, New: !there}
		if !w.Preshared.IsZero() && w.Preshared != h.Preshared {
			p.Preshared = w.Preshared
		}
		if !there || moved[k] || !h.Endpoint.IsValid() {
			p.Endpoint = w.Endpoint
		}
		p.Add, p.Drop = missing(w.Allowed, h.Allowed), missing(h.Allowed, w.Allowed)
		if !p.Empty() {
			c.Peers = append(c.Peers, p)
		}
	}
	// An address that moves is dropped before it is added, whatever the order of the peers.
	slices.SortFunc(c.Peers, func(a, b Change) int { return compareKeys(a.Key, b.Key) })
	return c
}

// missing returns what of a is not in b.
func missing(a, b []netip.Prefix) []netip.Prefix {
	had := make(map[netip.Prefix]bool, len(b))
	for _, p := range b {
		had[p] = true
	}
	var out []netip.Prefix
	for _, p := range a {
		if !had[p] {
			out = append(out, p)
		}
	}
	return out
}

func compareKeys(a, b Key) int { return slices.Compare(a[:], b[:]) }
