package manager

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
)

const (
	keyRotation = 12 * time.Hour
	// blacklistGrace is how long an entry outlives the certificate that it is about.
	blacklistGrace = 7 * 24 * time.Hour
)

// runCluster rotates the network keys and purges the blacklist.
func (m *Manager) runCluster(ctx context.Context) error {
	ticker := time.NewTicker(keyRotation)
	defer ticker.Stop()
	for {
		if err := m.purgeBlacklist(ctx); err != nil {
			return fmt.Errorf("purge blacklist: %w", err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
		if _, err := m.state.Update(ctx, m.rotateKeys); err != nil {
			return fmt.Errorf("rotate network keys: %w", err)
		}
		m.log.LogAttrs(ctx, slog.LevelInfo, "network keys rotated")
	}
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
