package e2e

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/e2e/testimage"
)

// TestEncryption takes an encrypted network of three nodes through what it promises: names,
// addresses and balancing as on any other, and no clear packet out or in, whatever ends.
func TestEncryption(t *testing.T) {
	s := newSwarm(t, 1, 2)
	m := s.byRole("manager")[0]
	s.loadImages(t)
	s.docker(t, m, "network", "create", "-d", "overlay", "--attachable", "--opt", "encrypted", "sealed")
	s.docker(t, m, "service", "create", "-d", "--name", "api", "--mode", "global", "--network", "sealed", testimage.V1, "serve", ":80")
	s.docker(t, m, "service", "create", "-d", "--name", "probe", "--mode", "global", "--network", "sealed", testimage.V1)
	s.wantRunning(t, m, "api", 3, 60*time.Second)
	s.wantRunning(t, m, "probe", 3, 60*time.Second)
	steps := []struct {
		name string
		run  func(*testing.T, *swarm, string)
	}{
		{"Reach", testSealedReach},
		{"NoClearPacketOut", testNoClearPacketOut},
		{"NoForgedPacketIn", testNoForgedPacketIn},
		{"Rotation", testRotation},
		{"DaemonKilled", testSealedDaemonKilled},
		{"DeviceKilled", testDeviceKilled},
		{"Refusal", testSealedRefusal},
		{"Ingress", testSealedIngress},
		{"NodeRemoved", testSealedNodeRemoved},
		{"NothingLeft", testSealedNothingLeft},
	}
	for _, step := range steps {
		if !t.Run(step.name, func(t *testing.T) { step.run(t, s, m) }) {
			t.Logf("step %s failed; going on, later steps may fail because of it", step.name)
		}
	}
}

// wantAllReached waits until a node's probe gets answers from all n tasks of api by name.
func (s *swarm) wantAllReached(t *testing.T, node string, n int) {
	t.Helper()
	eventually(t, 30*time.Second, fmt.Sprintf("%s reaches %d tasks", node, n), func() string {
		out, err := s.exec(t, node, "probe", "/bin/testapp", "resolve", "tasks.api")
		addresses := strings.Fields(out)
		if err != nil || len(addresses) != n {
			return fmt.Sprintf("tasks.api is %v: %v", addresses, err)
		}
		for _, a := range addresses {
			if out, err := s.exec(t, node, "probe", "/bin/testapp", "get", "http://"+a+"/"); err != nil {
				return fmt.Sprintf("%s: %v %s", a, err, out)
			}
		}
		return ""
	})
}

func testSealedReach(t *testing.T, s *swarm, m string) {
	if got := s.docker(t, m, "network", "inspect", "--format", `{{index .Options "skep.encryption"}}`, "sealed"); got != "wireguard" && got != "esp" {
		t.Errorf("the network is encrypted by %q", got)
	}
	for _, n := range s.nodes {
		s.wantAllReached(t, n.Name, 3)
		seen := map[string]bool{}
		for range 12 {
			out, err := s.exec(t, n.Name, "probe", "/bin/testapp", "get", "http://api/")
			if err != nil {
				t.Fatalf("%s does not reach the service address: %v", n.Name, err)
			}
			seen[strings.Fields(out + " ?")[0]] = true
		}
		if len(seen) < 2 {
			t.Errorf("twelve requests from %s all went to %v", n.Name, seen)
		}
		if out, err := s.exec(t, n.Name, "probe", "busybox", "ping", "-c", "1", "-W", "3", s.address(t, n.Name, "api")); err != nil {
			t.Errorf("%s: the service address does not answer ping: %v %s", n.Name, err, out)
		}
	}
}

// address resolves a name in the probe of a node.
func (s *swarm) address(t *testing.T, node, name string) string {
	t.Helper()
	out, err := s.exec(t, node, "probe", "/bin/testapp", "resolve", name)
	if err != nil {
		t.Fatalf("%s: resolve %s: %v", node, name, err)
	}
	return strings.Fields(out)[0]
}

