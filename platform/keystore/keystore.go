// Package keystore keeps a node's identity on disk: its root bundle, certificate and
// private key, and in the key file's headers the data encryption key of its raft log. The
// layout is SwarmKit's, below <data root>/swarm/certificates.
//
// A Store serializes its own writes and may be used from any goroutine; one process owns
// the directory. What the files mean is decided in core/pki.
package keystore

import (
	"crypto"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/disk"
)

const (
	rootFile    = "swarm-root-ca.crt"
	rootKeyFile = "swarm-root-ca.key"
	certFile    = "swarm-node.crt"
	keyFile     = "swarm-node.key"
	// pendingCert holds a new certificate while the key is being replaced.
	pendingCert = ".swarm-node.crt"

	kekVersionHeader = "kek-version"
)

// ErrNone says that the directory holds no identity.
var ErrNone = &model.Error{Kind: model.NotFound, Text: "this node has no certificate"}

// Identity is what a node knows itself by.
type Identity struct {
	// RootPEM is the trusted bundle, exactly as it was served.
	RootPEM []byte
	// ChainPEM is the node's certificate and its intermediates.
	ChainPEM []byte
	Key      crypto.Signer
}

// Store is one directory of certificates.
type Store struct {
	dir string

	mu sync.Mutex
	// file is the key file as it is on disk; its Key is nil before Load or Save.
	file pki.KeyFile
	// kek encrypts the key file; empty unless managers are locked.
	kek        []byte
	kekVersion uint64
	// worker is set once the identity was replaced by a worker's.
	worker bool
	rotate chan struct{}
}

// Open returns the store of a directory, which it makes if it is missing.
func Open(dir string) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open certificates: %w", err)
	}
	// A write that was cut short may have left a key in the clear that is sealed by now.
	stale, err := filepath.Glob(filepath.Join(dir, "."+keyFile+".*"))
	if err != nil {
		return nil, fmt.Errorf("open certificates: %w", err)
	}
	for _, path := range stale {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("open certificates: %w", err)
		}
	}
	return &Store{dir: dir, rotate: make(chan struct{}, 1)}, nil
}

func (s *Store) path(name string) string { return filepath.Join(s.dir, name) }

// Load reads the identity. kek opens an encrypted key file and may be nil. ErrNone when
// there is none, pki.ErrLocked when the key file needs another kek.
func (s *Store) Load(kek []byte) (Identity, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.load(kek)
}

// Reload is Load with the key encryption key that is in use.
func (s *Store) Reload() (Identity, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.load(s.kek)
}

func (s *Store) load(kek []byte) (Identity, error) {
	root, err := os.ReadFile(s.path(rootFile))
	if errors.Is(err, fs.ErrNotExist) {
		return Identity{}, ErrNone
	}
	if err != nil {
		return Identity{}, fmt.Errorf("read root certificate: %w", err)
	}
	data, err := os.ReadFile(s.path(keyFile))
	if errors.Is(err, fs.ErrNotExist) {
		return Identity{}, ErrNone
	}
	if err != nil {
		return Identity{}, fmt.Errorf("read node key: %w", err)
	}
	file, err := pki.DecodeKeyFile(data, kek)
	if err != nil {
		return Identity{}, err
	}
	chain, err := s.matchingChain(file.Key)
	if err != nil {
		return Identity{}, err
	}
	s.file, s.kek = file, kek
	s.kekVersion, _ = strconv.ParseUint(file.Headers[kekVersionHeader], 10, 64)
	s.worker = false
	return Identity{RootPEM: root, ChainPEM: chain, Key: file.Key}, nil
}

// matchingChain returns the certificate that belongs to key: the current one, or the
// pending one of a replacement that was cut short, which it finishes.
func (s *Store) matchingChain(key crypto.Signer) ([]byte, error) {
	for _, name := range []string{certFile, pendingCert} {
		chain, err := os.ReadFile(s.path(name))
		if err != nil {
			continue
		}
		certs, err := pki.ParseCerts(chain)
		if err != nil {
			continue
		}
		public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
		if !ok || !public.Equal(certs[0].PublicKey) {
			continue
		}
		if name == pendingCert {
			if err := os.Rename(s.path(pendingCert), s.path(certFile)); err != nil {
				return nil, fmt.Errorf("finish replacing the certificate: %w", err)
			}
		}
		return chain, nil
	}
	return nil, model.Errorf(model.Internal, "no certificate in %s belongs to the node's key", s.dir)
}

// Root returns the root bundle, which lies in the clear.
func (s *Store) Root() ([]byte, error) {
	data, err := os.ReadFile(s.path(rootFile))
	if err != nil {
		return nil, fmt.Errorf("read root certificate: %w", err)
	}
	return data, nil
}

// SaveRoot writes the root bundle.
func (s *Store) SaveRoot(rootPEM []byte) error {
	return disk.WriteFile(s.path(rootFile), rootPEM, 0o644)
}

// Save replaces root, certificate and key. The headers of the key file stay, and the key
// that encrypts it.
func (s *Store) Save(id Identity) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.save(id, func() error { return s.writeKey(s.file.Headers) })
}

// SaveManager is Save for a node that becomes a manager, under the key encryption key of
// the swarm, which is empty when the swarm does not lock its managers.
func (s *Store) SaveManager(id Identity, kek []byte, version uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.worker = false
	return s.save(id, func() error { return s.rekey(kek, version) })
}

// SaveWorker is Save for a node that becomes a worker: its key file is in the clear, and
// Follow leaves it so.
func (s *Store) SaveWorker(id Identity) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.worker = true
	return s.save(id, func() error { return s.rekey(nil, 0) })
}

// save does what Save promises; writeKey writes the key file. Callers hold mu.
func (s *Store) save(id Identity, writeKey func() error) error {
	if err := s.SaveRoot(id.RootPEM); err != nil {
		return err
	}
	if err := disk.WriteFile(s.path(pendingCert), id.ChainPEM, 0o644); err != nil {
		return err
	}
	old := s.file.Key
	s.file.Key = id.Key
	if err := writeKey(); err != nil {
		s.file.Key = old
		return err
	}
	if err := os.Rename(s.path(pendingCert), s.path(certFile)); err != nil {
		return fmt.Errorf("replace certificate: %w", err)
	}
	return nil
}

// writeKey writes the key file with headers and keeps them. Callers hold mu.
func (s *Store) writeKey(headers map[string]string) error {
	next := map[string]string{}
	maps.Copy(next, headers)
	next[kekVersionHeader] = strconv.FormatUint(s.kekVersion, 10)
	data, err := pki.EncodeKeyFile(rand.Reader, pki.KeyFile{Key: s.file.Key, Headers: next}, s.kek)
	if err != nil {
		return err
	}
	if err := disk.WriteFile(s.path(keyFile), data, 0o600); err != nil {
		return err
	}
	s.file.Headers = next
	return nil
}

// Clear deletes the identity.
func (s *Store) Clear() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.file, s.kek, s.kekVersion, s.worker = pki.KeyFile{}, nil, 0, false
	var errs []error
	for _, name := range []string{keyFile, certFile, pendingCert, rootFile, rootKeyFile} {
		if err := os.Remove(s.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
