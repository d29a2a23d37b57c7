// Package memnet is a network in memory, for nodes that run in one process. Its streams
// behave like TCP over a bad network: what is lost comes late, a cut holds everything
// back without telling anyone, connecting into a cut hangs, and a machine that is down
// refuses. It knows only time, so in a testing/synctest bubble it costs none.
//
// One mutex guards the network's faults and hosts, one more each direction of a stream.
// All methods may be called from any goroutine. Which faults happen when is the caller's.
package memnet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

const (
	// window bounds what one direction of a stream holds; a writer waits beyond it.
	window = 256 << 10
	// backlog bounds the connections waiting to be accepted; beyond it they are refused.
	backlog = 128
	// resend is how long it takes until something lost is sent again, at first.
	resend = 200 * time.Millisecond
)

// Network connects hosts. Make one with New.
type Network struct {
	mu        sync.Mutex
	random    *rand.Rand
	delay     [2]time.Duration // least and most
	loss      float64
	listeners map[string]*listener // by address
	down      map[string]bool      // by host
	cut       map[[2]string]bool   // from host to host
	conns     map[*conn]bool
	healed    chan struct{} // closed and replaced when cuts ended
}

// New returns a network without faults. Delays and losses follow random, which then
// belongs to the network.
func New(random *rand.Rand) *Network {
	return &Network{
		random: random, listeners: map[string]*listener{}, down: map[string]bool{},
		cut: map[[2]string]bool{}, conns: map[*conn]bool{}, healed: make(chan struct{}),
	}
}

// Host is one machine's access to the network.
type Host struct {
	n    *Network
	name string
}

// Host returns the access of the machine with an IP address.
func (n *Network) Host(ip string) *Host { return &Host{n: n, name: ip} }

// SetDelay makes everything take between least and most, each way.
func (n *Network) SetDelay(least, most time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.delay = [2]time.Duration{least, most}
}

// SetLoss makes a share of what is sent get lost; it is sent again until it arrives.
func (n *Network) SetLoss(share float64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.loss = share
}

// Cut stops everything from one host to another, one way.
func (n *Network) Cut(from, to string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cut[[2]string{from, to}] = true
}

// Heal ends all cuts.
func (n *Network) Heal() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.cut)
	n.wake()
}

// wake has all who wait for the end of a cut look again. Callers hold mu.
func (n *Network) wake() {
	close(n.healed)
	n.healed = make(chan struct{})
}

// SetDown takes a host off the network, or back. Its connections and listeners end.
func (n *Network) SetDown(host string, down bool) {
	n.mu.Lock()
	n.down[host] = down
	var broken []*conn
	var closed []*listener
	if down {
		for c := range n.conns {
			if c.local == host || c.remote == host {
				broken = append(broken, c)
			}
		}
		for _, l := range n.listeners {
			if l.host == host {
				closed = append(closed, l)
			}
		}
	}
	n.wake()
	n.mu.Unlock()
	for _, c := range broken {
		c.reset()
	}
	for _, l := range closed {
		_ = l.Close()
	}
}

// path says how long something sent now takes, and whether it gets through at all. healed
// is closed when that may have changed.
func (n *Network) path(from, to string) (delay time.Duration, open bool, healed <-chan struct{}) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delay = n.delay[0]
	if spread := n.delay[1] - n.delay[0]; spread > 0 {
		delay += time.Duration(n.random.Int64N(int64(spread)))
	}
	for again := resend; n.loss > 0 && n.random.Float64() < n.loss && again < time.Minute; again *= 2 {
		delay += again
	}
	return delay, !n.cut[[2]string{from, to}], n.healed
}

// open reports whether there is no cut between two hosts, either way.
func (n *Network) open(a, b string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return !n.cut[[2]string{a, b}] && !n.cut[[2]string{b, a}]
}

// Listen accepts connections to addr, host:port.
func (h *Host) Listen(_ context.Context, addr string) (net.Listener, error) {
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	if h.n.down[h.name] {
		return nil, &net.OpError{Op: "listen", Net: "mem", Addr: address(addr), Err: syscall.ENETDOWN}
	}
	if h.n.listeners[addr] != nil {
		return nil, &net.OpError{Op: "listen", Net: "mem", Addr: address(addr), Err: syscall.EADDRINUSE}
	}
	l := &listener{n: h.n, host: h.name, addr: addr, queue: make(chan net.Conn, backlog), closed: make(chan struct{})}
	h.n.listeners[addr] = l
	return l, nil
}

