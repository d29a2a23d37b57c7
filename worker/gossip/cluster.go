package gossip

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
	"golang.org/x/sync/errgroup"

	"github.com/skep-dev/skep/core/netdb"
)

const (
	// maxBroadcasts bounds the node and network events that wait to be passed on.
	maxBroadcasts = 4096
	// maxMembers bounds the nodes that memberlist takes for alive, maxName their names.
	maxMembers = 1 << 14
	maxName    = 256
	// maxAnswers is how many bulk synchronizations are answered at once; further ones wait, one
	// for each node that asked.
	maxAnswers = 8
	// maxEarly bounds the nodes that asked before they are known, of which more are all
	// forgotten, and those that wait, of which more are not answered. earlyAge is how long the
	// former are remembered.
	maxEarly = 256
	earlyAge = 30 * time.Second
	// gossipNodes is how many members of a network hear of its events at a time.
	gossipNodes = 3
	// syncTries is how many members of a network are asked in turn when rows are compared.
	syncTries = 2
	syncWait  = 30 * time.Second
	// askTries is how often a member is asked for all rows of a network that this node has
	// joined, and askWait how long each time.
	askTries = 3
	askWait  = 3 * time.Second
	// leaveWait bounds how long others are waited for to hear that this node leaves.
	leaveWait = time.Second
)

// The periods of what is done again and again, as in Docker.
const (
	gossipEvery = 200 * time.Millisecond
	reapEvery   = 5 * time.Second
	syncEvery   = 30 * time.Second
	returnEvery = time.Second
	// Peers out of reach are tried again after the first of these pauses, then after twice as
	// long each time, up to the second.
	rejoinFirst, rejoinLast = time.Second, time.Minute
)

// cluster is this node as a member.
type cluster struct {
	log        *slog.Logger
	name       string
	list       *memberlist.Memberlist
	keyring    *memberlist.Keyring
	broadcasts *memberlist.TransmitLimitedQueue
	answers    chan struct{} // holds a token for each answer under way
	tasks      sync.WaitGroup
	end        context.CancelFunc // of connections to others
	size       atomic.Int64       // how many members there are

	mu     sync.Mutex
	db     *netdb.DB
	closed bool // no task begins any more
	// members are the nodes in reach.
	members map[string]*memberlist.Node
	// waiting are bulk synchronizations without an answer, by the node asked.
	waiting map[string][]*asked
	// early are bulk synchronizations of nodes that are not known yet, by node: they are
	// answered when it is.
	early map[string]early
	// late are those that wait for others to be answered, by node.
	late map[string]*netdb.Sync
	// fresh are networks whose members are to be asked for all rows, with the event by which
	// this node joined.
	fresh map[string]netdb.Broadcast
}

// asked is a bulk synchronization under way.
type asked struct {
	time uint64
	done chan struct{}
}

// open makes this node a member of a cluster of its own, which others can join.
func (g *Gossip) open(ctx context.Context, w wish) (*cluster, error) {
	ring := w.session.ring()
	keyring, err := memberlist.NewKeyring(ring, ring[0])
	if err != nil {
		return nil, fmt.Errorf("take part in gossip: %w", err)
	}
	ctx, end := context.WithCancel(ctx)
	c := &cluster{
		log: g.cfg.Log, name: w.session.name(), keyring: keyring, answers: make(chan struct{}, maxAnswers), end: end,
		db: netdb.New(w.session.name(), uint64(time.Now().Unix())), members: map[string]*memberlist.Node{}, waiting: map[string][]*asked{},
		early: map[string]early{}, late: map[string]*netdb.Sync{},
		fresh: map[string]netdb.Broadcast{},
	}
	c.broadcasts = &memberlist.TransmitLimitedQueue{RetransmitMult: retransmitMult, NumNodes: func() int { return int(c.size.Load()) + 1 }}
	cfg := memberlist.DefaultLANConfig() // with Docker's settings, but for what follows
	cfg.Name, cfg.Keyring, cfg.Delegate, cfg.Events, cfg.Alive = c.name, keyring, c, c, c
	cfg.AdvertiseAddr, cfg.AdvertisePort, cfg.BindPort = w.session.Advertise.String(), Port, Port
	cfg.Logger = slog.NewLogLogger(g.cfg.Log.Handler(), slog.LevelDebug)
	tr, err := g.transport(ctx, w.session, cfg.Logger)
	if err != nil {
		end()
		return nil, fmt.Errorf("take part in gossip: %w", err)
	}
	cfg.Transport = tr
	if c.list, err = memberlist.Create(cfg); err != nil {
		end()
		return nil, errors.Join(fmt.Errorf("take part in gossip: %w", err), tr.Shutdown())
	}
	return c, nil
}

