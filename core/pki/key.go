package pki

import (
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/pbkdf2"
	"crypto/sha1" //nolint:gosec // the PRF that the key file's format prescribes
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

const (
	plainKeyType  = "PRIVATE KEY"
	lockedKeyType = "ENCRYPTED PRIVATE KEY"
	// KEKLength is the length of a key encryption key in bytes.
	KEKLength       = 32
	unlockKeyPrefix = "SWMKEY-1-"
	// maxIterations bounds the work that a key file can ask for.
	maxIterations = 1 << 20
)

// NewKey makes a node's private key, ECDSA on P-256. Since Go 1.26 the library takes its
// own secure randomness and ignores random.
func NewKey(random io.Reader) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), random)
	if err != nil {
		return nil, fmt.Errorf("generate key: %w", err)
	}
	return key, nil
}

// EncodeKey writes a key as PKCS#8 PEM.
func EncodeKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode private key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: plainKeyType, Bytes: der}), nil
}

// ParseKey reads a plain PKCS#8, EC or RSA key from PEM.
func ParseKey(data []byte) (crypto.Signer, error) {
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, model.Errorf(model.Invalid, "not a PEM key")
	}
	return parseKeyDER(block.Type, block.Bytes)
}

func parseKeyDER(kind string, der []byte) (crypto.Signer, error) {
	var key any
	var err error
	switch kind {
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(der)
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(der)
	case plainKeyType:
		key, err = x509.ParsePKCS8PrivateKey(der)
	default:
		return nil, model.Errorf(model.Invalid, "PEM block %q is not a private key", kind)
	}
	if err != nil {
		return nil, model.Wrap(model.Invalid, err, "parse private key")
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, model.Errorf(model.Invalid, "private key cannot sign")
	}
	return signer, nil
}

// KeyFile is the content of swarm-node.key: the private key and headers that hold, among
// others, the data encryption key.
type KeyFile struct {
	Key crypto.Signer
	// Headers are kept as they were read, unknown ones included.
	Headers map[string]string
}

// ErrLocked says that a key file is encrypted and the key at hand does not open it.
var ErrLocked = &model.Error{Kind: model.Denied, Text: "swarm could not be unlocked: invalid key provided"}

// EncodeKeyFile writes a key file. Random is used only with a kek, which encrypts it.
func EncodeKeyFile(random io.Reader, f KeyFile, kek []byte) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(f.Key)
	if err != nil {
		return nil, fmt.Errorf("encode private key: %w", err)
	}
	block := &pem.Block{Type: plainKeyType, Bytes: der, Headers: f.Headers}
	if len(kek) > 0 {
		if block.Bytes, err = encryptPKCS8(random, der, kek); err != nil {
			return nil, err
		}
		block.Type = lockedKeyType
	}
	return pem.EncodeToMemory(block), nil
}

// DecodeKeyFile reads a key file, with its kek if it is encrypted. ErrLocked when kek is
// missing or wrong.
func DecodeKeyFile(data, kek []byte) (KeyFile, error) {
	block, _ := pem.Decode(data)
	if block == nil {
		return KeyFile{}, model.Errorf(model.Invalid, "not a PEM key")
	}
	der := block.Bytes
	if block.Type == lockedKeyType {
		if len(kek) == 0 {
			return KeyFile{}, ErrLocked
		}
		plain, err := decryptPKCS8(der, kek)
		if err != nil {
			return KeyFile{}, err
		}
		key, err := parseKeyDER(plainKeyType, plain)
		if err != nil {
			return KeyFile{}, ErrLocked
		}
		return KeyFile{Key: key, Headers: lowerKeys(block.Headers)}, nil
	}
	if x509.IsEncryptedPEMBlock(block) { //nolint:staticcheck // files of old Docker Engines
		return decodeLegacy(block, kek)
	}
	key, err := parseKeyDER(block.Type, der)
	if err != nil {
		return KeyFile{}, err
	}
	return KeyFile{Key: key, Headers: lowerKeys(block.Headers)}, nil
}

// decodeLegacy reads a key file that is encrypted by RFC 1423.
func decodeLegacy(block *pem.Block, kek []byte) (KeyFile, error) {
	if len(kek) == 0 {
		return KeyFile{}, ErrLocked
	}
	der, err := x509.DecryptPEMBlock(block, kek) //nolint:staticcheck // as above
	if err != nil {
		return KeyFile{}, ErrLocked
	}
	key, err := parseKeyDER(block.Type, der)
	if err != nil {
		return KeyFile{}, ErrLocked
	}
	headers := lowerKeys(block.Headers)
	delete(headers, "proc-type")
	delete(headers, "dek-info")
	return KeyFile{Key: key, Headers: headers}, nil
}

func lowerKeys(in map[string]string) map[string]string {
	out := make(map[string]string, len(in))
	for _, k := range slices.Sorted(maps.Keys(in)) {
		out[strings.ToLower(k)] = in[k]
	}
	return out
}

// NewKEK makes a key encryption key.
func NewKEK(random io.Reader) ([]byte, error) {
	kek := make([]byte, KEKLength)
	if _, err := io.ReadFull(random, kek); err != nil {
		return nil, fmt.Errorf("make unlock key: %w", err)
	}
	return kek, nil
}