// Dial connects to addr, host:port. Into a cut it hangs until ctx ends or the cut does.
func (h *Host) Dial(ctx context.Context, addr string) (net.Conn, error) {
	fail := func(err error) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: "mem", Addr: address(addr), Err: err}
	}
	to, _, err := net.SplitHostPort(addr)
	if err != nil {
		return fail(err)
	}
	for {
		there, open, healed := h.n.path(h.name, to)
		back, openBack, _ := h.n.path(to, h.name)
		if open && openBack {
			if err := sleep(ctx, there+back); err != nil {
				return fail(err)
			}
			break
		}
		select {
		case <-healed:
		case <-ctx.Done():
			return fail(ctx.Err())
		}
	}
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	l := h.n.listeners[addr]
	if l == nil || h.n.down[h.name] || h.n.down[to] {
		return fail(syscall.ECONNREFUSED)
	}
	out, in := newStream(h.n, h.name, to), newStream(h.n, to, h.name)
	out.back, in.back = in, out
	mine := &conn{n: h.n, local: h.name, remote: to, localAddr: address(h.name + ":1"), remoteAddr: address(addr), r: in, w: out}
	theirs := &conn{n: h.n, local: to, remote: h.name, localAddr: address(addr), remoteAddr: address(h.name + ":1"), r: out, w: in}
	select {
	case l.queue <- theirs:
	default:
		return fail(syscall.ECONNREFUSED)
	}
	h.n.conns[mine], h.n.conns[theirs] = true, true
	return mine, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

type address string

// Network implements [net.Addr].
func (address) Network() string { return "mem" }

// String implements [net.Addr].
func (a address) String() string { return string(a) }

type listener struct {
	n          *Network
	host, addr string
	queue      chan net.Conn
	closed     chan struct{}
	once       sync.Once
}

// Accept implements [net.Listener].
func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.queue:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close implements [net.Listener]. Connections that nobody accepted are reset.
func (l *listener) Close() error {
	l.once.Do(func() {
		l.n.mu.Lock()
		if l.n.listeners[l.addr] == l {
			delete(l.n.listeners, l.addr)
		}
		l.n.mu.Unlock()
		close(l.closed)
		for {
			select {
			case c := <-l.queue:
				_ = c.Close()
			default:
				return
			}
		}
	})
	return nil
}

// Addr implements [net.Listener].
func (l *listener) Addr() net.Addr { return address(l.addr) }

// conn is one end of a connection.
type conn struct {
	n                     *Network
	local, remote         string
	localAddr, remoteAddr net.Addr
	r, w                  *stream
}

// Read implements [net.Conn].
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.r.read(p)
	return n, c.wrap("read", err)
}

// Write implements [net.Conn].
func (c *conn) Write(p []byte) (int, error) {
	n, err := c.w.write(p)
	return n, c.wrap("write", err)
}

func (c *conn) wrap(op string, err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	return &net.OpError{Op: op, Net: "mem", Source: c.localAddr, Addr: c.remoteAddr, Err: err}
}

// Close implements [net.Conn]. What was written still arrives. The other end hears of it
// like everything else: not through a cut.
func (c *conn) Close() error {
	c.n.mu.Lock()
	delete(c.n.conns, c)
	c.n.mu.Unlock()
	c.w.finish()
	c.r.ignore()
	return nil
}

// reset breaks the connection at both ends, at once.
func (c *conn) reset() {
	c.n.mu.Lock()
	delete(c.n.conns, c)
	c.n.mu.Unlock()
	c.w.abort(syscall.ECONNRESET)
	c.r.abort(syscall.ECONNRESET)
}

// LocalAddr implements [net.Conn].
func (c *conn) LocalAddr() net.Addr { return c.localAddr }

// RemoteAddr implements [net.Conn].
func (c *conn) RemoteAddr() net.Addr { return c.remoteAddr }

// SetDeadline implements [net.Conn].
func (c *conn) SetDeadline(t time.Time) error {
	c.r.setDeadline(true, t)
	c.w.setDeadline(false, t)
	return nil
}

// SetReadDeadline implements [net.Conn].
func (c *conn) SetReadDeadline(t time.Time) error { c.r.setDeadline(true, t); return nil }

// SetWriteDeadline implements [net.Conn].
func (c *conn) SetWriteDeadline(t time.Time) error { c.w.setDeadline(false, t); return nil }

