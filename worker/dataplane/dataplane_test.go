package dataplane

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

// inNamespace runs the test on a thread in a network namespace of its own.
func inNamespace(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for network namespaces")
	}
	goruntime.LockOSThread()
	old, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netns.Set(old); err != nil {
			t.Error(err)
		}
		_ = ns.Close()
		_ = old.Close()
		goruntime.UnlockOSThread()
	})
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, dir string) *Dataplane {
	t.Helper()
	d, err := New(Config{Dir: filepath.Join(dir, "d"), ExecDir: filepath.Join(dir, "x"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// serveIn answers every TCP connection to port in a sandbox with text until the test ends.
func serveIn(t *testing.T, path string, port int, text string) {
	t.Helper()
	ready := make(chan net.Listener)
	go func() {
		goruntime.LockOSThread() // never unlocked: the thread dies with the goroutine
		ns, err := netns.GetFromPath(path)
		if err != nil {
			t.Error(err)
			close(ready)
			return
		}
		defer ns.Close()
		if err := netns.Set(ns); err != nil {
			t.Error(err)
			close(ready)
			return
		}
		l, err := net.Listen("tcp4", fmt.Sprintf(":%d", port))
		if err != nil {
			t.Error(err)
			close(ready)
			return
		}
		ready <- l
	}()
	l, ok := <-ready
	if !ok {
		t.FailNow()
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, text)
			_ = c.Close()
		}
	}()
}

// ask connects from the test's namespace and returns what it is told.
func ask(t *testing.T, addr string) (string, error) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	to := netip.MustParseAddrPort(addr)
	tv := unix.NsecToTimeval((2 * time.Second).Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}); err != nil {
		return "", err
	}
	buf := make([]byte, 64)
	n, err := unix.Read(fd, buf)
	return string(buf[:max(n, 0)]), err
}

func TestPublishedPort(t *testing.T) {
	inNamespace(t)
	d := open(t, t.TempDir())
	t.Cleanup(func() {
		if err := d.Destroy(t.Context()); err != nil {
			t.Error(err)
		}
	})
	req := runtime.SandboxRequest{ContainerID: "aaaa", Mode: "bridge", Ports: []runtime.PortBinding{
		{Protocol: "tcp", ContainerPort: 80, HostPort: 8080},
		{Protocol: "tcp", ContainerPort: 80},
	}}
	s, err := d.Attach(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	serveIn(t, s.NetNS, 80, "hello")
	for _, addr := range []string{
		"127.0.0.1:8080", s.Endpoint.Gateway.String() + ":8080",
		s.Endpoint.IPAddress.String() + ":80", fmt.Sprintf("127.0.0.1:%d", s.Ports[1].HostPort),
	} {
		if got, err := ask(t, addr); got != "hello" {
			t.Errorf("%s answered %q, %v", addr, got, err)
		}
	}
	req.ContainerID = "bbbb"
	if _, err := d.Attach(t.Context(), req); model.KindOf(err) != model.Conflict || !strings.Contains(err.Error(), "port is already allocated") {
		t.Errorf("a taken port gave %v", err)
	}
	if _, known := d.state.Leases["bbbb"]; known {
		t.Error("a refused container has a lease")
	}
	// Somebody flushes all rules: the next check brings ours back.
	if err := d.localRules().remove(d.hostNS); err != nil {
		t.Fatal(err)
	}
	if err := d.ensureBridge(&drift{repair: true}); err != nil {
		t.Fatal(err)
	}
	if got, err := ask(t, "127.0.0.1:8080"); got != "hello" {
		t.Errorf("after the rules were flushed: %q, %v", got, err)
	}
	if err := d.Detach(t.Context(), "aaaa"); err != nil {
		t.Fatal(err)
	}
	if got, err := ask(t, "127.0.0.1:8080"); err == nil {
		t.Errorf("a withdrawn port answered %q", got)
	}
}

func TestRestartFindsEverything(t *testing.T) {
	inNamespace(t)
	dir := t.TempDir()
	d := open(t, dir)
	req := runtime.SandboxRequest{ContainerID: "aaaa", Ports: []runtime.PortBinding{{Protocol: "tcp", ContainerPort: 80}}}
	first, err := d.Attach(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range d.reserved["aaaa"] {
		r.close() // as the end of the process does
	}
	d = open(t, dir)
	t.Cleanup(func() {
		if err := d.Destroy(t.Context()); err != nil {
			t.Error(err)
		}
	})
	again, err := d.Attach(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if again.Endpoint.IPAddress != first.Endpoint.IPAddress || again.Ports[0] != first.Ports[0] {
		t.Errorf("after a restart %v %v, before %v %v", again.Endpoint.IPAddress, again.Ports, first.Endpoint.IPAddress, first.Ports)
	}
	if err := d.Retain(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(d.cfg.ExecDir)
	if err != nil || len(entries) != 0 || len(d.state.Leases) != 0 {
		t.Errorf("left behind: %v, %v, %v", entries, d.state.Leases, err)
	}
}

func TestAddressesRestBeforeReuse(t *testing.T) {
	d := &Dataplane{state: state{Address: netip.MustParsePrefix("10.9.0.1/29"), Leases: map[string]lease{}}}
	seen := map[netip.Addr]bool{}
	for range 5 {
		a, err := d.allocate()
		if err != nil || seen[a] {
			t.Fatalf("allocated %s again, or %v", a, err)
		}
		seen[a], d.state.Last = true, a
	}
	for i := range 5 {
		a, err := d.allocate()
		if err != nil {
			t.Fatal(err)
		}
		d.state.Leases[fmt.Sprint(i)], d.state.Last = lease{Addr: a}, a
	}
	if a, err := d.allocate(); model.KindOf(err) != model.Exhausted {
		t.Errorf("a full network gave %s, %v", a, err)
	}
}

func FuzzParseResolvConf(f *testing.F) {
	f.Add("nameserver 127.0.0.53\nsearch a b\noptions ndots:2\n")
	f.Add("nameserver\n#x y\n;z w\ndomain d")
	f.Fuzz(func(t *testing.T, text string) {
		servers, search, options := parseResolvConf(text)
		for _, s := range append(append(servers, search...), options...) {
			if strings.ContainsAny(s, " \n") || s == "" {
				t.Errorf("%q is no word", s)
			}
		}
	})
}

// TestTwoDaemonsOfOneNamespace starts both before either has a container.
func TestTwoDaemonsOfOneNamespace(t *testing.T) {
	inNamespace(t)
	a, b := open(t, t.TempDir()), open(t, t.TempDir())
	if a.state.Address.Overlaps(b.state.Address) {
		t.Errorf("two daemons chose %s and %s", a.state.Address, b.state.Address)
	}
}
