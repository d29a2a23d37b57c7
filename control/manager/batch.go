package manager

import (
	"context"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// Bounds of one entry of the log; what exceeds them goes into the next one.
const (
	maxObjects = 200
	maxBytes   = 3 * (3 << 19) / 4 // three quarters of raft's limit for an entry
)

// unit is what must be proposed together: changes that were decided from one view.
type unit struct {
	key     string // whom to ask again when the unit was refused
	changes []model.Change
	// uses are records that the decision depends on and does not write.
	uses []model.Object
}

// size returns the bytes that a unit takes in the log, about.
func (u *unit) size() int {
	n := 0
	for _, c := range u.changes {
		n += proto.Size(c.Object) + 16
	}
	return n
}

// batch collects units for one entry.
type batch struct {
	units   []unit
	objects int
	bytes   int
}

// add takes a unit and reports whether the batch is full.
func (b *batch) add(u unit) (full bool) {
	b.units = append(b.units, u)
	b.objects += len(u.changes)
	b.bytes += u.size()
	return b.full()
}

func (b *batch) full() bool { return b.objects >= maxObjects || b.bytes >= maxBytes }

// propose writes a batch as one entry, without the units whose view is stale by now,
// which it returns.
func (m *Manager) propose(ctx context.Context, b *batch) (stale []*unit, err error) {
	if len(b.units) == 0 {
		return nil, nil
	}
	begin := time.Now()
	_, err = m.state.Update(ctx, func(tx *store.Tx) error {
		for i := range b.units {
			u := &b.units[i]
			if !current(tx.Snapshot(), u) {
				stale = append(stale, u)
				continue
			}
			if err := tx.Apply(u.changes); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		m.metrics.batch.Observe(time.Since(begin).Seconds())
	}
	m.metrics.conflicts.Add(float64(len(stale)))
	return stale, err
}

// current reports whether what a unit was decided from is still so.
func current(s *store.Snapshot, u *unit) bool {
	for _, o := range u.uses {
		if !same(s, o) {
			return false
		}
	}
	for _, c := range u.changes {
		if c.Kind == model.Create {
			if s.Get(model.TableOf(c.Object), c.Object.GetId()) != nil {
				return false
			}
			continue
		}
		if !same(s, c.Object) {
			return false
		}
	}
	return true
}

// same reports whether the stored record has the version of the one that was read.
func same(s *store.Snapshot, read model.Object) bool {
	stored := s.Get(model.TableOf(read), read.GetId())
	return stored != nil && stored.GetMeta().GetVersion().GetIndex() == read.GetMeta().GetVersion().GetIndex()
}
