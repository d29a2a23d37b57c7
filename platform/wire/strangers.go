package wire

import (
	"container/list"
	"net"
	"sync"

	"google.golang.org/grpc/credentials"
)

// Bounds of connections whose peer has not shown a certificate. At a bound the oldest gives
// way to the newest: a peer in good faith is through in a few round trips, and whoever holds
// connections open loses them first. So nobody without a certificate can use up a manager's
// descriptors, and nodes always get in.
const (
	maxHandshakes = 1024
	// maxStrangers bounds connections without a certificate after their handshake: nodes that
	// join make one each.
	maxStrangers = 1024
)

// pool is a bounded set of connections, oldest first.
type pool struct {
	max int

	mu    sync.Mutex
	conns list.List
}

// enter adds a connection and returns what takes it out; the oldest beyond the bound is
// closed.
func (p *pool) enter(c net.Conn) (leave func()) {
	p.mu.Lock()
	e := p.conns.PushBack(c)
	var oldest net.Conn
	if p.conns.Len() > p.max {
		first := p.conns.Front()
		oldest, _ = first.Value.(net.Conn)
		p.conns.Remove(first)
	}
	p.mu.Unlock()
	if oldest != nil {
		_ = oldest.Close()
	}
	return sync.OnceFunc(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.conns.Remove(e) // nothing, if it was the oldest once
	})
}

func (p *pool) size() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.conns.Len()
}

// bounded are a server's credentials that bound the connections without a certificate.
type bounded struct {
	credentials.TransportCredentials

	handshakes, strangers *pool
}

func newBounded(c credentials.TransportCredentials) *bounded {
	return &bounded{TransportCredentials: c, handshakes: &pool{max: maxHandshakes}, strangers: &pool{max: maxStrangers}}
}

// ServerHandshake implements credentials.TransportCredentials.
func (b *bounded) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	leave := b.handshakes.enter(raw)
	conn, info, err := b.TransportCredentials.ServerHandshake(raw)
	leave()
	if err != nil {
		return nil, nil, err
	}
	if t, ok := info.(credentials.TLSInfo); ok && len(t.State.PeerCertificates) > 0 {
		return conn, info, nil
	}
	return &stranger{Conn: conn, leave: b.strangers.enter(raw)}, info, nil
}

// Clone implements credentials.TransportCredentials. The clone shares the bounds.
func (b *bounded) Clone() credentials.TransportCredentials {
	return &bounded{TransportCredentials: b.TransportCredentials.Clone(), handshakes: b.handshakes, strangers: b.strangers}
}

// stranger is a connection without a certificate, which leaves its pool when it is closed.
type stranger struct {
	net.Conn

	leave func()
}

// Close closes the connection.
func (s *stranger) Close() error {
	s.leave()
	return s.Conn.Close()
}
