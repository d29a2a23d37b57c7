package netplan

import (
	"crypto/sha256"
	"maps"
	"net/netip"
	"slices"

	"google.golang.org/protobuf/proto"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
)

// Peer is another node of an encrypted network, with the addresses that are behind it.
type Peer struct {
	Node string
	// Addr is where its packets go; zero when that is not known.
	Addr netip.Addr
	// Public is its WireGuard key; empty when it has told none.
	Public []byte
	// Preshared is what the two nodes share; empty until a manager has said it.
	Preshared []byte
	// Addresses are those of its endpoints, sorted.
	Addresses []netip.Addr
}

// TunnelNetwork is where the tunnels of an encrypted ingress network have their addresses.
// Nothing outside of its namespaces ever sees one.
func TunnelNetwork() netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 's', 'k', 'e', 'p'}), 48)
}

// TunnelAddr returns a node's address among tunnels, which follows from its id: nobody has to
// give it out.
func TunnelAddr(nodeID string) netip.Addr {
	a, sum := TunnelNetwork().Addr().As16(), sha256.Sum256([]byte(nodeID))
	copy(a[6:], sum[:])
	return netip.AddrFrom16(a)
}

// Peers returns the other nodes of an encrypted network, in the order of their ids. An
// endpoint whose node is not among them is behind nobody: its packets go nowhere.
func (s *State) Peers(network string) []Peer {
	behind := map[string][]netip.Addr{}
	for _, f := range s.Forwards(network) {
		behind[f.NodeID] = append(behind[f.NodeID], f.Addr)
		if f.Addr6.IsValid() {
			behind[f.NodeID] = append(behind[f.NodeID], f.Addr6)
		}
	}
	var out []Peer
	for _, id := range slices.Sorted(maps.Keys(s.peers[network])) {
		p := s.peers[network][id]
		addr, _ := netip.ParseAddr(p.GetAddr())
		slices.SortFunc(behind[id], netip.Addr.Compare)
		out = append(out, Peer{Node: id, Addr: addr, Public: p.GetPublicKey(), Preshared: p.GetPresharedKey(), Addresses: behind[id]})
	}
	return out
}

// WithoutKeys returns an update without what must not be written down.
func WithoutKeys(u *skepv1.NetworkUpdate) *skepv1.NetworkUpdate {
	if len(u.GetPeers()) == 0 {
		return u
	}
	out := proto.CloneOf(u)
	for _, p := range out.GetPeers() {
		p.PresharedKey, p.EspKeys = nil, nil
	}
	return out
}

// incrementPeers does for peers what Increment does. Those of a removed network go with it.
func (s *State) incrementPeers(out, u *skepv1.NetworkUpdate) {
	listed := set[Key]{}
	for _, p := range u.GetPeers() {
		k := peerKey(p.GetKey())
		listed[k] = struct{}{}
		if !proto.Equal(p, s.peers[k.Network][k.Task]) {
			out.Peers = append(out.Peers, p)
		}
	}
	var gone []Key
	if u.GetComplete() {
		for id, nodes := range s.peers {
			for node := range nodes {
				gone = append(gone, Key{id, node})
			}
		}
	}
	for _, k := range u.GetRemovedPeers() {
		gone = append(gone, peerKey(k))
	}
	for _, id := range out.GetRemovedNetworks() {
		for node := range s.peers[id] {
			gone = append(gone, Key{id, node})
		}
	}
	slices.SortFunc(gone, Key.compare)
	for _, k := range slices.Compact(gone) {
		if _, stays := listed[k]; !stays && s.peers[k.Network][k.Task] != nil {
			out.RemovedPeers = append(out.RemovedPeers, &skepv1.PeerKey{NetworkId: k.Network, NodeId: k.Task})
		}
	}
}

func peerKey(k *skepv1.PeerKey) Key { return Key{k.GetNetworkId(), k.GetNodeId()} }

func (s *State) mergePeers(u *skepv1.NetworkUpdate) {
	for _, k := range u.GetRemovedPeers() {
		delete(s.peers[k.GetNetworkId()], k.GetNodeId())
		if len(s.peers[k.GetNetworkId()]) == 0 {
			delete(s.peers, k.GetNetworkId())
		}
	}
	for _, p := range u.GetPeers() {
		id := p.GetKey().GetNetworkId()
		if s.peers[id] == nil {
			s.peers[id] = map[string]*skepv1.NetworkPeer{}
		}
		s.peers[id][p.GetKey().GetNodeId()] = p
	}
}

// encrypted returns the encrypted networks that an increment says something new of: their
// nodes, or the endpoints on them where that makes a difference to encryption.
func (s *State) encrypted(u *skepv1.NetworkUpdate) []string {
	ids := set[string]{}
	note := func(id string) {
		if s.networks[id].GetEncrypted() {
			ids[id] = struct{}{}
		}
	}
	for _, p := range u.GetPeers() {
		note(p.GetKey().GetNetworkId())
	}
	for _, k := range u.GetRemovedPeers() {
		note(k.GetNetworkId())
	}
	// VXLAN knows what is behind a node, with ESP and in the ingress network.
	behind := func(id string) {
		if n := s.networks[id]; !n.GetIngress() && !ByESP(n) {
			note(id)
		}
	}
	for _, e := range u.GetEndpoints() {
		behind(e.GetKey().GetNetworkId())
	}
	for _, k := range u.GetRemovedEndpoints() {
		behind(k.GetNetworkId())
	}
	return slices.Sorted(maps.Keys(ids))
}
