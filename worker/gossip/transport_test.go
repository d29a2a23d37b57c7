package gossip

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/skep-dev/skep/core/netdb"
)

// openTransport is a transport on an address of loopback.
func openTransport(ctx context.Context, t *testing.T) (memberlist.Transport, string) {
	t.Helper()
	at := netip.MustParseAddr("127.94.6.1")
	opened, err := newTransport(ctx, Session{Bind: at, Advertise: at}, log.New(io.Discard, "", 0))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := opened.Shutdown(); err != nil {
			t.Error(err)
		}
	})
	return opened, netip.AddrPortFrom(at, Port).String()
}

// dialFrom connects from an address of loopback.
func dialFrom(t *testing.T, from int, addr string) net.Conn {
	t.Helper()
	d := net.Dialer{Timeout: 10 * time.Second, LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 94, 7, byte(from))}}
	conn, err := d.DialContext(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() }) // some are
	return conn
}

func wantClosed(t *testing.T, conn net.Conn) {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a connection is not closed: %v", err)
	}
}

// TestTransport: others get no more connections than there is room for, one that is closed
// makes room, and all end with the context.
func TestTransport(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	opened, addr := openTransport(ctx, t)
	var ours []net.Conn
	first := dialFrom(t, 0, addr)
	ours = append(ours, <-opened.StreamCh())
	for i := 1; i < maxStreams; i++ {
		dialFrom(t, i/maxStreamsOfOne, addr)
		ours = append(ours, <-opened.StreamCh())
	}
	wantClosed(t, dialFrom(t, 0, addr))
	wantClosed(t, dialFrom(t, 99, addr))
	for range 2 { // twice makes room once
		if err := ours[1].Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			t.Fatal(err)
		}
	}
	dialFrom(t, 0, addr)
	<-opened.StreamCh()
	wantClosed(t, dialFrom(t, 99, addr))
	cancel()
	wantClosed(t, first)
	if _, err := opened.DialTimeout(addr, time.Second); err == nil {
		t.Error("a connection is made after the end")
	}
}

// TestForeignWords: memberlist panics at an empty message and at padding that is longer than
// what is padded, which everybody can send who has a key. Neither reaches it.
func TestForeignWords(t *testing.T) {
	opened, addr := openTransport(t.Context(), t)
	good := append([]byte{version}, make([]byte, overhead)...)
	conn, err := net.Dial("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, bad := range [][]byte{append([]byte{0}, make([]byte, 60)...), good[:overhead], {version}, append([]byte{244, 1, 'x'}, good...)} {
		if _, err := conn.Write(bad); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := conn.Write(good); err != nil {
		t.Fatal(err)
	}
	if p := <-opened.PacketCh(); !bytes.Equal(p.Buf, good) { // in their order on loopback
		t.Errorf("memberlist gets % x", p.Buf)
	}

	stream := func(head ...byte) ([]byte, error) {
		theirs := dialFrom(t, 1, addr)
		ours := <-opened.StreamCh()
		defer ours.Close()
		if _, err := theirs.Write(append(head, "the rest"...)); err != nil {
			t.Fatal(err)
		}
		if err := theirs.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		return io.ReadAll(ours)
	}
	for name, head := range map[string][]byte{
		"in clear": {6, 0, 0, 0, 30, 1}, "padded": {encrypted, 0, 0, 0, 60, 0}, "empty": {encrypted, 0, 0, 0, overhead, 1}, "labelled": {244, 1, 'x', encrypted, 0, 0},
		"too much": {encrypted, 0xf0, 0, 0, 0, 1},
	} {
		if got, err := stream(head...); err == nil || len(got) > 0 {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	head := []byte{encrypted, 0, 0, 0, overhead + 1, version}
	for range 2 { // what was announced before is not counted any more
		if got, err := stream(head...); err != nil || string(got) != string(head)+"the rest" {
			t.Errorf("an encrypted stream: %q, %v", got, err)
		}
	}
	if n := opened.(*transport).unread.Load(); n != 0 {
		t.Errorf("%d bytes are still counted", n)
	}
}

func TestBind(t *testing.T) {
	for _, tc := range [][3]string{
		{"0.0.0.0", "192.0.2.1", "0.0.0.0"},
		{"192.0.2.1", "192.0.2.2", "192.0.2.1"},
		{"0.0.0.0", "2001:db8::1", "::"},
		{"::", "192.0.2.1", "0.0.0.0"},
		{"2001:db8::1", "2001:db8::2", "2001:db8::1"},
	} {
		s := Session{Bind: netip.MustParseAddr(tc[0]), Advertise: netip.MustParseAddr(tc[1])}
		if got := s.bind().String(); got != tc[2] {
			t.Errorf("asked for %s and reached at %s it listens at %s, want %s", tc[0], tc[1], got, tc[2])
		}
	}
}

// TestAliveLimits: memberlist keeps no node that is too much.
func TestAliveLimits(t *testing.T) {
	c := &cluster{members: map[string]*memberlist.Node{"known": {}}, db: netdb.New("self", 1)}
	for name, tc := range map[string]struct {
		node    *memberlist.Node
		members int
		refused bool
	}{
		"a node":         {&memberlist.Node{Name: "new"}, 1, false},
		"a long name":    {&memberlist.Node{Name: strings.Repeat("n", maxName+1)}, 1, true},
		"much meta data": {&memberlist.Node{Name: "new", Meta: make([]byte, memberlist.MetaMaxSize+1)}, 1, true},
		"many nodes":     {&memberlist.Node{Name: "new"}, maxMembers, true},
		"a known one":    {&memberlist.Node{Name: "known"}, maxMembers, false},
	} {
		for i := len(c.members); i < tc.members; i++ {
			c.members[strings.Repeat("x", 1+i%7)+string(rune(0x4e00+i))] = nil
		}
		if tc.members == 1 {
			c.members = map[string]*memberlist.Node{"known": {}}
		}
		if err := c.NotifyAlive(tc.node); (err != nil) != tc.refused {
			t.Errorf("%s: %v", name, err)
		}
	}
}
