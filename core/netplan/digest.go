package netplan

import (
	"cmp"
	"crypto/sha256"
	"slices"

	"google.golang.org/protobuf/proto"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
)

// Digest returns a short form of everything that an update which is complete tells, in
// whatever order it tells it: two nodes that know the same have the same digest.
func Digest(u *skepv1.NetworkUpdate) []byte {
	c := &skepv1.NetworkUpdate{
		Node:      u.GetNode(),
		Networks:  slices.Clone(u.GetNetworks()),
		Endpoints: slices.Clone(u.GetEndpoints()),
		Services:  slices.Clone(u.GetServices()),
		Peers:     slices.Clone(u.GetPeers()),
	}
	slices.SortFunc(c.Networks, func(a, b *skepv1.OverlayNetwork) int { return cmp.Compare(a.GetId(), b.GetId()) })
	slices.SortFunc(c.Endpoints, func(a, b *skepv1.OverlayEndpoint) int { return keyOf(a.GetKey()).compare(keyOf(b.GetKey())) })
	slices.SortFunc(c.Services, func(a, b *skepv1.BalancedService) int { return cmp.Compare(a.GetId(), b.GetId()) })
	slices.SortFunc(c.Peers, func(a, b *skepv1.NetworkPeer) int {
		return cmp.Or(cmp.Compare(a.GetKey().GetNetworkId(), b.GetKey().GetNetworkId()), cmp.Compare(a.GetKey().GetNodeId(), b.GetKey().GetNodeId()))
	})
	c.Services = slices.CompactFunc(c.Services, func(a, b *skepv1.BalancedService) bool { return a.GetId() == b.GetId() })
	// Both ends of a check run the same encoder or count as different, which is mended.
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(c)
	if err != nil {
		return nil // no message of ours is invalid
	}
	sum := sha256.Sum256(data)
	return sum[:16]
}
