package wire

import (
	"strings"
	"testing"
)

// TestLeaderOnly: a manager that believes in a leader which was restarted calls it all the
// same. That one has not applied what was acknowledged since, so it must not answer.
func TestLeaderOnly(t *testing.T) {
	found := map[string]int{}
	for name, m := range methods() {
		service := strings.Split(name, "/")[1]
		if m.leaderOnly {
			found[service]++
		}
	}
	for _, service := range []string{"docker.swarmkit.v1.Control", "docker.swarmkit.v1.Dispatcher", "docker.swarmkit.v1.Logs", "skep.v1.Insight"} {
		if found[service] == 0 {
			t.Errorf("%s is served by managers that do not lead", service)
		}
	}
	if found["docker.swarmkit.v1.Raft"] > 0 {
		t.Error("raft's own messages are forwarded to the leader")
	}
}
