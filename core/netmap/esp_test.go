package netmap

import (
	"bytes"
	"crypto/hkdf"
	"crypto/sha256"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
)

func TestSPI(t *testing.T) {
	for _, c := range []struct {
		from, to string
		want     uint32
	}{
		{"192.168.0.2", "192.168.0.3", 0x20536156}, {"192.168.0.3", "192.168.0.2", 0x737a3036}, {"fd00::1", "fd00::2", 0x770a94b4},
	} {
		if got := spi(netip.MustParseAddr(c.from), netip.MustParseAddr(c.to), 100); got != c.want {
			t.Errorf("%s to %s: %#x, want %#x", c.from, c.to, got, c.want)
		}
	}
}

// TestESPKeysAreHKDFs: what is derived in two steps is what one would give.
func TestESPKeysAreHKDFs(t *testing.T) {
	secrets := espSecrets([]*api.EncryptionKey{{Key: []byte("one")}, {Key: []byte("two")}})
	a, b := &espEnd{name: [32]byte{1}}, &espEnd{name: [32]byte{2}}
	got, rest := secrets[1].key(make([]byte, 0, 2*sha256.Size), a, b)
	again, _ := secrets[1].key(rest, b, a)
	for _, c := range []struct {
		got      []byte
		from, to *espEnd
	}{{got, a, b}, {again, b, a}} {
		want, err := hkdf.Key(sha256.New, []byte("two"), nil, string(c.from.name[:])+string(c.to.name[:]), model.ESPKeySize)
		if err != nil || !bytes.Equal(c.got, want) {
			t.Errorf("%x, %v; want %x", c.got, err, want)
		}
	}
}

func espNode(i int, epoch string) *api.Node {
	n := encryptedNode(fmt.Sprintf("n%d", i), "0a")
	n.Description.Engine.Labels = map[string]string{model.ESPEpochLabel: epoch}
	return n
}

func generations(times ...uint64) *api.Cluster {
	c := new(api.Cluster)
	for _, at := range times {
		c.NetworkBootstrapKeys = append(c.NetworkBootstrapKeys, &api.EncryptionKey{Subsystem: pki.OverlayKeys, Key: fmt.Appendf(nil, "key%d", at), LamportTime: at})
	}
	return c
}

// TestESPKeys: what one node sends by, the other receives by, and nobody else has it; they
// change as the keys of the cluster do, and with a node's epoch or address.
func TestESPKeys(t *testing.T) {
	network := encryptedNetwork()
	network.DriverState.Options[model.EncryptionOption] = model.ESP
	m := New(&records{})
	m.Apply(model.Event{Table: model.Clusters, New: generations(5, 3, 4)})
	m.Apply(model.Event{Table: model.Networks, New: network})
	var all []*follower
	for i := 1; i <= 3; i++ {
		m.Apply(model.Event{Table: model.Nodes, New: espNode(i, fmt.Sprintf("epoch%d", i))})
		task := encryptedTask(fmt.Sprintf("t%d", i), fmt.Sprintf("n%d", i))
		task.Networks[0].Network = network
		m.Apply(model.Event{Table: model.Tasks, New: task})
	}
	for i := 1; i <= 3; i++ {
		f := &follower{m: m, id: fmt.Sprintf("n%d", i), peers: map[string]*skepv1.NetworkPeer{}}
		u, told := m.Complete(f.id)
		f.told = told
		f.take(u)
		all = append(all, f)
	}
	everybody := func(e model.Event) {
		notices := m.Apply(e)
		for _, f := range all {
			f.hear(notices)
		}
	}
	seen := map[string]bool{}
	check := func(what string, times ...uint64) {
		t.Helper()
		used := map[string]bool{}
		for _, f := range all {
			for id, p := range f.peers {
				if len(p.GetPresharedKey())+len(p.GetPublicKey()) > 0 || len(p.GetEspKeys()) != len(times) {
					t.Fatalf("%s: %s was told of %s: %v", what, f.id, id, p)
				}
				back := all[id[1]-'1'].peers[f.id]
				for i, k := range p.GetEspKeys() {
					b := back.GetEspKeys()[i]
					if k.GetGeneration() != times[i] || k.GetSending() != (i == 1) || len(k.GetOutKey()) != 20 ||
						k.GetOutSpi() != b.GetInSpi() || !bytes.Equal(k.GetOutKey(), b.GetInKey()) || b.GetSending() != k.GetSending() {
						t.Errorf("%s: %s sends to %s by %v, which receives by %v", what, f.id, id, k, b)
					}
					if used[string(k.GetOutKey())] {
						t.Errorf("%s: the key from %s to %s is used twice", what, f.id, id)
					}
					used[string(k.GetOutKey())] = true
				}
			}
		}
		for k := range used {
			seen[k] = true
		}
	}
	known := func(want int, what string) {
		t.Helper()
		if len(seen) != want {
			t.Errorf("%s: %d keys so far, want %d", what, len(seen), want)
		}
	}
	check("at first", 5, 4, 3)
	known(3*6, "at first")
	everybody(model.Event{Table: model.Clusters, New: generations(6, 5, 4)})
	check("after a rotation", 6, 5, 4)
	known(4*6, "a rotation brings one more for each pair and direction")
	everybody(model.Event{Table: model.Nodes, Old: espNode(2, "epoch2"), New: espNode(2, "another")})
	check("after a loss", 6, 5, 4)
	known(4*6+3*4, "a loss changes those of one node")
	moved := espNode(2, "another")
	moved.Status.Addr = "192.0.2.9"
	everybody(model.Event{Table: model.Nodes, Old: espNode(2, "another"), New: moved})
	check("after a move", 6, 5, 4)
	known(4*6+2*3*4, "another address changes those of one node")
	everybody(model.Event{Table: model.Nodes, Old: moved, New: espNode(2, "")})
	if keys := all[0].peers["n2"].GetEspKeys(); len(keys) > 0 {
		t.Errorf("a node that cannot encrypt is told of with %v", keys)
	}
	wantAsNew(t, m, all)
}

