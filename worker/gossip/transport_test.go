package gossip

import (
	"context"
	"io"
	"log"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/skep-dev/skep/core/netdb"
)

// TestTransport: others get no more connections than there is room for, one that is closed
// makes room, and all end with the context.
func TestTransport(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	at := netip.MustParseAddr("127.94.6.1")
	opened, err := newTransport(ctx, Session{Bind: at, Advertise: at}, log.New(io.Discard, "", 0))
	if err != nil {
		t.Fatal(err)
	}
	addr := netip.AddrPortFrom(at, Port).String()
	var theirs, ours []net.Conn
	dial := func() net.Conn {
		conn, err := net.DialTimeout("tcp", addr, 10*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		theirs = append(theirs, conn)
		return conn
	}
	for range maxStreams {
		dial()
		ours = append(ours, <-opened.StreamCh())
	}
	closed := func(conn net.Conn) {
		t.Helper()
		if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
			t.Errorf("a connection is not closed: %v", err)
		}
	}
	closed(dial())
	for range 2 { // twice makes room once
		if err := ours[0].Close(); err != nil && !strings.Contains(err.Error(), "closed") {
			t.Fatal(err)
		}
	}
	dial()
	<-opened.StreamCh()
	closed(dial())
	cancel()
	closed(theirs[1])
	if _, err := opened.DialTimeout(addr, time.Second); err == nil {
		t.Error("a connection is made after the end")
	}
	if err := opened.Shutdown(); err != nil {
		t.Error(err)
	}
	for _, conn := range theirs {
		_ = conn.Close() // some are
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
