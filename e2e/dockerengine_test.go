package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/platform/process"
)

// dockerEngine is Debian's Docker Engine as one more machine of a dev swarm: in a network
// namespace on the swarm's bridge, and in mount, host name and process namespaces of its
// own, which end with it whatever it left there.
type dockerEngine struct {
	s    *swarm
	node devNode
	cmd  *exec.Cmd
}

func (e *dockerEngine) netns() string  { return "skep-" + e.s.name + "-" + e.node.Name }
func (e *dockerEngine) cgroup() string { return "/skep-dev/" + e.s.name + "/" + e.node.Name }

// addDocker starts a Docker Engine in no swarm, as node name of s, with the test images.
func (s *swarm) addDocker(t *testing.T, name string) *dockerEngine {
	t.Helper()
	root := engineFiles(t)
	dir := filepath.Join(filepath.Dir(s.nodes[0].Dir), name)
	first := netip.MustParseAddr(s.nodes[0].Addr).As4()
	first[3] = byte(200 + len(s.engines))
	e := &dockerEngine{s: s, node: devNode{
		Name: name, Role: "docker", Socket: filepath.Join(dir, "s.sock"), Addr: netip.AddrFrom4(first).String(), Dir: dir,
	}}
	t.Cleanup(func() { e.remove(t) })
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	bridge, port := "skep-"+s.name, "to-"+name
	for _, args := range [][]string{
		{"netns", "add", e.netns()},
		{"link", "add", "name", port, "netns", bridge, "type", "veth", "peer", "name", "eth0", "netns", e.netns()},
		{"-n", bridge, "link", "set", port, "master", "br0", "up"},
		{"-n", e.netns(), "link", "set", "lo", "up"},
		{"-n", e.netns(), "addr", "add", e.node.Addr + "/24", "dev", "eth0"},
		{"-n", e.netns(), "link", "set", "eth0", "up"},
	} {
		run(t, "ip", args...)
	}
	s.engines = append(s.engines, e)
	s.nodes = append(s.nodes, e.node)
	e.start(t, root)
	return e
}

// engineFiles returns where Docker Engine's files are; the archive is fetched once.
func engineFiles(t *testing.T) string {
	t.Helper()
	skepBinary(t) // skips without what is needed
	root, err := filepath.Abs("../bin/docker-engine")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := exec.LookPath("iptables"); err != nil {
		if _, err := os.Stat("/usr/sbin/iptables"); err != nil {
			t.Skip("Docker Engine needs iptables: run make interop")
		}
	}
	run(t, "../tools/docker-engine.sh", root)
	return root
}

// start runs the daemon and waits until it answers.
func (e *dockerEngine) start(t *testing.T, root string) {
	t.Helper()
	log, err := os.OpenFile(filepath.Join(e.node.Dir, "daemon.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	in := func(name string) string { return filepath.Join(e.node.Dir, name) }
	daemon := []string{
		filepath.Join(root, "usr/sbin/dockerd"), "--data-root", in("data"), "--exec-root", in("run"), "--pidfile", in("pid"),
		"-H", "unix://" + e.node.Socket, "--cgroup-parent", e.cgroup(), "--exec-opt", "native.cgroupdriver=cgroupfs",
	}
	for _, stale := range []string{"pid", "run/containerd/containerd.pid"} {
		_ = os.Remove(in(stale)) // another process has the number by now
	}
	e.cmd = exec.Command("nsenter", append([]string{
		"--net=/run/netns/" + e.netns(), "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc",
		"sh", "-c", `hostname "$0" && exec "$@"`, e.node.Name,
	}, daemon...)...)
	e.cmd.Env = append(os.Environ(), "PATH="+filepath.Join(root, "usr/bin")+":"+filepath.Join(root, "usr/sbin")+":"+os.Getenv("PATH")+":/usr/sbin:/sbin")
	e.cmd.Stdout, e.cmd.Stderr = log, log
	if err := e.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "Docker Engine answers", func() string {
		if err := process.Ping(t.Context(), e.node.Socket); err != nil {
			return err.Error() + "\n" + process.Tail(log.Name(), 2000)
		}
		return ""
	})
}

// kill ends the daemon and all its containers at once, as the loss of power does.
func (e *dockerEngine) kill(ctx context.Context) error {
	if e.cmd != nil && e.cmd.Process != nil {
		_ = e.cmd.Process.Signal(syscall.SIGKILL) // unshare takes the namespace along
		_ = e.cmd.Wait()
		e.cmd = nil
	}
	var st unix.Stat_t
	if err := unix.Stat("/run/netns/"+e.netns(), &st); errors.Is(err, unix.ENOENT) {
		return nil
	} else if err != nil {
		return err
	}
	return process.KillAll(ctx, func(p process.Entry) bool { return p.NetNS == st.Ino })
}

// remove leaves nothing of the engine.
func (e *dockerEngine) remove(t *testing.T) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	if t.Failed() {
		t.Logf("--- %s\n%s", e.node.Name, process.Tail(filepath.Join(e.node.Dir, "daemon.log"), 6000))
	}
	if err := e.kill(ctx); err != nil {
		t.Errorf("end %s: %v", e.node.Name, err)
	}
	if out, err := exec.CommandContext(ctx, "ip", "netns", "del", e.netns()).CombinedOutput(); err != nil {
		t.Errorf("remove namespace of %s: %v: %s", e.node.Name, err, out)
	}
	if err := process.RemoveCgroups(e.cgroup()); err != nil {
		t.Errorf("remove cgroups of %s: %v", e.node.Name, err)
	}
	if err := os.RemoveAll(e.node.Dir); err != nil {
		t.Errorf("remove files of %s: %v", e.node.Name, err)
	}
}

// join makes node a member of the swarm that manager manages and waits until it is ready.
func (s *swarm) join(t *testing.T, node, manager, role string) {
	t.Helper()
	token := s.docker(t, manager, "swarm", "join-token", "-q", role)
	s.docker(t, node, "swarm", "join", "--token", token, s.node(t, manager).Addr+":2377")
	s.wantNode(t, manager, node, "Ready", "Active")
}

// wantNode waits until a node has a status and an availability.
func (s *swarm) wantNode(t *testing.T, manager, node, status, availability string) {
	t.Helper()
	want := fmt.Sprintf("%s %s %s", node, status, availability)
	eventually(t, time.Minute, "node ls has "+want, func() string {
		out, err := s.tryDocker(t, 20*time.Second, manager, "node", "ls", "--format", "{{.Hostname}} {{.Status}} {{.Availability}}")
		if err != nil {
			return err.Error()
		}
		if !slices.Contains(strings.Split(strings.TrimSpace(out), "\n"), want) {
			return out
		}
		return ""
	})
}

// refused runs a docker command that must fail with a text.
func (s *swarm) refused(t *testing.T, node, text string, args ...string) {
	t.Helper()
	out, err := s.tryDocker(t, time.Minute, node, args...)
	if err == nil || !strings.Contains(out, text) {
		t.Fatalf("docker %s on %s: %v, %s; want a refusal with %q", strings.Join(args, " "), node, err, out, text)
	}
}

// fetchOn asks a URL in a node's network.
func (s *swarm) fetchOn(t *testing.T, node, url string) (string, error) {
	t.Helper()
	return try(t, 10*time.Second, "nsenter", "--net=/run/netns/skep-"+s.name+"-"+node, "curl", "-sS", "--max-time", "5", url)
}
