package e2e

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/e2e/testimage"
)

// outside is a machine that is no node, on the wire of a dev swarm.
type outside struct {
	addr  netip.Addr
	netns string // where the wire is
	app   string
}

// newOutside gives the wire itself an address: what it sends to a node goes over that one's link.
func (s *swarm) newOutside(t *testing.T) *outside {
	t.Helper()
	b := netip.MustParseAddr(s.nodes[0].Addr).As4()
	b[3] = 250
	o := &outside{addr: netip.AddrFrom4(b), netns: "/run/netns/skep-" + s.name, app: testapp(t)}
	err := inside(o.netns, func() error {
		br, err := netlink.LinkByName("br0")
		if err != nil {
			return err
		}
		return netlink.AddrAdd(br, &netlink.Addr{IPNet: &net.IPNet{IP: o.addr.AsSlice(), Mask: net.CIDRMask(24, 32)}})
	})
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func (o *outside) run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	return try(t, time.Minute, "nsenter", append([]string{"--net=" + o.netns, o.app}, args...)...)
}

// wantSeen waits until a server of whois at a port of each node is reached and sees this machine.
func (o *outside) wantSeen(t *testing.T, s *swarm, port int) {
	t.Helper()
	for _, n := range s.nodes {
		for _, network := range []string{"tcp", "udp"} {
			eventually(t, 30*time.Second, fmt.Sprintf("%s through %s shows the client", network, n.Name), func() string {
				answers, err := asked(o.run(t, "who", network, "0", fmt.Sprintf("%s:%d", n.Addr, port)))
				if err != nil || slices.ContainsFunc(answers, func(a answer) bool { return a.client != o.addr.String() }) {
					return fmt.Sprint(answers, err)
				}
				return ""
			})
		}
	}
}

// optionsOf returns how a network is encrypted and on which port; empty if it is not.
func (s *swarm) optionsOf(t *testing.T, m, network string) (how string, port uint16) {
	t.Helper()
	out := s.docker(t, m, "network", "inspect", "--format", `{{index .Options "skep.encryption"}} {{index .Options "skep.encryption.port"}}`, network)
	_, _ = fmt.Sscan(out, &how, &port) // nothing in them
	return how, port
}

// wire captures on the wire, and tells packets with a text in them between nodes (clear) from
// those to and from outside (client), and from what is encrypted (sealed).
func (o *outside) wire(t *testing.T, s *swarm, text string, port uint16) *capture {
	t.Helper()
	node := map[netip.Addr]bool{}
	for _, n := range s.nodes {
		node[netip.MustParseAddr(n.Addr)] = true
	}
	return captureIn(t, o.netns, func(packet []byte) []string {
		if len(packet) < 14+28 || binary.BigEndian.Uint16(packet[12:]) != unix.ETH_P_IP {
			return nil
		}
		p := packet[14:]
		from, to := netip.AddrFrom4([4]byte(p[12:])), netip.AddrFrom4([4]byte(p[16:]))
		with := bytes.Contains(packet, []byte(text))
		switch {
		case with && (from == o.addr && node[to] || node[from] && to == o.addr):
			return []string{"client"}
		case with:
			return []string{"clear"}
		case node[from] && node[to] && p[9] == unix.IPPROTO_UDP && binary.BigEndian.Uint16(p[22:]) == port:
			return []string{"sealed"}
		}
		return nil
	})
}

// TestEncryptAll takes published ports of a swarm that encrypts all through load while keys are
// changed and daemons end: clients' addresses arrive, nothing is lost, and nothing goes from
// node to node in clear.
func TestEncryptAll(t *testing.T) {
	s := newSwarm(t, 1, 2, "--encrypt-all")
	m, w := s.byRole("manager")[0], s.byRole("worker")
	s.loadImages(t)
	o := s.newOutside(t)
	how, port := s.optionsOf(t, m, "ingress")
	if how == "" {
		t.Fatal("the ingress network is not encrypted")
	}
	t.Logf("the ingress network is encrypted by %s on port %d", how, port)
	s.docker(t, m, "service", "create", "-d", "--name", "who", "--constraint", "node.hostname=="+w[0], "--publish", "8081:80/tcp", "--publish", "8081:80/udp",
		testimage.V1, "whois", ":80")
	s.docker(t, m, "service", "create", "-d", "--name", "api", "--constraint", "node.hostname=="+w[0], "--publish", "8080:80", testimage.V1, "serve", ":80")
	s.wantRunning(t, m, "who", 1, 60*time.Second)
	s.wantRunning(t, m, "api", 1, 60*time.Second)
	o.wantSeen(t, s, 8081)

	const secret = "CANARY-at-a-published-port"
	c := o.wire(t, s, secret, port)
	results := make(chan string, len(s.nodes))
	for _, n := range s.nodes {
		go func() {
			out, err := o.run(t, "load", "http://"+n.Addr+":8080/"+secret, "8s", "60")
			results <- n.Name + ": " + out + errText(err)
		}()
	}
	for range 5 {
		run(t, skepBinary(t), "-H", "unix://"+s.node(t, m).Socket, "net", "rotate-keys")
	}
	for _, n := range w { // one that leads to the task, and the task's own
		s.dev(t, "kill", n)
		s.dev(t, "start", n)
	}
	s.refresh(t)
	for range s.nodes {
		out := <-results
		t.Log(strings.TrimSpace(out))
		if !strings.Contains(out, " 0 failed") {
			t.Errorf("load while keys were changed and daemons killed: %s", out)
		}
	}
	eventually(t, 20*time.Second, "the capture sees clients and what is encrypted", func() string {
		client, all := c.count("client")
		if sealed, _ := c.count("sealed"); client == 0 || sealed == 0 {
			return fmt.Sprintf("%d and %d of %d", client, sealed, all)
		}
		return ""
	})
	if bare, all := c.count("clear"); bare != 0 {
		t.Errorf("%d of %d packets go from node to node in clear", bare, all)
	}
	o.wantSeen(t, s, 8081)
	if out, err := try(t, time.Minute, skepBinary(t), "-H", "unix://"+s.node(t, m).Socket, "net", "check"); err != nil {
		t.Errorf("the check of the networks: %v\n%s", err, out)
	}
}

// testSealedIngress makes the ingress network of a running swarm anew, encrypted, and clear again.
func testSealedIngress(t *testing.T, s *swarm, m string) {
	o := s.newOutside(t)
	for i, create := range [][]string{{"--opt", "encrypted"}, nil} {
		s.pipe(t, m, "y\n", "network", "rm", "ingress")
		s.docker(t, m, append(append([]string{"network", "create", "-d", "overlay", "--ingress"}, create...), "ingress")...)
		name := fmt.Sprint("edge", i)
		s.docker(t, m, "service", "create", "-d", "--name", name, "--constraint", "node.hostname=="+s.byRole("worker")[0], "--publish", "8085:80/tcp",
			"--publish", "8085:80/udp", testimage.V1, "whois", ":80")
		s.wantRunning(t, m, name, 1, 30*time.Second)
		if how, _ := s.optionsOf(t, m, "ingress"); (how != "") != (create != nil) {
			t.Errorf("created with %q the ingress network is encrypted by %q", create, how)
		}
		o.wantSeen(t, s, 8085)
		s.docker(t, m, "service", "rm", name)
		eventually(t, 30*time.Second, "the tasks are gone", func() string {
			left, err := s.tasks(t, m, name)
			if err == nil && len(left) > 0 {
				return fmt.Sprint(left)
			}
			return ""
		})
	}
}
