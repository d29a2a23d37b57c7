package e2e

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/e2e/testimage"
)

// TestESP takes a swarm of daemons on a kernel that has ESP through what TestEncryption does with
// WireGuard: the leader chooses ESP, requests pass in both directions, nothing passes in clear,
// and nothing is lost while keys change, a daemon is away and associations are lost.
func TestESP(t *testing.T) {
	if err := kernelHasESP(); err != nil {
		t.Skipf("this kernel has no ESP, where TestGuestKernel's has it: %v", err)
	}
	s := newSwarm(t, 1, 2)
	m := s.byRole("manager")[0]
	s.loadImages(t)
	s.docker(t, m, "network", "create", "-d", "overlay", "--opt", "encrypted", "sealed")
	if how, port := s.optionsOf(t, m, "sealed"); how != model.ESP || port != model.ESPPort {
		t.Fatalf("where all nodes can do ESP, the network is encrypted by %q on port %d", how, port)
	}
	s.docker(t, m, "service", "create", "-d", "--name", "api", "--mode", "global", "--network", "sealed", "--env", "GREETING={{.Node.Hostname}}",
		testimage.V1, "serve", ":80")
	s.wantRunning(t, m, "api", 3, 2*time.Minute)
	for _, step := range []struct {
		name string
		run  func(*testing.T, *swarm, string)
	}{
		{"Reach", testESPReach},
		{"KeysChange", testESPKeysChange},
		{"AssociationsLost", testESPLost},
		{"PowerLost", testESPPowerLost},
		{"NothingLeft", testESPNothingLeft},
	} {
		begin := time.Now()
		if !t.Run(step.name, func(t *testing.T) { step.run(t, s, m) }) {
			t.Logf("step %s failed; going on, later steps may fail because of it", step.name)
		}
		t.Logf("%s took %s", step.name, time.Since(begin).Round(time.Second))
	}
}

// kernelHasESP makes an association in a namespace that ends with its thread.
func kernelHasESP() error {
	return inside("/proc/self/ns/net", func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		a := []byte{192, 0, 2, 1}
		return netlink.XfrmStateAdd(&netlink.XfrmState{
			Src: a, Dst: a, Proto: netlink.XFRM_PROTO_ESP, Mode: netlink.XFRM_MODE_TRANSPORT, Spi: 0x1000,
			Aead: &netlink.XfrmStateAlgo{Name: "rfc4106(gcm(aes))", Key: make([]byte, model.ESPKeySize), ICVLen: 64},
		})
	})
}

// associations are what the kernel of a node has: the indexes that it receives by, and by other
// node the one that it sends by.
type associations struct {
	receives []int
	sends    map[string]int
	policies int
}

func (s *swarm) associations(t *testing.T, node string) associations {
	t.Helper()
	n, out := s.node(t, node), associations{sends: map[string]int{}}
	err := inside(netnsOf(n.PID), func() error {
		states, err := netlink.XfrmStateList(netlink.FAMILY_V4)
		if err != nil {
			return err
		}
		for _, x := range states {
			if x.Dst.String() == n.Addr {
				out.receives = append(out.receives, x.Spi)
			} else {
				out.sends[x.Dst.String()] = x.Spi
			}
		}
		policies, err := netlink.XfrmPolicyList(netlink.FAMILY_V4)
		out.policies = len(policies)
		return err
	})
	if err != nil {
		t.Fatalf("%s: %v", node, err)
	}
	return out
}

// wantAssociations waits until all nodes have exactly what they need of each other: three
// generations to receive by, one to send by, a policy for each node and the two that guard. None
// sends by what was there before. It returns all indexes.
func (s *swarm) wantAssociations(t *testing.T, before []int) []int {
	t.Helper()
	var all []int
	eventually(t, 90*time.Second, "all nodes have the associations that they need", func() string {
		all = nil
		peers := len(s.nodes) - 1
		for _, n := range s.nodes {
			a := s.associations(t, n.Name)
			if len(a.receives) != 3*peers || len(a.sends) != peers || a.policies != peers+2 {
				return fmt.Sprintf("%s has %+v", n.Name, a)
			}
			for to, spi := range a.sends {
				if slices.Contains(before, spi) {
					return fmt.Sprintf("%s still sends to %s by %#x", n.Name, to, spi)
				}
				all = append(all, spi)
			}
			all = append(all, a.receives...)
		}
		return ""
	})
	return all
}

// traffic is a command that runs in a container until it is stopped.
type traffic struct {
	command string
	result  chan string
}

