package replica

import (
	"fmt"
	"testing"
)

func TestFirstMemberWritesAndRestarts(t *testing.T) {
	dir := t.TempDir()
	n := startNode(t, "node1", dir, "", nil)
	waitLeader(t, n)
	for i := range 10 {
		mustCreate(t, n, fmt.Sprintf("c%d", i))
	}
	n.stop()
	if n.err != nil {
		t.Fatalf("run: %v", n.err)
	}
	n = startNode(t, "node1", dir, "", nil)
	waitLeader(t, n)
	for i := range 10 {
		if n.View().Config(fmt.Sprintf("c%d", i)) == nil {
			t.Errorf("c%d is lost", i)
		}
	}
	mustCreate(t, n, "after")
}

func TestThreeMembersReplicate(t *testing.T) {
	nodes := startSwarm(t, 3, nil)
	mustCreate(t, nodes[0], "c")
	for _, n := range nodes {
		waitFor(t, "replicated", func() bool { return n.View().Config("c") != nil })
	}
}

func TestLeaderLossElectsAnother(t *testing.T) {
	nodes := startSwarm(t, 3, nil)
	mustCreate(t, nodes[0], "before")
	nodes[0].stop()
	leader := waitLeader(t, nodes[1:]...)
	mustCreate(t, leader, "after")
	if leader.View().Config("before") == nil {
		t.Error("an acknowledged write is lost")
	}
}
