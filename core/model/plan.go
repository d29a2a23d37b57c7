package model

import "time"

// A Plan is what a decider wants done.
type Plan struct {
	Changes []Change  // proposed together, in this order
	Wake    time.Time // when time alone could change the answer; zero means never
	Notes   []Note    // why, for logs and for people
}

// Note explains one decision. Subject is the id of the object it is about.
type Note struct {
	Subject string
	Text    string
}

// Add appends another plan: its changes, its notes, and the earlier wake.
func (p *Plan) Add(other Plan) {
	p.Changes = append(p.Changes, other.Changes...)
	p.Notes = append(p.Notes, other.Notes...)
	p.Wake = Earlier(p.Wake, other.Wake)
}

// Earlier returns the earlier of two instants, where zero means never.
func Earlier(a, b time.Time) time.Time {
	if a.IsZero() || (!b.IsZero() && b.Before(a)) {
		return b
	}
	return a
}