// traffic starts a command in the task of api on a node. No other process has the same arguments.
func (s *swarm) traffic(t *testing.T, node string, command ...string) *traffic {
	t.Helper()
	tr := &traffic{command: strings.Join(command, "\x00"), result: make(chan string, 1)}
	id := s.docker(t, node, "ps", "-q", "--filter", "name=api.")
	go func() {
		out, err := s.tryDocker(t, 10*time.Minute, node, append([]string{"exec", id}, command...)...)
		tr.result <- out + errText(err)
	}()
	eventually(t, 30*time.Second, command[0]+" runs", func() string {
		if tr.pid() == 0 {
			return "it does not"
		}
		return ""
	})
	return tr
}

// pid returns the process of the command, which is none of the docker client's.
func (tr *traffic) pid() (pid int) {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline") // the pattern is good
	for _, path := range all {
		data, err := os.ReadFile(path)
		if err == nil && string(data) == tr.command+"\x00" {
			_, _ = fmt.Sscan(filepath.Base(filepath.Dir(path)), &pid)
		}
	}
	return pid
}

// stop ends the command as a person would and returns what it said.
func (tr *traffic) stop(t *testing.T) string {
	t.Helper()
	if pid := tr.pid(); pid != 0 {
		if err := unix.Kill(pid, unix.SIGINT); err != nil {
			t.Fatal(err)
		}
	}
	out := <-tr.result
	t.Log(strings.ReplaceAll(strings.TrimSpace(out), "\n", " | "))
	return out
}

// wantEachReached waits until each node has had answers from all tasks by the service's address.
func (s *swarm) wantEachReached(t *testing.T) {
	t.Helper()
	for _, n := range s.nodes {
		seen := map[string]bool{}
		eventually(t, time.Minute, n.Name+" reaches all tasks", func() string {
			out, err := s.exec(t, n.Name, "api", "sh", "-c", "for i in 1 2 3 4 5 6 7 8; do /bin/testapp get http://api/ || exit; done")
			if err != nil {
				clear(seen)
				return fmt.Sprint(out, err)
			}
			for line := range strings.Lines(out) {
				seen[strings.Fields(line + " ? ?")[1]] = true
			}
			for _, other := range s.nodes {
				if !seen[other.Name] {
					return fmt.Sprint("answers came from ", seen)
				}
			}
			return ""
		})
	}
}

func (s *swarm) wantNetCheckClean(t *testing.T, m string) {
	t.Helper()
	if out, err := try(t, time.Minute, skepBinary(t), "-H", "unix://"+s.node(t, m).Socket, "net", "check"); err != nil {
		t.Errorf("the check of the networks: %v\n%s", err, out)
	}
}

func testESPReach(t *testing.T, s *swarm, m string) {
	for _, n := range s.nodes {
		labels := s.docker(t, m, "node", "inspect", n.Name, "--format", `{{index .Description.Engine.Labels "skep.encryption"}}`)
		if !strings.Contains(labels, model.ESP) || !strings.Contains(labels, model.WireGuard) {
			t.Errorf("%s can encrypt by %q: nothing was there to choose from", n.Name, labels)
		}
	}
	s.wantEachReached(t)
	s.wantAssociations(t, nil)
	s.wantNetCheckClean(t, m)
}

// espKinds says of a packet whether a text is in it (clear), and whether it is VXLAN on the port
// of ESP that no ESP is around (bare) or ESP (sealed).
func espKinds(packet []byte, text string) (kinds []string) {
	if bytes.Contains(packet, []byte(text)) {
		kinds = append(kinds, "clear")
	}
	if len(packet) < 14+28 || binary.BigEndian.Uint16(packet[12:]) != unix.ETH_P_IP {
		return kinds
	}
	switch p := packet[14:]; {
	case p[9] == unix.IPPROTO_UDP && binary.BigEndian.Uint16(p[22:]) == model.ESPPort:
		kinds = append(kinds, "bare")
	case p[9] == unix.IPPROTO_ESP:
		kinds = append(kinds, "sealed")
	}
	return kinds
}

