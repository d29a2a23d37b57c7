package node

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/keystore"
	"github.com/skep-dev/skep/platform/unlock"
)

// Bounds of the pause between two questions to a provider that has no key yet.
const (
	providerPause    = time.Second
	providerMaxPause = time.Minute
)

// unlockByProvider unlocks a manager that starts locked with the key that a provider has,
// which is asked until it has one or a person was faster.
func (s *membership) unlockByProvider(ctx context.Context, p unlock.Provider) error {
	for pause := providerPause; s.Status().LocalNodeState == swarm.LocalNodeStateLocked; pause = min(2*pause, providerMaxPause) {
		err := s.askProvider(ctx, p)
		if err == nil || ctx.Err() != nil {
			return nil //nolint:nilerr // asked to stop
		}
		s.cfg.Log.Warn("not unlocked by the provider, trying again", slog.String("provider", p.String()), slog.Duration("pause", pause), slog.Any("error", err))
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
	return nil
}

func (s *membership) askProvider(ctx context.Context, p unlock.Provider) error {
	peeked, err := keystore.Peek(filepath.Join(s.dir, "certificates"), nil)
	if err != nil {
		return err
	}
	certs, err := pki.ParseCerts(peeked.ChainPEM)
	if err != nil {
		return err
	}
	if len(certs[0].Subject.Organization) == 0 {
		return errors.New("the node's certificate names no swarm")
	}
	kek, err := p.Key(ctx, unlock.Request{
		ClusterID: certs[0].Subject.Organization[0], NodeID: certs[0].Subject.CommonName, KEKVersion: peeked.KEKVersion,
	})
	if err != nil {
		return err
	}
	return s.Unlock(ctx, swarm.UnlockRequest{UnlockKey: pki.EncodeUnlockKey(kek)})
}
