package sim

import (
	"flag"
	"testing"
	"time"
)

var (
	seedFlag = flag.Uint64("seed", 0, "run the random simulation from this seed only")
	forFlag  = flag.Duration("for", 0, "how much of the swarm's time the random simulation takes, before it heals")
	logFlag  = flag.Bool("log", false, "print the logs of all nodes")
)

// TestRandom lets users and faults loose on swarms, from fixed seeds or the one asked for.
func TestRandom(t *testing.T) {
	seeds, length := []uint64{1, 2}, time.Minute
	if *seedFlag != 0 {
		seeds = []uint64{*seedFlag}
	}
	if *forFlag != 0 {
		length = *forFlag
	}
	for _, seed := range seeds {
		ok := t.Run("seed", func(t *testing.T) {
			inWorld(t, seed, 5, func(w *world) {
				w.found(3)
				newUser(w, seed).live(length)
			})
		})
		if !ok {
			t.Errorf("seed %d failed; again with: go test ./sim -run TestRandom -seed %d -for %v -log", seed, seed, length)
		}
	}
}
