package pki

import (
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api/skepv1"
)

func TestRotationDue(t *testing.T) {
	last := time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC)
	now := last.Add(time.Hour)
	early := last.Add(-24 * time.Hour) // as a leader with a right clock has it after one with a wrong one
	for _, c := range []struct {
		what    string
		wanted  uint32
		rotated bool
		now     time.Time
		due     time.Time
		settled time.Time
	}{
		{"by age", 0, true, now, last.Add(12 * time.Hour), last.Add(2 * time.Minute)},
		{"asked for", 2, true, now, last, last.Add(2 * time.Minute)},
		{"asked for before the first", 1, false, now, time.Time{}, time.Time{}.Add(2 * time.Minute)},
		{"by age, from the future", 0, true, early, early, early.Add(2 * time.Minute)},
		{"asked for, from the future", 1, true, early, early, early.Add(2 * time.Minute)},
		{"by a clock that differs a little", 0, true, last.Add(-time.Second), last.Add(12 * time.Hour), last.Add(2 * time.Minute)},
	} {
		r := &skepv1.KeyRotation{Wanted: c.wanted}
		if c.rotated {
			r.Rotated = timestamppb.New(last)
		}
		due, settled := RotationDue(r, c.now)
		if !due.Equal(c.due) {
			t.Errorf("%s: due at %v, want %v", c.what, due, c.due)
		}
		if !settled.Equal(c.settled) {
			t.Errorf("%s: waits until %v", c.what, settled)
		}
	}
}
