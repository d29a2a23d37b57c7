package pki

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// minRootLife is how long a root that a swarm is to rotate to must still be valid.
const minRootLife = 365 * 24 * time.Hour

// RootPlan is what a new CA configuration makes of a swarm's root.
type RootPlan struct {
	// Next is the root from now on, nil if it stays as it is.
	Next *api.RootCA
	// To is set when a rotation begins: the root that the present one must sign before Next
	// is complete (Next.RootRotation.CrossSignedCaCert).
	To *Root
	// External holds the certificates of roots whose key the swarm does not have: each
	// needs an external CA that can be reached.
	External [][]byte
}

// PlanRoot decides what a CA configuration makes of a swarm's root. It leaves ca as it was.
func PlanRoot(random io.Reader, now time.Time, ca *api.RootCA, want *api.CAConfig) (RootPlan, error) {
	cert := NormalizePEM(want.GetSigningCaCert())
	switch {
	case len(want.GetSigningCaCert()) == 0 && len(want.GetSigningCaKey()) > 0:
		return RootPlan{}, model.Errorf(model.Invalid, "if a signing CA key is provided, the signing CA cert must also be provided")
	case len(want.GetSigningCaCert()) == 0 && want.GetForceRotate() == ca.GetLastForcedRotation():
		return RootPlan{}, nil
	case len(want.GetSigningCaCert()) == 0:
		to, err := NewRoot(random, now)
		if err != nil {
			return RootPlan{}, err
		}
		return rotateTo(to, ca, want)
	}
	to, err := GivenRoot(now, want.GetSigningCaCert(), want.GetSigningCaKey())
	if err != nil {
		return RootPlan{}, err
	}
	var external [][]byte
	if to.Key == nil {
		external = append(external, to.CertPEM)
	}
	next := model.Clone(ca)
	next.LastForcedRotation = want.GetForceRotate()
	switch rotation := ca.GetRootRotation(); {
	case bytes.Equal(cert, NormalizePEM(ca.GetCaCert())):
		next.CaKey, next.RootRotation = to.KeyPEM, nil
		return RootPlan{Next: next, External: external}, nil
	case rotation != nil && bytes.Equal(cert, NormalizePEM(rotation.GetCaCert())):
		next.RootRotation.CaKey = to.KeyPEM
		return RootPlan{Next: next, External: external}, nil
	case to.Key == nil && len(ca.GetCaKey()) == 0:
		return RootPlan{}, model.Errorf(model.Invalid, "rotating from one external CA to a different external CA is not supported: give the key of one of them")
	}
	if held, err := ParseKey(ca.GetCaKey()); err == nil && to.Key != nil && samePublicKey(held.Public(), to.Key.Public()) {
		return RootPlan{}, model.Errorf(model.Invalid, "the signing CA key is the present one: a new root needs a key of its own")
	}
	return rotateTo(to, ca, want)
}

// GivenRoot checks a root that somebody brings, with its key or none, for a swarm to use.
func GivenRoot(now time.Time, certPEM, keyPEM []byte) (*Root, error) {
	key := NormalizePEM(keyPEM)
	if len(keyPEM) > 0 && len(key) == 0 {
		return nil, model.Errorf(model.Invalid, "invalid signing CA: the key is not in PEM")
	}
	root, err := ParseRoot(NormalizePEM(certPEM), key)
	if err != nil {
		return nil, model.Wrap(model.Invalid, err, "invalid signing CA")
	}
	switch c := root.Certs[0]; {
	case len(root.Certs) != 1:
		return nil, model.Errorf(model.Invalid, "the signing CA cert must be one certificate, not %d", len(root.Certs))
	case now.Before(c.NotBefore):
		return nil, model.Errorf(model.Invalid, "the signing CA cert is not valid before %s", c.NotBefore.UTC().Format(time.RFC3339))
	case now.Add(minRootLife).After(c.NotAfter):
		return nil, model.Errorf(model.Invalid, "the signing CA cert expires %s, too soon: it must be valid for one more year", c.NotAfter.UTC().Format(time.RFC3339))
	}
	return root, nil
}

