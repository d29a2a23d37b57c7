package netplan

import (
	"bytes"
	"slices"
	"testing"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
)

func TestDigestIsOfWhatIsKnown(t *testing.T) {
	told := func() *skepv1.NetworkUpdate {
		return &skepv1.NetworkUpdate{
			Complete: true, Version: 7, Node: &skepv1.LocalNode{Id: "me"},
			Networks:  []*skepv1.OverlayNetwork{{Id: "n2"}, {Id: "n1", Name: "front"}},
			Endpoints: []*skepv1.OverlayEndpoint{{Key: &skepv1.EndpointKey{NetworkId: "n1", TaskId: "b"}}, {Key: &skepv1.EndpointKey{NetworkId: "n1", TaskId: "a"}}},
			Services:  []*skepv1.BalancedService{{Id: "s1"}, {Id: "s1"}},
			Withdrawn: []string{"x"},
			Peers: []*skepv1.NetworkPeer{
				{Key: &skepv1.PeerKey{NetworkId: "n2", NodeId: "w2"}, Addr: "192.0.2.2", PublicKey: []byte("2")},
				{Key: &skepv1.PeerKey{NetworkId: "n2", NodeId: "w1"}, Addr: "192.0.2.1", PublicKey: []byte("1"), PresharedKey: []byte("k")},
			},
		}
	}
	s := NewState()
	s.Merge(told())
	want := Digest(told())
	if !bytes.Equal(Digest(s.Snapshot()), want) {
		t.Error("a node that was told everything has another digest")
	}
	for name, change := range map[string]func(*skepv1.NetworkUpdate){
		"an endpoint less": func(u *skepv1.NetworkUpdate) { u.Endpoints = u.Endpoints[:1] },
		"a service less":   func(u *skepv1.NetworkUpdate) { u.Services = nil },
		"another name":     func(u *skepv1.NetworkUpdate) { u.Networks[1].Name = "back" },
		"another key":      func(u *skepv1.NetworkUpdate) { u.Peers[1].PresharedKey = []byte("l") },
		"another node":     func(u *skepv1.NetworkUpdate) { u.Node.DataAddr = "192.0.2.1" },
	} {
		u := told()
		change(u)
		if bytes.Equal(Digest(u), want) {
			t.Errorf("%s makes no difference", name)
		}
	}
	u := told()
	slices.Reverse(u.Networks)
	if u.Version = 8; !bytes.Equal(Digest(u), want) {
		t.Error("order or version makes a difference")
	}
}
