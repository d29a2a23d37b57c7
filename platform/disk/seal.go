package disk

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"

	"golang.org/x/crypto/nacl/secretbox"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
)

// KeySize is the length of a data or key encryption key in bytes.
const KeySize = 32

const nonceSize = 24

// ErrDecrypt means that none of the keys opens a record, or that it was altered.
var ErrDecrypt = errors.New("no key opens the record")

// Seal encrypts plain with key (at most KeySize bytes, zero padded on the right) by
// NaCl secretbox under a fresh nonce. The result is a marshalled MaybeEncryptedRecord.
func Seal(key, plain []byte) ([]byte, error) {
	k, err := pad(key)
	if err != nil {
		return nil, err
	}
	var nonce [nonceSize]byte
	rand.Read(nonce[:])
	// The fields of the message in their order, so that the box is made in its place.
	size := len(plain) + secretbox.Overhead
	record := make([]byte, 0, 2+1+protowire.SizeBytes(size)+1+protowire.SizeBytes(nonceSize))
	record = protowire.AppendTag(record, 1, protowire.VarintType)
	record = protowire.AppendVarint(record, uint64(api.MaybeEncryptedRecord_SECRETBOX_SALSA20_POLY1305))
	record = protowire.AppendTag(record, 2, protowire.BytesType)
	record = protowire.AppendVarint(record, uint64(size))
	record = secretbox.Seal(record, plain, &nonce, k)
	record = protowire.AppendTag(record, 3, protowire.BytesType)
	return protowire.AppendBytes(record, nonce[:]), nil
}

// Open returns the plain text of a marshalled MaybeEncryptedRecord, trying keys in
// order; empty keys are skipped. A record in the clear needs no key. ErrDecrypt when no
// key fits.
func Open(record []byte, keys ...[]byte) ([]byte, error) {
	var r api.MaybeEncryptedRecord
	if err := proto.Unmarshal(record, &r); err != nil {
		return nil, fmt.Errorf("open record: %w", err)
	}
	if r.GetAlgorithm() == api.MaybeEncryptedRecord_NONE {
		return r.GetData(), nil
	}
	for _, key := range keys {
		if len(key) == 0 {
			continue
		}
		k, err := pad(key)
		if err != nil {
			return nil, err
		}
		plain, ok := openWith(&r, k)
		if ok {
			return plain, nil
		}
	}
	return nil, ErrDecrypt
}

func openWith(r *api.MaybeEncryptedRecord, key *[KeySize]byte) ([]byte, bool) {
	switch r.GetAlgorithm() {
	case api.MaybeEncryptedRecord_SECRETBOX_SALSA20_POLY1305:
		if len(r.GetNonce()) != nonceSize {
			return nil, false
		}
		return secretbox.Open(nil, r.GetData(), (*[nonceSize]byte)(r.GetNonce()), key)
	case api.MaybeEncryptedRecord_FERNET_AES_128_CBC:
		return openFernet(r.GetData(), key)
	default:
		return nil, false
	}
}

// openFernet opens a Fernet token (version, time, IV, AES-128-CBC text, HMAC-SHA-256)
// without looking at its time.
func openFernet(token []byte, key *[KeySize]byte) ([]byte, bool) {
	const head = 1 + 8 + aes.BlockSize
	raw := make([]byte, base64.URLEncoding.DecodedLen(len(token)))
	n, err := base64.URLEncoding.Decode(raw, token)
	if err != nil || n < head+aes.BlockSize+sha256.Size || raw[0] != 0x80 {
		return nil, false
	}
	signed, sum := raw[:n-sha256.Size], raw[n-sha256.Size:n]
	mac := hmac.New(sha256.New, key[:16])
	mac.Write(signed)
	text := signed[head:]
	if !hmac.Equal(mac.Sum(nil), sum) || len(text)%aes.BlockSize != 0 {
		return nil, false
	}
	block, err := aes.NewCipher(key[16:])
	if err != nil {
		return nil, false
	}
	cipher.NewCBCDecrypter(block, signed[9:head]).CryptBlocks(text, text)
	padding := int(text[len(text)-1])
	if padding == 0 || padding > aes.BlockSize {
		return nil, false
	}
	for _, b := range text[len(text)-padding:] {
		if int(b) != padding {
			return nil, false
		}
	}
	return text[:len(text)-padding], true
}

func pad(key []byte) (*[KeySize]byte, error) {
	if len(key) == 0 || len(key) > KeySize {
		return nil, fmt.Errorf("use key: length %d, want 1 to %d", len(key), KeySize)
	}
	k := new([KeySize]byte)
	copy(k[:], key)
	return k, nil
}
