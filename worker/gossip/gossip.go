package gossip

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"log"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/skep-dev/skep/core/netdb"
)

// Port is where Docker's nodes gossip, over TCP and UDP. They know no other.
const Port = 7946

// Config is what a Gossip works with. Log is required.
type Config struct {
	Log *slog.Logger
	// Registerer takes the metrics; nil keeps them to the Gossip.
	Registerer prometheus.Registerer
}

// Key protects the messages.
type Key struct {
	// Time orders the keys of a swarm, and identifies each.
	Time uint64
	Key  []byte
}

// keysWanted is how many keys a swarm has: the newest, which nobody sends with yet, the one in
// use, and the one before.
const keysWanted = 3

// Session is what the swarm tells a node of itself and of the managers.
type Session struct {
	NodeID string
	// Bind is the address to listen at; unspecified or zero for all.
	Bind netip.Addr
	// Advertise is the address that the others reach this node at.
	Advertise netip.Addr
	Keys      []Key
	// Managers are the addresses of the other managers.
	Managers []netip.Addr
}

// equal reports whether both are the same.
func (s Session) equal(o Session) bool {
	return s.NodeID == o.NodeID && s.Bind == o.Bind && s.Advertise == o.Advertise && slices.Equal(s.Managers, o.Managers) &&
		slices.EqualFunc(s.Keys, o.Keys, func(a, b Key) bool { return a.Time == b.Time && bytes.Equal(a.Key, b.Key) })
}

// Rows are what a node publishes, and for whom.
type Rows struct {
	// NodeID is this node's in the swarm, empty while that has no Docker Engines. Without it, or
	// in the session of another swarm, this node takes no part.
	NodeID string
	// Peers are the addresses of some of them.
	Peers []netip.Addr
	// Networks are those that this node is in, with its rows in each.
	Networks map[string][]netdb.Row
}

// Gossip is this node's part in Docker's gossip. Its methods may be called from any goroutine.
type Gossip struct {
	cfg Config
	// transport opens the port; tests have a network of their own.
	transport func(ctx context.Context, s Session, logger *log.Logger) (memberlist.Transport, error)

	mu      sync.Mutex
	session Session
	rows    Rows
	changed chan struct{} // closed and replaced when session or rows changed
	now     *cluster      // nil while there is none
}

// New returns a Gossip that does nothing before Run.
func New(cfg Config) *Gossip {
	g := &Gossip{cfg: cfg, transport: newTransport, changed: make(chan struct{})}
	if cfg.Registerer != nil {
		cfg.Registerer.MustRegister(newCollector(g))
	}
	return g
}

// SetSession takes over what the swarm says; the zero Session is that of a node in none.
func (g *Gossip) SetSession(s Session) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.session.equal(s) {
		g.session = s
		g.wake()
	}
}

// SetRows takes over what to publish. The caller leaves r as it is from then on.
func (g *Gossip) SetRows(r Rows) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if r.NodeID == "" && g.rows.NodeID == "" {
		return
	}
	g.rows = r
	g.wake()
}

// wake tells Run of a change. Callers hold mu.
func (g *Gossip) wake() {
	close(g.changed)
	g.changed = make(chan struct{})
}

func (g *Gossip) current() *cluster {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.now
}

// wish is what there shall be.
type wish struct {
	session Session
	rows    Rows
	changed <-chan struct{}
}

func (g *Gossip) wish() wish {
	g.mu.Lock()
	defer g.mu.Unlock()
	return wish{g.session, g.rows, g.changed}
}

// on reports whether this node shall take part, and can.
func (w wish) on() bool {
	return w.rows.NodeID != "" && w.rows.NodeID == w.session.NodeID && w.session.Advertise.IsValid() && len(w.session.Keys) == keysWanted
}

// name is this node's among the others: 12 hex digits as Docker's, the same after a restart,
// so that nobody takes it for another. A node that moves gets another, since Docker's nodes
// give no name a second address.
func (s Session) name() string {
	sum := sha256.Sum256([]byte("gossip " + s.NodeID + " " + s.Advertise.String()))
	return hex.EncodeToString(sum[:6])
}

// ring returns the keys in the order in which memberlist is to try them. Docker's nodes send
// with the one in the middle: all have it by then.
func (s Session) ring() [][]byte {
	keys := slices.SortedFunc(slices.Values(s.Keys), func(a, b Key) int { return cmp.Compare(a.Time, b.Time) })
	return [][]byte{keys[1].Key, keys[0].Key, keys[2].Key}
}

// The pause after an attempt to take part that failed, which doubles with each that follows.
const (
	againFirst = 5 * time.Second
	againLast  = 5 * time.Minute
)

// Run takes part whenever there is somebody to gossip with, until ctx ends.
func (g *Gossip) Run(ctx context.Context) error {
	pause := againFirst
	for ctx.Err() == nil {
		w := g.wish()
		if !w.on() {
			select {
			case <-ctx.Done():
			case <-w.changed:
			}
			continue
		}
		begun := time.Now()
		err := g.takePart(ctx, w)
		if err == nil || ctx.Err() != nil {
			pause = againFirst
			continue
		}
		if time.Since(begun) > againLast {
			pause = againFirst // it had worked
		}
		g.cfg.Log.Error("gossip with Docker Engines failed, trying again: they do not hear of this node's endpoints", slog.Any("error", err))
		g.rest(ctx, w, pause)
		pause = min(2*pause, againLast)
	}
	return nil
}

// rest waits for a time, or until this node shall not take part as it tried to.
func (g *Gossip) rest(ctx context.Context, tried wish, pause time.Duration) {
	again := time.NewTimer(pause)
	defer again.Stop()
	for w := tried; w.on() && w.session.equal(tried.session); w = g.wish() {
		select {
		case <-ctx.Done():
			return
		case <-again.C:
			return
		case <-w.changed:
		}
	}
}

// takePart is a member of the cluster until ctx ends or it shall not be one, or not so.
func (g *Gossip) takePart(ctx context.Context, w wish) error {
	c, err := g.open(ctx, w)
	if err != nil {
		return err
	}
	g.setCurrent(c)
	g.cfg.Log.Info("gossip with Docker Engines begins", slog.String("name", w.session.name()), slog.Any("address", w.session.Advertise))
	err = c.run(ctx, w, g.wish)
	g.setCurrent(nil)
	g.cfg.Log.Info("gossip with Docker Engines ends")
	return err
}

func (g *Gossip) setCurrent(c *cluster) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.now = c
}