// TestESPOfAReplacedNode: of two nodes at one address, others are told nothing to send to the one
// that is lost, which would be by the associations of the other.
func TestESPOfAReplacedNode(t *testing.T) {
	network := encryptedNetwork()
	network.DriverState.Options[model.EncryptionOption] = model.ESP
	m := New(&records{})
	m.Apply(model.Event{Table: model.Clusters, New: generations(3)})
	m.Apply(model.Event{Table: model.Networks, New: network})
	stored := map[int]*api.Node{}
	one := &follower{m: m, id: "n1", peers: map[string]*skepv1.NetworkPeer{}}
	_, one.told = m.Complete(one.id)
	put := func(i int, addr string, state api.NodeStatus_State) {
		n := espNode(i, "epoch")
		n.Status.Addr, n.Status.State = addr, state
		one.hear(m.Apply(model.Event{Table: model.Nodes, Old: stored[i], New: n}))
		stored[i] = n
	}
	task := func(i int) *api.Task {
		out := encryptedTask(fmt.Sprintf("t%d", i), fmt.Sprintf("n%d", i))
		out.Networks[0].Network = network
		return out
	}
	want := func(what string, nodes ...string) {
		t.Helper()
		var got []string
		for _, id := range sortedKeys(one.peers) {
			switch p := one.peers[id]; {
			case p.GetAddr() != "" && len(p.GetEspKeys()) == 1:
				got = append(got, id)
			case p.GetAddr() != "" || len(p.GetEspKeys()) > 0:
				t.Errorf("%s: half told of %v", what, p)
			}
		}
		if !slices.Equal(got, nodes) {
			t.Errorf("%s: n1 sends to %v, want %v", what, got, nodes)
		}
		wantAsNew(t, m, []*follower{one})
	}
	const up, down = api.NodeStatus_READY, api.NodeStatus_DOWN
	for i := 1; i <= 3; i++ {
		put(i, fmt.Sprintf("192.0.2.%d", i), up)
		one.hear(m.Apply(model.Event{Table: model.Tasks, New: task(i)}))
	}
	want("at first", "n2", "n3")
	put(2, "192.0.2.2", down)
	want("lost, and nobody else has its address", "n2", "n3")
	put(4, "192.0.2.2", up)
	want("another has it", "n3")
	one.hear(m.Apply(model.Event{Table: model.Tasks, New: task(4)}))
	want("and is in the network", "n3", "n4")
	put(4, "192.0.2.2", down)
	want("which is lost as well", "n2", "n3", "n4")
	put(2, "192.0.2.2", up)
	want("the first is back", "n2", "n3")
	put(2, "192.0.2.9", up)
	want("it moves", "n2", "n3", "n4")
	put(2, "192.0.2.2", up)
	want("and back", "n2", "n3")
	one.hear(m.Apply(model.Event{Kind: model.Remove, Table: model.Tasks, Old: task(2)}))
	one.hear(m.Apply(model.Event{Kind: model.Remove, Table: model.Nodes, Old: stored[2]}))
	want("it is removed", "n3", "n4")
}

// TestESPKeysAreDerivedOnce: nodes that share several networks have the same keys in all, which
// an update derives once; the next one derives them anew.
func TestESPKeysAreDerivedOnce(t *testing.T) {
	m := New(&records{})
	m.Apply(model.Event{Table: model.Clusters, New: generations(5, 4, 3)})
	for i := 1; i <= 2; i++ {
		m.Apply(model.Event{Table: model.Nodes, New: espNode(i, "epoch")})
		task := encryptedTask(fmt.Sprintf("t%d", i), fmt.Sprintf("n%d", i))
		task.Networks = nil
		for _, id := range []string{"a", "b"} {
			network := encryptedNetwork()
			network.Id, network.DriverState.Options[model.EncryptionOption] = id, model.ESP
			m.Apply(model.Event{Table: model.Networks, New: network})
			task.Networks = append(task.Networks, &api.NetworkAttachment{Network: network, Addresses: []string{"10.0.1.9/24"}})
		}
		m.Apply(model.Event{Table: model.Tasks, New: task})
	}
	whole, told := m.Complete("n1")
	var before []*skepv1.EspKey
	for _, u := range []*skepv1.NetworkUpdate{whole, m.Update("n1", told, []Key{{Kind: Peer, Network: "a"}, {Kind: Peer, Network: "b", ID: "n2"}})} {
		if len(u.GetPeers()) != 2 {
			t.Fatalf("n1 hears of %v", u.GetPeers())
		}
		a, b := u.GetPeers()[0].GetEspKeys(), u.GetPeers()[1].GetEspKeys()
		if len(a) != 3 || !slices.Equal(a, b) || slices.Equal(a, before) {
			t.Errorf("keys %v in one network, %v in the other, %v before: want the same, derived once", a, b, before)
		}
		before = a
	}
}
