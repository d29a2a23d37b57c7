package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha1" //nolint:gosec // RFC 5280 key identifiers, no security rests on it
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"slices"
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// Organizational units of node certificates, and the server names that clients ask for.
const (
	ManagerRole = "swarm-manager"
	WorkerRole  = "swarm-worker"
	// CARole is an additional name of managers, used while a node has no certificate.
	CARole = "swarm-ca"
)

const (
	rootValidity = 7300 * 24 * time.Hour
	// DefaultExpiry is how long node certificates live unless the swarm says otherwise.
	DefaultExpiry = 2160 * time.Hour
	// MinExpiry is the shortest life that a swarm may ask for.
	MinExpiry = time.Hour

	certificateType = "CERTIFICATE"
)

// RoleOU returns the organizational unit of a role.
func RoleOU(role api.NodeRole) string {
	if role == api.NodeRole_MANAGER {
		return ManagerRole
	}
	return WorkerRole
}

// Root is a certificate authority. Key is nil where only the certificate is known.
type Root struct {
	// CertPEM is the bundle of trusted roots; the first signs. Token digests are over
	// exactly these bytes.
	CertPEM []byte
	// Intermediates are appended to what is issued; set during a root rotation only.
	Intermediates []byte
	Certs         []*x509.Certificate
	Key           crypto.Signer
	// KeyPEM is Key in PKCS#8, empty if Key is nil.
	KeyPEM []byte
}

// NewRoot makes a certificate authority.
func NewRoot(random io.Reader, now time.Time) (*Root, error) {
	key, err := NewKey(random)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial(random)
	if err != nil {
		return nil, err
	}
	skid, err := keyID(key.Public())
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: CARole},
		NotBefore:             now.Add(-5 * time.Minute).UTC().Truncate(time.Second),
		NotAfter:              now.Add(-5 * time.Minute).UTC().Truncate(time.Second).Add(rootValidity),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		SubjectKeyId:          skid,
		SignatureAlgorithm:    x509.ECDSAWithSHA256,
	}
	der, err := x509.CreateCertificate(random, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("create root certificate: %w", err)
	}
	keyPEM, err := EncodeKey(key)
	if err != nil {
		return nil, err
	}
	return ParseRoot(encodeCert(der), keyPEM)
}

// ParseRoot reads a bundle of roots and, if not empty, the key of the first.
// Every certificate must be a self-signed CA with an accepted algorithm.
func ParseRoot(certPEM, keyPEM []byte) (*Root, error) {
	certs, err := ParseCerts(certPEM)
	if err != nil {
		return nil, err
	}
	for _, c := range certs {
		if !c.IsCA || c.CheckSignatureFrom(c) != nil {
			return nil, model.Errorf(model.Invalid, "root certificate %q is not a self-signed CA certificate", c.Subject)
		}
		if err := checkAlgorithm(c); err != nil {
			return nil, err
		}
	}
	root := &Root{CertPEM: certPEM, Certs: certs}
	if len(keyPEM) == 0 {
		return root, nil
	}
	key, err := ParseKey(keyPEM)
	if err != nil {
		return nil, err
	}
	if !samePublicKey(key.Public(), certs[0].PublicKey) {
		return nil, model.Errorf(model.Invalid, "the CA key does not belong to the CA certificate")
	}
	root.Key, root.KeyPEM = key, keyPEM
	return root, nil
}

// Pool returns the roots as trust anchors.
func (r *Root) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	for _, c := range r.Certs {
		pool.AddCert(c)
	}
	return pool
}

// Leaf says what to certify.
type Leaf struct {
	NodeID, ClusterID string
	// OU is ManagerRole or WorkerRole.
	OU string
	// Expiry below MinExpiry means DefaultExpiry.
	Expiry time.Duration
}

// Names are the server names that a node answers to.
func (l Leaf) Names() []string {
	names := []string{l.OU, l.NodeID}
	if l.OU == ManagerRole {
		names = append(names, CARole)
	}
	return names
}

// Issue signs the public key of a certificate request; nothing else of it is used. The
// answer is the leaf followed by the intermediates, in PEM.
func (r *Root) Issue(random io.Reader, now time.Time, csrPEM []byte, leaf Leaf) ([]byte, error) {
	if r.Key == nil {
		return nil, model.Errorf(model.Precondition, "this swarm does not hold its CA key")
	}
	csr, err := ParseCSR(csrPEM)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial(random)
	if err != nil {
		return nil, err
	}
	skid, err := keyID(csr.PublicKey)
	if err != nil {
		return nil, err
	}
	if leaf.Expiry < MinExpiry {
		leaf.Expiry = DefaultExpiry
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject: pkix.Name{
			CommonName:         leaf.NodeID,
			OrganizationalUnit: []string{leaf.OU},
			Organization:       []string{leaf.ClusterID},
		},
		NotBefore:             now.UTC().Truncate(time.Minute).Add(-time.Hour),
		NotAfter:              now.UTC().Truncate(time.Minute).Add(leaf.Expiry),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		DNSNames:              leaf.Names(),
		SubjectKeyId:          skid,
		AuthorityKeyId:        r.Certs[0].SubjectKeyId,
	}
	der, err := x509.CreateCertificate(random, template, r.Certs[0], csr.PublicKey, r.Key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate of node %s: %w", leaf.NodeID, err)
	}
	return append(encodeCert(der), r.Intermediates...), nil
}

