package netmap

import (
	"fmt"
	"testing"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// espSwarm is a network that ESP encrypts, with a task on each of n nodes.
func espSwarm(n int) *Map {
	network := encryptedNetwork()
	network.DriverState.Options[model.EncryptionOption] = model.ESP
	m := New(&records{})
	m.Apply(model.Event{Table: model.Clusters, New: generations(5, 4, 3)})
	m.Apply(model.Event{Table: model.Networks, New: network})
	for i := range n {
		node := espNode(i, fmt.Sprintf("%032x", i))
		node.Id, node.Status.Addr = fmt.Sprintf("%025d", i), fmt.Sprintf("10.1.%d.%d", i/256, i%256)
		m.Apply(model.Event{Table: model.Nodes, New: node})
		task := encryptedTask(fmt.Sprintf("t%d", i), node.GetId())
		task.Networks[0] = &api.NetworkAttachment{Network: network, Addresses: []string{fmt.Sprintf("10.0.%d.%d/16", i/256, i%256)}}
		m.Apply(model.Event{Table: model.Tasks, New: task})
	}
	return m
}

// BenchmarkESPRotation is what one of 1,000 nodes is told when keys change: a rotation costs a
// thousand times as much.
func BenchmarkESPRotation(b *testing.B) {
	m := espSwarm(1000)
	id := fmt.Sprintf("%025d", 7)
	_, told := m.Complete(id)
	keys := []Key{{Kind: Peer, Network: "net"}}
	b.ReportAllocs()
	for b.Loop() {
		if u := m.Update(id, told, keys); len(u.GetPeers()) != 999 {
			b.Fatalf("%d peers", len(u.GetPeers()))
		}
	}
}