// retransmitMult is Docker's, for node and network events.
const retransmitMult = 4

// run does what a member does until ctx ends or this node shall be no member, or another.
func (c *cluster) run(whole context.Context, first wish, wished func() wish) error {
	group, ctx := errgroup.WithContext(whole)
	defer context.AfterFunc(ctx, c.end)()
	moved := errors.New("another session")
	var left atomic.Bool
	freshen := make(chan struct{}, 1)
	peers := make(chan []netip.Addr, 1)
	group.Go(func() error {
		c.pass(c.announce())
		for {
			w := wished()
			if !w.on() || w.session.name() != c.name || w.session.Bind != first.session.Bind {
				left.Store(true)
				return moved
			}
			if err := c.setKeys(w.session.ring()); err != nil {
				return err
			}
			if c.setRows(w.rows) {
				poke(freshen)
			}
			replace(peers, c.peersOf(w))
			select {
			case <-ctx.Done():
				return nil
			case <-w.changed:
			}
		}
	})
	group.Go(func() error { return c.rejoin(ctx, peers) })
	group.Go(func() error { return c.syncFresh(ctx, freshen) })
	group.Go(func() error {
		return every(ctx, gossipEvery, func() {
			c.gossip()
			if c.isFresh() {
				poke(freshen)
			}
		})
	})
	group.Go(func() error { return every(ctx, reapEvery, c.reap) })
	group.Go(func() error { return every(ctx, syncEvery, func() { c.syncAll(ctx) }) })
	group.Go(func() error { return every(ctx, returnEvery, func() { c.callBack(ctx) }) })
	err := group.Wait()
	if left.Load() {
		err = nil
		if whole.Err() == nil { // else the daemon ends, and its containers go on
			c.leave()
		}
	}
	return errors.Join(err, c.close())
}

// close ends the membership without a word, as a restart does: others find out.
func (c *cluster) close() error {
	c.end()
	err := c.list.Shutdown()
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.tasks.Wait()
	if err != nil {
		return fmt.Errorf("end gossip: %w", err)
	}
	return nil
}

// leave tells others that this node is no member any more.
func (c *cluster) leave() {
	c.mu.Lock()
	b, members := c.db.Depart(), len(c.members)
	c.mu.Unlock()
	if members == 0 {
		return
	}
	c.pass(b)
	gone := time.NewTimer(leaveWait)
	defer gone.Stop()
	<-gone.C // several rounds of gossip
	if err := c.list.Leave(leaveWait); err != nil {
		c.log.Debug("leave gossip", slog.Any("error", err))
	}
}

func (c *cluster) announce() netdb.Broadcast {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.db.Announce()
}

// setKeys makes the keys those given, of which the first is sent with.
func (c *cluster) setKeys(ring [][]byte) error {
	for _, k := range ring {
		if err := c.keyring.AddKey(k); err != nil {
			return fmt.Errorf("add gossip key: %w", err)
		}
	}
	if err := c.keyring.UseKey(ring[0]); err != nil {
		return fmt.Errorf("use gossip key: %w", err)
	}
	for _, k := range slices.Clone(c.keyring.GetKeys()) {
		if slices.ContainsFunc(ring, func(o []byte) bool { return string(o) == string(k) }) {
			continue
		}
		if err := c.keyring.RemoveKey(k); err != nil {
			return fmt.Errorf("remove gossip key: %w", err)
		}
	}
	return nil
}

// setRows makes this node's networks and rows those given, and reports whether there are
// networks that it has just joined.
func (c *cluster) setRows(r Rows) bool {
	now := time.Now()
	var events []netdb.Broadcast
	c.mu.Lock()
	was := c.db.Networks()
	for _, id := range was {
		if _, stays := r.Networks[id]; !stays {
			events = append(events, c.db.Leave(id, now))
			delete(c.fresh, id)
		}
	}
	for id, rows := range r.Networks {
		if !slices.Contains(was, id) {
			c.fresh[id] = c.db.Join(id)
			events = append(events, c.fresh[id])
		}
		c.db.Set(id, rows, now)
	}
	fresh := len(c.fresh) > 0
	c.mu.Unlock()
	c.pass(events...)
	return fresh
}

