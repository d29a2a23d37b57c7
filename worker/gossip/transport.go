package gossip

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
)

// What strangers can cost: before its first message nobody has shown that he has a key.
const (
	// maxStreams bounds the connections of others that are open at once, maxStreamsOfOne those
	// of one address. Further ones are closed.
	maxStreams      = 128
	maxStreamsOfOne = 8
	// maxUnread bounds what all of them together announce to send.
	maxUnread = 64 << 20
)

// What everything begins with that is encrypted as Docker's nodes do. memberlist panics at
// other things, even those of whoever has a key.
const (
	// version is of AES-GCM without padding, overhead what it adds to a message, of which there
	// is at least one byte.
	version  = 1
	overhead = 29
	// encrypted is the type of a message in a stream, before its length.
	encrypted = 10
	headSize  = 6
)

// transport is memberlist's, whose connections end with a context: a daemon that stops does
// not wait for nodes that do not answer.
type transport struct {
	*memberlist.NetTransport

	until   func() context.Context
	packets chan *memberlist.Packet
	streams chan net.Conn
	unread  atomic.Int64
	stopped chan struct{}
	stop    func()

	mu   sync.Mutex
	all  int                // connections of others that are open
	from map[netip.Addr]int // of these, by address
}

func newTransport(ctx context.Context, s Session, logger *log.Logger) (memberlist.Transport, error) {
	inner, err := memberlist.NewNetTransport(&memberlist.NetTransportConfig{BindAddrs: []string{s.bind().String()}, BindPort: Port, Logger: logger})
	if err != nil {
		return nil, err
	}
	t := &transport{
		NetTransport: inner, until: func() context.Context { return ctx },
		packets: make(chan *memberlist.Packet), streams: make(chan net.Conn), stopped: make(chan struct{}), from: map[netip.Addr]int{},
	}
	t.stop = sync.OnceFunc(func() { close(t.stopped) })
	go t.accept()
	go t.receive()
	return t, nil
}

// bind is the address to listen at. Docker's default is all addresses of IPv4, which a node
// that others reach by IPv6 does not have in mind.
func (s Session) bind() netip.Addr {
	switch {
	case s.Bind.IsValid() && !s.Bind.IsUnspecified():
		return s.Bind
	case s.Advertise.Is6():
		return netip.IPv6Unspecified()
	default:
		return netip.IPv4Unspecified()
	}
}

// accept hands connections of others on. It takes them until memberlist's transport has
// stopped, which waits for that.
func (t *transport) accept() {
	for {
		select {
		case <-t.stopped:
			return
		case conn := <-t.NetTransport.StreamCh():
			free, ok := t.admit(conn.RemoteAddr())
			if !ok {
				_ = conn.Close() // nothing was said yet
				continue
			}
			c := t.ending(conn, free)
			c.budget = &t.unread
			select {
			case t.streams <- c:
			case <-t.until().Done():
				_ = c.Close() // nothing was said yet
			}
		}
	}
}

// admit counts a connection until free is called, if there is room for it.
func (t *transport) admit(addr net.Addr) (free func(), ok bool) {
	from := hostOf(addr)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.all >= maxStreams || t.from[from] >= maxStreamsOfOne {
		return nil, false
	}
	t.all++
	t.from[from]++
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.all--
		if t.from[from]--; t.from[from] == 0 {
			delete(t.from, from)
		}
	}, true
}

func hostOf(addr net.Addr) netip.Addr {
	at, err := netip.ParseAddrPort(addr.String())
	if err != nil {
		return netip.Addr{}
	}
	return at.Addr().Unmap()
}

// receive hands packets on that can be what others send.
func (t *transport) receive() {
	for {
		select {
		case <-t.stopped:
			return
		case p := <-t.NetTransport.PacketCh():
			if len(p.Buf) <= overhead || p.Buf[0] != version {
				continue
			}
			select {
			case t.packets <- p:
			case <-t.until().Done():
			}
		}
	}
}

// PacketCh implements memberlist.Transport.
func (t *transport) PacketCh() <-chan *memberlist.Packet { return t.packets }

// StreamCh implements memberlist.Transport.
func (t *transport) StreamCh() <-chan net.Conn { return t.streams }

// Shutdown implements memberlist.Transport.
func (t *transport) Shutdown() error {
	defer t.stop()
	return t.NetTransport.Shutdown()
}

// DialTimeout implements memberlist.Transport.
func (t *transport) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	dialer := net.Dialer{Timeout: timeout}
	conn, err := dialer.DialContext(t.until(), "tcp", addr)
	if err != nil {
		return nil, err
	}
	return t.ending(conn, func() {}), nil
}

// DialAddressTimeout implements memberlist.NodeAwareTransport.
func (t *transport) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	return t.DialTimeout(a.Addr, timeout)
}

// ending returns a connection that ends with the context, and calls free when it is closed.
func (t *transport) ending(conn net.Conn, free func()) *endingConn {
	forget := context.AfterFunc(t.until(), func() { _ = conn.Close() }) // it may be closed already
	c := &endingConn{Conn: conn}
	c.ended = sync.OnceFunc(func() {
		forget()
		free()
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.budget != nil {
			c.budget.Add(-c.announced)
		}
		c.announced, c.budget = 0, nil
	})
	return c
}

// endingConn is a connection by which nothing comes but what is encrypted.
type endingConn struct {
	net.Conn

	ended func()
	head  []byte // what was looked at and is to be read; it belongs to the reader
	known bool   // the beginning was looked at

	mu        sync.Mutex
	budget    *atomic.Int64 // of what others announce; nil without one
	announced int64         // what was taken of it
}

// Read implements [io.Reader].
func (c *endingConn) Read(b []byte) (int, error) {
	if !c.known {
		head := make([]byte, headSize)
		if _, err := io.ReadFull(c.Conn, head); err != nil {
			return 0, err
		}
		if err := c.look(head); err != nil {
			return 0, errors.Join(err, c.Conn.Close())
		}
		c.known, c.head = true, head
	}
	if len(c.head) > 0 {
		n := copy(b, c.head)
		c.head = c.head[n:]
		return n, nil
	}
	return c.Conn.Read(b)
}

// look refuses what a message cannot begin with, and one that there is no room for.
func (c *endingConn) look(head []byte) error {
	length := int64(binary.BigEndian.Uint32(head[1:]))
	if head[0] != encrypted || length <= overhead || head[5] != version {
		return errors.New("this is no message of gossip")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.budget == nil {
		return nil
	}
	c.announced = length
	if c.budget.Add(length) > maxUnread {
		return errors.New("too much at once")
	}
	return nil
}

// Close implements [net.Conn].
func (c *endingConn) Close() error {
	c.ended()
	return c.Conn.Close()
}
