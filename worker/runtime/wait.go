package runtime

import (
	"context"
	"slices"
	"sync"

	"github.com/moby/moby/api/types/container"

	"github.com/skep-dev/skep/core/model"
)

// Waiters are those who wait for the end of one container. Its owner guards it, with the
// lock it hands to Add.
type Waiters struct {
	next, removed Waiting
}

// Waiting is a set of waiters that are told one result.
type Waiting []chan WaitResult

// Add adds a waiter and returns its channel. The caller holds mu; mu is taken again when
// ctx ends before the container does. With ended, which is how a container that does not
// run ended and nil for one that runs, who waits for one that does not run need not wait.
func (w *Waiters) Add(ctx context.Context, mu sync.Locker, condition container.WaitCondition, ended *WaitResult) (<-chan WaitResult, error) {
	ch := make(chan WaitResult, 1)
	list := &w.next
	switch condition {
	case container.WaitConditionNotRunning, "":
		if ended != nil {
			ch <- *ended
			return ch, nil
		}
	case container.WaitConditionNextExit:
	case container.WaitConditionRemoved:
		list = &w.removed
	default:
		return nil, model.Errorf(model.Invalid, "invalid condition: %q", condition)
	}
	*list = append(*list, ch)
	context.AfterFunc(ctx, func() {
		mu.Lock()
		defer mu.Unlock()
		if i := slices.Index(*list, ch); i >= 0 {
			*list = slices.Delete(*list, i, i+1)
			ch <- WaitResult{Err: ctx.Err()}
		}
	})
	return ch, nil
}

// Exited takes out those who wait for the next exit.
func (w *Waiters) Exited() Waiting {
	out := w.next
	w.next = nil
	return out
}

// Removed takes out everybody.
func (w *Waiters) Removed() Waiting {
	out := append(w.next, w.removed...)
	w.next, w.removed = nil, nil
	return out
}

// Tell sends each of them the result. It never blocks.
func (w Waiting) Tell(r WaitResult) {
	for _, ch := range w {
		ch <- r
	}
}