// peersOf are the addresses of nodes that this one shall find.
func (c *cluster) peersOf(w wish) []netip.Addr {
	all := slices.DeleteFunc(slices.Concat(w.rows.Peers, w.session.Managers), func(a netip.Addr) bool {
		return !a.IsValid() || a == w.session.Advertise
	})
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all)
}

// isFresh reports whether there are members to ask for all rows.
func (c *cluster) isFresh() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id := range c.fresh {
		if len(c.db.Members(id)) > 0 {
			return true
		}
	}
	return false
}

// memberAt returns the name of the member at an address, and the networks that both are in.
func (c *cluster) memberAt(addr string) (name string, common map[string][]byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	common = map[string][]byte{}
	for name, n := range c.members {
		if n.Address() != addr {
			continue
		}
		for _, id := range c.db.Common(name) {
			common[id] = nil
		}
		if len(common) > 0 {
			return name, common
		}
	}
	return "", nil
}

// rejoin joins the peers that are not in reach, again and again, and compares rows with each.
func (c *cluster) rejoin(ctx context.Context, peers <-chan []netip.Addr) error {
	var known []netip.Addr
	pause := rejoinFirst
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case next := <-peers:
			if slices.Equal(next, known) {
				continue
			}
			known, pause = next, rejoinFirst
		case <-timer.C:
		}
		for _, a := range c.missing(known) {
			if ctx.Err() != nil {
				return nil
			}
			if _, err := c.list.Join([]string{net.JoinHostPort(a.String(), strconv.Itoa(Port))}); err != nil {
				c.log.Debug("gossip peer not in reach", slog.Any("address", a), slog.Any("error", err))
				continue
			}
			c.pass(c.announce())
			if name, common := c.memberAt(netip.AddrPortFrom(a, Port).String()); len(common) > 0 {
				c.tasks.Go(func() { c.askAll(ctx, name, common) })
			}
		}
		timer.Reset(pause)
		pause = min(2*pause, rejoinLast)
	}
}

// missing returns those addresses of which no node is in reach.
func (c *cluster) missing(peers []netip.Addr) []netip.Addr {
	c.mu.Lock()
	defer c.mu.Unlock()
	here := map[netip.Addr]bool{}
	for _, n := range c.members {
		if a, ok := netip.AddrFromSlice(n.Addr); ok {
			here[a.Unmap()] = true
		}
	}
	return slices.DeleteFunc(slices.Clone(peers), func(a netip.Addr) bool { return here[a.Unmap()] })
}

// callBack tries one node that failed.
func (c *cluster) callBack(ctx context.Context) {
	c.mu.Lock()
	failed := c.db.Failed()
	c.mu.Unlock()
	if len(failed) == 0 {
		return
	}
	addr := failed[rand.IntN(len(failed))]
	if _, err := c.list.Join([]string{addr}); err != nil {
		return
	}
	c.pass(c.announce())
	if name, common := c.memberAt(addr); len(common) > 0 {
		c.askAll(ctx, name, common)
	}
}

// gossip tells some members of each network what changed in it.
func (c *cluster) gossip() {
	c.mu.Lock()
	messages := c.db.Gossip()
	type packet struct {
		to  *memberlist.Node
		msg []byte
	}
	var packets []packet
	for _, m := range messages {
		rand.Shuffle(len(m.Members), func(i, j int) { m.Members[i], m.Members[j] = m.Members[j], m.Members[i] })
		for _, name := range m.Members[:min(len(m.Members), gossipNodes)] {
			if n := c.members[name]; n != nil {
				packets = append(packets, packet{n, m.Msg})
			}
		}
	}
	c.mu.Unlock()
	for _, p := range packets {
		if err := c.list.SendBestEffort(p.to, p.msg); err != nil {
			c.log.Debug("gossip not sent", slog.String("to", p.to.Name), slog.Any("error", err))
		}
	}
}

func (c *cluster) reap() {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	c.db.Reap(now)
	maps.DeleteFunc(c.early, func(_ string, e early) bool { return now.Sub(e.at) > earlyAge })
}

func (c *cluster) stats() netdb.Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.db.Stats()
}

// every calls f again and again, first after a random part of the period, until ctx ends.
func every(ctx context.Context, period time.Duration, f func()) error {
	timer := time.NewTimer(rand.N(period))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		f()
		timer.Reset(period)
	}
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// replace makes the one value of a channel that only the caller sends to v.
func replace[T any](c chan T, v T) {
	select {
	case <-c:
	default:
	}
	c <- v
}
