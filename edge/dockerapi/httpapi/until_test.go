package httpapi

import (
	"testing"
	"time"
)

// FuzzParseUntil reads the filter of the prune calls.
func FuzzParseUntil(f *testing.F) {
	for _, seed := range []string{"24h", "1h30m", "2026-01-02T15:04:05Z", "1136073845.000000001", "-5", ""} {
		f.Add(seed)
	}
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, text string) {
		at, err := Until(text, now)
		if again, other := Until(text, now); !again.Equal(at) || (err == nil) != (other == nil) {
			t.Errorf("%q reads as %s, %v and then as %s, %v", text, at, err, again, other)
		}
		if d, bad := time.ParseDuration(text); bad == nil && !at.Equal(now.Add(-d)) {
			t.Errorf("%q is %s before now, got %s", text, d, at)
		}
	})
}
