package dataplane

import (
	"fmt"
	"net"
	"slices"
	"testing"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/lifecycle"
)

// The sockets that take what comes from others are told, of this container and of both
// families, and none that are connected.
func TestListening(t *testing.T) {
	l := newLab(t, 1)
	n := l.nodes[0]
	l.tell(&skepv1.NetworkUpdate{Complete: true, Networks: nets(), Endpoints: append(l.legs(), endpointOf(n, "n1", "web", "", "10.0.1.3", false))})
	path := l.attach(n, "web", "n1=10.0.1.3").NetNS
	other := l.attach(n, "other").NetNS
	echo(t, other, 99, "other")
	told := func() []string {
		t.Helper()
		sockets, err := n.Listening("web")
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, s := range sockets {
			if s.Addr.Addr().IsLoopback() && s.Addr.Addr() == resolverAddr {
				continue // the node's resolver
			}
			text := fmt.Sprint(s.Protocol, " ", s.Addr)
			if s.Only6 {
				text += " only IPv6"
			}
			out = append(out, text)
		}
		slices.Sort(out)
		return out
	}
	if got := told(); len(got) > 0 {
		t.Errorf("an idle container listens: %q", got)
	}
	echo(t, path, 80, "web")
	echoOn(t, "6", path, 81, "web")
	echoOn(t, "", path, 82, "web")
	c, err := dialIn(path, "tcp4", "127.0.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	err = withinPath(path, func(netns.NsHandle) error {
		var d net.Dialer
		u, err := d.DialContext(t.Context(), "udp4", "127.0.0.1:80")
		if err == nil {
			t.Cleanup(func() { _ = u.Close() })
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"17 0.0.0.0:80", "17 [::]:81 only IPv6", "17 [::]:82", "6 0.0.0.0:80", "6 [::]:81 only IPv6", "6 [::]:82"}
	if got := told(); !slices.Equal(got, want) {
		t.Errorf("listening: %q, want %q", got, want)
	}
	if _, err := n.Listening("nobody"); err == nil {
		t.Error("a container that is not there listens")
	}
	if s, ok := socketOf(unix.IPPROTO_TCP, make([]byte, sockAnswerBytes-1)); ok || s != (lifecycle.Socket{}) {
		t.Errorf("half an answer is %v", s)
	}
}
