package gossip

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/skep-dev/skep/core/netdb"
)

// syncFresh asks all members of networks that this node joined for all rows. Networks without
// members wait for some, which may say what a former process of this node published.
func (c *cluster) syncFresh(ctx context.Context, wake <-chan struct{}) error {
	var group errgroup.Group
	group.SetLimit(maxAnswers)
	for {
		select {
		case <-ctx.Done():
			return group.Wait()
		case <-wake:
		}
		for name, ids := range c.takeFresh() {
			group.Go(func() error {
				c.askAll(ctx, name, ids)
				return nil
			})
		}
	}
}

// takeFresh returns which members are to be asked for the rows of which networks, with the
// events by which this node joined those.
func (c *cluster) takeFresh() map[string]map[string][]byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := map[string]map[string][]byte{}
	for id, event := range c.fresh {
		members := c.db.Members(id)
		for _, name := range members {
			if out[name] == nil {
				out[name] = map[string][]byte{}
			}
			out[name][id] = event.Msg
		}
		if len(members) > 0 {
			delete(c.fresh, id)
		}
	}
	return out
}

// askAll exchanges all rows of networks with a member. That does not answer while it holds
// this node for failed, as it may after a restart.
func (c *cluster) askAll(ctx context.Context, name string, events map[string][]byte) {
	networks := slices.Sorted(maps.Keys(events))
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, id := range networks {
			c.db.Synced(id)
		}
	}()
	for range askTries {
		var err error
		for _, id := range networks { // rows of a node that is not known to be in a network are ignored
			if events[id] != nil {
				err = errors.Join(err, c.send(name, events[id]))
			}
		}
		if err == nil {
			err = c.sync(ctx, name, networks, askWait)
		}
		if err == nil || ctx.Err() != nil {
			return
		}
		c.log.Debug("gossip tables not compared", slog.String("with", name), slog.Any("error", err))
	}
}

// syncAll compares the rows of each network with some other member's.
func (c *cluster) syncAll(ctx context.Context) {
	c.mu.Lock()
	networks := c.db.Networks()
	c.mu.Unlock()
	done := map[string]bool{}
	for _, id := range networks {
		if done[id] {
			continue
		}
		c.mu.Lock()
		members := c.db.Members(id)
		c.mu.Unlock()
		rand.Shuffle(len(members), func(i, j int) { members[i], members[j] = members[j], members[i] })
		for _, name := range members[:min(len(members), syncTries)] {
			c.mu.Lock()
			common := c.db.Common(name)
			c.mu.Unlock()
			if err := c.sync(ctx, name, common, syncWait); err != nil {
				c.log.Debug("gossip tables not compared", slog.String("with", name), slog.Any("error", err))
				continue
			}
			for _, one := range common {
				done[one] = true
			}
			break
		}
	}
}

// sync exchanges all rows of networks with a node, which may take so long.
func (c *cluster) sync(ctx context.Context, name string, networks []string, limit time.Duration) error {
	c.mu.Lock()
	msg, at := c.db.Sync(networks, true, time.Now())
	a := &asked{at, make(chan struct{}, 1)}
	c.waiting[name] = append(c.waiting[name], a)
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.waiting[name] = slices.DeleteFunc(c.waiting[name], func(o *asked) bool { return o == a })
		if len(c.waiting[name]) == 0 {
			delete(c.waiting, name)
		}
	}()
	if err := c.send(name, msg); err != nil {
		return err
	}
	late := time.NewTimer(limit)
	defer late.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-late.C:
		return errors.New("no answer")
	case <-a.done:
		return nil
	}
}

// answered ends the waiting for a node's rows.
func (c *cluster) answered(s *netdb.Sync) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, a := range c.waiting[s.From] {
		if s.Time > a.time {
			poke(a.done)
		}
	}
}

// answer sends this node's rows to a node that sent its own. One that has just joined may ask
// before this node has heard of it, and joins a network only when all its members have answered.
// Callers hold mu.
func (c *cluster) answer(s *netdb.Sync) {
	if c.members[s.From] != nil {
		c.respond(s)
		return
	}
	if len(c.early) >= maxEarly { // who has not come by now may ask again
		clear(c.early)
	}
	c.early[s.From] = early{s, time.Now()}
}

// early is a bulk synchronization of a node that is not known yet.
type early struct {
	sync *netdb.Sync
	at   time.Time
}

// respond answers, or has it done when others have been. Callers hold mu.
func (c *cluster) respond(s *netdb.Sync) {
	if c.closed {
		return
	}
	select {
	case c.answers <- struct{}{}:
	default:
		if c.late[s.From] != nil || len(c.late) < maxEarly {
			c.late[s.From] = s
		}
		return
	}
	c.tasks.Go(func() {
		defer func() { <-c.answers }()
		for s != nil {
			c.mu.Lock()
			msg, _ := c.db.Sync(s.Networks, false, time.Now())
			c.mu.Unlock()
			if err := c.send(s.From, msg); err != nil {
				c.log.Debug("gossip tables not sent", slog.String("to", s.From), slog.Any("error", err))
			}
			s = c.takeLate()
		}
	})
}

// takeLate returns an answer that waits to be given, nil without any.
func (c *cluster) takeLate() *netdb.Sync {
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, s := range c.late {
		delete(c.late, name)
		if !c.closed {
			return s
		}
	}
	return nil
}

// send sends a message to a node over a connection.
func (c *cluster) send(name string, msg []byte) error {
	c.mu.Lock()
	n := c.members[name]
	c.mu.Unlock()
	if n == nil {
		return fmt.Errorf("gossip node %s is not in reach", name)
	}
	return c.list.SendReliable(n, msg)
}
