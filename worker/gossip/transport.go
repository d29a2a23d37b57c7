package gossip

import (
	"context"
	"log"
	"net"
	"net/netip"
	"time"

	"github.com/hashicorp/memberlist"
)

// transport is memberlist's, whose connections to others end with a context: a daemon that
// stops does not wait for nodes that do not answer.
type transport struct {
	*memberlist.NetTransport

	until func() context.Context
}

func newTransport(ctx context.Context, s Session, logger *log.Logger) (memberlist.Transport, error) {
	bind := s.Bind
	if !bind.IsValid() {
		bind = netip.IPv4Unspecified()
	}
	t, err := memberlist.NewNetTransport(&memberlist.NetTransportConfig{BindAddrs: []string{bind.String()}, BindPort: Port, Logger: logger})
	if err != nil {
		return nil, err
	}
	return &transport{t, func() context.Context { return ctx }}, nil
}

// DialTimeout implements memberlist.Transport.
func (t *transport) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	dialer := net.Dialer{Timeout: timeout}
	ctx := t.until()
	conn, err := dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	return &endingConn{conn, context.AfterFunc(ctx, func() { _ = conn.Close() })}, nil // it may be closed already
}

// DialAddressTimeout implements memberlist.NodeAwareTransport.
func (t *transport) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	return t.DialTimeout(a.Addr, timeout)
}

// endingConn is a connection that ends with a context, unless it was closed before.
type endingConn struct {
	net.Conn

	forget func() bool
}

// Close implements [net.Conn].
func (c *endingConn) Close() error {
	c.forget()
	return c.Conn.Close()
}