func rotateTo(to *Root, ca *api.RootCA, want *api.CAConfig) (RootPlan, error) {
	next := model.Clone(ca)
	next.LastForcedRotation = want.GetForceRotate()
	next.RootRotation = &api.RootRotation{CaCert: to.CertPEM, CaKey: to.KeyPEM}
	plan := RootPlan{Next: next, To: to}
	if to.Key == nil {
		plan.External = append(plan.External, to.CertPEM)
	}
	if len(ca.GetCaKey()) == 0 {
		plan.External = append(plan.External, ca.GetCaCert())
	}
	return plan, nil
}

// FinishRotation makes the root that a swarm has rotated to its only one, with join tokens
// that pin it. It leaves ca as it was.
func FinishRotation(random io.Reader, ca *api.RootCA, fips bool) (*api.RootCA, error) {
	rotation := ca.GetRootRotation()
	next := &api.RootCA{
		CaCert: rotation.GetCaCert(), CaKey: rotation.GetCaKey(), CaCertHash: CertHash(rotation.GetCaCert()),
		LastForcedRotation: ca.GetLastForcedRotation(),
	}
	var err error
	if next.JoinTokens, err = NewTokens(random, next.GetCaCert(), fips); err != nil {
		return nil, err
	}
	return next, nil
}

// oidAuthorityKeyID names the one extension that a cross-signed certificate does not share
// with the self-signed one.
func oidAuthorityKeyID() asn1.ObjectIdentifier { return asn1.ObjectIdentifier{2, 5, 29, 35} }

// CrossSign certifies another root: its subject, key, extensions and validity under r's
// signature. What the other root signs is then trusted by those who trust r.
func (r *Root) CrossSign(random io.Reader, other *x509.Certificate) ([]byte, error) {
	if r.Key == nil {
		return nil, model.Errorf(model.Precondition, "this swarm does not hold its CA key")
	}
	serial, err := newSerial(random)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial, RawSubject: other.RawSubject, NotBefore: other.NotBefore, NotAfter: other.NotAfter,
		BasicConstraintsValid: true, IsCA: true, AuthorityKeyId: r.Certs[0].SubjectKeyId,
	}
	for _, e := range other.Extensions {
		if !e.Id.Equal(oidAuthorityKeyID()) {
			template.ExtraExtensions = append(template.ExtraExtensions, e)
		}
	}
	der, err := x509.CreateCertificate(random, template, r.Certs[0], other.PublicKey, r.Key)
	if err != nil {
		return nil, fmt.Errorf("cross-sign root certificate: %w", err)
	}
	return encodeCert(der), nil
}

// CrossRequest makes the certificate request by which an external CA cross-signs a root:
// its subject, key and extensions.
func CrossRequest(random io.Reader, root *Root) ([]byte, error) {
	if root.Key == nil {
		return nil, model.Errorf(model.Precondition, "a root whose key is not at hand cannot be cross-signed")
	}
	template := &x509.CertificateRequest{RawSubject: root.Certs[0].RawSubject}
	for _, e := range root.Certs[0].Extensions {
		if !e.Id.Equal(oidAuthorityKeyID()) {
			template.ExtraExtensions = append(template.ExtraExtensions, e)
		}
	}
	der, err := x509.CreateCertificateRequest(random, template, root.Key)
	if err != nil {
		return nil, fmt.Errorf("request a cross-signed root certificate: %w", err)
	}
	return encodeRequest(der), nil
}

// CheckCross checks that cross certifies to under old, however it was made.
func CheckCross(old, to *Root, cross []byte, now time.Time) error {
	certs, err := ParseCerts(cross)
	if err != nil {
		return err
	}
	if len(certs) != 1 || !certs[0].IsCA || !bytes.Equal(certs[0].RawSubject, to.Certs[0].RawSubject) ||
		!bytes.Equal(certs[0].RawSubjectPublicKeyInfo, to.Certs[0].RawSubjectPublicKeyInfo) {
		return model.Errorf(model.Invalid, "the cross-signed certificate is not one of the new root")
	}
	_, err = old.Verify(cross, now)
	return err
}

