package shim

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// sealedAnnotation holds the whole specification, sealed, in the one that containerd gets.
const sealedAnnotation = "dev.skep.sealed"

// sealKeySize is the length in bytes of the keys of specifications, for AES-256.
const sealKeySize = 32

// SealSpec returns a specification for containerd to keep, which says nothing, and the key
// by which the shim makes the real one of it. containerd writes what it gets to its
// database, from where environments and labels would never go away again.
func SealSpec(spec *specs.Spec) (sealed *specs.Spec, key []byte, err error) {
	plain, err := json.Marshal(spec)
	if err != nil {
		return nil, nil, fmt.Errorf("encode container specification: %w", err)
	}
	key = make([]byte, sealKeySize)
	rand.Read(key)
	aead, err := specCipher(key)
	if err != nil {
		return nil, nil, err
	}
	text := base64.StdEncoding.EncodeToString(aead.Seal(nil, nil, plain, nil)) //nolint:gosec // it draws a nonce itself
	sealed = &specs.Spec{Version: spec.Version, Annotations: map[string]string{sealedAnnotation: text}}
	if spec.Linux != nil { // by which containerd chooses the owner of the bundle
		sealed.Linux = &specs.Linux{UIDMappings: spec.Linux.UIDMappings, GIDMappings: spec.Linux.GIDMappings}
	}
	return sealed, key, nil
}

func specCipher(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("seal container specification: %w", err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, fmt.Errorf("seal container specification: %w", err)
	}
	return aead, nil
}

// openSpec puts the real specification in the place of the sealed one in a bundle, which
// lies in memory.
func openSpec(bundle string, key []byte) error {
	path := filepath.Join(bundle, "config.json")
	data, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read container specification: %w", err)
	}
	plain, err := unsealSpec(data, key)
	if err != nil {
		return fmt.Errorf("read container specification: %w", err)
	}
	if err := os.WriteFile(path, plain, 0o600); err != nil {
		return fmt.Errorf("write container specification: %w", err)
	}
	return nil
}

// unsealSpec returns the specification in a sealed one.
func unsealSpec(data, key []byte) ([]byte, error) {
	var spec specs.Spec
	if err := json.Unmarshal(data, &spec); err != nil {
		return nil, err
	}
	text, ok := spec.Annotations[sealedAnnotation]
	if !ok {
		return nil, errors.New("it is not sealed")
	}
	record, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil, err
	}
	aead, err := specCipher(key)
	if err != nil {
		return nil, err
	}
	return aead.Open(nil, nil, record, nil)
}
