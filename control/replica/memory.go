package replica

import (
	"context"
	"sync"
	"time"

	"github.com/skep-dev/skep/core/store"
)

// Memory is a State without raft, disk or peers: one process that always leads. Tests
// and simulations of what runs on top of a State use it.
type Memory struct {
	mu    sync.Mutex
	index uint64
	feed  *feed
}

// NewMemory returns a Memory that holds initial.
func NewMemory(initial *store.Snapshot) *Memory {
	return &Memory{index: initial.Index() + 10, feed: newFeed(initial)}
}

// View returns the newest state.
func (m *Memory) View() *store.Snapshot { return m.feed.view() }

// Read returns the newest state. It never fails but with ctx's error.
func (m *Memory) Read(ctx context.Context) (*store.Snapshot, error) { return m.feed.view(), ctx.Err() }

// Follow returns a cursor at the newest state.
func (m *Memory) Follow() *Cursor { return m.feed.follow() }

// Update implements State. It never fails but with fn's error or ctx's.
func (m *Memory) Update(ctx context.Context, fn func(*store.Tx) error) (*store.Snapshot, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	tx := store.Begin(m.feed.view(), m.index, time.Now())
	if err := fn(tx); err != nil {
		return nil, err
	}
	if tx.Empty() {
		return m.feed.view(), nil
	}
	m.index++
	s := tx.Commit(m.index)
	m.feed.publish(s, tx.Events(), false)
	return s, nil
}
