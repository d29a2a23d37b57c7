package keystore

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// Brought returns the root certificate, and its key if there is one, that somebody put into
// the directory of a node without identity, for a swarm to be founded with them. Both are
// nil if there is none.
func (s *Store) Brought() (certPEM, keyPEM []byte, err error) {
	if certPEM, err = optional(s.path(rootFile)); err != nil || certPEM == nil {
		return nil, nil, err
	}
	keyPEM, err = optional(s.path(rootKeyFile))
	return certPEM, keyPEM, err
}

// ForgetBroughtKey deletes the key that Brought returned: a swarm that holds its key keeps
// it sealed.
func (s *Store) ForgetBroughtKey() error {
	if err := os.Remove(s.path(rootKeyFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete root key: %w", err)
	}
	return nil
}

func optional(path string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read root: %w", err)
	}
	return data, nil
}