// devices returns the processes that are WireGuard devices of a node.
func devices(t *testing.T, node devNode) []string {
	t.Helper()
	var pids []string
	own, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", node.PID))
	if err != nil {
		t.Fatal(err)
	}
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range all {
		data, err := os.ReadFile(path)
		args := strings.Split(string(data), "\x00")
		if err != nil || len(args) < 4 || args[1] != "wireguard" {
			continue
		}
		if its, err := os.Readlink(filepath.Join(filepath.Dir(path), "ns/net")); err == nil && its == own {
			pids = append(pids, filepath.Base(filepath.Dir(path)))
		}
	}
	slices.Sort(pids)
	return pids
}

// testSealedDaemonKilled kills a daemon under load: its containers' traffic goes on, and the
// daemon finds the device again when it is back.
func testSealedDaemonKilled(t *testing.T, s *swarm, _ string) {
	w, other := s.byRole("worker")[0], s.byRole("worker")[1]
	before := devices(t, s.node(t, w))
	far := s.own(t, w, "api")
	done := make(chan string, 1)
	go func() {
		out, err := s.exec(t, other, "probe", "/bin/testapp", "load", "http://"+far+"/", "6s", "100")
		done <- fmt.Sprint(out, " ", errText(err))
	}()
	s.dev(t, "kill", w)
	s.dev(t, "start", w)
	s.refresh(t)
	if out := <-done; !strings.Contains(out, " 0 failed") {
		t.Errorf("load while the daemon was killed: %s", out)
	}
	s.wantAllReached(t, other, 3)
	if after := devices(t, s.node(t, w)); len(before) != 1 || !slices.Equal(before, after) {
		t.Errorf("devices of %s: %v, before the daemon was killed %v", w, after, before)
	}
}

// own returns the address in the network sealed of a service's task on a node.
func (s *swarm) own(t *testing.T, node, service string) string {
	t.Helper()
	id := s.docker(t, node, "ps", "-q", "--filter", "name="+service+".")
	return s.docker(t, node, "inspect", "--format", "{{.NetworkSettings.Networks.sealed.IPAddress}}", id)
}

func testSealedNothingLeft(t *testing.T, s *swarm, m string) {
	s.docker(t, m, "service", "rm", "api", "probe")
	for _, n := range s.nodes[:2] { // the third was removed
		eventually(t, 30*time.Second, "the devices of "+n.Name+" end", func() string { return strings.Join(devices(t, n), " ") })
	}
	s.wantGone(t, m, "sealed", 30*time.Second)
}

// testNoClearPacketOut captures on every link of every node while a text goes between all
// pairs of containers.
func testNoClearPacketOut(t *testing.T, s *swarm, m string) {
	const secret, control = "CANARY-of-the-sealed-network", "CANARY-that-must-be-seen"
	captures := map[string]*capture{}
	for _, n := range s.nodes {
		captures[n.Name] = newCapture(t, n.PID, secret, control)
	}
	for _, n := range s.nodes {
		for _, to := range s.nodes {
			if out, err := s.exec(t, n.Name, "probe", "/bin/testapp", "get", "http://"+s.own(t, to.Name, "api")+"/"+secret); err != nil {
				t.Fatalf("%s to %s: %v %s", n.Name, to.Name, err, out)
			}
		}
	}
	// What shows that the capture works, and that by now it has seen what went before.
	for i, n := range s.nodes {
		to := s.nodes[(i+1)%len(s.nodes)]
		if err := sendUDP(n.PID, netip.MustParseAddr(to.Addr).As4(), 9, []byte(control)); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range captures {
		eventually(t, 20*time.Second, "the capture on "+name+" sees both what the node sent and what it got", func() string {
			if with, all := c.count(control); with < 2 {
				return fmt.Sprintf("%d of %d", with, all)
			}
			return ""
		})
		if with, all := c.count(secret); with != 0 {
			t.Errorf("%s: %d of %d packets are clear", name, with, all)
		}
	}
}

// vxlanOf returns a VXLAN packet with a UDP datagram inside.
func vxlanOf(vni uint32, from, to [4]byte, payload string) []byte {
	udp := binary.BigEndian.AppendUint16(nil, 999)
	udp = binary.BigEndian.AppendUint16(udp, 999)
	udp = binary.BigEndian.AppendUint16(udp, uint16(8+len(payload)))
	udp = append(append(udp, 0, 0), payload...)
	ip := []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0}
	ip = append(append(ip, from[:]...), to[:]...)
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+len(udp)))
	var sum uint32
	for i := 0; i < len(ip); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum))
	frame := append([]byte{0x02, 0x42}, to[:]...)
	frame = append(append(frame, 0x02, 0x42), from[:]...)
	frame = append(append(append(frame, 8, 0), ip...), udp...)
	return append([]byte{8, 0, 0, 0, byte(vni >> 16), byte(vni >> 8), byte(vni), 0}, frame...)
}

