package node

import (
	"context"
	"log/slog"
	"time"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/enroll"
	"github.com/skep-dev/skep/platform/keystore"
)

// findRootPause is how often at most a node looks for a root that it missed.
const findRootPause = 5 * time.Second

// comeBack gets a new identity from any other manager for a node whose certificate expired
// while it was off. ok is false on a manager that needs nobody else, being the only one.
func (m *member) comeBack(ctx context.Context) (id keystore.Identity, ok bool, err error) {
	if role := m.manager.Load(); role != nil && role.isReady() && role.replica.Votes() && len(role.replica.Voters()) == 1 {
		return keystore.Identity{}, false, nil
	}
	err = model.Errorf(model.Unavailable, "this node's certificate has expired, and no other manager is known to ask for a new one")
	for _, k := range m.remotes.list() { // most may have expired as well
		if k.Addr == m.saved.AdvertiseAddr {
			continue
		}
		if id, err = enroll.Return(ctx, m.creds, k.Addr); err == nil {
			return id, true, nil
		}
		m.remotes.observe(k, false)
		if model.KindOf(err) == model.Denied || ctx.Err() != nil {
			break // the leader's answer
		}
	}
	return keystore.Identity{}, false, err
}

// findRoot looks for the swarm's root where managers show certificates from one that this
// node does not know: it was off when the last rotation ended.
func (m *member) findRoot(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.unknown:
		}
		if k, ok := m.remotes.pick(m.saved.AdvertiseAddr); ok {
			rootPEM, err := enroll.FetchRoot(ctx, m.cfg.Network, k.Addr)
			if err != nil {
				m.cfg.Log.Debug("root certificate not fetched", slog.String("addr", k.Addr), slog.Any("error", err))
			} else {
				m.adoptUnproven(rootPEM)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(findRootPause):
		}
	}
}

// adoptUnproven takes over a root that nobody vouches for, if it is the one that signed
// this node's own certificate: only who holds its key can serve it with that effect. A
// bundle might hold a stranger's root beside the right one, so it must be a single one.
func (m *member) adoptUnproven(rootPEM []byte) {
	root, err := pki.ParseRoot(rootPEM, nil)
	if err != nil || len(root.Certs) != 1 {
		m.cfg.Log.Warn("the root certificate that a manager serves is not taken over: it is not a single one")
		return
	}
	m.adoptRoot(rootPEM)
}
