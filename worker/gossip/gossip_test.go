package gossip

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/skep-dev/skep/core/netdb"
)

// memory is a network in memory: packets to nobody are lost, connections refused.
type memory struct {
	mu    sync.Mutex
	ports map[string]*port
	// seen counts who was reached, by address.
	seen map[string]int
}

type port struct {
	net     *memory
	addr    *net.TCPAddr
	packets chan *memberlist.Packet
	streams chan net.Conn
	done    chan struct{}
	once    sync.Once
}

func (m *memory) open(_ context.Context, s Session, _ *log.Logger) (memberlist.Transport, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	addr := &net.TCPAddr{IP: s.Advertise.AsSlice(), Port: Port}
	if m.ports[addr.String()] != nil {
		return nil, errors.New("address already in use")
	}
	p := &port{net: m, addr: addr, packets: make(chan *memberlist.Packet, 64), streams: make(chan net.Conn), done: make(chan struct{})}
	m.ports[addr.String()] = p
	return p, nil
}

func (m *memory) at(addr string) *port {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.seen[addr]++
	return m.ports[addr]
}

func (p *port) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return p.addr.IP, p.addr.Port, nil
}
func (p *port) PacketCh() <-chan *memberlist.Packet { return p.packets }
func (p *port) StreamCh() <-chan net.Conn           { return p.streams }

func (p *port) WriteTo(b []byte, addr string) (time.Time, error) {
	if to := p.net.at(addr); to != nil {
		select {
		case to.packets <- &memberlist.Packet{Buf: slices.Clone(b), From: p.addr, Timestamp: time.Now()}:
		default: // lost
		}
	}
	return time.Now(), nil
}

func (p *port) DialTimeout(addr string, _ time.Duration) (net.Conn, error) {
	to := p.net.at(addr)
	if to == nil {
		return nil, fmt.Errorf("dial %s: connection refused", addr)
	}
	here, there := net.Pipe()
	select {
	case to.streams <- &named{there, p.addr}:
		return &named{here, to.addr}, nil
	case <-to.done:
		return nil, fmt.Errorf("dial %s: connection refused", addr)
	}
}

func (p *port) Shutdown() error {
	p.once.Do(func() {
		close(p.done)
		p.net.mu.Lock()
		defer p.net.mu.Unlock()
		delete(p.net.ports, p.addr.String())
	})
	return nil
}

// named is a connection that knows the other end's address.
type named struct {
	net.Conn

	remote net.Addr
}

func (n *named) RemoteAddr() net.Addr { return n.remote }

// member is one Gossip of a test.
type member struct {
	*Gossip

	addr netip.Addr
	rows Rows
	stop func()
}

func newMemory() *memory { return &memory{ports: map[string]*port{}, seen: map[string]int{}} }

func testKeys(first uint64) []Key {
	var out []Key
	for i := range uint64(3) {
		out = append(out, Key{first + i, []byte(fmt.Sprintf("0123456789abcde%d", (first+i)%10))})
	}
	return out
}

// start runs member i, whose manager is member 1.
func (m *memory) start(t *testing.T, i byte) *member {
	t.Helper()
	g := New(Config{Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	g.transport = m.open
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	out := &member{Gossip: g, addr: netip.AddrFrom4([4]byte{10, 0, 0, i}), rows: Rows{NodeID: fmt.Sprint("node", i)}}
	out.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("node %d ended: %v", i, err)
		}
	})
	out.session(testKeys(1))
	out.SetRows(out.rows)
	return out
}

func (g *member) session(keys []Key) {
	g.SetSession(Session{NodeID: g.rows.NodeID, Advertise: g.addr, Keys: keys, Managers: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, 1})}})
}

// publish makes text the only row in a network; none leaves it.
func (g *member) publish(text ...string) {
	g.rows.Networks = map[string][]netdb.Row{}
	for _, v := range text {
		g.rows.Networks["net"] = append(g.rows.Networks["net"], netdb.Row{Table: "t", Key: g.rows.NodeID + strings.ReplaceAll(v, "/", ""), Value: []byte(v)})
	}
	g.SetRows(g.rows)
}

