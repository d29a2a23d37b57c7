package netmap

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
)

// encryptedNode is a node with a WireGuard key.
func encryptedNode(id, key string) *api.Node {
	return &api.Node{
		Id: id, Status: &api.NodeStatus{State: api.NodeStatus_READY, Addr: "192.0.2." + id[1:]},
		Description: &api.NodeDescription{Engine: &api.EngineDescription{Labels: map[string]string{model.WireGuardKeyLabel: strings.Repeat(key, 32)}}},
	}
}

func encryptedNetwork() *api.Network {
	options := map[string]string{model.EncryptedOption: "", model.EncryptionOption: model.WireGuard, model.EncryptionPortOption: "51820", vniOption: "4097"}
	return &api.Network{
		Id: "net", Spec: &api.NetworkSpec{Annotations: &api.Annotations{Name: "sec"}},
		DriverState: &api.Driver{Name: "overlay", Options: options},
		Ipam:        &api.IPAMOptions{Configs: []*api.IPAMConfig{{Subnet: "10.0.1.0/24"}}},
	}
}

func encryptedTask(id, node string) *api.Task {
	return &api.Task{
		Id: id, NodeId: node, Status: &api.TaskStatus{State: api.TaskState_RUNNING}, DesiredState: api.TaskState_RUNNING,
		Networks: []*api.NetworkAttachment{{Network: encryptedNetwork(), Addresses: []string{"10.0.1." + id[1:] + "/24"}}},
	}
}

func keysOf(secret string) *api.Cluster {
	return &api.Cluster{NetworkBootstrapKeys: []*api.EncryptionKey{
		{Subsystem: pki.OverlayKeys, Key: []byte(secret), LamportTime: 9},
		{Subsystem: pki.OverlayKeys, Key: []byte("older"), LamportTime: 3},
		{Subsystem: "networking:gossip", Key: []byte("gossip"), LamportTime: 12},
	}}
}

// follower is a node as it is told.
type follower struct {
	m     *Map
	id    string
	told  *Told
	peers map[string]*skepv1.NetworkPeer
}

func (f *follower) take(u *skepv1.NetworkUpdate) {
	for _, k := range u.GetRemovedPeers() {
		delete(f.peers, k.GetNodeId())
	}
	for _, p := range u.GetPeers() {
		f.peers[p.GetKey().GetNodeId()] = p
	}
}

func (f *follower) hear(notices []Notice) *skepv1.NetworkUpdate {
	var keys []Key
	for _, n := range notices {
		if n.NodeID == f.id {
			keys = append(keys, n.Key)
		}
	}
	u := f.m.Update(f.id, f.told, keys)
	f.take(u)
	return u
}

func (f *follower) want(t *testing.T, nodes ...string) {
	t.Helper()
	var got []string
	for id, p := range f.peers {
		got = append(got, id)
		if len(p.GetPublicKey()) != 32 || len(p.GetPresharedKey()) != 32 || p.GetAddr() == "" {
			t.Errorf("%s was told of %v", f.id, p)
		}
	}
	slices.Sort(got)
	if !slices.Equal(got, nodes) {
		t.Errorf("%s knows %v, want %v", f.id, got, nodes)
	}
}