// ManagersKEK returns the key encryption key of a swarm's managers, nil where there is none.
func ManagersKEK(c *api.Cluster) []byte {
	for _, k := range c.GetUnlockKeys() {
		if k.GetSubsystem() == ManagerRole {
			return k.GetKey()
		}
	}
	return nil
}

// EncodeUnlockKey writes a key encryption key as people type it.
func EncodeUnlockKey(kek []byte) string {
	if len(kek) == 0 {
		return ""
	}
	return unlockKeyPrefix + base64.RawStdEncoding.EncodeToString(kek)
}

// ParseUnlockKey reads what EncodeUnlockKey writes.
func ParseUnlockKey(text string) ([]byte, error) {
	rest, ok := strings.CutPrefix(text, unlockKeyPrefix)
	kek, err := base64.RawStdEncoding.DecodeString(rest)
	if !ok || err != nil || len(kek) != KEKLength {
		return nil, model.Errorf(model.Invalid, "invalid key string")
	}
	return kek, nil
}

// The ASN.1 of PKCS#8 EncryptedPrivateKeyInfo with PBES2, RFC 8018.
type (
	encryptedKeyInfo struct {
		Algorithm struct {
			ID     asn1.ObjectIdentifier
			Params pbes2Params
		}
		Data []byte
	}
	pbes2Params struct {
		KDF struct {
			ID     asn1.ObjectIdentifier
			Params pbkdf2Params
		}
		Scheme struct {
			ID asn1.ObjectIdentifier
			IV []byte
		}
	}
	pbkdf2Params struct {
		Salt       []byte
		Iterations int
		PRF        pkix.AlgorithmIdentifier `asn1:"optional"`
	}
)

func oids() (pbes2, kdf, aes256cbc asn1.ObjectIdentifier) {
	return asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 13},
		asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 12},
		asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 42}
}

func encryptPKCS8(random io.Reader, der, kek []byte) ([]byte, error) {
	var info encryptedKeyInfo
	salt, iv := make([]byte, 8), make([]byte, aes.BlockSize)
	for _, b := range [][]byte{salt, iv} {
		if _, err := io.ReadFull(random, b); err != nil {
			return nil, fmt.Errorf("encrypt private key: %w", err)
		}
	}
	const iterations = 2048
	info.Algorithm.ID, info.Algorithm.Params.KDF.ID, info.Algorithm.Params.Scheme.ID = oids()
	info.Algorithm.Params.KDF.Params = pbkdf2Params{Salt: salt, Iterations: iterations}
	info.Algorithm.Params.Scheme.IV = iv
	block, err := keyCipher(kek, salt, iterations)
	if err != nil {
		return nil, err
	}
	pad := aes.BlockSize - len(der)%aes.BlockSize
	info.Data = append([]byte(nil), der...)
	for range pad {
		info.Data = append(info.Data, byte(pad))
	}
	cipher.NewCBCEncrypter(block, iv).CryptBlocks(info.Data, info.Data) //nolint:gosec // the caller drew the IV
	out, err := asn1.Marshal(info)
	if err != nil {
		return nil, fmt.Errorf("encrypt private key: %w", err)
	}
	return out, nil
}

func decryptPKCS8(data, kek []byte) ([]byte, error) {
	var info encryptedKeyInfo
	if rest, err := asn1.Unmarshal(data, &info); err != nil || len(rest) > 0 {
		return nil, model.Errorf(model.Invalid, "malformed encrypted private key")
	}
	pbes2, kdf, aes256cbc := oids()
	p := info.Algorithm.Params
	if !info.Algorithm.ID.Equal(pbes2) || !p.KDF.ID.Equal(kdf) || !p.Scheme.ID.Equal(aes256cbc) ||
		len(p.Scheme.IV) != aes.BlockSize || len(info.Data) == 0 || len(info.Data)%aes.BlockSize != 0 ||
		p.KDF.Params.Iterations < 1 || p.KDF.Params.Iterations > maxIterations {
		return nil, model.Errorf(model.Invalid, "encrypted private key of an unsupported kind")
	}
	block, err := keyCipher(kek, p.KDF.Params.Salt, p.KDF.Params.Iterations)
	if err != nil {
		return nil, err
	}
	plain := make([]byte, len(info.Data))
	cipher.NewCBCDecrypter(block, p.Scheme.IV).CryptBlocks(plain, info.Data)
	pad := int(plain[len(plain)-1])
	if pad < 1 || pad > aes.BlockSize || pad > len(plain) {
		return nil, ErrLocked
	}
	for _, b := range plain[len(plain)-pad:] {
		if int(b) != pad {
			return nil, ErrLocked
		}
	}
	return plain[:len(plain)-pad], nil
}

func keyCipher(kek, salt []byte, iterations int) (cipher.Block, error) {
	key, err := pbkdf2.Key(sha1.New, string(kek), salt, iterations, 32)
	if err != nil {
		return nil, fmt.Errorf("derive key: %w", err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("derive key: %w", err)
	}
	return block, nil
}