func (g *member) sees() string {
	c := g.current()
	if c == nil {
		return ""
	}
	c.mu.Lock()
	rows := c.db.Others("net")
	c.mu.Unlock()
	var out []string
	for _, r := range rows {
		out = append(out, string(r.Value))
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// within waits, of the bubble's time, until nodes see what they shall.
func within(t *testing.T, limit time.Duration, want string, nodes ...*member) {
	t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(100 * time.Millisecond) {
		var wrong []string
		for _, g := range nodes {
			if got := g.sees(); got != want {
				wrong = append(wrong, g.rows.NodeID+" sees "+got)
			}
		}
		if len(wrong) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("after %s %v, want %q", limit, wrong, want)
		}
	}
}

// TestGossip: what one publishes the others see, until it is withdrawn, the network left, or
// nobody takes part any more.
func TestGossip(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		defer time.Sleep(time.Minute) // memberlist's probes under way end in time
		m := newMemory()
		a, b, c := m.start(t, 1), m.start(t, 2), m.start(t, 3)
		for _, g := range []*member{a, b, c} {
			defer g.stop()
		}
		b.publish("b")
		c.publish("c")
		a.publish("a")
		within(t, 10*time.Second, "a c", b)
		within(t, 10*time.Second, "a b", c)
		a.publish("a", "more")
		within(t, 2*time.Second, "a b more", c)
		a.publish("more")
		within(t, 2*time.Second, "b more", c)
		a.publish()
		within(t, 2*time.Second, "b", c)
		a.publish("again")
		within(t, 2*time.Second, "again b", c)

		a.SetRows(Rows{}) // the swarm has no Docker Engine any more
		within(t, 3*time.Second, "b", c)
		time.Sleep(5 * time.Second)
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.ports["10.0.0.1:7946"] != nil {
			t.Error("the port is still open")
		}
	})
}

// TestOff: without Docker Engines, or in the session of another swarm, nothing is open.
func TestOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		defer time.Sleep(time.Minute) // memberlist's probes under way end in time
		m := newMemory()
		a := m.start(t, 1)
		defer a.stop()
		for name, set := range map[string]func(){
			"no Docker Engine": func() { a.SetRows(Rows{}) },
			"another swarm":    func() { a.SetRows(Rows{NodeID: "else"}) },
			"no session":       func() { a.SetRows(a.rows); a.SetSession(Session{}) },
			"a key too few":    func() { a.session(testKeys(1)[:2]) },
		} {
			a.SetRows(a.rows)
			a.session(testKeys(1))
			synctest.Wait()
			m.mu.Lock()
			if len(m.ports) != 1 {
				t.Errorf("%s: nothing was open before", name)
			}
			m.mu.Unlock()
			set()
			time.Sleep(5 * time.Second)
			m.mu.Lock()
			if len(m.ports) != 0 {
				t.Errorf("%s: a port is open", name)
			}
			m.mu.Unlock()
		}
	})
}

// TestRestart: a daemon that starts again withdraws nothing meanwhile, and what has changed
// is known at once afterwards. One that stays away is noticed.
func TestRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		defer time.Sleep(time.Minute) // memberlist's probes under way end in time
		m := newMemory()
		a, b, c := m.start(t, 1), m.start(t, 2), m.start(t, 3)
		defer a.stop()
		defer b.stop()
		a.publish("a")
		b.publish("b")
		c.publish("c", "gone")
		within(t, 10*time.Second, "a c gone", b)
		c.stop()
		time.Sleep(2 * time.Second)
		within(t, 0, "a c gone", b)
		c = m.start(t, 3)
		c.publish("c", "new")
		within(t, 10*time.Second, "a c new", b)
		within(t, 10*time.Second, "a b", c)
		c.stop()
		within(t, time.Minute, "a", b)
		c = m.start(t, 3)
		defer c.stop()
		c.publish("c")
		within(t, 10*time.Second, "a c", b)
	})
}

