package wire

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/pki"
)

// TestHalfOpenConnections holds 10,000 connections to a manager open that never say a word,
// and as many as it takes that finish the handshake without a certificate. A node still gets
// in, and the manager keeps few of them.
func TestHalfOpenConnections(t *testing.T) {
	const wanted = 10_000
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	// Each connection has two ends here; of the manager's, the bound remains.
	if limit.Cur < wanted+2*(maxHandshakes+maxStrangers)+1000 {
		t.Skipf("needs some %d file descriptors, the limit is %d", wanted+5000, limit.Cur)
	}
	root, err := pki.NewRoot(rand.Reader, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	manager := new(Credentials)
	manager.Set(issue(t, root, "leader", "swarm", pki.ManagerRole))
	guard := &Guard{Credentials: manager, Leading: func() bool { return true }, Removed: func(string) bool { return false }}
	server := NewServer(guard)
	register(server, new(rig))
	var lc net.ListenConfig
	listen, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	counted := &countingListener{Listener: listen}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(counted) }()
	defer func() { server.Stop(); <-done }()

	var open []net.Conn
	defer func() {
		for _, c := range open {
			_ = c.Close()
		}
	}()
	dialer := net.Dialer{Timeout: 10 * time.Second}
	for i := range wanted {
		c, err := dialer.DialContext(t.Context(), "tcp", listen.Addr().String())
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		open = append(open, c)
		if i%2000 == 1000 {
			heartbeat(t, root, listen.Addr().String())
		}
	}
	heartbeat(t, root, listen.Addr().String())
	for range maxStrangers + 200 {
		c := tls.Client(dialTo(t, listen.Addr().String()), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS12})
		if err := c.HandshakeContext(t.Context()); err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	heartbeat(t, root, listen.Addr().String())
	// What the manager keeps: the bounds, and those whose end is being noticed.
	deadline := time.Now().Add(30 * time.Second)
	for counted.open() > maxHandshakes+maxStrangers+50 {
		if time.Now().After(deadline) {
			t.Fatalf("the manager keeps %d connections", counted.open())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func dialTo(t *testing.T, addr string) net.Conn {
	t.Helper()
	var d net.Dialer
	c, err := d.DialContext(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// heartbeat calls a manager as a worker of its swarm.
func heartbeat(t *testing.T, root *pki.Root, addr string) {
	t.Helper()
	creds := new(Credentials)
	creds.Set(issue(t, root, "w", "swarm", pki.WorkerRole))
	conn, err := Dial(creds, addr, pki.ManagerRole)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	// A connection that is lost in the flood is made again, as agents do.
	for {
		_, err := api.NewDispatcherClient(conn).Heartbeat(ctx, new(api.HeartbeatRequest))
		if err == nil {
			return
		}
		if status.Code(err) != codes.Unavailable || ctx.Err() != nil {
			t.Fatalf("a node does not get in: %v", err)
		}
	}
}

// countingListener counts the connections that its server has not closed.
type countingListener struct {
	net.Listener

	mu sync.Mutex
	n  int
}

func (l *countingListener) open() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.n
}

func (l *countingListener) add(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.n += n
}

func (l *countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.add(1)
	return &countedConn{Conn: c, closed: sync.OnceFunc(func() { l.add(-1) })}, nil
}

type countedConn struct {
	net.Conn

	closed func()
}

func (c *countedConn) Close() error {
	c.closed()
	return c.Conn.Close()
}

func TestPoolClosesTheOldest(t *testing.T) {
	p := &pool{max: 2}
	ends := make([]net.Conn, 4)
	leave := make([]func(), 4)
	for i := range ends {
		var mine net.Conn
		ends[i], mine = net.Pipe()
		defer ends[i].Close()
		defer mine.Close()
		leave[i] = p.enter(mine)
		if i == 1 {
			leave[1]()
			leave[1]()
		}
	}
	// 1 has left, so 0 was the oldest of three.
	for i, want := range []bool{true, false, false, false} {
		_ = ends[i].SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		_, err := ends[i].Read(make([]byte, 1))
		if closed := err != nil && err.Error() == "EOF"; closed != want {
			t.Errorf("connection %d: %v", i, err)
		}
	}
	leave[0]()
	if p.size() != 2 {
		t.Errorf("%d are left", p.size())
	}
}

// FuzzHello gives a manager's listener what a stranger may send first.
func FuzzHello(f *testing.F) {
	root, err := pki.NewRoot(rand.Reader, time.Now())
	if err != nil {
		f.Fatal(err)
	}
	key, err := pki.NewKey(rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	csr, err := pki.NewCSR(rand.Reader, key)
	if err != nil {
		f.Fatal(err)
	}
	chain, err := root.Issue(rand.Reader, time.Now(), csr, pki.Leaf{NodeID: "m", ClusterID: "swarm", OU: pki.ManagerRole, Expiry: time.Hour})
	if err != nil {
		f.Fatal(err)
	}
	m, err := NewMaterial(root, chain, key)
	if err != nil {
		f.Fatal(err)
	}
	creds := new(Credentials)
	creds.Set(m)
	server := newBounded(transport(creds.ServerTLS()))
	f.Add([]byte{})
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
	f.Add(clientHello(f))
	f.Fuzz(func(t *testing.T, data []byte) {
		mine, theirs := net.Pipe()
		defer mine.Close()
		deadline := time.Now().Add(200 * time.Millisecond)
		_ = mine.SetDeadline(deadline)
		_ = theirs.SetDeadline(deadline)
		done := make(chan struct{})
		go func() {
			defer close(done)
			defer mine.Close()
			_, _ = mine.Write(data)
			buf := make([]byte, 1<<16)
			_, _ = mine.Read(buf)
		}()
		if _, info, err := server.ServerHandshake(theirs); err == nil {
			t.Errorf("%d bytes made a connection: %+v", len(data), info)
		}
		_ = theirs.Close()
		<-done
		if n := server.handshakes.size() + server.strangers.size(); n != 0 {
			t.Errorf("%d connections are left", n)
		}
	})
}

// clientHello returns what a TLS client says first.
func clientHello(f *testing.F) []byte {
	f.Helper()
	mine, theirs := net.Pipe()
	defer mine.Close()
	defer theirs.Close()
	go func() {
		_ = tls.Client(theirs, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12}).Handshake()
	}()
	buf := make([]byte, 4096)
	n, err := mine.Read(buf)
	if err != nil {
		f.Fatal(err)
	}
	return buf[:n]
}
