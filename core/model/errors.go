package model

import (
	"errors"
	"fmt"
)

// Kind says what the caller of a failed operation may do about it.
type Kind int

// The kinds of errors.
const (
	// Internal is a fault of the program or its machine. It is the kind of every foreign error.
	Internal Kind = iota
	// Invalid means that the request can never succeed as it is.
	Invalid
	// Precondition means that the request is well formed but the state forbids it.
	Precondition
	// NotFound means that the object does not exist.
	NotFound
	// Exists means that another object has the name or id.
	Exists
	// Conflict means that the caller acted on stale state: read again and retry.
	Conflict
	// Denied means that the caller may not do this.
	Denied
	// Exhausted means that a limit or pool is used up.
	Exhausted
	// Unavailable means that nobody can serve the request now: retry later.
	Unavailable
	// Unimplemented means that Skep does not do this.
	Unimplemented
)

// Error is an error of a known kind.
type Error struct {
	Kind Kind
	// Text is a sentence for people; it names the object and what to do.
	Text string
	// Err is the cause and may be nil.
	Err error
}

// Error returns the text, followed by the cause if there is one.
func (e *Error) Error() string {
	switch {
	case e.Err == nil:
		return e.Text
	case e.Text == "":
		return e.Err.Error()
	default:
		return e.Text + ": " + e.Err.Error()
	}
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is reports whether target is an *Error of the same kind with the same text or none.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Kind == e.Kind && (t.Text == "" || t.Text == e.Text)
}

// Errorf makes an error of a kind. A %w verb sets the cause.
func Errorf(kind Kind, format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	if errors.Unwrap(err) != nil {
		return &Error{Kind: kind, Err: err}
	}
	return &Error{Kind: kind, Text: err.Error()}
}

// Wrap gives err a kind and says what was attempted. It returns nil for a nil err.
func Wrap(kind Kind, err error, attempted string) error {
	if err == nil {
		return nil
	}
	return &Error{Kind: kind, Text: attempted, Err: err}
}

// KindOf returns the kind of the outermost *Error in err's chain, Internal without one.
func KindOf(err error) Kind {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Kind
	}
	return Internal
}

// ErrSequence is the conflict that Docker clients look for by its text.
var ErrSequence = &Error{Kind: Conflict, Text: "update out of sequence"}

// ErrUnconfirmed is what a read answers that was not executed, because a majority of managers
// did not confirm that the one which got it leads. It may be made again elsewhere.
var ErrUnconfirmed = &Error{
	Kind: Unavailable,
	Text: "A majority of managers does not confirm that the one which was asked still leads the swarm. Make sure more than half of the managers are online.",
}

// ErrNoLeader is what every write answers while the swarm has no leader.
var ErrNoLeader = &Error{
	Kind: Unavailable,
	Text: "The swarm does not have a leader. It's possible that too few managers are online. Make sure more than half of the managers are online.",
}
