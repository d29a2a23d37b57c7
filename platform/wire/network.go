package wire

import (
	"context"
	"net"
)

// Network carries bytes between nodes. Addresses are host:port.
type Network interface {
	// Listen accepts connections to an address of this machine.
	Listen(ctx context.Context, addr string) (net.Listener, error)
	// Dial connects to another machine.
	Dial(ctx context.Context, addr string) (net.Conn, error)
}

// TCP is the network of the machine that the program runs on.
type TCP struct{}

// Listen implements Network.
func (TCP) Listen(ctx context.Context, addr string) (net.Listener, error) {
	var config net.ListenConfig
	return config.Listen(ctx, "tcp", addr)
}

// Dial implements Network.
func (TCP) Dial(ctx context.Context, addr string) (net.Conn, error) {
	var dialer net.Dialer
	return dialer.DialContext(ctx, "tcp", addr)
}

// orTCP is n, or TCP without one.
func orTCP(n Network) Network {
	if n == nil {
		return TCP{}
	}
	return n
}

// Listen accepts connections on n, which is TCP when nil.
func Listen(ctx context.Context, n Network, addr string) (net.Listener, error) {
	return orTCP(n).Listen(ctx, addr)
}