// stream is one direction of a connection.
type stream struct {
	n        *Network
	from, to string
	back     *stream // the other direction

	mu       sync.Mutex
	chunks   []chunk
	size     int
	finished bool          // nothing more will be written
	ignored  bool          // nothing more will be read
	refused  bool          // the writer's other direction was answered with a reset
	err      error         // the stream is broken
	changed  chan struct{} // closed and replaced at every change
	// readBy and writeBy are deadlines; zero is none.
	readBy, writeBy time.Time
}

// chunk is what one write sent.
type chunk struct {
	data []byte
	at   time.Time // when it arrives, if the path is open then
}

func newStream(n *Network, from, to string) *stream {
	return &stream{n: n, from: from, to: to, changed: make(chan struct{})}
}

// notify wakes both ends. Callers hold mu.
func (s *stream) notify() {
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *stream) finish() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.finished = true
	s.notify()
}

// ignore throws away what nobody will read any more.
func (s *stream) ignore() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ignored, s.chunks, s.size = true, nil, 0
	s.notify()
}

// refuse has the reader find what has arrived or is on its way, then a reset: its own
// writes fail, and no connection is broken for the writer alone. gRPC counts on that: after
// a failed write it tries again, without a pause, until the reader has noticed as well.
func (s *stream) refuse() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refused = true
	s.notify()
}

func (s *stream) abort(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err, s.chunks = err, nil
	}
	s.notify()
}

func (s *stream) setDeadline(reader bool, t time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if reader {
		s.readBy = t
	} else {
		s.writeBy = t
	}
	s.notify()
}

func (s *stream) write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	delay, _, _ := s.n.path(s.from, s.to)
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case s.err != nil:
			return 0, s.err
		case s.finished:
			return 0, net.ErrClosed
		case s.ignored && s.n.open(s.from, s.to):
			s.mu.Unlock()
			s.back.refuse()
			s.mu.Lock()
			return 0, syscall.EPIPE
		case s.ignored:
			return len(p), nil // lost, and so would be the answer
		case expired(s.writeBy):
			return 0, os.ErrDeadlineExceeded
		case s.size < window:
			at := time.Now().Add(delay)
			if n := len(s.chunks); n > 0 && s.chunks[n-1].at.After(at) {
				at = s.chunks[n-1].at // in order, like TCP
			}
			s.chunks = append(s.chunks, chunk{data: append([]byte(nil), p...), at: at})
			s.size += len(p)
			s.notify()
			return len(p), nil
		}
		s.wait(nil, s.writeBy)
	}
}

func (s *stream) read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case s.err != nil:
			return 0, s.err
		case s.ignored:
			return 0, net.ErrClosed
		case expired(s.readBy):
			return 0, os.ErrDeadlineExceeded
		case len(s.chunks) == 0 && s.refused:
			return 0, syscall.ECONNRESET
		case len(s.chunks) == 0 && s.finished:
			if _, open, healed := s.n.path(s.from, s.to); !open {
				s.wait(healed, s.readBy)
				continue
			}
			return 0, io.EOF
		case len(s.chunks) == 0:
			s.wait(nil, s.readBy)
			continue
		}
		head := &s.chunks[0]
		if time.Now().Before(head.at) && !s.refused {
			s.wait(nil, earlier(head.at, s.readBy))
			continue
		}
		if _, open, healed := s.n.path(s.from, s.to); !open && !s.refused {
			s.wait(healed, s.readBy)
			continue
		}
		n := copy(p, head.data)
		head.data = head.data[n:]
		s.size -= n
		if len(head.data) == 0 {
			s.chunks = s.chunks[1:]
		}
		s.notify()
		return n, nil
	}
}

// wait lets go of mu until something changed, the time comes or healed closes.
func (s *stream) wait(healed <-chan struct{}, until time.Time) {
	changed := s.changed
	s.mu.Unlock()
	defer s.mu.Lock()
	var due <-chan time.Time
	if !until.IsZero() {
		t := time.NewTimer(time.Until(until))
		defer t.Stop()
		due = t.C
	}
	select {
	case <-changed:
	case <-healed:
	case <-due:
	}
}

func expired(t time.Time) bool { return !t.IsZero() && !time.Now().Before(t) }

func earlier(a, b time.Time) time.Time {
	if b.IsZero() || a.Before(b) {
		return a
	}
	return b
}

// String tells the faults of now.
func (n *Network) String() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return fmt.Sprintf("delay %v to %v, loss %.2f, %d cuts, %d connections", n.delay[0], n.delay[1], n.loss, len(n.cut), len(n.conns))
}
