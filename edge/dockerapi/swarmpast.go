package dockerapi

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/moby/moby/api/types/events"
)

// maxPast is how many of the swarm's events a manager remembers for `since`; older ones
// are forgotten. Docker's engine keeps as many.
const maxPast = 256

// rememberSoon is how often a node looks whether others made it a manager: what happens
// before it has noticed is not remembered. One that was told to be one here knows at once.
const rememberSoon = time.Second

// swarmPast holds the swarm's last events, for streams that ask for what has happened.
type swarmPast struct {
	mu     sync.Mutex
	source follower
	list   []events.Message
}

// Run remembers the swarm's events while this node is a manager, until ctx ends.
func (a *API) Run(ctx context.Context) error {
	look := time.NewTicker(rememberSoon)
	defer look.Stop()
	a.past.attach(a.follow)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.past.changed():
			a.past.catchUp()
		case <-look.C:
			a.past.attach(a.follow)
		}
	}
}

// attach begins to follow this node's state if there is some and nobody follows it, and
// ends when there is none.
func (p *swarmPast) attach(follow func() follower) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if now := follow(); !now.live() || !p.source.live() {
		p.remember()
		p.source = now
	}
}

// restart follows the state that this node has from now on.
func (p *swarmPast) restart(follow func() follower) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.remember()
	p.source = follow()
}

func (p *swarmPast) changed() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.source.changed()
}

func (p *swarmPast) catchUp() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.remember()
}

// remember takes what the source tells. Callers hold mu.
func (p *swarmPast) remember() {
	if !p.source.live() {
		return
	}
	p.list = append(p.list, p.source.take(time.Now())...)
	p.list = slices.Clone(p.list[max(0, len(p.list)-maxPast):])
}

// since returns the remembered events from a time on.
func (p *swarmPast) since(t time.Time) []events.Message {
	p.catchUp()
	p.mu.Lock()
	defer p.mu.Unlock()
	var list []events.Message
	for _, m := range p.list {
		if m.TimeNano >= t.UnixNano() {
			list = append(list, m)
		}
	}
	return list
}

// sameEvent reports whether two followers tell of one change. An object is removed once,
// but each follower notes its own time of it.
func sameEvent(a, b events.Message) bool {
	return a.Type == b.Type && a.Action == b.Action && a.Actor.ID == b.Actor.ID &&
		(a.TimeNano == b.TimeNano || a.Action == events.ActionRemove)
}
