package manager

import (
	"container/heap"
	"context"
	"time"
)

// queue holds ids to look at, each once, first in first out. It is bounded by the number
// of objects that exist.
type queue struct {
	list []string
	in   map[string]bool
}

func newQueue() *queue { return &queue{in: make(map[string]bool)} }

func (q *queue) empty() bool { return len(q.list) == 0 }

func (q *queue) push(id string) {
	if id != "" && !q.in[id] {
		q.in[id] = true
		q.list = append(q.list, id)
	}
}

func (q *queue) pop() string {
	id := q.list[0]
	q.list = q.list[1:]
	delete(q.in, id)
	return id
}

// agenda says when to look at ids again. It is bounded by the number of objects.
type agenda struct {
	at   map[string]time.Time
	heap alarms
}

type alarm struct {
	id string
	at time.Time
}

type alarms []alarm

func (a alarms) Len() int           { return len(a) }
func (a alarms) Less(i, j int) bool { return a[i].at.Before(a[j].at) }
func (a alarms) Swap(i, j int)      { a[i], a[j] = a[j], a[i] }
func (a *alarms) Push(x any)        { *a = append(*a, x.(alarm)) }
func (a *alarms) Pop() any {
	old := *a
	last := old[len(old)-1]
	*a = old[:len(old)-1]
	return last
}

func newAgenda() *agenda { return &agenda{at: make(map[string]time.Time)} }

// set replaces the time for an id; zero means never.
func (a *agenda) set(id string, at time.Time) {
	if at.IsZero() {
		delete(a.at, id)
		return
	}
	if !a.at[id].Equal(at) {
		a.at[id] = at
		heap.Push(&a.heap, alarm{id, at})
	}
}

// due removes and returns the ids whose time has come.
func (a *agenda) due(now time.Time) []string {
	var out []string
	for len(a.heap) > 0 && !a.heap[0].at.After(now) {
		first := heap.Pop(&a.heap).(alarm)
		if a.at[first.id].Equal(first.at) { // else it was changed since
			delete(a.at, first.id)
			out = append(out, first.id)
		}
	}
	return out
}

// wait returns at the next time in the agenda, when changed is closed, or with ctx's error.
func (a *agenda) wait(ctx context.Context, changed <-chan struct{}) error {
	var alarm <-chan time.Time
	if len(a.heap) > 0 {
		timer := time.NewTimer(time.Until(a.heap[0].at))
		defer timer.Stop()
		alarm = timer.C
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-changed:
	case <-alarm:
	}
	return nil
}
