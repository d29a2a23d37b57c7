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

// Bounds of the pause between two questions to somebody who has no key yet.
const (
	providerPause    = time.Second
	providerMaxPause = time.Minute
)

// unlockBy unlocks a manager that starts locked by asking somebody, until that succeeded or a
// person was faster. [errNobody] ends it.
func (s *membership) unlockBy(ctx context.Context, who string, ask func(context.Context) error) error {
	for pause := providerPause; s.Status().LocalNodeState == swarm.LocalNodeStateLocked; pause = min(2*pause, providerMaxPause) {
		err := ask(ctx)
		if err == nil || errors.Is(err, errNobody) || ctx.Err() != nil {
			return nil //nolint:nilerr // done, or asked to stop
		}
		s.cfg.Log.Warn("not unlocked, trying again", slog.String("asked", who), slog.Duration("pause", pause), slog.Any("error", err))
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
	return nil
}

// errNobody says that there is nobody to ask.
var errNobody = errors.New("nobody to ask for the key")

// unlockByProvider unlocks a manager that starts locked with the key that a provider has.
func (s *membership) unlockByProvider(ctx context.Context, p unlock.Provider) error {
	return s.unlockBy(ctx, p.String(), func(ctx context.Context) error { return s.askProvider(ctx, p) })
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
