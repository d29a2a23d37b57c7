package wire

import (
	"context"
	"crypto/tls"
	"fmt"
	"math"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	experimental "google.golang.org/grpc/experimental/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/test/bufconn"
)

// Bounds of a server. A message or connection beyond them is refused by gRPC.
const (
	maxReceive = 4 << 20
	// maxStreams bounds the calls in flight on one connection.
	maxStreams = 1 << 16
	// handshakeTimeout ends connections that do not become TLS.
	handshakeTimeout = 10 * time.Second
)

// NewServer returns a gRPC server over mutual TLS behind a guard.
func NewServer(guard *Guard) *grpc.Server {
	return grpc.NewServer(append(guard.ServerOptions(),
		grpc.Creds(guard.Conns.track(newBounded(transport(guard.Credentials.ServerTLS())))),
		grpc.MaxRecvMsgSize(maxReceive),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(handshakeTimeout),
		// A peer that vanished without a word is found within 10 s or so.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 5 * time.Second, Timeout: 5 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
	)...)
}

// transport makes credentials that offer HTTP/2 by ALPN but do not insist on it, as grpc does
// otherwise: a Docker Engine (seen with 20.10) negotiates it only until its certificate is
// renewed, on both sides, and would be lost then until it is restarted.
func transport(config *tls.Config) credentials.TransportCredentials {
	return experimental.NewTLSWithALPNDisabled(config)
}

// AnyRole is the server name that stands for every node of the swarm.
const AnyRole = ""

// Dial connects to a manager by its certificate's server name, or to any node with AnyRole.
// It returns before the connection is up; calls fail fast while it is not.
func Dial(creds *Credentials, addr, serverName string) (*grpc.ClientConn, error) {
	return dial(creds.Network, addr, creds.ClientTLS(serverName))
}

// DialUnverified connects without checking who answers: only to fetch the root
// certificate that a join token pins. The network is TCP when nil.
func DialUnverified(network Network, addr string) (*grpc.ClientConn, error) {
	return dial(network, addr, &tls.Config{
		MinVersion: tls.VersionTLS12, CipherSuites: suites(), NextProtos: []string{"h2"},
		InsecureSkipVerify: true, //nolint:gosec // what is fetched is checked against the token
	})
}

func dial(network Network, addr string, config *tls.Config) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("passthrough:///"+addr,
		grpc.WithTransportCredentials(transport(config)),
		grpc.WithContextDialer(orTCP(network).Dial),
		grpc.WithChainUnaryInterceptor(markSkep),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 3 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
	)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", addr, err)
	}
	return conn, nil
}

// Local is a server that only this process can reach, and the connection to it.
type Local struct {
	Server *grpc.Server
	Conn   *grpc.ClientConn
	listen *bufconn.Listener
}

// NewLocal returns a local server behind a guard, which it makes local. Register services,
// then Serve.
func NewLocal(guard *Guard) (*Local, error) {
	g := *guard
	g.Local = true
	l := &Local{
		Server: grpc.NewServer(append(g.ServerOptions(), grpc.MaxRecvMsgSize(math.MaxInt32))...),
		listen: bufconn.Listen(1 << 20),
	}
	var err error
	l.Conn, err = grpc.NewClient("passthrough:///local",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.listen.DialContext(ctx) }),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32)),
	)
	if err != nil {
		return nil, fmt.Errorf("connect to own services: %w", err)
	}
	return l, nil
}

// Serve answers until ctx ends.
func (l *Local) Serve(ctx context.Context) error {
	stop := context.AfterFunc(ctx, l.Server.Stop)
	defer stop()
	err := l.Server.Serve(l.listen)
	_ = l.Conn.Close()
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// Route is a connection that reaches the leader's services from a manager: in this process
// while it leads, else at the leader, as this node.
type Route struct {
	Local   grpc.ClientConnInterface
	Leading func() bool
	// Leader is as in Guard.
	Leader func(ctx context.Context) (grpc.ClientConnInterface, error)
}

func (r *Route) pick(ctx context.Context) (grpc.ClientConnInterface, error) {
	if r.Leading() {
		return r.Local, nil
	}
	conn, err := r.Leader(ctx)
	if conn == nil && err == nil {
		return r.Local, nil
	}
	return conn, err
}

// Invoke makes a unary call. It waits for the next leader when the last one did not take
// the call, and never makes a call twice that may have been executed.
func (r *Route) Invoke(ctx context.Context, name string, args, reply any, opts ...grpc.CallOption) error {
	return callLeader(ctx, r.pick, func(conn grpc.ClientConnInterface) (bool, error) {
		return invoke(ctx, conn, name, args, reply, opts...)
	})
}

// NewStream opens a stream, as Invoke makes a call.
func (r *Route) NewStream(ctx context.Context, desc *grpc.StreamDesc, name string, opts ...grpc.CallOption) (stream grpc.ClientStream, err error) {
	err = callLeader(ctx, r.pick, func(conn grpc.ClientConnInterface) (unsent bool, err error) {
		stream, unsent, err = open(ctx, conn, desc, name, opts...)
		return unsent, err
	})
	return stream, err
}
