package docker

import (
	"context"
	"sync"
	"time"

	"github.com/moby/moby/api/types/events"

	"github.com/skep-dev/skep/core/model"
)

// MaxBacklog is how many events a subscriber may fall behind before it is ended.
const MaxBacklog = 4096

// Bus hands events to subscribers. Publishing never blocks: a subscriber that falls
// MaxBacklog behind is ended with an error.
type Bus struct {
	mu   sync.Mutex
	subs map[*subscription]struct{} // guarded by mu; nil until the first subscriber
}

type subscription struct {
	messages chan events.Message
	errs     chan error
}

// Subscribe streams what is published from now on until ctx ends; then, or when the
// subscriber is too slow, the error channel yields one error. The message channel is
// never closed.
func (b *Bus) Subscribe(ctx context.Context) (<-chan events.Message, <-chan error) {
	s := &subscription{messages: make(chan events.Message, MaxBacklog), errs: make(chan error, 1)}
	b.mu.Lock()
	if b.subs == nil {
		b.subs = map[*subscription]struct{}{}
	}
	b.subs[s] = struct{}{}
	b.mu.Unlock()
	context.AfterFunc(ctx, func() { b.end(s, context.Cause(ctx)) })
	return s.messages, s.errs
}

// Publish hands m to every subscriber, filling in scope and time if they are missing.
func (b *Bus) Publish(m events.Message) {
	if m.TimeNano == 0 {
		now := time.Now()
		m.Time, m.TimeNano = now.Unix(), now.UnixNano()
	}
	if m.Scope == "" {
		m.Scope = "local"
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for s := range b.subs {
		select {
		case s.messages <- m:
		default:
			delete(b.subs, s)
			s.errs <- model.Errorf(model.Exhausted, "event stream ended: reader fell %d events behind", MaxBacklog)
		}
	}
}

// Len returns the number of subscribers.
func (b *Bus) Len() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.subs)
}

func (b *Bus) end(s *subscription, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.subs[s]; !ok {
		return
	}
	delete(b.subs, s)
	s.errs <- err
}
