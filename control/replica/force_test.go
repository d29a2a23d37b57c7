package replica

import (
	"path/filepath"
	"testing"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/platform/disk"
)

// TestForceNewClusterWithoutVote: what is left of a swarm is a manager that had no vote yet,
// or that had been removed and did not know that all had agreed.
func TestForceNewClusterWithoutVote(t *testing.T) {
	first := &api.RaftMember{RaftId: 1, NodeId: "node8", Addr: "10.0.0.8:2377"}
	self := &api.RaftMember{RaftId: 2, NodeId: "node9", Addr: "10.0.0.9:2377"}
	for name, changes := range map[string][]raftpb.ConfChangeType{
		"not yet": {raftpb.ConfChangeAddLearnerNode},
		"removed": {raftpb.ConfChangeAddLearnerNode, raftpb.ConfChangeAddNode, raftpb.ConfChangeRemoveNode},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, 0, func(t *testing.T, s *testSwarm) {
				marshal := func(m proto.Message) []byte {
					data, err := proto.Marshal(m)
					if err != nil {
						t.Fatal(err)
					}
					return data
				}
				var entries []*raftpb.Entry
				add := func(kind raftpb.ConfChangeType, of *api.RaftMember) {
					index := uint64(len(entries) + 1)
					cc := &raftpb.ConfChange{Id: new(index), Type: kind.Enum(), NodeId: new(of.GetRaftId()), Context: marshal(of)}
					entries = append(entries, &raftpb.Entry{Type: raftpb.EntryConfChange.Enum(), Term: new(uint64(1)), Index: new(index), Data: marshal(cc)})
				}
				add(raftpb.ConfChangeAddNode, first)
				for _, kind := range changes {
					add(kind, self)
				}
				dir := filepath.Join(s.base, "9")
				log, err := disk.Create(dir, marshal(self), testKey(), testLog())
				if err != nil {
					t.Fatal(err)
				}
				if err := log.Save(&raftpb.HardState{Term: new(uint64(1)), Vote: new(uint64(1)), Commit: new(uint64(len(entries)))}, entries); err != nil {
					t.Fatal(err)
				}
				if err := log.Close(); err != nil {
					t.Fatal(err)
				}
				s.change = func(c *Config) { c.ForceNewCluster = true }
				n := s.start(self.GetNodeId(), dir, self.GetAddr(), "")
				s.nodes = append(s.nodes, n)
				s.configure(&api.RaftConfig{SnapshotInterval: 5})
				s.write("alone")
				s.change = nil
				s.write(names("c", 20)...) // over a snapshot
				n.stop()
				n = s.restart(n)
				s.write("again")
				s.mustHave(n, "alone", "again")
				if members, voters := n.Members(), n.Voters(); len(members) != 1 || len(voters) != 1 || !n.Votes() {
					t.Errorf("members %v, of which vote %v", members, voters)
				}
			})
		})
	}
}
