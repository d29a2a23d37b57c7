package wire

import (
	"net"
	"sync"

	"google.golang.org/grpc/credentials"
)

// Conns knows the open connections of other nodes to this manager, so that those of a node
// whose certificate became void can be closed. The zero value is ready for use.
type Conns struct {
	mu   sync.Mutex
	open map[*conn]struct{}
}

// conn is a connection that a node with a certificate opened.
type conn struct {
	net.Conn

	conns *Conns
	// peer is who opened it, by its certificate.
	peer Identity
}

// Close closes the connection and forgets it.
func (c *conn) Close() error {
	c.conns.mu.Lock()
	delete(c.conns.open, c)
	c.conns.mu.Unlock()
	return c.Conn.Close()
}

// CloseIf closes the connections whose peer's certificate is void by now, and returns how
// many they were. Calls on them fail as if the peer had lost its network.
func (c *Conns) CloseIf(void func(peer Identity) bool) int {
	var shut []*conn
	c.mu.Lock()
	for one := range c.open {
		shut = append(shut, one)
	}
	c.mu.Unlock()
	n := 0
	for _, one := range shut {
		if void(one.peer) {
			n++
			_ = one.Conn.Close() // its server notices, and forgets it
		}
	}
	return n
}

// track returns credentials whose server side remembers connections.
func (c *Conns) track(creds credentials.TransportCredentials) credentials.TransportCredentials {
	if c == nil {
		return creds
	}
	return &tracking{TransportCredentials: creds, conns: c}
}

type tracking struct {
	credentials.TransportCredentials

	conns *Conns
}

// ServerHandshake remembers the connection if its peer showed a certificate.
func (t *tracking) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	secure, info, err := t.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return secure, info, err
	}
	peer := certified(info)
	if peer.Anonymous() {
		return secure, info, nil
	}
	one := &conn{Conn: secure, conns: t.conns, peer: peer}
	t.conns.mu.Lock()
	defer t.conns.mu.Unlock()
	if t.conns.open == nil {
		t.conns.open = map[*conn]struct{}{}
	}
	t.conns.open[one] = struct{}{}
	return one, info, nil
}

// Clone returns credentials that remember in the same place.
func (t *tracking) Clone() credentials.TransportCredentials {
	return &tracking{TransportCredentials: t.TransportCredentials.Clone(), conns: t.conns}
}
