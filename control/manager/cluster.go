package manager

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

const (
	keyRotation      = 12 * time.Hour
	keySize          = 16
	keysPerSubsystem = 3
	// blacklistGrace is how long an entry outlives the certificate that it is about.
	blacklistGrace = 7 * 24 * time.Hour
)

// subsystems are the users of network keys, in the order of their first clock values.
func subsystems() [2]string { return [2]string{"networking:gossip", "networking:ipsec"} }

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
	var start [2]byte
	if _, err := io.ReadFull(m.random, start[:]); err != nil {
		return fmt.Errorf("make network keys: %w", err)
	}
	c.EncryptionKeyLamportClock = uint64(binary.BigEndian.Uint16(start[:]))
	for _, subsystem := range subsystems() {
		for range keysPerSubsystem {
			if err := m.addKey(c, subsystem); err != nil {
				return err
			}
		}
	}
	return tx.Update(c)
}

func (m *Manager) addKey(c *api.Cluster, subsystem string) error {
	key := make([]byte, keySize)
	if _, err := io.ReadFull(m.random, key); err != nil {
		return fmt.Errorf("make network key: %w", err)
	}
	c.EncryptionKeyLamportClock++
	c.NetworkBootstrapKeys = append(c.NetworkBootstrapKeys, &api.EncryptionKey{
		Subsystem: subsystem, Algorithm: api.EncryptionKey_AES_128_GCM, Key: key, LamportTime: c.EncryptionKeyLamportClock,
	})
	return nil
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
	for _, subsystem := range subsystems() {
		if err := m.addKey(c, subsystem); err != nil {
			return err
		}
		for count(c, subsystem) > keysPerSubsystem {
			c.NetworkBootstrapKeys = slices.Delete(c.NetworkBootstrapKeys, oldest(c, subsystem), oldest(c, subsystem)+1)
		}
	}
	return tx.Update(c)
}

func count(c *api.Cluster, subsystem string) (n int) {
	for _, k := range c.GetNetworkBootstrapKeys() {
		if k.GetSubsystem() == subsystem {
			n++
		}
	}
	return n
}

func oldest(c *api.Cluster, subsystem string) int {
	found := -1
	for i, k := range c.GetNetworkBootstrapKeys() {
		if k.GetSubsystem() == subsystem &&
			(found < 0 || k.GetLamportTime() < c.GetNetworkBootstrapKeys()[found].GetLamportTime()) {
			found = i
		}
	}
	return found
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
