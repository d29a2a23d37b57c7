package node

import (
	"net/netip"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/worker/gossip"
)

// Gossip is this node's part in the gossip of Docker Engines.
type Gossip interface {
	// SetSession takes over what the swarm says; the zero Session is that of a node in none.
	SetSession(s gossip.Session)
}

// gossipSession is what a message of the session says to gossip.
func (m *member) gossipSession(msg *api.SessionMessage) gossip.Session {
	s := gossip.Session{NodeID: msg.GetNode().GetId(), Bind: hostAddr(m.saved.ListenAddr), Advertise: hostAddr(msg.GetNode().GetStatus().GetAddr())}
	if !s.Advertise.IsValid() || s.Advertise.IsUnspecified() {
		s.Advertise = hostAddr(m.saved.AdvertiseAddr)
	}
	for _, k := range msg.GetNetworkBootstrapKeys() {
		if k.GetSubsystem() == pki.GossipKeys {
			s.Keys = append(s.Keys, gossip.Key{Time: k.GetLamportTime(), Key: k.GetKey()})
		}
	}
	for _, p := range msg.GetManagers() {
		if a := hostAddr(p.GetPeer().GetAddr()); a.IsValid() && p.GetPeer().GetNodeId() != s.NodeID {
			s.Managers = append(s.Managers, a)
		}
	}
	return s
}

// hostAddr returns the address of a host with or without a port; zero when it is none.
func hostAddr(text string) netip.Addr {
	a, _ := netip.ParseAddr(hostOf(text)) // zero if it is none
	return a.Unmap()
}
