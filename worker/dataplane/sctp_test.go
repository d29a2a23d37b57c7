package dataplane

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
)

// association is one of SCTP, as far as tests use it as a connection.
type association struct{ *os.File }

func (association) LocalAddr() net.Addr  { return nil }
func (association) RemoteAddr() net.Addr { return nil }

// sctpSocket makes a socket in a namespace.
func sctpSocket(path string) (*os.File, error) {
	var f *os.File
	err := withinPath(path, func(netns.NsHandle) error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_SCTP)
		if err == nil {
			f = os.NewFile(uintptr(fd), "sctp")
		}
		return err
	})
	return f, err
}

// onSocket calls f, again each time that the socket is ready, until it is done.
func onSocket(s *os.File, reading bool, f func(fd int) (done bool)) error {
	raw, err := s.SyscallConn()
	if err != nil {
		return err
	}
	call := func(fd uintptr) bool { return f(int(fd)) }
	if reading {
		return raw.Read(call)
	}
	return raw.Write(call)
}

// dialSCTP connects from a namespace.
func dialSCTP(path, to string) (net.Conn, error) {
	s, err := sctpSocket(path)
	if err != nil {
		return nil, err
	}
	if err := s.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	addr := netip.MustParseAddrPort(to)
	started := false
	var failed error
	err = onSocket(s, false, func(fd int) bool {
		if !started {
			started = true
			failed = unix.Connect(fd, &unix.SockaddrInet4{Addr: addr.Addr().As4(), Port: int(addr.Port())})
			return !errors.Is(failed, unix.EINPROGRESS)
		}
		code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if failed = err; err == nil && code != 0 {
			failed = unix.Errno(code)
		}
		return true
	})
	if err := errors.Join(err, failed); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return association{s}, nil
}

// echoSCTP is echo for SCTP; stop ends it as the end of a process does.
func echoSCTP(t *testing.T, path string, port int, name string) (stop func()) {
	t.Helper()
	s, err := sctpSocket(path)
	if err != nil {
		t.Fatal(err)
	}
	err = onSocket(s, false, func(fd int) bool {
		err = errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Port: port}), unix.Listen(fd, 16))
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	var open []*os.File // until done
	go func() {
		defer close(done)
		for {
			var c int
			var from unix.Sockaddr
			var failed error
			err := onSocket(s, true, func(fd int) bool {
				c, from, failed = unix.Accept4(fd, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
				return !errors.Is(failed, unix.EAGAIN)
			})
			if errors.Join(err, failed) != nil {
				return
			}
			f := os.NewFile(uintptr(c), "association")
			open = append(open, f)
			seen := netip.AddrFrom4(from.(*unix.SockaddrInet4).Addr)
			go func() {
				buf := make([]byte, 256)
				for {
					n, err := f.Read(buf)
					if err != nil || n == 0 {
						return
					}
					if strings.HasPrefix(string(buf[:n]), "who") {
						_, _ = fmt.Fprintf(f, "%s %s\n", name, seen)
					}
				}
			}()
		}
	}()
	stop = func() {
		_ = s.Close()
		<-done
		for _, f := range open {
			_ = f.Close()
		}
	}
	t.Cleanup(stop)
	return stop
}

func whoSCTP(path, to string) (name, seen string, err error) {
	c, err := dialSCTP(path, to)
	if err != nil {
		return "", "", err
	}
	defer c.Close()
	return whoOverSCTP(c)
}

// whoOverSCTP is whoOver that waits longer than SCTP does before it sends a packet again, which
// is three seconds at first.
func whoOverSCTP(c net.Conn) (name, seen string, err error) { return whoWithin(c, 15*time.Second) }

// wantBothSCTP fails unless both tasks answer, and see whom they should.
func wantBothSCTP(t *testing.T, path, to, seen string) {
	t.Helper()
	names := map[string]int{}
	for range 20 {
		name, from, err := whoSCTP(path, to)
		if err != nil || seen != "" && from != seen {
			t.Errorf("%s: %q saw %q, %v", to, name, from, err)
			return
		}
		names[name]++
	}
	if len(names) != 2 {
		t.Errorf("%s is not balanced: %v", to, names)
	}
}

