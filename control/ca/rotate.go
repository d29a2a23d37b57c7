package ca

import (
	"context"
	"crypto/rand"
	"log/slog"
	"slices"
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
)

const (
	// rotateWindow bounds the nodes that renew for a rotation at one time: each costs its
	// manager a few signatures, and all others go on working meanwhile.
	rotateWindow = 100
	// rotatePatience is how long a node that was asked keeps its place in the window. It is
	// asked no more after that, and still counts.
	rotatePatience = 10 * time.Second
	// rotatePause gathers what nodes report before the next are asked.
	rotatePause = 200 * time.Millisecond
)

// rotation is what the leader knows of the root rotation under way. It can be rebuilt from
// the state at any time.
type rotation struct {
	// of is the rotation's new root in PEM; empty when none is under way.
	of     string
	issuer pki.Issuer
	// open holds the nodes whose certificate is not from the new root.
	open map[string]bool
	// asked holds when those of open that renew now were asked to.
	asked map[string]time.Time
}

// runRotation brings every node's certificate under the new root while a rotation is under
// way, and ends the rotation when there is no other node left.
func (s *Server) runRotation(ctx context.Context) error {
	at := s.state.Follow()
	r := new(rotation)
	r.begin(at.Snapshot())
	for {
		var wake <-chan time.Time
		if r.of != "" {
			if err := s.stepRotation(ctx, r); err != nil {
				if ctx.Err() != nil {
					return nil //nolint:nilerr // the term has ended
				}
				return err
			}
			wake = time.After(time.Second)
			if len(r.asked) == 0 {
				wake = nil
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-wake:
			continue
		case <-at.Changed():
		}
		if r.of != "" {
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(rotatePause):
			}
		}
		events, reset := at.Drain()
		view := at.Snapshot()
		if reset || string(view.Cluster().GetRootCa().GetRootRotation().GetCaCert()) != r.of {
			r.begin(view)
			continue
		}
		for _, e := range events {
			if e.Table == model.Nodes && r.of != "" {
				r.note(e)
			}
		}
	}
}

// begin starts from what the state says.
func (r *rotation) begin(view *store.Snapshot) {
	*r = rotation{open: map[string]bool{}, asked: map[string]time.Time{}}
	next := view.Cluster().GetRootCa().GetRootRotation()
	root, err := pki.ParseRoot(next.GetCaCert(), nil)
	if next == nil || err != nil {
		return
	}
	r.of, r.issuer = string(next.GetCaCert()), pki.IssuerOf(root.Certs[0])
	for node := range view.Nodes() {
		if !r.issuer.Issued(node) {
			r.open[node.GetId()] = true
		}
	}
}

// note takes in one change of a node.
func (r *rotation) note(e model.Event) {
	id := e.ID()
	if node, ok := e.New.(*api.Node); ok && node != nil && !r.issuer.Issued(node) {
		r.open[id] = true
		return
	}
	delete(r.open, id)
	delete(r.asked, id)
}

// next returns the nodes to ask now, at most as many as there is room for.
func (r *rotation) next(view *store.Snapshot, now time.Time) []string {
	for id, since := range r.asked {
		if now.Sub(since) > rotatePatience {
			delete(r.asked, id)
		}
	}
	var ask []string
	for id := range r.open {
		node := view.Node(id)
		if _, ok := r.asked[id]; ok || node == nil || pki.Asked(node) {
			continue
		}
		ask = append(ask, id)
	}
	slices.Sort(ask)
	room := rotateWindow - len(r.asked)
	ready := 0
	for i, id := range ask {
		if view.Node(id).GetStatus().GetState() != api.NodeStatus_READY {
			continue // hears of it when it is back, and takes no room until then
		}
		if ready++; ready > room {
			return ask[:i]
		}
		r.asked[id] = now
	}
	return ask
}

// stepRotation asks the next nodes, or ends the rotation.
func (s *Server) stepRotation(ctx context.Context, r *rotation) error {
	if len(r.open) == 0 {
		return s.finishRotation(ctx, r)
	}
	ask := r.next(s.state.View(), time.Now())
	for chunk := range slices.Chunk(ask, rotateWindow) {
		_, err := s.state.Update(ctx, func(tx *store.Tx) error {
			if string(tx.Snapshot().Cluster().GetRootCa().GetRootRotation().GetCaCert()) != r.of {
				return nil
			}
			for _, id := range chunk {
				node := tx.Snapshot().Node(id)
				if node == nil || r.issuer.Issued(node) || pki.Asked(node) {
					continue
				}
				node = model.Clone(node)
				if node.Certificate == nil {
					node.Certificate = &api.Certificate{Cn: id, Role: node.GetRole()}
				}
				node.Certificate.Status = &api.IssuanceStatus{State: api.IssuanceStatus_ROTATE}
				if err := tx.Update(node); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// finishRotation makes the new root the only one, if every node has a certificate from it.
func (s *Server) finishRotation(ctx context.Context, r *rotation) error {
	done := false
	_, err := s.state.Update(ctx, func(tx *store.Tx) error {
		done = false
		cluster := tx.Snapshot().Cluster()
		if string(cluster.GetRootCa().GetRootRotation().GetCaCert()) != r.of {
			return nil
		}
		for node := range tx.Snapshot().Nodes() {
			if !r.issuer.Issued(node) {
				return nil // it came meanwhile; its event is on the way
			}
		}
		root, err := pki.FinishRotation(rand.Reader, cluster.GetRootCa(), cluster.GetFips())
		if err != nil {
			return err
		}
		for object := range tx.Snapshot().All(model.Resources) {
			// They pin the old root, so nobody can join with them any more.
			if old, ok := object.(*api.Resource); ok && old.GetKind() == pki.TokenKind {
				if err := tx.Remove(model.Resources, old.GetId()); err != nil {
					return err
				}
			}
		}
		cluster = model.Clone(cluster)
		cluster.RootCa = root
		done = true
		return tx.Update(cluster)
	})
	if err == nil && done {
		s.log.Info("the root certificate was replaced; join tokens have changed",
			slog.String("ca_cert_hash", pki.CertHash([]byte(r.of))))
	}
	return err
}
