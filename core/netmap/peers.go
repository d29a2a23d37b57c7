package netmap

import (
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
)

// toPeers tells all members of an encrypted network about one of its nodes.
func (m *Map) toPeers(networkID, nodeID string) []Notice {
	if !m.networks[networkID].record.GetEncrypted() {
		return nil
	}
	return m.toMembers(networkID, Key{Kind: Peer, Network: networkID, ID: nodeID})
}

// peerChanged says who must hear that a node has another key or address: the others, and with
// ESP, whose keys follow from both ends, the node itself.
func (m *Map) peerChanged(id string, old, now *api.Node) []Notice {
	if dataAddr(old) == dataAddr(now) && publicKey(old) == publicKey(now) && epoch(old) == epoch(now) {
		return nil
	}
	var out []Notice
	for networkID, n := range m.networks {
		if n.members[id] > 0 {
			out = append(out, m.toPeers(networkID, id)...)
			if n.record.GetEncryption() == model.ESP {
				out = append(out, Notice{id, Key{Kind: Peer, Network: networkID}})
			}
		}
	}
	return out
}

func epoch(n *api.Node) string {
	return n.GetDescription().GetEngine().GetLabels()[model.ESPEpochLabel]
}

func publicKey(n *api.Node) string {
	return n.GetDescription().GetEngine().GetLabels()[model.WireGuardKeyLabel]
}

// peerRecord is what one node of an encrypted network must know of another.
func (m *Map) peerRecord(networkID, nodeID, to string) *skepv1.NetworkPeer {
	n := m.nodes[nodeID]
	if n == nil {
		n = new(node)
	}
	key, err := hex.DecodeString(publicKey(n.stored))
	if err != nil {
		key = nil
	}
	r := &skepv1.NetworkPeer{Key: &skepv1.PeerKey{NetworkId: networkID, NodeId: nodeID}, Addr: n.addr()}
	if m.networks[networkID].record.GetEncryption() == model.ESP {
		r.EspKeys = m.espKeys(to, nodeID)
		return r
	}
	var newest []byte
	if len(m.keys) > 0 {
		newest = m.keys[0].GetKey()
	}
	r.PublicKey, r.PresharedKey = key, presharedKey(newest, networkID, nodeID, to)
	return r
}

// presharedKey derives what two nodes of a network share: nobody else can, without the
// cluster's secret, and it tells nothing of what other nodes share.
func presharedKey(secret []byte, networkID, a, b string) []byte {
	if len(secret) == 0 {
		return nil
	}
	if b < a {
		a, b = b, a
	}
	key, err := hkdf.Key(sha256.New, secret, nil, fmt.Sprintf("skep overlay %q %q %q", networkID, a, b), sha256.Size)
	if err != nil {
		panic(fmt.Sprintf("netmap: derive key: %v", err)) // lengths are constant
	}
	return key
}

// tellPeer adds one node of an encrypted network, or that it is there no more; with an
// empty id all nodes.
func (m *Map) tellPeer(u *skepv1.NetworkUpdate, told *Told, k Key, to string) {
	known, n := told.peers[k.Network], m.networks[k.Network]
	if known == nil || n == nil {
		return // not in this network, or it is not encrypted
	}
	members := n.members
	if k.ID == "" {
		for _, id := range sortedKeys(known) {
			if members[id] == 0 {
				m.tellPeer(u, told, Key{Kind: Peer, Network: k.Network, ID: id}, to)
			}
		}
		for _, id := range sortedKeys(members) {
			m.tellPeer(u, told, Key{Kind: Peer, Network: k.Network, ID: id}, to)
		}
		return
	}
	if k.ID == to {
		return
	}
	if members[k.ID] == 0 {
		if known[k.ID] {
			delete(known, k.ID)
			u.RemovedPeers = append(u.RemovedPeers, &skepv1.PeerKey{NetworkId: k.Network, NodeId: k.ID})
		}
		return
	}
	known[k.ID] = true
	u.Peers = append(u.Peers, m.peerRecord(k.Network, k.ID, to))
}