// testNoForgedPacketIn sends a node packets as if they were of the network, from another
// member and from itself, by a user without rights: none reaches the container.
func testNoForgedPacketIn(t *testing.T, s *swarm, m string) {
	const forged, control = "FORGED-into-the-sealed-network", "REAL-in-the-sealed-network"
	victim, other := s.node(t, s.byRole("worker")[0]), s.node(t, s.byRole("worker")[1])
	id := s.docker(t, victim.Name, "ps", "-q", "--filter", "name=api.")
	var pid int
	if _, err := fmt.Sscan(s.docker(t, victim.Name, "inspect", "--format", "{{.State.Pid}}", id), &pid); err != nil {
		t.Fatal(err)
	}
	c := newCapture(t, pid, forged, control)
	var vni, port uint32
	options := s.docker(t, m, "network", "inspect", "--format",
		`{{index .Options "com.docker.network.driver.overlay.vxlanid_list"}} {{index .Options "skep.encryption.port"}}`, "sealed")
	if _, err := fmt.Sscan(options, &vni, &port); err != nil {
		t.Fatalf("options %q: %v", options, err)
	}
	to := netip.MustParseAddr(s.own(t, victim.Name, "api")).As4()
	from := netip.MustParseAddr(s.own(t, other.Name, "api")).As4()
	inner := vxlanOf(vni, from, to, forged)
	for _, sender := range []devNode{other, victim} {
		for _, at := range []int{4789, 21819, int(port)} {
			for _, data := range [][]byte{inner, inner[8+14:], append([]byte{4, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, inner[8+14:]...)} {
				if err := sendUDP(sender.PID, netip.MustParseAddr(victim.Addr).As4(), at, data); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
					t.Fatal(err)
				}
			}
		}
	}
	if out, err := s.exec(t, other.Name, "probe", "/bin/testapp", "get", "http://"+s.own(t, victim.Name, "api")+"/"+control); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	eventually(t, 20*time.Second, "the capture sees what is real", func() string {
		if with, all := c.count(control); with == 0 {
			return fmt.Sprintf("%d of %d", with, all)
		}
		return ""
	})
	if with, _ := c.count(forged); with != 0 {
		t.Errorf("%d forged packets reached the container", with)
	}
}

// preshared returns the preshared keys of a node's device, by peer.
func preshared(t *testing.T, n devNode) map[string]string {
	t.Helper()
	socket := ""
	for _, pid := range devices(t, n) {
		data, err := os.ReadFile("/proc/" + pid + "/cmdline")
		if err != nil {
			t.Fatal(err)
		}
		socket = strings.Split(string(data), "\x00")[3]
	}
	c, err := (&net.Dialer{}).DialContext(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "get=1\n\n"); err != nil {
		t.Fatal(err)
	}
	out, peer := map[string]string{}, ""
	for lines := bufio.NewScanner(c); lines.Scan(); {
		switch k, v, _ := strings.Cut(lines.Text(), "="); k {
		case "public_key":
			peer = v
		case "preshared_key":
			out[peer] = v
		case "errno":
			return out
		}
	}
	t.Fatalf("the device of %s did not answer", n.Name)
	return nil
}

// wantOtherKeys waits until all keys of a node's device are others, and returns them.
func wantOtherKeys(t *testing.T, n devNode, before map[string]string, peers int) map[string]string {
	t.Helper()
	var now map[string]string
	eventually(t, 20*time.Second, fmt.Sprintf("%s has %d peers with new keys", n.Name, peers), func() string {
		now = preshared(t, n)
		for peer, key := range now {
			if before[peer] == key {
				return "one is as before"
			}
		}
		if len(now) != peers {
			return fmt.Sprint(len(now), " peers")
		}
		return ""
	})
	return now
}

