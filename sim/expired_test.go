package sim

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"github.com/skep-dev/skep/platform/keystore"
)

// The whole swarm was off for longer than certificates live, and nobody could issue new
// ones: a single manager certifies itself, one of several does so after it was told to go on
// alone, and the others return to it.
func TestEverybodyExpired(t *testing.T) {
	for _, tt := range []struct {
		name     string
		managers int
		lock     bool
	}{
		{"one manager", 1, false},
		{"three managers", 3, false},
		{"three locked managers", 3, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inWorld(t, 9, 5, func(w *world) {
				w.found(tt.managers)
				web := w.mustCreate(service("web", 5))
				w.await("it runs", time.Minute, w.converged)
				locked := w.machines[:0]
				if tt.lock {
					locked = w.machines[:tt.managers]
				}
				key := w.lock(locked)
				for _, m := range w.machines {
					m.powerOff()
				}
				w.watch.stop()
				time.Sleep(100 * 24 * time.Hour) // of 90 days
				for _, m := range w.machines {
					m.start()
				}
				for _, m := range locked {
					m.must("POST", "/swarm/unlock", swarm.UnlockRequest{UnlockKey: key}, nil)
				}
				if tt.managers > 1 {
					w.sleep(20 * time.Minute) // the others try less often by now
					survivor := w.machines[1]
					if err := survivor.call("GET", "/services/"+web, nil, nil); err == nil {
						t.Fatal("managers with expired certificates agree")
					}
					survivor.must("POST", "/swarm/init", swarm.InitRequest{ForceNewCluster: true}, nil)
				}
				w.await("all are back", 2*time.Minute, w.converged)
				for _, m := range w.machines {
					if until := m.certificate().NotAfter; until.Before(time.Now()) {
						t.Errorf("the certificate of %s ended %v", m.name, until)
					}
				}
			})
		})
	}
}

// lock locks the swarm of some managers, if any, and returns the key once all are sealed.
func (w *world) lock(managers []*machine) string {
	w.t.Helper()
	if len(managers) == 0 {
		return ""
	}
	w.updateSwarm(func(s *swarm.Spec) { s.EncryptionConfig.AutoLockManagers = true })
	w.await("the managers are sealed", time.Minute, func() error {
		for _, m := range managers {
			if p, err := keystore.Peek(filepath.Join(m.dir, "data", "swarm", "certificates"), nil); err != nil || !p.Sealed {
				return fmt.Errorf("%s is open: %w", m.name, err)
			}
		}
		return nil
	})
	var resp swarm.UnlockKeyResponse
	managers[0].must("GET", "/swarm/unlockkey", nil, &resp)
	return resp.UnlockKey
}