// TestKeysRotate: members that have heard of a rotation and such that have not understand
// each other.
func TestKeysRotate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		defer time.Sleep(time.Minute) // memberlist's probes under way end in time
		m := newMemory()
		a, b := m.start(t, 1), m.start(t, 2)
		defer a.stop()
		defer b.stop()
		a.publish("a")
		b.publish("0")
		within(t, 10*time.Second, "0", a)
		for round := range uint64(4) {
			a.session(testKeys(2 + round))
			b.publish(fmt.Sprint("half", round))
			within(t, 2*time.Second, fmt.Sprint("half", round), a)
			b.session(testKeys(2 + round))
			b.publish(fmt.Sprint("whole", round))
			within(t, 2*time.Second, fmt.Sprint("whole", round), a)
		}
		time.Sleep(20 * time.Second)
		within(t, 0, "whole3", a)
		if got := a.current().keyring.GetKeys(); len(got) != 3 || string(got[0]) != string(testKeys(5)[1].Key) {
			t.Errorf("the keys are %q", got)
		}

		// Who has none of the keys is told nothing.
		x := m.start(t, 9)
		defer x.stop()
		x.session([]Key{{1, []byte("x123456789abcdef")}, {2, []byte("y123456789abcdef")}, {3, []byte("z123456789abcdef")}})
		x.publish("x")
		time.Sleep(10 * time.Second)
		within(t, 0, "", x)
		within(t, 0, "whole3", a)
	})
}

// TestPeerComesLater: a peer that does not answer yet is tried until it does.
func TestPeerComesLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		defer time.Sleep(time.Minute) // memberlist's probes under way end in time
		m := newMemory()
		b := m.start(t, 2)
		defer b.stop()
		b.publish("b")
		time.Sleep(10 * time.Minute)
		m.mu.Lock()
		if n := m.seen["10.0.0.1:7946"]; n < 10 || n > 20 {
			t.Errorf("it was tried %d times in ten minutes", n)
		}
		m.mu.Unlock()
		a := m.start(t, 1)
		defer a.stop()
		a.publish("a")
		within(t, 70*time.Second, "b", a)
	})
}

// TestAskedBeforeItIsKnown: a node that has just joined asks before all have heard of it. Docker
// Engines wait half a minute for an answer, with which they begin to have the network.
func TestAskedBeforeItIsKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		defer time.Sleep(time.Minute) // memberlist's probes under way end in time
		m := newMemory()
		a := m.start(t, 1)
		defer a.stop()
		a.publish("a")
		synctest.Wait()
		db := netdb.New("newcomer", 1)
		db.Join("net")
		msg, at := db.Sync([]string{"net"}, true, time.Now())
		for i := range 3 * maxEarly { // and others, who never come
			other := netdb.New(fmt.Sprint("other", i), 1)
			ask, _ := other.Sync([]string{"net"}, true, time.Now())
			a.current().NotifyMsg(ask)
		}
		a.current().NotifyMsg(msg)
		if n := len(a.current().early); n > maxEarly {
			t.Errorf("%d wait to be known", n)
		}
		ear := &listener{heard: make(chan []byte, 16)}
		tr, err := m.open(t.Context(), Session{Advertise: netip.AddrFrom4([4]byte{10, 0, 0, 9})}, nil)
		if err != nil {
			t.Fatal(err)
		}
		cfg := memberlist.DefaultLANConfig()
		cfg.Name, cfg.Transport, cfg.Delegate, cfg.Logger = "newcomer", tr, ear, log.New(io.Discard, "", 0)
		cfg.AdvertiseAddr, cfg.AdvertisePort = "10.0.0.9", Port
		if cfg.Keyring, err = memberlist.NewKeyring([][]byte{testKeys(1)[1].Key}, testKeys(1)[1].Key); err != nil {
			t.Fatal(err)
		}
		list, err := memberlist.Create(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer list.Shutdown()
		if _, err := list.Join([]string{"10.0.0.1:7946"}); err != nil {
			t.Fatal(err)
		}
		for end := time.After(5 * time.Second); ; {
			select {
			case text := <-ear.heard:
				if answer, err := db.Receive(text, time.Now()); err == nil && answer.Sync != nil && !answer.Sync.Unsolicited && answer.Sync.Time > at {
					return
				}
			case <-end:
				t.Fatal("it is not answered")
			}
		}
	})
}

// listener is a member that only listens.
type listener struct{ heard chan []byte }

func (*listener) NodeMeta(int) []byte             { return nil }
func (*listener) GetBroadcasts(int, int) [][]byte { return nil }
func (*listener) LocalState(bool) []byte          { return nil }
func (*listener) MergeRemoteState([]byte, bool)   {}
func (l *listener) NotifyMsg(b []byte) {
	select {
	case l.heard <- slices.Clone(b):
	default:
	}
}
