package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

func aRoot(t *testing.T) *Root {
	t.Helper()
	root, err := NewRoot(rand.Reader, sampleTime())
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func certOnly(t *testing.T, root *Root) *Root {
	t.Helper()
	known, err := ParseRoot(root.CertPEM, nil)
	if err != nil {
		t.Fatal(err)
	}
	return known
}

// rootUntil makes a root with an extension of its own that ends at a time.
func rootUntil(t *testing.T, key crypto.Signer, end time.Time) []byte {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "Example Root", Organization: []string{"Example"}},
		NotBefore: sampleTime().Add(-time.Hour), NotAfter: end, IsCA: true, BasicConstraintsValid: true, MaxPathLen: 2,
		KeyUsage:        x509.KeyUsageCertSign,
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Value: []byte{5, 0}}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return encodeCert(der)
}

// What the new root signs is trusted by those who trust the old one, and by those who
// trust the new one alone.
func TestCrossSign(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	keyPEM, err := EncodeKey(rsaKey)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := ParseRoot(rootUntil(t, rsaKey, sampleTime().Add(5*365*24*time.Hour)), keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	for _, pair := range [][2]*Root{{aRoot(t), aRoot(t)}, {aRoot(t), foreign}, {foreign, aRoot(t)}} {
		old, to := pair[0], *pair[1]
		cross, err := old.CrossSign(rand.Reader, to.Certs[0])
		if err != nil {
			t.Fatal(err)
		}
		if err := CheckCross(certOnly(t, old), &to, cross, sampleTime()); err != nil {
			t.Error(err)
		}
		if err := CheckCross(certOnly(t, old), aRoot(t), cross, sampleTime()); err == nil {
			t.Error("a certificate of another root passes")
		}
		if err := CheckCross(aRoot(t), &to, cross, sampleTime()); err == nil {
			t.Error("a certificate by another root passes")
		}
		certs, err := ParseCerts(cross)
		if err != nil {
			t.Fatal(err)
		}
		c, self := certs[0], to.Certs[0]
		if !c.NotAfter.Equal(self.NotAfter) || !c.NotBefore.Equal(self.NotBefore) || !bytes.Equal(c.RawSubject, self.RawSubject) ||
			!bytes.Equal(c.RawIssuer, old.Certs[0].RawSubject) || !bytes.Equal(c.SubjectKeyId, self.SubjectKeyId) {
			t.Errorf("cross-signed %+v", c)
		}
		for _, e := range self.Extensions {
			if !e.Id.Equal(oidAuthorityKeyID()) && !has(c.Extensions, e) {
				t.Errorf("extension %v is lost", e.Id)
			}
		}
		to.Intermediates = cross
		key, err := NewKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		csr, err := NewCSR(rand.Reader, key)
		if err != nil {
			t.Fatal(err)
		}
		chain, err := to.Issue(rand.Reader, sampleTime(), csr, Leaf{NodeID: "n", ClusterID: "c", OU: WorkerRole})
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := ParseCerts(chain)
		if err != nil {
			t.Fatal(err)
		}
		for name, trust := range map[string]*Root{"old": certOnly(t, old), "new": certOnly(t, &to)} {
			if _, err := trust.Verify(chain, sampleTime()); err != nil {
				t.Errorf("who trusts the %s root: %v", name, err)
			}
			if diff := cmp.Diff(IssuerOf(self), trust.SelfIssuer(parsed)); diff != "" {
				t.Errorf("issuer by the %s root: %s", name, diff)
			}
		}
		if _, err := aRoot(t).Verify(chain, sampleTime()); err == nil {
			t.Error("a stranger's root verifies it")
		}
	}
	if _, err := certOnly(t, foreign).CrossSign(rand.Reader, aRoot(t).Certs[0]); model.KindOf(err) != model.Precondition {
		t.Errorf("without a key: %v", err)
	}
}

func has(all []pkix.Extension, e pkix.Extension) bool {
	for _, o := range all {
		if o.Id.Equal(e.Id) && o.Critical == e.Critical && bytes.Equal(o.Value, e.Value) {
			return true
		}
	}
	return false
}

func TestPlanRoot(t *testing.T) {
	now := sampleTime()
	old, other, under := aRoot(t), aRoot(t), aRoot(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	short := rootUntil(t, key, now.Add(minRootLife-time.Hour))
	keyPEM, err := EncodeKey(key)
	if err != nil {
		t.Fatal(err)
	}
	oldKey, err := ParseKey(old.KeyPEM)
	if err != nil {
		t.Fatal(err)
	}
	sameKey := rootUntil(t, oldKey, now.Add(2*minRootLife))
	held := &api.RootCA{CaCert: old.CertPEM, CaKey: old.KeyPEM, LastForcedRotation: 3}
	outside := &api.RootCA{CaCert: old.CertPEM, LastForcedRotation: 3}
	rotating := model.Clone(held)
	rotating.RootRotation = &api.RootRotation{CaCert: under.CertPEM, CaKey: under.KeyPEM, CrossSignedCaCert: []byte("cross")}
	const (
		stays = "stays"
		keyed = "key"
		moves = "moves"
	)
	for name, c := range map[string]struct {
		ca       *api.RootCA
		cert     []byte
		key      []byte
		force    uint64
		want     string // of the above, or the beginning of an error
		external int
	}{
		"nothing":                         {ca: held, force: 3, want: stays},
		"nothing while rotating":          {ca: rotating, force: 3, want: stays},
		"forced":                          {ca: held, force: 4, want: moves},
		"forced back":                     {ca: held, force: 2, want: moves},
		"forced while rotating":           {ca: rotating, force: 4, want: moves},
		"forced from external":            {ca: outside, force: 4, want: moves, external: 1},
		"given":                           {ca: held, cert: other.CertPEM, key: other.KeyPEM, force: 3, want: moves},
		"given with junk around":          {ca: held, cert: append([]byte("junk\n"), other.CertPEM...), key: other.KeyPEM, force: 3, want: moves},
		"given without key":               {ca: held, cert: other.CertPEM, force: 3, want: moves, external: 1},
		"given from external":             {ca: outside, cert: other.CertPEM, key: other.KeyPEM, force: 3, want: moves, external: 1},
		"external to external":            {ca: outside, cert: other.CertPEM, force: 3, want: "rotating from one external CA"},
		"the present one":                 {ca: held, cert: old.CertPEM, key: old.KeyPEM, force: 4, want: keyed},
		"the present one ends a rotation": {ca: rotating, cert: old.CertPEM, key: old.KeyPEM, force: 3, want: keyed},
		"the present one without key":     {ca: held, cert: old.CertPEM, force: 3, want: keyed, external: 1},
		"the one rotated to":              {ca: rotating, cert: under.CertPEM, force: 3, want: keyed, external: 1},
		"key alone":                       {ca: held, key: other.KeyPEM, force: 3, want: "if a signing CA key is provided"},
		"wrong key":                       {ca: held, cert: other.CertPEM, key: old.KeyPEM, force: 3, want: "invalid signing CA"},
		"no key at all":                   {ca: held, cert: other.CertPEM, key: []byte("junk"), force: 3, want: "invalid signing CA"},
		"two certificates":                {ca: held, cert: append(append([]byte(nil), other.CertPEM...), under.CertPEM...), key: other.KeyPEM, force: 3, want: "the signing CA cert must be one certificate, not 2"},
		"ends too soon":                   {ca: held, cert: short, key: keyPEM, force: 3, want: "the signing CA cert expires"},
		"not a certificate":               {ca: held, cert: []byte("junk"), force: 3, want: "invalid signing CA"},
		"the present key":                 {ca: held, cert: sameKey, key: old.KeyPEM, force: 3, want: "the signing CA key is the present one"},
	} {
		t.Run(name, func(t *testing.T) {
			before := model.Clone(c.ca)
			plan, err := PlanRoot(rand.Reader, now, c.ca, &api.CAConfig{SigningCaCert: c.cert, SigningCaKey: c.key, ForceRotate: c.force})
			if diff := cmp.Diff(before, c.ca, protocmp.Transform()); diff != "" {
				t.Errorf("the present root was changed: %s", diff)
			}
			got := stays
			switch {
			case err != nil:
				got = err.Error()
			case plan.To != nil:
				got = moves
			case plan.Next != nil:
				got = keyed
			}
			if !strings.HasPrefix(got, c.want) {
				t.Fatalf("it %s: %v, want %s", got, err, c.want)
			}
			if err != nil && model.KindOf(err) != model.Invalid {
				t.Errorf("kind %v", model.KindOf(err))
			}
			if len(plan.External) != c.external {
				t.Errorf("%d external CAs are needed, want %d", len(plan.External), c.external)
			}
			if plan.Next == nil {
				return
			}
			if plan.Next.GetLastForcedRotation() != c.force || string(plan.Next.GetCaCert()) != string(old.CertPEM) {
				t.Errorf("next is %v", plan.Next)
			}
			if plan.To != nil && string(plan.Next.GetRootRotation().GetCaCert()) != string(plan.To.CertPEM) {
				t.Error("the rotation is not to the planned root")
			}
		})
	}
}

func TestFinishRotation(t *testing.T) {
	old, to := aRoot(t), aRoot(t)
	next, err := FinishRotation(rand.Reader, &api.RootCA{
		CaCert: old.CertPEM, CaKey: old.KeyPEM, JoinTokens: &api.JoinTokens{Worker: "w", Manager: "m"}, LastForcedRotation: 4,
		RootRotation: &api.RootRotation{CaCert: to.CertPEM, CaKey: to.KeyPEM},
	}, false)
	if err != nil {
		t.Fatal(err)
	}
	for _, token := range []string{next.GetJoinTokens().GetWorker(), next.GetJoinTokens().GetManager()} {
		parsed, err := ParseToken(token)
		if err != nil || parsed.Pins(to.CertPEM) != nil || parsed.Pins(old.CertPEM) == nil {
			t.Errorf("token %s: %v", token, err)
		}
	}
	if next.GetJoinTokens().GetWorker() == next.GetJoinTokens().GetManager() || next.GetRootRotation() != nil ||
		string(next.GetCaKey()) != string(to.KeyPEM) || next.GetCaCertHash() != CertHash(to.CertPEM) || next.GetLastForcedRotation() != 4 {
		t.Errorf("the root is %v", next)
	}
}
