package keystore

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/platform/disk"
)

// Headers of the key file that hold the data encryption keys.
const (
	dekHeader     = "raft-dek"
	pendingHeader = "raft-dek-pending"
	wantedHeader  = "raft-dek-needs-rotation"
)

// Headers of our own, which SwarmKit carries along: the keys of the task database.
const (
	taskHeader    = "skep-task-key"
	oldTaskHeader = "skep-task-key-old"
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
	if err := s.sealKeys(headers, map[string][]byte{dekHeader: pending}); err != nil {
		return err
	}
	s.askRotation() // another one may have been requested during this one
	return nil
}

// askRotation passes a request for a rotation on, if there is one. Callers hold mu.
func (s *Store) askRotation() {
	if s.file.Headers[wantedHeader] != "true" {
		return
	}
	select {
	case s.rotate <- struct{}{}:
	default:
	}
}

// Follow takes over the key encryption key that the swarm has at a version of its cluster
// object, empty when it does not lock its managers: the key file is written again, sealed
// with it. What is not newer than the one in use changes nothing. locked says that the key
// file was in the clear before: then a rotation of the data encryption key is requested,
// and the private key should be replaced, for both lay readable on the disk.
func (s *Store) Follow(kek []byte, version uint64) (locked bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	same := bytes.Equal(kek, s.kek)
	switch {
	case s.file.Key == nil:
		return false, ErrNone
	case s.worker:
		return false, nil // no manager any more
	case version == s.kekVersion && !same:
		return false, model.Errorf(model.Internal, "the unlock key at version %d is another than the one in use", version)
	case version <= s.kekVersion || same:
		return false, nil
	}
	locked = len(s.kek) == 0
	if err := s.rekey(kek, version); err != nil {
		return false, err
	}
	s.askRotation()
	return locked, nil
}

// Locks reports whether the key file is sealed.
func (s *Store) Locks() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.kek) > 0
}

// rekey writes the key file with all its keys sealed with kek, and requests a rotation of
// keys that were in the clear until then. Callers hold mu.
func (s *Store) rekey(kek []byte, version uint64) error {
	headers, keys := maps.Clone(s.file.Headers), map[string][]byte{}
	for _, header := range sealedHeaders() {
		key, err := s.openKey(header)
		if err != nil {
			return err
		}
		if key != nil {
			keys[header] = key
		}
	}
	if len(s.kek) == 0 && len(kek) > 0 {
		if keys[dekHeader] != nil {
			headers[wantedHeader] = "true"
		}
		if keys[taskHeader] != nil {
			keys[oldTaskHeader], keys[taskHeader] = append(bytes.Clone(keys[taskHeader]), keys[oldTaskHeader]...), newDEK()
		}
	}
	oldKEK, oldVersion := s.kek, s.kekVersion
	s.kek, s.kekVersion = bytes.Clone(kek), version
	if err := s.sealKeys(headers, keys); err != nil {
		s.kek, s.kekVersion = oldKEK, oldVersion
		return err
	}
	return nil
}

func sealedHeaders() []string {
	return []string{dekHeader, pendingHeader, taskHeader, oldTaskHeader}
}

// TaskKeys returns the keys of the node's task database: the one to seal with, made when
// there is none, and behind it those before, as long as records may be sealed with them.
func (s *Store) TaskKeys() ([][]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file.Key == nil {
		return nil, ErrNone
	}
	current, err := s.openKey(taskHeader)
	if err != nil {
		return nil, err
	}
	old, err := s.openKey(oldTaskHeader)
	switch {
	case err != nil:
		return nil, err
	case current == nil:
		current = newDEK()
		err := s.sealKeys(maps.Clone(s.file.Headers), map[string][]byte{taskHeader: current})
		return [][]byte{current}, err
	}
	return append([][]byte{current}, slices.Collect(slices.Chunk(old, disk.KeySize))...), nil
}

// ForgetOldTaskKey says that no record is sealed with a task key before the current one.
func (s *Store) ForgetOldTaskKey() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.file.Headers[oldTaskHeader]; !ok {
		return nil
	}
	headers := maps.Clone(s.file.Headers)
	delete(headers, oldTaskHeader)
	return s.writeKey(headers)
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
