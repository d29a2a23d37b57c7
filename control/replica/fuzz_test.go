package replica

import (
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// FuzzDecodeState reads snapshots of other managers: what is accepted can be written and
// read again with as many records.
func FuzzDecodeState(f *testing.F) {
	seed, err := proto.Marshal(&api.Snapshot{
		Membership: &api.ClusterSnapshot{Members: []*api.RaftMember{{RaftId: 1, NodeId: "n"}}, Removed: []uint64{2}},
		Store:      &api.StoreSnapshot{Nodes: []*api.Node{{Id: "n"}}, Tasks: []*api.Task{{Id: "t", NodeId: "n"}}},
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed, uint64(7))
	f.Add([]byte{8, 1}, uint64(1))
	f.Fuzz(func(t *testing.T, data []byte, index uint64) {
		state, members, err := decodeState(data, index)
		if err != nil {
			return
		}
		ros := rosterOf(1, members)
		again, err := encodeState(state, ros)
		if err != nil {
			t.Fatal(err)
		}
		read, _, err := decodeState(again, index)
		if err != nil {
			t.Fatal(err)
		}
		for table := range model.Table(model.TableCount) {
			if read.Len(table) != state.Len(table) {
				t.Errorf("%d of %s, read again %d", state.Len(table), table, read.Len(table))
			}
		}
	})
}
