package manager

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
)

// blacklistGrace is how long an entry outlives the certificate that it is about.
const blacklistGrace = 7 * 24 * time.Hour

// runCluster rotates the network keys and purges the blacklist. There is a cluster by now.
func (m *Manager) runCluster(ctx context.Context) error {
	cursor := m.state.Follow()
	if _, err := m.state.Update(ctx, m.startRotation); err != nil {
		return fmt.Errorf("note rotation of network keys: %w", err)
	}
	for {
		if err := m.purgeBlacklist(ctx); err != nil {
			return fmt.Errorf("purge blacklist: %w", err)
		}
		if err := m.awaitRotation(ctx, cursor); err != nil {
			return err
		}
		if _, err := m.state.Update(ctx, m.rotateKeys); err != nil {
			return fmt.Errorf("rotate network keys: %w", err)
		}
		m.log.LogAttrs(ctx, slog.LevelInfo, "network keys rotated")
	}
}

// awaitRotation returns when keys are to be rotated: when that is due, or asked for, and the
// nodes have taken up the last rotation, if they do so soon.
func (m *Manager) awaitRotation(ctx context.Context, cursor *replica.Cursor) error {
	for {
		s := m.state.View()
		due, settled := pki.RotationDue(pki.Rotation(s), time.Now())
		if wait := time.Until(due); wait > 0 {
			if err := nextOrWhen(ctx, cursor, wait); err != nil {
				return err
			}
			continue
		}
		if m.taken == nil || time.Until(settled) <= 0 {
			return nil
		}
		bounded, cancel := context.WithDeadline(ctx, settled)
		err := m.taken(bounded, s.Index())
		cancel()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			m.log.LogAttrs(ctx, slog.LevelWarn, "network keys are rotated although some nodes have not taken up the last rotation")
		}
		return nil
	}
}

// nextOrWhen waits for a change of the keys' rotation, at most for a while.
func nextOrWhen(ctx context.Context, cursor *replica.Cursor, wait time.Duration) error {
	bounded, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	for {
		events, reset, err := cursor.Next(bounded)
		if bounded.Err() != nil {
			return ctx.Err() // nil when it is time
		}
		if err != nil {
			return fmt.Errorf("follow rotation of network keys: %w", err)
		}
		if reset || slices.ContainsFunc(events, func(e model.Event) bool { return e.Table == model.Resources }) {
			return nil
		}
	}
}

// startRotation notes when the time of the newest keys began, unless that is known.
func (m *Manager) startRotation(tx *store.Tx) error {
	if tx.Snapshot().Cluster() == nil || pki.Rotation(tx.Snapshot()).GetRotated() != nil {
		return nil
	}
	if _, foreign := tx.Snapshot().OnlyOf(pki.RotationKind); foreign != nil {
		m.log.Warn("removing a resource that has one of Skep's own names and is not Skep's",
			slog.String("resource_id", foreign.GetId()), slog.String("name", foreign.GetAnnotations().GetName()), slog.String("kind", foreign.GetKind()))
	}
	return pki.StartRotation(tx, m.random, tx.Now())
}

// ensureKeys makes the first network keys.
func (m *Manager) ensureKeys(tx *store.Tx) error {
	c := tx.Snapshot().Cluster()
	if c == nil || len(c.GetNetworkBootstrapKeys()) > 0 {
		return nil
	}
	c = model.Clone(c)
	if err := pki.FirstNetworkKeys(c, m.random); err != nil {
		return err
	}
	return tx.Update(c)
}

// rotateKeys replaces the oldest key of each subsystem.
func (m *Manager) rotateKeys(tx *store.Tx) error {
	if err := m.ensureKeys(tx); err != nil {
		return err
	}
	c := model.Clone(tx.Snapshot().Cluster())
	if c == nil {
		return nil
	}
	if err := pki.RotateNetworkKeys(c, m.random, pki.GossipKeys, pki.OverlayKeys); err != nil {
		return err
	}
	if err := pki.Rotated(tx, m.random, tx.Now()); err != nil {
		return err
	}
	return tx.Update(c)
}

// purgeBlacklist forgets removed nodes whose certificates ended long ago.
func (m *Manager) purgeBlacklist(ctx context.Context) error {
	_, err := m.state.Update(ctx, func(tx *store.Tx) error {
		stored := tx.Snapshot().Cluster()
		c := model.Clone(stored)
		for cn, entry := range stored.GetBlacklistedCertificates() {
			if expiry := entry.GetExpiry(); expiry != nil && tx.Now().Sub(expiry.AsTime()) > blacklistGrace {
				delete(c.GetBlacklistedCertificates(), cn)
			}
		}
		if c == nil || len(c.GetBlacklistedCertificates()) == len(stored.GetBlacklistedCertificates()) {
			return nil
		}
		return tx.Update(c)
	})
	return err
}
