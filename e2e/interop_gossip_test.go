package e2e

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
)

// TestInteropGossip has a Docker Engine and Skep's nodes gossip: the engine hears who is in
// the ingress network, and its kernel where.
func TestInteropGossip(t *testing.T) {
	s := newSwarm(t, 1, 1)
	e := s.addDocker(t, "d1")
	if open := s.gossipPort(t, "m1"); open {
		t.Error("a port is open in a swarm of Skep alone")
	}
	s.join(t, "d1", "m1", "worker")
	s.wantPeers(t, "m1", "w1", "d1")
	eventually(t, 40*time.Second, "the engine's kernel knows the way to Skep's nodes", func() string {
		out := e.overlay(t, s.networkID(t, "ingress"), "bridge", "fdb")
		for _, name := range []string{"m1", "w1"} {
			if !strings.Contains(out, "dst "+s.node(t, name).Addr+" ") {
				return out
			}
		}
		return ""
	})

	s.dev(t, "kill", "w1")
	s.dev(t, "start", "w1")
	s.wantNode(t, "m1", "w1", "Ready", "Active")
	s.wantPeers(t, "m1", "w1", "d1")
	// What is heard from now on is encrypted by other keys. The second wish waits until the first
	// is met.
	for range 2 {
		run(t, skepBinary(t), "-H", "unix://"+s.node(t, "m1").Socket, "net", "rotate-keys")
	}
	s.docker(t, "w1", "swarm", "leave")
	s.wantPeers(t, "m1", "d1")

	s.docker(t, "d1", "swarm", "leave")
	s.wantNode(t, "m1", "d1", "Down", "Active")
	s.docker(t, "m1", "node", "rm", "d1")
	eventually(t, 20*time.Second, "the port is closed", func() string {
		if s.gossipPort(t, "m1") {
			return "it is open"
		}
		return ""
	})
}

// gossipPort reports whether a node listens on the port of Docker's gossip.
func (s *swarm) gossipPort(t *testing.T, node string) bool {
	t.Helper()
	out := run(t, "ip", "netns", "exec", "skep-"+s.name+"-"+node, "cat", "/proc/net/tcp", "/proc/net/tcp6", "/proc/net/udp", "/proc/net/udp6")
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) > 3 && strings.HasSuffix(f[1], ":1F0A") && (f[3] == "0A" || f[3] == "07") { // 7946, listening or UDP
			return true
		}
	}
	return false
}

// networkID returns the id of a network of the swarm.
func (s *swarm) networkID(t *testing.T, name string) string {
	t.Helper()
	return s.docker(t, "m1", "network", "inspect", "--format", "{{.Id}}", name)
}

// wantPeers waits until node d1 has heard that just these nodes are in the ingress network.
func (s *swarm) wantPeers(t *testing.T, nodes ...string) {
	t.Helper()
	var want []string
	for _, name := range nodes {
		want = append(want, s.node(t, name).Addr)
	}
	eventually(t, 30*time.Second, "the engine hears of "+strings.Join(nodes, ", "), func() string {
		out, err := s.tryDocker(t, 20*time.Second, "d1", "network", "inspect", "--format", "{{json .Peers}}", "ingress")
		if err != nil {
			return out
		}
		var peers []struct{ IP string }
		if err := json.Unmarshal([]byte(out), &peers); err != nil {
			return out
		}
		var got []string
		for _, p := range peers {
			got = append(got, p.IP)
		}
		if sortLines(strings.Join(got, "\n")) != sortLines(strings.Join(want, "\n")) {
			return out
		}
		return ""
	})
}

// overlay runs a command where an engine keeps an overlay network: in a namespace that only
// the daemon's own mounts show.
func (e *dockerEngine) overlay(t *testing.T, network string, command ...string) string {
	t.Helper()
	out, err := e.inside(t, "1-"+network[:10], command...)
	if err != nil {
		return err.Error() + out
	}
	return out
}
