package netmap

import (
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"

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

// putHost notes the address of a node, which may be empty.
func (m *Map) putHost(id, old, now string) {
	if old == now {
		return
	}
	if delete(m.hosts[old], id); len(m.hosts[old]) == 0 {
		delete(m.hosts, old)
	}
	if now == "" {
		return
	}
	if m.hosts[now] == nil {
		m.hosts[now] = map[string]bool{}
	}
	m.hosts[now][id] = true
}

// replaced reports whether a node is lost and another one is alive at its address: the machine
// was installed anew, say.
func (m *Map) replaced(n *node) bool {
	if n.alive() {
		return false
	}
	for id := range m.hosts[n.addr()] {
		if m.nodes[id].alive() {
			return true
		}
	}
	return false
}

// twinsChanged says who must hear of all nodes at the address of one that came there, went, was
// lost or is back: some may be replaced now, or not any more.
func (m *Map) twinsChanged(id string, old, now *api.Node) []Notice {
	was, is := &node{stored: old}, &node{stored: now}
	if was.addr() == is.addr() && was.alive() == is.alive() {
		return nil
	}
	var out []Notice
	for _, addr := range slices.Compact([]string{was.addr(), is.addr()}) {
		twins := m.hosts[addr]
		if len(twins) == 1 && twins[id] {
			continue // alone
		}
		for networkID, n := range m.networks {
			for twin := range twins {
				if n.members[twin] > 0 && n.record.GetEncryption() == model.ESP {
					out = append(out, m.toPeers(networkID, twin)...)
				}
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
		if m.replaced(n) {
			r.Addr = "" // associations are told apart by addresses: this one's are the other node's
		} else {
			r.EspKeys = m.espKeys(to, nodeID)
		}
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