// TestSCTP goes through service addresses and published ports where the kernel has SCTP.
func TestSCTP(t *testing.T) {
	l := newLab(t, 3)
	a, b, c := l.nodes[0], l.nodes[1], l.nodes[2]
	if s, err := sctpSocket(a.path); errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.ESOCKTNOSUPPORT) {
		t.Skip("the kernel has no SCTP")
	} else if err != nil {
		t.Fatal(err)
	} else if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	outside := l.host("outside", netip.MustParseAddr("192.0.2.50"))
	service := web()
	service.Ports = []*skepv1.MeshPort{{Protocol: unix.IPPROTO_SCTP, Target: 80, Published: 8080}}
	tasks := func(routable bool) []*skepv1.OverlayEndpoint {
		return []*skepv1.OverlayEndpoint{
			endpointOf(b, "n1", "web.2", "s1", "10.0.1.4", routable), endpointOf(b, "ingress", "web.2", "s1", "10.0.0.4", routable),
		}
	}
	l.tell(&skepv1.NetworkUpdate{Complete: true, Networks: nets(), Services: []*skepv1.BalancedService{service}, Endpoints: append(append(l.legs(),
		endpointOf(a, "n1", "client", "", "10.0.1.2", true),
		endpointOf(a, "n1", "web.1", "s1", "10.0.1.3", true), endpointOf(a, "ingress", "web.1", "s1", "10.0.0.3", true),
	), tasks(true)...)})
	client := l.attach(a, "client", "n1=10.0.1.2").NetNS
	web1, web2 := l.attach(a, "web.1", "n1=10.0.1.3", "ingress=10.0.0.3").NetNS, l.attach(b, "web.2", "n1=10.0.1.4", "ingress=10.0.0.4").NetNS
	stop1, stop2 := echoSCTP(t, web1, 80, "web.1"), echoSCTP(t, web2, 80, "web.2")
	if name, seen, err := whoSCTP(client, "10.0.1.4:80"); err != nil || name != "web.2" || seen != "10.0.1.2" {
		t.Errorf("across nodes: %q saw %q, %v", name, seen, err)
	}
	wantBothSCTP(t, client, "10.0.1.100:80", "10.0.1.2")
	for i, n := range []*labNode{a, b, c} { // the last has no task
		wantBothSCTP(t, outside, netip.AddrPortFrom(n.addr, 8080).String(), "")
		wantBothSCTP(t, n.path, netip.AddrPortFrom(l.nodes[(i+1)%3].addr, 8080).String(), "")
	}
	// A task that drains keeps its associations and gets no new ones.
	type held struct {
		from, to string
		conn     net.Conn
	}
	var old []*held
	for _, h := range []*held{{from: client, to: "10.0.1.100:80"}, {from: outside, to: "192.0.2.1:8080"}, {from: outside, to: "192.0.2.2:8080"}, {from: outside, to: "192.0.2.3:8080"}} {
		for h.conn == nil {
			conn, err := dialSCTP(h.from, h.to)
			if err != nil {
				t.Fatal(err)
			}
			if name, _, err := whoOverSCTP(conn); err != nil {
				t.Fatal(err)
			} else if name == "web.2" {
				h.conn = conn
				t.Cleanup(func() { _ = conn.Close() })
			} else if err := conn.Close(); err != nil {
				t.Error(err)
			}
		}
		old = append(old, h)
	}
	l.tell(&skepv1.NetworkUpdate{Endpoints: tasks(false)})
	for _, h := range old {
		for range 10 {
			if name, _, err := whoSCTP(h.from, h.to); err != nil || name != "web.1" {
				t.Errorf("%s while a task drains: %q, %v", h.to, name, err)
			}
		}
		if name, _, err := whoOverSCTP(h.conn); err != nil || name != "web.2" {
			t.Errorf("a draining task lost its association through %s: %q, %v", h.to, name, err)
		}
	}
	// When it ends its clients are told, and what is left of it goes.
	stop2()
	for _, h := range old {
		if err := h.conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := h.conn.Read(make([]byte, 16)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("an association through %s with a task that ended: %v", h.to, err)
		} else if !errors.Is(err, io.EOF) {
			t.Logf("through %s: %v", h.to, err)
		}
	}
	l.tell(&skepv1.NetworkUpdate{RemovedEndpoints: []*skepv1.EndpointKey{{NetworkId: "n1", TaskId: "web.2"}, {NetworkId: "ingress", TaskId: "web.2"}}})
	if err := b.Detach(t.Context(), "web.2"); err != nil {
		t.Error(err)
	}
	l.wantClean()
	// Without tasks associations are refused at once.
	l.tell(&skepv1.NetworkUpdate{RemovedEndpoints: []*skepv1.EndpointKey{{NetworkId: "n1", TaskId: "web.1"}, {NetworkId: "ingress", TaskId: "web.1"}}})
	stop1()
	for from, to := range map[string]string{client: "10.0.1.100:80", outside: "192.0.2.1:8080"} {
		start := time.Now()
		if _, err := dialSCTP(from, to); err == nil || errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) > 5*time.Second {
			t.Errorf("%s without tasks: %v after %s", to, err, time.Since(start))
		} else {
			t.Logf("%s without tasks: %v", to, err)
		}
	}
	// A node that is started again holds what it held.
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	l.start(a)
	l.wantClean()
}