// testESPKeysChange changes keys under traffic, also while a daemon is away that then has old
// ones: nothing is lost, and nothing leaves a node in clear.
func testESPKeysChange(t *testing.T, s *swarm, m string) {
	const secret = "CANARY-of-the-sealed-network"
	w := s.byRole("worker")
	captures := map[string]*capture{}
	for _, n := range s.nodes {
		captures[n.Name] = captureIn(t, netnsOf(n.PID), func(packet []byte) []string { return espKinds(packet, secret) })
	}
	load := s.traffic(t, m, "/bin/testapp", "load", "http://api/"+secret, "10m", "5")
	pings := s.traffic(t, w[0], "busybox", "ping", "-q", "-i", "0.2", "-W", "10", "-p", "5a", s.own(t, w[1], "api"))
	rotate := func() {
		run(t, skepBinary(t), "-H", "unix://"+s.node(t, m).Socket, "net", "rotate-keys")
	}
	before := s.wantAssociations(t, nil)
	for range 2 {
		rotate()
		before = s.wantAssociations(t, before)
	}

	epoch := s.epoch(t, m, w[1])
	old := s.associations(t, m).receives
	s.dev(t, "kill", w[1])
	rotate()
	eventually(t, 30*time.Second, "the others have new keys", func() string {
		if slices.Equal(s.associations(t, m).receives, old) {
			return "the same as before"
		}
		return ""
	})
	logged := len(s.daemonLog(t, w[1]))
	s.dev(t, "start", w[1])
	s.refresh(t)
	s.wantAssociations(t, before)
	if got := s.epoch(t, m, w[1]); got != epoch {
		t.Errorf("a daemon that was away took another epoch, %q after %q", got, epoch)
	}
	if later := s.daemonLog(t, w[1])[logged:]; strings.Contains(later, "differed from the plan") || strings.Contains(later, "lost ESP associations") {
		t.Errorf("a daemon that was away mended what was right:\n%s", later)
	}

	if out := load.stop(t); !strings.Contains(out, " 0 failed") || strings.HasPrefix(out, "0 ") {
		t.Errorf("load while keys changed: %s", out)
	}
	if out := pings.stop(t); !strings.Contains(out, " 0% packet loss") {
		t.Errorf("packets while keys changed: %s", out)
	}
	for name, c := range captures {
		sealed, all := c.count("sealed")
		seen, _ := c.count("clear")
		bare, _ := c.count("bare")
		t.Logf("%s: %d of %d packets are ESP", name, sealed, all)
		if sealed == 0 || seen+bare != 0 {
			t.Errorf("%s: of %d packets %d are ESP, %d hold what containers sent, %d are VXLAN", name, all, sealed, seen, bare)
		}
	}
	s.wantEachReached(t)
	s.wantNetCheckClean(t, m)
}

// epoch returns the number that the keys of a node follow from.
func (s *swarm) epoch(t *testing.T, m, node string) string {
	t.Helper()
	return s.docker(t, m, "node", "inspect", node, "--format", `{{index .Description.Engine.Labels "`+model.ESPEpochLabel+`"}}`)
}

// testESPLost takes a node its associations: it asks for other keys, and all is as before.
func testESPLost(t *testing.T, s *swarm, m string) {
	w := s.byRole("worker")[0]
	epoch := s.epoch(t, m, w)
	err := inside(netnsOf(s.node(t, w).PID), func() error { return netlink.XfrmStateFlush(netlink.XFRM_PROTO_ESP) })
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "the node takes another epoch", func() string {
		if s.epoch(t, m, w) == epoch {
			return "it has not"
		}
		return ""
	})
	s.wantAssociations(t, nil)
	s.wantEachReached(t)
	s.wantNetCheckClean(t, m)
}

// testESPPowerLost restarts a node from nothing but its disk.
func testESPPowerLost(t *testing.T, s *swarm, m string) {
	w := s.byRole("worker")[1]
	epoch := s.epoch(t, m, w)
	s.dev(t, "kill", w, "--containers")
	s.dev(t, "start", w)
	s.refresh(t)
	eventually(t, 2*time.Minute, "its task runs again, with other keys", func() string {
		up, err := s.running(t, m, "api")
		if err != nil || len(up) != 3 || s.epoch(t, m, w) == epoch {
			return fmt.Sprint(up, err)
		}
		return errText(s.hasContainer(t, w, "api"))
	})
	s.wantAssociations(t, nil)
	s.wantEachReached(t)
	s.wantNetCheckClean(t, m)
}

// hasContainer returns an error unless one container of a service runs on a node.
func (s *swarm) hasContainer(t *testing.T, node, service string) error {
	t.Helper()
	id, err := s.tryDocker(t, 20*time.Second, node, "ps", "-q", "--filter", "name="+service+".")
	if err == nil && len(strings.Fields(id)) != 1 {
		err = fmt.Errorf("containers of %s on %s: %q", service, node, id)
	}
	return err
}

func testESPNothingLeft(t *testing.T, s *swarm, m string) {
	s.docker(t, m, "service", "rm", "api")
	for _, n := range s.nodes {
		eventually(t, time.Minute, "nothing is left at "+n.Name, func() string {
			if a := s.associations(t, n.Name); len(a.receives)+len(a.sends)+a.policies > 0 {
				return fmt.Sprintf("%+v", a)
			}
			return ""
		})
	}
	s.wantGone(t, m, "sealed", time.Minute)
}