// testRotation changes the keys ten times under traffic and wants no packet lost.
func testRotation(t *testing.T, s *swarm, m string) {
	w := s.byRole("worker")
	to := s.own(t, w[1], "api")
	result := make(chan string, 1)
	go func() {
		out, err := s.exec(t, w[0], "probe", "busybox", "ping", "-q", "-i", "0.01", "-c", "1500", "-W", "5", to)
		result <- out + errText(err)
	}()
	keys := preshared(t, s.node(t, w[0]))
	for range 10 {
		run(t, skepBinary(t), "-H", "unix://"+s.node(t, m).Socket, "net", "rotate-keys")
		keys = wantOtherKeys(t, s.node(t, w[0]), keys, 2)
	}
	out := <-result
	t.Log(lastLine(out))
	if !strings.Contains(out, "1500 packets transmitted, 1500 packets received, 0% packet loss") {
		t.Errorf("ten rotations under 1500 packets: %s", out)
	}
	eventually(t, 20*time.Second, "two nodes share one key", func() string { // the last rotation may be under way
		a, b := preshared(t, s.node(t, w[0])), preshared(t, s.node(t, w[1]))
		common := 0
		for _, x := range a {
			for _, y := range b {
				if x == y {
					common++
				}
			}
		}
		if common != 1 {
			return fmt.Sprintf("%v and %v share %d", a, b, common)
		}
		return ""
	})
	s.wantAllReached(t, w[0], 3)
}

// testDeviceKilled kills a device: it comes back with all it had.
func testDeviceKilled(t *testing.T, s *swarm, _ string) {
	w := s.node(t, s.byRole("worker")[0])
	before := devices(t, w)
	var pid int
	if _, err := fmt.Sscan(strings.Join(before, " "), &pid); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, "another device runs", func() string {
		if now := devices(t, w); len(now) != 1 || slices.Equal(now, before) {
			return fmt.Sprint(now)
		}
		return ""
	})
	s.wantAllReached(t, w.Name, 3)
	s.wantAllReached(t, s.byRole("worker")[1], 3)
}

// testSealedRefusal asks for what no node here can do.
func testSealedRefusal(t *testing.T, s *swarm, m string) {
	s.docker(t, m, "network", "create", "-d", "overlay", "--opt", "encrypted", "--opt", "skep.encryption=esp", "kernel")
	defer s.docker(t, m, "network", "rm", "kernel")
	labels := s.docker(t, m, "node", "inspect", "self", "--format", `{{index .Description.Engine.Labels "skep.encryption"}}`)
	if strings.Contains(","+labels+",", ",esp,") {
		return // it can: nothing is refused
	}
	s.docker(t, m, "service", "create", "-d", "--name", "refused", "--network", "kernel", testimage.V1)
	defer s.docker(t, m, "service", "rm", "refused")
	eventually(t, 20*time.Second, "the task says why", func() string {
		all, err := s.tasks(t, m, "refused")
		if err != nil || len(all) != 1 || !strings.Contains(all[0].Error, "cannot encrypt the network as it is (esp) on 3 nodes") {
			return fmt.Sprint(all, err)
		}
		return ""
	})
	if out := run(t, skepBinary(t), "-H", "unix://"+s.node(t, m).Socket, "explain", "refused"); !strings.Contains(out, "Encryption refused 3 nodes") {
		t.Errorf("skep explain says\n%s", out)
	}
}

// testSealedNodeRemoved removes a node: the others' keys change, and they know it no more.
func testSealedNodeRemoved(t *testing.T, s *swarm, m string) {
	w := s.byRole("worker")
	before := preshared(t, s.node(t, m))
	s.docker(t, m, "node", "rm", "--force", w[1])
	wantOtherKeys(t, s.node(t, m), before, 1)
	s.wantAllReached(t, m, 2)
	s.wantAllReached(t, w[0], 2)
}