// Verify checks a chain (leaf first) against the roots at a time and returns the leaf.
func (r *Root) Verify(chainPEM []byte, now time.Time) (*x509.Certificate, error) {
	chain, err := ParseCerts(chainPEM)
	if err != nil {
		return nil, err
	}
	intermediates := x509.NewCertPool()
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	_, err = chain[0].Verify(x509.VerifyOptions{
		Roots: r.Pool(), Intermediates: intermediates, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return nil, fmt.Errorf("verify certificate chain: %w", err)
	}
	return chain[0], nil
}

// ParseCerts reads one or more certificates. Other PEM blocks are refused.
func ParseCerts(data []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for len(bytes.TrimSpace(data)) > 0 {
		var block *pem.Block
		block, data = pem.Decode(data)
		if block == nil || block.Type != certificateType {
			return nil, model.Errorf(model.Invalid, "not a PEM certificate")
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, model.Wrap(model.Invalid, err, "parse certificate")
		}
		certs = append(certs, c)
	}
	if len(certs) == 0 {
		return nil, model.Errorf(model.Invalid, "no certificate")
	}
	return certs, nil
}

// NormalizePEM returns the PEM blocks of data without headers and what stands between them.
func NormalizePEM(data []byte) []byte {
	var out []byte
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		block.Headers = nil
		out = append(out, pem.EncodeToMemory(block)...)
	}
	return out
}

// NewCSR makes a certificate request for a key; its subject is empty as the CA ignores it.
func NewCSR(random io.Reader, key crypto.Signer) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(random, new(x509.CertificateRequest), key)
	if err != nil {
		return nil, fmt.Errorf("create certificate request: %w", err)
	}
	return encodeRequest(der), nil
}

// ParseCSR reads a certificate request and checks its signature.
func ParseCSR(data []byte) (*x509.CertificateRequest, error) {
	block, _ := pem.Decode(data)
	if block == nil || !slices.Contains([]string{"CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST"}, block.Type) {
		return nil, model.Errorf(model.Invalid, "not a PEM certificate request")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, model.Wrap(model.Invalid, err, "parse certificate request")
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, model.Wrap(model.Invalid, err, "certificate request is not signed by its key")
	}
	return csr, nil
}

// RenewAt returns when to renew a certificate: a random minute between 50 and 80 percent
// of its life.
func RenewAt(cert *x509.Certificate, random io.Reader) (time.Time, error) {
	life := cert.NotAfter.Sub(cert.NotBefore)
	window := int64(life * 3 / 10 / time.Minute)
	at := cert.NotBefore.Add(life / 2)
	if window <= 0 {
		return at, nil
	}
	var b [8]byte
	if _, err := io.ReadFull(random, b[:]); err != nil {
		return time.Time{}, fmt.Errorf("choose renewal time: %w", err)
	}
	n := new(big.Int).SetBytes(b[:])
	return at.Add(time.Duration(n.Mod(n, big.NewInt(window)).Int64()) * time.Minute), nil
}

func encodeRequest(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func encodeCert(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: certificateType, Bytes: der})
}

// newSerial makes 20 random bytes with the top bit clear.
func newSerial(random io.Reader) (*big.Int, error) {
	var b [20]byte
	if _, err := io.ReadFull(random, b[:]); err != nil {
		return nil, fmt.Errorf("make serial number: %w", err)
	}
	b[0] &= 0x7f
	return new(big.Int).SetBytes(b[:]), nil
}

// keyID is the SHA-1 of the public key's bits.
func keyID(public crypto.PublicKey) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, fmt.Errorf("encode public key: %w", err)
	}
	var info struct {
		Algorithm pkix.AlgorithmIdentifier
		Bits      asn1.BitString
	}
	if _, err := asn1.Unmarshal(der, &info); err != nil {
		return nil, fmt.Errorf("decode public key: %w", err)
	}
	sum := sha1.Sum(info.Bits.Bytes) //nolint:gosec // as above
	return sum[:], nil
}

func checkAlgorithm(c *x509.Certificate) error {
	ok := false
	switch key := c.PublicKey.(type) {
	case *rsa.PublicKey:
		ok = key.N.BitLen() >= 2048 && slices.Contains([]x509.SignatureAlgorithm{
			x509.SHA256WithRSA, x509.SHA384WithRSA, x509.SHA512WithRSA,
		}, c.SignatureAlgorithm)
	case *ecdsa.PublicKey:
		ok = slices.Contains([]elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()}, key.Curve) &&
			slices.Contains([]x509.SignatureAlgorithm{
				x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512,
			}, c.SignatureAlgorithm)
	}
	if !ok {
		return model.Errorf(model.Invalid, "unsupported signature algorithm: %s", c.SignatureAlgorithm)
	}
	return nil
}

func samePublicKey(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}
