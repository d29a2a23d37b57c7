package pki

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"strings"

	"github.com/skep-dev/skep/core/model"
)

// A Share is one part of an unlock key that was split by Shamir's scheme over GF(2⁸): so
// many of them as Threshold says make the key, fewer say nothing about it.
type Share struct {
	// Threshold is how many shares of the set make the key, from 2.
	Threshold byte
	// Index is the share's place in the set, from 1.
	Index byte
	// Set is the beginning of the key's digest: shares of other keys are told apart by it,
	// and the key is checked by it.
	Set [shareSetLength]byte
	// Value is the polynomials' values at Index.
	Value [KEKLength]byte
}

const (
	sharePrefix    = "SKEPSHARE-1-"
	shareSetLength = 4
	shareSumLength = 4
	shareLength    = 2 + shareSetLength + KEKLength + shareSumLength
	// MaxShares bounds the shares of a set: an index is a byte and not zero.
	MaxShares = 255
)

// SplitKey makes n shares of a key of which any threshold make it again.
func SplitKey(random io.Reader, kek []byte, n, threshold int) ([]Share, error) {
	switch {
	case len(kek) != KEKLength:
		return nil, model.Errorf(model.Invalid, "an unlock key has %d bytes, not %d", KEKLength, len(kek))
	case threshold < 2 || n < threshold || n > MaxShares:
		return nil, model.Errorf(model.Invalid, "cannot make %d shares of which %d unlock: there must be 2 to %d, and not fewer than needed", n, threshold, MaxShares)
	}
	// One polynomial for each byte of the key, which is its value at 0.
	coefficients := make([]byte, (threshold-1)*KEKLength)
	if _, err := io.ReadFull(random, coefficients); err != nil {
		return nil, fmt.Errorf("split unlock key: %w", err)
	}
	shares := make([]Share, n)
	for i := range shares {
		s := Share{Threshold: byte(threshold), Index: byte(i + 1), Set: shareSet(kek)}
		for b := range s.Value {
			y := byte(0)
			for degree := threshold - 1; degree > 0; degree-- {
				y = gfMul(y, s.Index) ^ coefficients[(degree-1)*KEKLength+b]
			}
			s.Value[b] = gfMul(y, s.Index) ^ kek[b]
		}
		shares[i] = s
	}
	return shares, nil
}

// JoinShares makes the key of shares. Invalid says what is wrong: too few, of different
// keys, or one of them not genuine.
func JoinShares(shares []Share) ([]byte, error) {
	if len(shares) == 0 {
		return nil, model.Errorf(model.Invalid, "no share of the unlock key is given")
	}
	need := int(shares[0].Threshold)
	var use []Share
	seen := map[byte]bool{}
	for _, s := range shares {
		if s.Set != shares[0].Set || s.Threshold != shares[0].Threshold {
			return nil, model.Errorf(model.Invalid, "share %d belongs to another key than share %d", s.Index, shares[0].Index)
		}
		if !seen[s.Index] && len(use) < need {
			seen[s.Index] = true
			use = append(use, s)
		}
	}
	if len(use) < need {
		return nil, model.Errorf(model.Invalid, "%d of the %d shares that are needed are given", len(use), need)
	}
	kek := make([]byte, KEKLength)
	for i, s := range use {
		// Lagrange's basis polynomial at 0; subtracting is adding in this field.
		basis := byte(1)
		for j, other := range use {
			if i != j {
				basis = gfMul(basis, gfMul(other.Index, gfInverse(other.Index^s.Index)))
			}
		}
		for b := range kek {
			kek[b] ^= gfMul(s.Value[b], basis)
		}
	}
	if shareSet(kek) != shares[0].Set {
		return nil, model.Errorf(model.Invalid, "the shares do not fit each other: they come from different splits, or one is not genuine")
	}
	return kek, nil
}

// String writes a share as people keep it.
func (s Share) String() string {
	data := append([]byte{s.Threshold, s.Index}, s.Set[:]...)
	data = append(data, s.Value[:]...)
	sum := sha256.Sum256(data)
	return sharePrefix + base64.RawURLEncoding.EncodeToString(append(data, sum[:shareSumLength]...))
}

// ParseShare reads what String writes. A checksum finds slips of the pen.
func ParseShare(text string) (Share, error) {
	rest, ok := strings.CutPrefix(strings.TrimSpace(text), sharePrefix)
	if !ok {
		return Share{}, model.Errorf(model.Invalid, "a share of an unlock key begins with %s", sharePrefix)
	}
	data, err := base64.RawURLEncoding.Strict().DecodeString(rest)
	if err != nil || len(data) != shareLength {
		return Share{}, model.Errorf(model.Invalid, "this share is not whole")
	}
	body, sum := data[:shareLength-shareSumLength], sha256.Sum256(data[:shareLength-shareSumLength])
	if !bytes.Equal(sum[:shareSumLength], data[len(body):]) || body[0] < 2 || body[1] == 0 {
		return Share{}, model.Errorf(model.Invalid, "this share has a mistake in it")
	}
	s := Share{Threshold: body[0], Index: body[1]}
	copy(s.Set[:], body[2:])
	copy(s.Value[:], body[2+shareSetLength:])
	return s, nil
}

func shareSet(kek []byte) (set [shareSetLength]byte) {
	sum := sha256.Sum256(append([]byte("skep unlock key shares\n"), kek...))
	copy(set[:], sum[:])
	return set
}

// gfMul multiplies in GF(2⁸) modulo x⁸+x⁴+x³+x+1, in the same time for all values.
func gfMul(a, b byte) byte {
	var product byte
	for range 8 {
		product ^= a & -(b & 1)
		carry := -(a >> 7)
		a = a<<1 ^ carry&0x1b
		b >>= 1
	}
	return product
}

// gfInverse returns a²⁵⁴, which is 1/a.
func gfInverse(a byte) byte {
	result := byte(1)
	for range 7 {
		a = gfMul(a, a)
		result = gfMul(result, a)
	}
	return result
}
