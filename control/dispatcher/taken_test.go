package dispatcher

import (
	"context"
	"crypto/rand"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
)

func sealedOverlay() *api.Network {
	n := anOverlay("sealed", "sealed")
	n.DriverState.Options[model.EncryptedOption], n.DriverState.Options[model.EncryptionOption] = "", model.ESP
	return n
}

func onSealed(id, node string) *api.Task {
	task := onNetwork(id, node, "sealed")
	task.Networks[0].Network = sealedOverlay()
	return task
}

// taken begins to wait for keys and returns where the end of it will be.
func (r *rig) taken(timeout time.Duration) <-chan error {
	done := make(chan error, 1)
	version := r.state.View().Index()
	go func() {
		ctx, cancel := context.WithTimeout(r.Context(), timeout)
		defer cancel()
		done <- r.d.KeysTaken(ctx, version)
	}()
	synctest.Wait()
	return done
}

func (r *rig) encrypts(node string, how string) {
	r.update(func(tx *store.Tx) error {
		n := model.Clone(tx.Snapshot().Node(node))
		n.Description.Engine = &api.EngineDescription{Labels: map[string]string{model.EncryptionLabel: how}}
		return tx.Update(n)
	})
}

// TestKeysAreTaken: a rotation is over once all nodes that are there and encrypt have programmed
// it, whoever leads by then.
func TestKeysAreTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, sealedOverlay(), onSealed("t1", "n1"), onSealed("t2", "n2"))
		r.lead()
		defer func() { r.stop() }()
		_, id1 := r.register("n1")
		_, id2 := r.register("n2")
		w1, w2 := r.watch("n1", id1), r.watch("n2", id2)
		r.encrypts("n1", model.ESP)
		r.encrypts("n2", model.ESP)
		programmed := func(node, id string, u *skepv1.NetworkUpdate) {
			t.Helper()
			if _, err := r.d.Networks().Programmed(r.as(node), &skepv1.ProgrammedRequest{SessionId: id, Version: u.GetVersion()}); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		programmed("n1", id1, w1.latest())
		programmed("n2", id2, w2.latest())
		rotate := func() {
			r.update(func(tx *store.Tx) error {
				c := model.Clone(tx.Snapshot().Cluster())
				if err := pki.RotateNetworkKeys(c, rand.Reader, pki.OverlayKeys); err != nil {
					return err
				}
				return tx.Update(c)
			})
		}
		want := func(what string, done <-chan error, taken bool) {
			t.Helper()
			select {
			case err := <-done:
				if err != nil || !taken {
					t.Errorf("%s: it is over: %v", what, err)
				}
			default:
				if taken {
					t.Errorf("%s: it is not over", what)
				}
			}
		}
		want("before any rotation", r.taken(time.Hour), true)
		rotate()
		done := r.taken(time.Hour)
		programmed("n1", id1, w1.latest())
		want("one of two", done, false)
		programmed("n2", id2, w2.latest())
		want("both", done, true)

		rotate()
		done = r.taken(time.Hour)
		programmed("n1", id1, w1.latest())
		want("one is silent", done, false)
		r.update(func(tx *store.Tx) error {
			n := model.Clone(tx.Snapshot().Node("n2"))
			n.Status.State = api.NodeStatus_DOWN
			return tx.Update(n)
		})
		synctest.Wait()
		want("which is lost", done, true)

		rotate()
		programmed("n1", id1, w1.latest())
		r.stop()
		r.lead()
		done = r.taken(time.Minute)
		want("another leader, whom nobody told", done, false)
		_, id1 = r.register("n1")
		r.encrypts("n1", model.ESP)
		programmed("n1", id1, r.watch("n1", id1).latest())
		want("told by those who are there", done, true)

		rotate()
		done = r.taken(time.Second) // before the silent node counts as lost
		time.Sleep(time.Second)
		if err := <-done; !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("waiting ended with %v", err)
		}
	})
}
