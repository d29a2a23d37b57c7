package keystore

import (
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"maps"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/platform/disk"
)

// Headers of the key file that hold the data encryption keys.
const (
	dekHeader     = "raft-dek"
	pendingHeader = "raft-dek-pending"
	wantedHeader  = "raft-dek-needs-rotation"
)

// DEKs returns the key that the raft log is sealed with, made when there is none, and the
// one that a rotation moves to, else nil.
func (s *Store) DEKs() (current, pending []byte, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if current, err = s.openKey(dekHeader); err != nil {
		return nil, nil, err
	}
	if pending, err = s.openKey(pendingHeader); err != nil {
		return nil, nil, err
	}
	if current != nil {
		return current, pending, nil
	}
	if pending != nil {
		return nil, nil, fmt.Errorf("read data encryption key: a pending key without a current one")
	}
	current = newDEK()
	headers := maps.Clone(s.file.Headers)
	return current, nil, s.sealKeys(headers, map[string][]byte{dekHeader: current})
}

// RotationWanted receives a value when a rotation was requested.
func (s *Store) RotationWanted() <-chan struct{} { return s.rotate }

// BeginRotation returns the pending key, made durable before; nil when no rotation was
// requested.
func (s *Store) BeginRotation() ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	pending, err := s.openKey(pendingHeader)
	if err != nil || pending != nil || s.file.Headers[wantedHeader] != "true" {
		return pending, err
	}
	pending = newDEK()
	headers := maps.Clone(s.file.Headers)
	delete(headers, wantedHeader)
	return pending, s.sealKeys(headers, map[string][]byte{pendingHeader: pending})
}

// FinishRotation makes the pending key the current one, durably.
func (s *Store) FinishRotation() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	pending, err := s.openKey(pendingHeader)
	if err != nil || pending == nil {
		return err
	}
	headers := maps.Clone(s.file.Headers)
	delete(headers, pendingHeader)
	return s.sealKeys(headers, map[string][]byte{dekHeader: pending})
}

// ForgetDEKs removes all data encryption keys: the node is no manager any more.
func (s *Store) ForgetDEKs() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file.Key == nil {
		return nil
	}
	headers := maps.Clone(s.file.Headers)
	for _, h := range []string{dekHeader, pendingHeader, wantedHeader} {
		delete(headers, h)
	}
	return s.writeKey(headers)
}

func newDEK() []byte {
	key := make([]byte, disk.KeySize)
	rand.Read(key)
	return key
}

// openKey returns the key in a header, nil without one. Callers hold mu.
func (s *Store) openKey(header string) ([]byte, error) {
	text, ok := s.file.Headers[header]
	if !ok {
		return nil, nil
	}
	record, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil, fmt.Errorf("read %s of the key file: %w", header, err)
	}
	key, err := disk.Open(record, s.kek)
	if err != nil {
		return nil, fmt.Errorf("read %s of the key file: %w", header, err)
	}
	return key, nil
}

// sealKeys writes the key file with headers and the given keys in theirs. Callers hold mu.
func (s *Store) sealKeys(headers map[string]string, keys map[string][]byte) error {
	if headers == nil {
		headers = map[string]string{}
	}
	for header, key := range keys {
		var record []byte
		var err error
		if len(s.kek) > 0 {
			record, err = disk.Seal(s.kek, key)
		} else {
			record, err = proto.Marshal(&api.MaybeEncryptedRecord{Data: key})
		}
		if err != nil {
			return fmt.Errorf("write %s of the key file: %w", header, err)
		}
		headers[header] = base64.StdEncoding.EncodeToString(record)
	}
	return s.writeKey(headers)
}
