package replica

import (
	"context"
	"sync/atomic"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// State is what the rest of a manager sees of the replicated state. Replica and
// Memory implement it.
type State interface {
	// View returns the newest state here. It needs nobody else, and may be old: another
	// manager may lead by now.
	View() *store.Snapshot
	// Read returns a state that has everything which was acknowledged, by any manager,
	// before the call. It waits for a majority to confirm that this manager leads, not
	// longer than one that lost its majority goes on to believe that it does.
	// model.ErrUnconfirmed when this manager does not lead, or does no more.
	Read(ctx context.Context) (*store.Snapshot, error)
	// Follow returns a cursor at the newest state.
	Follow() *Cursor
	// Update runs fn against the newest state and makes its changes durable as one
	// atomic entry. It returns the state that includes them, after they were applied
	// here. fn must be quick, must not block and may run again only if Update is
	// called again. Errors of fn come back as they are and nothing is changed;
	// model.ErrNoLeader when this manager does not lead; Unavailable when leadership
	// was lost while the entry was in flight (it may or may not have been written).
	Update(ctx context.Context, fn func(*store.Tx) error) (*store.Snapshot, error)
}

// commit is one version of the state and the changes that made it. The list is
// linked from old to new, so that what no cursor holds any more is collected.
type commit struct {
	state  *store.Snapshot
	events []model.Event
	// reset is set when the state was replaced as a whole (a raft snapshot was
	// restored) and events do not say what changed.
	reset bool
	next  atomic.Pointer[commit]
	done  chan struct{} // closed after next was set
}

// feed is the newest commit. Publish belongs to one goroutine; the rest to all.
type feed struct{ head atomic.Pointer[commit] }

func newFeed(s *store.Snapshot) *feed {
	f := new(feed)
	f.head.Store(&commit{state: s, done: make(chan struct{})})
	return f
}

func (f *feed) view() *store.Snapshot { return f.head.Load().state }

func (f *feed) follow() *Cursor { return &Cursor{at: f.head.Load()} }

func (f *feed) publish(s *store.Snapshot, events []model.Event, reset bool) {
	c := &commit{state: s, events: events, reset: reset, done: make(chan struct{})}
	last := f.head.Swap(c)
	last.next.Store(c)
	close(last.done)
}

// Cursor is a place in the history of the state. It belongs to one goroutine.
type Cursor struct{ at *commit }

// Snapshot returns the state at the cursor.
func (c *Cursor) Snapshot() *store.Snapshot { return c.at.state }

// Changed is closed once there is something after the cursor.
func (c *Cursor) Changed() <-chan struct{} { return c.at.done }

// Next waits for changes after the cursor, moves it to the newest state and returns
// all changes between. reset means that the state was replaced as a whole and events
// are incomplete: start over from Snapshot. The only error is ctx's.
func (c *Cursor) Next(ctx context.Context) (events []model.Event, reset bool, err error) {
	select {
	case <-c.at.done:
	case <-ctx.Done():
		return nil, false, ctx.Err()
	}
	events, reset = c.Drain()
	return events, reset, nil
}

// Drain is Next without waiting: it returns nothing when nothing changed.
func (c *Cursor) Drain() (events []model.Event, reset bool) {
	for next := c.at.next.Load(); next != nil; next = c.at.next.Load() {
		c.at = next
		events = append(events, next.events...)
		reset = reset || next.reset
	}
	return events, reset
}
