package node

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/audit"
	"github.com/skep-dev/skep/platform/disk"
	"github.com/skep-dev/skep/platform/enroll"
	"github.com/skep-dev/skep/platform/keystore"
)

// registerPause is how long a manager waits after it could not register its credential.
const registerPause = 2 * time.Second

// registerTimeout bounds one attempt.
const registerTimeout = 10 * time.Second

// credentialFile is where the manager of a swarm directory keeps, in clear, what others
// unlock it for.
func credentialFile(dir string) string { return filepath.Join(dir, "certificates", "unlock-peers") }

// readCredential returns the credential in a file, an error that is [fs.ErrNotExist] when there is none.
func readCredential(path string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read credential: %w", err)
	}
	credential, err := hex.DecodeString(strings.TrimSpace(string(data)))
	if err != nil || len(credential) != pki.PeerCredentialSize {
		return nil, fmt.Errorf("%s holds no credential", path)
	}
	return credential, nil
}

// forgetCredential deletes it.
func forgetCredential(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete credential: %w", err)
	}
	return nil
}

// followPeers keeps a credential registered while managers unlock each other, a new one at
// each start, after each use and for each unlock key, and none otherwise.
func (r *managerRole) followPeers(ctx context.Context) {
	select {
	case <-r.replica.Ready():
	case <-ctx.Done():
		return
	}
	var digest []byte // of the credential that this process registered
	var index uint64  // of the state that has it
	for at := r.replica.Follow(); ; {
		s := at.Snapshot()
		_, peers := pki.PeerUnlocking(s)
		kek := pki.ManagersKEK(s.Cluster())
		registered := peers.GetCredentials()[r.creds.NodeID()]
		var err error
		switch {
		case s.Node(r.creds.NodeID()) == nil: // not caught up
		case peers == nil || len(kek) == 0:
			digest = nil
			err = forgetCredential(r.credential)
		case s.Index() < index: // not caught up
		case digest == nil || !bytes.Equal(registered.GetDigest(), digest) || !pki.SameDigest(registered.GetKeyDigest(), kek):
			digest, index, err = r.registerCredential(ctx)
		}
		if err != nil && ctx.Err() == nil {
			r.log.Warn("other managers cannot unlock this one yet, trying again", slog.Any("error", err))
			select {
			case <-ctx.Done():
				return
			case <-time.After(registerPause):
			}
			at.Drain()
			continue
		}
		if _, _, err := at.Next(ctx); err != nil {
			return
		}
	}
}

// registerCredential makes a credential. It is on the disk before the others take it; a crash
// between leaves the manager to be unlocked by hand.
func (r *managerRole) registerCredential(ctx context.Context) (digest []byte, index uint64, err error) {
	credential := make([]byte, pki.PeerCredentialSize)
	if _, err := rand.Read(credential); err != nil {
		return nil, 0, fmt.Errorf("make credential: %w", err)
	}
	if err := disk.WriteFile(r.credential, []byte(hex.EncodeToString(credential)+"\n"), 0o600); err != nil {
		return nil, 0, err
	}
	digest = pki.PeerDigest(credential)
	call, cancel := context.WithTimeout(ctx, registerTimeout)
	defer cancel()
	resp, err := skepv1.NewUnlockClient(r.route()).Register(call, &skepv1.RegisterUnlockRequest{Digest: digest})
	if err != nil {
		return nil, 0, err
	}
	r.log.Info("other managers may unlock this one once", slog.String("node_id", r.creds.NodeID()))
	return digest, resp.GetIndex(), nil
}

// recordAsked records that a locked manager asked for the unlock key.
func (m *member) recordAsked(nodeID, addr string, err error) {
	if m.cfg.audit == nil {
		return
	}
	record := audit.Record{Who: "anonymous", From: addr, What: skepv1.Unlock_Ask_FullMethodName, Object: nodeID, Outcome: audit.Done}
	if err != nil {
		record.Outcome, record.Reason = audit.Refused, err.Error()
	}
	m.cfg.audit.Add(record)
}

// unlockByPeers unlocks a manager that starts locked with the key that other managers give
// for its credential.
func (s *membership) unlockByPeers(ctx context.Context) error {
	return s.unlockBy(ctx, "other managers", func(ctx context.Context) error {
		credential, err := readCredential(credentialFile(s.dir))
		if errors.Is(err, fs.ErrNotExist) {
			return errNobody
		}
		if err == nil {
			err = s.askPeers(ctx, credential)
		}
		if err != nil && ctx.Err() == nil {
			s.tellLocked("Other managers do not unlock it: " + err.Error())
		}
		return err
	})
}

// tellLocked says more about why this node is still locked.
func (s *membership) tellLocked(why string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state == swarm.LocalNodeStateLocked {
		s.fault = lockedText + " " + why
	}
}

// askPeers asks each manager that this node knows for the key, until one gives it.
func (s *membership) askPeers(ctx context.Context, credential []byte) error {
	peeked, err := keystore.Peek(filepath.Join(s.dir, "certificates"), nil)
	if err != nil {
		return err
	}
	certs, err := pki.ParseCerts(peeked.ChainPEM)
	if err != nil {
		return err
	}
	rootPEM, err := s.keys.Root()
	if err != nil {
		return err
	}
	root, err := pki.ParseRoot(rootPEM, nil)
	if err != nil {
		return err
	}
	s.mu.Lock()
	own := s.pending.AdvertiseAddr
	s.mu.Unlock()
	err = model.Errorf(model.Unavailable, "no other manager is known")
	for _, k := range openRemotes(s.dir, s.cfg.Log).list() {
		if k.Addr == own {
			continue
		}
		var kek []byte
		kek, err = enroll.AskKey(ctx, s.cfg.Network, root, k.Addr, certs[0].Subject.CommonName, credential)
		if err == nil {
			return s.Unlock(ctx, swarm.UnlockRequest{UnlockKey: pki.EncodeUnlockKey(kek)})
		}
		if model.KindOf(err) == model.Denied {
			return err // the leader's answer
		}
	}
	return err
}
