package keystore

import (
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/skep-dev/skep/core/pki"
)

// Peeked is what a directory of certificates says without being changed.
type Peeked struct {
	ChainPEM []byte
	// Sealed says that the key file is encrypted, Opened that the key given opens it.
	Sealed, Opened bool
	KEKVersion     uint64
	// DEKs open the raft log, newest first; empty unless the key file could be read.
	DEKs [][]byte
	// Rotating says that a data encryption key is being replaced.
	Rotating bool
}

// Peek reads the certificates in dir. kek opens a sealed key file and may be nil. ErrNone
// when there is no certificate.
func Peek(dir string, kek []byte) (Peeked, error) {
	var p Peeked
	chain, err := os.ReadFile(filepath.Join(dir, certFile))
	if errors.Is(err, os.ErrNotExist) {
		return p, ErrNone
	}
	if err != nil {
		return p, fmt.Errorf("read certificate: %w", err)
	}
	p.ChainPEM = chain
	data, err := os.ReadFile(filepath.Join(dir, keyFile))
	if err != nil {
		return p, fmt.Errorf("read node key: %w", err)
	}
	if block, _ := pem.Decode(data); block != nil {
		for name, value := range block.Headers {
			if strings.EqualFold(name, kekVersionHeader) {
				p.KEKVersion, _ = strconv.ParseUint(value, 10, 64) // 0 says that it is not known
			}
		}
	}
	file, err := pki.DecodeKeyFile(data, nil)
	if errors.Is(err, pki.ErrLocked) {
		p.Sealed = true
		if file, err = pki.DecodeKeyFile(data, kek); errors.Is(err, pki.ErrLocked) && len(kek) == 0 {
			return p, nil
		}
	}
	if err != nil {
		return p, err
	}
	p.Opened = p.Sealed
	s := &Store{file: file}
	if p.Sealed {
		s.kek = kek
	}
	for _, header := range []string{pendingHeader, dekHeader} {
		key, err := s.openKey(header)
		if err != nil {
			return p, err
		}
		if key != nil {
			p.DEKs = append(p.DEKs, key)
		}
	}
	_, pending := file.Headers[pendingHeader]
	p.Rotating = pending || file.Headers[wantedHeader] == "true"
	return p, nil
}
