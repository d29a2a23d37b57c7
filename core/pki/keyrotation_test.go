package pki

import (
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api/skepv1"
)

func TestRotationDue(t *testing.T) {
	last := time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		what    string
		wanted  uint32
		rotated bool
		due     time.Time
	}{
		{"by age", 0, true, last.Add(12 * time.Hour)},
		{"asked for", 2, true, last},
		{"asked for before the first", 1, false, time.Time{}},
	} {
		r := &skepv1.KeyRotation{Wanted: c.wanted}
		if c.rotated {
			r.Rotated = timestamppb.New(last)
		}
		due, settled := RotationDue(r)
		if !due.Equal(c.due) {
			t.Errorf("%s: due at %v, want %v", c.what, due, c.due)
		}
		if c.rotated && !settled.Equal(last.Add(2*time.Minute)) {
			t.Errorf("%s: waits until %v", c.what, settled)
		}
	}
}
