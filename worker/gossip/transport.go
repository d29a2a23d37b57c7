package gossip

import (
	"context"
	"log"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

// maxStreams bounds the connections of others that are open at once. Further ones are closed:
// before its first message nobody has shown that he has a key.
const maxStreams = 128

// transport is memberlist's, whose connections end with a context: a daemon that stops does
// not wait for nodes that do not answer.
type transport struct {
	*memberlist.NetTransport

	until   func() context.Context
	streams chan net.Conn
	room    chan struct{} // holds a token for each open connection of others
	stopped chan struct{}
	stop    func()
}

func newTransport(ctx context.Context, s Session, logger *log.Logger) (memberlist.Transport, error) {
	inner, err := memberlist.NewNetTransport(&memberlist.NetTransportConfig{BindAddrs: []string{s.bind().String()}, BindPort: Port, Logger: logger})
	if err != nil {
		return nil, err
	}
	t := &transport{
		NetTransport: inner, until: func() context.Context { return ctx },
		streams: make(chan net.Conn), room: make(chan struct{}, maxStreams), stopped: make(chan struct{}),
	}
	t.stop = sync.OnceFunc(func() { close(t.stopped) })
	go t.accept()
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
			select {
			case t.room <- struct{}{}:
			default:
				_ = conn.Close() // nothing was said yet
				continue
			}
			c := t.ending(conn, func() { <-t.room })
			select {
			case t.streams <- c:
			case <-t.until().Done():
				_ = c.Close() // nothing was said yet
			}
		}
	}
}

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
func (t *transport) ending(conn net.Conn, free func()) net.Conn {
	forget := context.AfterFunc(t.until(), func() { _ = conn.Close() }) // it may be closed already
	return &endingConn{conn, sync.OnceFunc(func() {
		forget()
		free()
	})}
}

type endingConn struct {
	net.Conn

	ended func()
}

// Close implements [net.Conn].
func (c *endingConn) Close() error {
	c.ended()
	return c.Conn.Close()
}