func TestPeersOfEncryptedNetworks(t *testing.T) {
	m := New(&records{})
	m.Apply(model.Event{Table: model.Clusters, New: keysOf("first")})
	m.Apply(model.Event{Table: model.Networks, New: encryptedNetwork()})
	for i := 1; i <= 3; i++ {
		m.Apply(model.Event{Table: model.Nodes, New: encryptedNode(fmt.Sprintf("n%d", i), fmt.Sprintf("0%d", i))})
	}
	m.Apply(model.Event{Table: model.Tasks, New: encryptedTask("t1", "n1")})
	var all []*follower
	for _, id := range []string{"n1", "n2", "n3"} {
		f := &follower{m: m, id: id, peers: map[string]*skepv1.NetworkPeer{}}
		u, told := m.Complete(id)
		f.told = told
		f.take(u)
		f.want(t)
		all = append(all, f)
	}
	everybody := func(e model.Event) {
		notices := m.Apply(e)
		for _, f := range all {
			f.hear(notices)
		}
	}
	everybody(model.Event{Table: model.Tasks, New: encryptedTask("t2", "n2")})
	all[0].want(t, "n2")
	all[1].want(t, "n1")
	all[2].want(t)
	everybody(model.Event{Table: model.Tasks, New: encryptedTask("t3", "n3")})
	all[0].want(t, "n2", "n3")
	all[2].want(t, "n1", "n2")

	ab, ba, ac := all[0].peers["n2"], all[1].peers["n1"], all[0].peers["n3"]
	if !bytes.Equal(ab.GetPresharedKey(), ba.GetPresharedKey()) || bytes.Equal(ab.GetPresharedKey(), ac.GetPresharedKey()) {
		t.Errorf("n1 and n2 share %x and %x, n1 and n3 %x", ab.GetPresharedKey(), ba.GetPresharedKey(), ac.GetPresharedKey())
	}
	everybody(model.Event{Table: model.Clusters, New: keysOf("second")})
	if now := all[0].peers["n2"]; bytes.Equal(now.GetPresharedKey(), ab.GetPresharedKey()) || !bytes.Equal(now.GetPresharedKey(), all[1].peers["n1"].GetPresharedKey()) {
		t.Errorf("after the rotation n1 and n2 share %x and %x, before %x", now.GetPresharedKey(), all[1].peers["n1"].GetPresharedKey(), ab.GetPresharedKey())
	}
	everybody(model.Event{Table: model.Nodes, Old: encryptedNode("n2", "02"), New: encryptedNode("n2", "0a")})
	if got := all[2].peers["n2"].GetPublicKey(); !bytes.Equal(got, bytes.Repeat([]byte{0x0a}, 32)) {
		t.Errorf("n3 was told the key %x of n2", got)
	}
	gone := encryptedTask("t3", "n3")
	gone.Status.State = api.TaskState_SHUTDOWN
	everybody(model.Event{Table: model.Tasks, Old: encryptedTask("t3", "n3"), New: gone})
	all[0].want(t, "n2")
	if all[2].told.peers["net"] != nil {
		t.Errorf("n3 left the network and is still told of %v", all[2].told.peers)
	}
	wantAsNew(t, m, all[:2])
}

// wantAsNew fails unless what nodes were told bit by bit is what they would be told at once.
func wantAsNew(t *testing.T, m *Map, all []*follower) {
	t.Helper()
	for _, f := range all {
		u, _ := m.Complete(f.id)
		whole := &follower{peers: map[string]*skepv1.NetworkPeer{}}
		whole.take(u)
		if fmt.Sprint(whole.peers) != fmt.Sprint(f.peers) {
			t.Errorf("%s knows %v, a new one would know %v", f.id, f.peers, whole.peers)
		}
	}
}

// TestPeersOfEncryptedIngress: every node with an address in the ingress network is in it.
func TestPeersOfEncryptedIngress(t *testing.T) {
	mesh := encryptedNetwork()
	mesh.Spec.Ingress = true
	node := func(i int) *api.Node {
		n := encryptedNode(fmt.Sprintf("n%d", i), fmt.Sprintf("0%d", i))
		n.Attachments = []*api.NetworkAttachment{{Network: mesh, Addresses: []string{fmt.Sprintf("10.0.1.%d/24", i)}}}
		return n
	}
	m := New(&records{})
	m.Apply(model.Event{Table: model.Clusters, New: keysOf("first")})
	m.Apply(model.Event{Table: model.Networks, New: mesh})
	m.Apply(model.Event{Table: model.Nodes, New: node(1)})
	one := &follower{m: m, id: "n1", peers: map[string]*skepv1.NetworkPeer{}}
	u, told := m.Complete("n1")
	one.told = told
	one.take(u)
	one.want(t)
	one.hear(m.Apply(model.Event{Table: model.Nodes, New: node(2)}))
	one.hear(m.Apply(model.Event{Table: model.Nodes, New: encryptedNode("n3", "03")})) // without address as yet
	one.want(t, "n2")
	one.hear(m.Apply(model.Event{Table: model.Nodes, Old: encryptedNode("n3", "03"), New: node(3)}))
	one.want(t, "n2", "n3")
	before := one.peers["n2"].GetPresharedKey()
	one.hear(m.Apply(model.Event{Table: model.Clusters, New: keysOf("second")}))
	if bytes.Equal(before, one.peers["n2"].GetPresharedKey()) {
		t.Error("the keys of the ingress network do not change")
	}
	one.hear(m.Apply(model.Event{Kind: model.Remove, Table: model.Nodes, Old: node(2)}))
	one.want(t, "n3")
	u = one.hear(m.Apply(model.Event{Kind: model.Remove, Table: model.Networks, Old: mesh}))
	if !slices.Equal(u.GetRemovedNetworks(), []string{"net"}) || one.told.peers["net"] != nil {
		t.Errorf("with the network removed n1 hears %v and is still told of %v", u, one.told.peers)
	}
}
