package pki

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
	"io"
	"math/big"
	"strings"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

const (
	tokenPrefix  = "SWMTKN"
	digestLength = 50
	secretLength = 25
	base36Digits = "0123456789abcdefghijklmnopqrstuvwxyz"
)

// Token is a parsed join token.
type Token struct {
	// Digest is the SHA-256 of the root bundle's PEM bytes.
	Digest [sha256.Size]byte
	// FIPS says that the swarm admits nodes in FIPS mode only.
	FIPS bool
}

// NewTokens makes a join token for each role.
func NewTokens(random io.Reader, rootPEM []byte, fips bool) (*api.JoinTokens, error) {
	tokens := new(api.JoinTokens)
	for _, token := range []*string{&tokens.Worker, &tokens.Manager} {
		var err error
		if *token, err = NewToken(random, rootPEM, fips); err != nil {
			return nil, err
		}
	}
	return tokens, nil
}

// NewToken makes a join token for a root bundle.
func NewToken(random io.Reader, rootPEM []byte, fips bool) (string, error) {
	var secret [16]byte
	if _, err := io.ReadFull(random, secret[:]); err != nil {
		return "", fmt.Errorf("make join token: %w", err)
	}
	digest := sha256.Sum256(rootPEM)
	version := "1"
	if fips {
		version = "2-1"
	}
	return fmt.Sprintf("%s-%s-%s-%s", tokenPrefix, version, base36(digest[:], digestLength), base36(secret[:], secretLength)), nil
}

// ParseToken reads both versions of join tokens.
func ParseToken(text string) (Token, error) {
	invalid := model.Errorf(model.Internal, "invalid join token")
	parts := strings.Split(text, "-")
	if len(parts) < 4 || parts[0] != tokenPrefix {
		return Token{}, invalid
	}
	var t Token
	switch {
	case parts[1] == "1" && len(parts) == 4:
	case parts[1] == "2" && len(parts) == 5 && (parts[2] == "0" || parts[2] == "1"):
		t.FIPS = parts[2] == "1"
	default:
		return Token{}, invalid
	}
	digest, secret := parts[len(parts)-2], parts[len(parts)-1]
	if len(digest) != digestLength || len(secret) != secretLength || strings.Trim(digest+secret, base36Digits) != "" {
		return Token{}, invalid
	}
	n, ok := new(big.Int).SetString(digest, 36)
	if !ok || n.BitLen() > 8*sha256.Size {
		return Token{}, invalid
	}
	n.FillBytes(t.Digest[:])
	return t, nil
}

// Pins checks a downloaded root bundle against the token's digest.
func (t Token) Pins(rootPEM []byte) error {
	if sha256.Sum256(rootPEM) != t.Digest {
		return model.Errorf(model.Internal, "remote CA does not match fingerprint. Expected: %s", hex.EncodeToString(t.Digest[:]))
	}
	return nil
}

// SameToken compares whole tokens in constant time. An empty want matches nothing.
func SameToken(got, want string) bool {
	return want != "" && subtle.ConstantTimeCompare([]byte(got), []byte(want)) == 1
}

// CertHash returns the form in which a swarm records the digest of its root bundle.
func CertHash(rootPEM []byte) string {
	sum := sha256.Sum256(rootPEM)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func base36(b []byte, length int) string {
	s := new(big.Int).SetBytes(b).Text(36)
	return strings.Repeat("0", length-len(s)) + s
}