// Signer returns the authority that signs a swarm's certificates now: during a rotation the
// new root, with the certificate that the old one gave it as an intermediate.
func Signer(ca *api.RootCA) (*Root, error) {
	rotation := ca.GetRootRotation()
	if rotation == nil {
		return ParseRoot(ca.GetCaCert(), ca.GetCaKey())
	}
	root, err := ParseRoot(rotation.GetCaCert(), rotation.GetCaKey())
	if err != nil {
		return nil, err
	}
	root.Intermediates = rotation.GetCrossSignedCaCert()
	return root, nil
}

// CheckIssued checks a chain that somebody else signed for a request: it must certify the
// request's key, for exactly what was asked, under root.
func CheckIssued(root *Root, csrPEM, chain []byte, want Leaf, now time.Time) error {
	csr, err := ParseCSR(csrPEM)
	if err != nil {
		return err
	}
	leaf, err := root.Verify(chain, now)
	if err != nil {
		return err
	}
	s := leaf.Subject
	switch {
	case !samePublicKey(leaf.PublicKey, csr.PublicKey):
		return model.Errorf(model.Invalid, "the certificate is for another key")
	case s.CommonName != want.NodeID || !slices.Equal(s.OrganizationalUnit, []string{want.OU}) || !slices.Equal(s.Organization, []string{want.ClusterID}):
		return model.Errorf(model.Invalid, "the certificate is for %q", s)
	case !slices.Equal(slices.Sorted(slices.Values(leaf.DNSNames)), slices.Sorted(slices.Values(want.Names()))):
		return model.Errorf(model.Invalid, "the certificate is for the names %q", leaf.DNSNames)
	case leaf.IsCA:
		return model.Errorf(model.Invalid, "the certificate is one of a CA")
	case !usableFor(leaf, x509.ExtKeyUsageClientAuth) || !usableFor(leaf, x509.ExtKeyUsageServerAuth):
		return model.Errorf(model.Invalid, "the certificate is not for client and server authentication")
	}
	return nil
}

func usableFor(c *x509.Certificate, use x509.ExtKeyUsage) bool {
	return slices.Contains(c.ExtKeyUsage, use) || slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny)
}

// Issuer identifies who signed a node's certificate.
type Issuer struct {
	// Subject and PublicKey are DER, as nodes report them.
	Subject, PublicKey []byte
}

// IssuerOf returns the issuer that nodes report whose certificates cert signed.
func IssuerOf(cert *x509.Certificate) Issuer {
	return Issuer{Subject: cert.RawSubject, PublicKey: cert.RawSubjectPublicKeyInfo}
}

// Issued reports whether a node reports a certificate from this issuer.
func (i Issuer) Issued(node *api.Node) bool {
	info := node.GetDescription().GetTlsInfo()
	return bytes.Equal(info.GetCertIssuerSubject(), i.Subject) && bytes.Equal(info.GetCertIssuerPublicKey(), i.PublicKey)
}

// Asked reports whether a node's certificate is being replaced, or the node was asked to
// replace it.
func Asked(node *api.Node) bool {
	return slices.Contains([]api.IssuanceStatus_State{
		api.IssuanceStatus_RENEW, api.IssuanceStatus_PENDING, api.IssuanceStatus_ROTATE,
	}, node.GetCertificate().GetStatus().GetState())
}

// SelfIssuer returns the issuer of a chain (leaf first) that the roots verify: the second
// certificate of the verified chain.
func (r *Root) SelfIssuer(chain []*x509.Certificate) Issuer {
	for _, c := range slices.Concat(chain[1:], r.Certs) {
		if bytes.Equal(chain[0].RawIssuer, c.RawSubject) && chain[0].CheckSignatureFrom(c) == nil {
			return IssuerOf(c)
		}
	}
	return Issuer{Subject: chain[0].RawIssuer}
}
