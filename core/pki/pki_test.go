package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// random is the tests' randomness: the same each time, but for keys.
func random() io.Reader { return rand.NewChaCha8([32]byte{1}) }

// sample returns a fenced block of docs/format/identity.md.
func sample(tb testing.TB, name string) string {
	tb.Helper()
	page, err := os.ReadFile("../../docs/format/identity.md")
	if err != nil {
		tb.Fatal(err)
	}
	m := regexp.MustCompile("(?s)```" + name + "\n(.*?)```").FindSubmatch(page)
	if m == nil {
		tb.Fatalf("docs/format/identity.md has no block %q", name)
	}
	return string(m[1])
}

// kek is the bytes 00 to 1f.
func kek() []byte {
	b := make([]byte, KEKLength)
	for i := range b {
		b[i] = byte(i)
	}
	return b
}

func sampleTime() time.Time { return time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC) }

// TestTokenVectors holds tokens to those that the reference made.
func TestTokenVectors(t *testing.T) {
	root := []byte(sample(t, "root"))
	if got, want := CertHash(root), strings.TrimSpace(sample(t, "root-digest")); got != want {
		t.Errorf("digest %s, want %s", got, want)
	}
	for name, fips := range map[string]bool{"token": false, "token-fips": true} {
		text := strings.TrimSpace(sample(t, name))
		token, err := ParseToken(text)
		if err != nil || token.FIPS != fips {
			t.Errorf("%s: %+v, %v", name, token, err)
		}
		if err := token.Pins(root); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := token.Pins(bytes.TrimSpace(root)); err == nil {
			t.Errorf("%s pins other bytes", name)
		}
		made, err := NewToken(random(), root, fips)
		if err != nil {
			t.Fatal(err)
		}
		if at := strings.LastIndex(text, "-"); len(made) != len(text) || made[:at] != text[:at] {
			t.Errorf("made %s, want the beginning of %s", made, text)
		}
	}
}

func TestParseTokenRefuses(t *testing.T) {
	good := strings.TrimSpace(sample(t, "token"))
	digest, secret := good[9:59], good[60:]
	for name, text := range map[string]string{
		"empty":                "",
		"other prefix":         "SWMKEY" + good[6:],
		"version 0":            "SWMTKN-0-" + digest + "-" + secret,
		"version 3":            "SWMTKN-3-" + digest + "-" + secret,
		"version 1 with flag":  "SWMTKN-1-0-" + digest + "-" + secret,
		"version 2 no flag":    "SWMTKN-2-" + digest + "-" + secret,
		"version 2 other flag": "SWMTKN-2-2-" + digest + "-" + secret,
		"short digest":         "SWMTKN-1-" + digest[1:] + "-" + secret,
		"long digest":          "SWMTKN-1-0" + digest + "-" + secret,
		"short secret":         "SWMTKN-1-" + digest + "-" + secret[1:],
		"long secret":          good + "0",
		"upper case":           "SWMTKN-1-" + strings.ToUpper(digest) + "-" + secret,
		"sign":                 "SWMTKN-1-+" + digest[1:] + "-" + secret,
		"digest too large":     "SWMTKN-1-" + strings.Repeat("z", 50) + "-" + secret,
		"blank at the end":     good + " ",
		"fifth part":           good + "-x",
	} {
		if token, err := ParseToken(text); err == nil || err.Error() != "invalid join token" {
			t.Errorf("%s: %+v, %v", name, token, err)
		}
	}
	if SameToken("", "") || SameToken(good, "") || SameToken(good[:80], good) || !SameToken(good, good) {
		t.Error("tokens are compared wrongly")
	}
}

// TestCertificateVectors reads the reference's certificate and makes one like it.
func TestCertificateVectors(t *testing.T) {
	root, err := ParseRoot([]byte(sample(t, "root")), nil)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := root.Verify([]byte(sample(t, "certificate")), sampleTime())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := root.Verify([]byte(sample(t, "certificate")), sampleTime().AddDate(1, 0, 0)); err == nil {
		t.Error("an expired certificate is accepted")
	}
	file, err := DecodeKeyFile([]byte(sample(t, "key")), nil)
	if err != nil {
		t.Fatal(err)
	}
	if !samePublicKey(file.Key.Public(), theirs.PublicKey) {
		t.Error("key and certificate of the page do not belong together")
	}
	// Ours, for the same node, issued by a root of our own at the same minute.
	own, err := NewRoot(random(), sampleTime())
	if err != nil {
		t.Fatal(err)
	}
	csr, err := NewCSR(random(), file.Key)
	if err != nil {
		t.Fatal(err)
	}
	issued := theirs.NotBefore.Add(time.Hour).Add(42 * time.Second)
	chain, err := own.Issue(random(), issued, csr, Leaf{NodeID: "nodeidnodeidnodeidnodeid1", ClusterID: "orgorgorg", OU: ManagerRole})
	if err != nil {
		t.Fatal(err)
	}
	ours, err := own.Verify(chain, sampleTime())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(look(theirs), look(ours)); diff != "" {
		t.Errorf("certificates differ (-reference +ours):\n%s", diff)
	}
	if diff := cmp.Diff(look(root.Certs[0]), look(own.Certs[0])); diff != "" {
		t.Errorf("roots differ (-reference +ours):\n%s", diff)
	}
	if _, err := root.Verify(chain, sampleTime()); err == nil {
		t.Error("a certificate of another root is accepted")
	}
}

// looks is what of a certificate must be the same for every implementation.
type looks struct {
	CN                 string
	OU, O, DNS         []string
	Usage              x509.KeyUsage
	Extended           []x509.ExtKeyUsage
	CA, Constraints    bool
	PathLength         int
	Algorithm          x509.SignatureAlgorithm
	Life               time.Duration
	OnTheMinute        bool
	SerialBits         bool
	KeyID, AuthorityID int
	Critical           []string
}

func look(c *x509.Certificate) looks {
	l := looks{
		CN: c.Subject.CommonName, OU: c.Subject.OrganizationalUnit, O: c.Subject.Organization, DNS: c.DNSNames,
		Usage: c.KeyUsage, Extended: c.ExtKeyUsage, CA: c.IsCA, Constraints: c.BasicConstraintsValid, PathLength: c.MaxPathLen,
		Algorithm: c.SignatureAlgorithm, Life: c.NotAfter.Sub(c.NotBefore), OnTheMinute: c.NotBefore.Second() == 0,
		SerialBits: c.SerialNumber.Sign() > 0 && c.SerialNumber.BitLen() < 160, KeyID: len(c.SubjectKeyId), AuthorityID: len(c.AuthorityKeyId),
	}
	for _, e := range c.Extensions {
		if e.Critical {
			l.Critical = append(l.Critical, e.Id.String())
		}
	}
	slices.Sort(l.Critical)
	return l
}

func TestKeyFileVectors(t *testing.T) {
	plain, err := DecodeKeyFile([]byte(sample(t, "key")), nil)
	if err != nil {
		t.Fatal(err)
	}
	if plain.Headers["kek-version"] != "0" {
		t.Errorf("headers %v", plain.Headers)
	}
	locked, err := DecodeKeyFile([]byte(sample(t, "key-locked")), kek())
	if err != nil {
		t.Fatal(err)
	}
	if !samePublicKey(plain.Key.Public(), locked.Key.Public()) {
		t.Error("the locked key is another one")
	}
	wrong := kek()
	wrong[0] = 0xff
	for _, k := range [][]byte{nil, {}, wrong, kek()[:31]} {
		if _, err := DecodeKeyFile([]byte(sample(t, "key-locked")), k); !errors.Is(err, ErrLocked) {
			t.Errorf("opened with %x: %v", k, err)
		}
	}
	again, err := EncodeKeyFile(nil, plain, nil)
	if err != nil || string(again) != sample(t, "key") {
		t.Errorf("written again it is\n%s%v", again, err)
	}
	if got, want := EncodeUnlockKey(kek()), strings.TrimSpace(sample(t, "unlock-key")); got != want {
		t.Errorf("unlock key %s, want %s", got, want)
	}
	if got, err := ParseUnlockKey(strings.TrimSpace(sample(t, "unlock-key"))); err != nil || !bytes.Equal(got, kek()) {
		t.Errorf("unlock key %x, %v", got, err)
	}
	for _, text := range []string{"", "SWMKEY-1-", "SWMKEY-2-AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8", "SWMKEY-1-AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHg", "SWMKEY-1-AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="} {
		if k, err := ParseUnlockKey(text); err == nil || err.Error() != "invalid key string" {
			t.Errorf("%q: %x, %v", text, k, err)
		}
	}
	if EncodeUnlockKey(nil) != "" {
		t.Error("no key has a text")
	}
}

// TestLegacyKeyFile reads what old Docker Engines wrote.
func TestLegacyKeyFile(t *testing.T) {
	key, err := NewKey(random())
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	block, err := x509.EncryptPEMBlock(random(), "EC PRIVATE KEY", der, kek(), x509.PEMCipherAES256) //nolint:staticcheck // the old format
	if err != nil {
		t.Fatal(err)
	}
	block.Headers["Kek-Version"] = "7"
	file, err := DecodeKeyFile(pem.EncodeToMemory(block), kek())
	if err != nil || !samePublicKey(file.Key.Public(), key.Public()) {
		t.Fatalf("%v, %v", file, err)
	}
	if diff := cmp.Diff(map[string]string{"kek-version": "7"}, file.Headers); diff != "" {
		t.Error(diff)
	}
	for _, k := range [][]byte{nil, kek()[1:]} {
		if _, err := DecodeKeyFile(pem.EncodeToMemory(block), k); !errors.Is(err, ErrLocked) {
			t.Errorf("opened with %x: %v", k, err)
		}
	}
	file, err = DecodeKeyFile(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), nil)
	if err != nil || !samePublicKey(file.Key.Public(), key.Public()) {
		t.Errorf("in the clear: %v, %v", file, err)
	}
}

// TestKeyFileRoundTrip keeps headers, and what is locked opens with its key only.
func TestKeyFileRoundTrip(t *testing.T) {
	key, err := NewKey(random())
	if err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(t *rapid.T) {
		headers := rapid.MapOfN(rapid.StringMatching(`[a-z][a-z-]{0,15}`), rapid.StringMatching(`[A-Za-z0-9+/=]{0,80}`), 0, 4).Draw(t, "headers")
		k := rapid.SampledFrom([][]byte{nil, kek()}).Draw(t, "kek")
		data, err := EncodeKeyFile(random(), KeyFile{Key: key, Headers: headers}, k)
		if err != nil {
			t.Fatal(err)
		}
		got, err := DecodeKeyFile(data, k)
		if err != nil || !key.Equal(got.Key) {
			t.Fatalf("%v", err)
		}
		if diff := cmp.Diff(headers, got.Headers); diff != "" && len(headers)+len(got.Headers) > 0 {
			t.Fatal(diff)
		}
		if k == nil {
			return
		}
		if bytes.Contains(data, []byte(" "+plainKeyType)) && !bytes.Contains(data, []byte(lockedKeyType)) {
			t.Fatal("the locked file says that it is not")
		}
		wrong := slices.Clone(k)
		wrong[rapid.IntRange(0, len(k)-1).Draw(t, "at")] ^= rapid.ByteRange(1, 255).Draw(t, "by")
		if _, err := DecodeKeyFile(data, wrong); !errors.Is(err, ErrLocked) {
			t.Fatalf("another key opens it: %v", err)
		}
	})
}

func TestIssue(t *testing.T) {
	now := sampleTime()
	root, err := NewRoot(random(), now)
	if err != nil {
		t.Fatal(err)
	}
	key, err := NewKey(random())
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(random(), &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "mallory", OrganizationalUnit: []string{ManagerRole}}, DNSNames: []string{"swarm-manager"},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	greedy := pem.EncodeToMemory(&pem.Block{Type: "NEW CERTIFICATE REQUEST", Bytes: der})
	for name, c := range map[string]struct {
		expiry, want time.Duration
	}{
		"default":   {0, DefaultExpiry},
		"too short": {MinExpiry - 1, DefaultExpiry},
		"shortest":  {MinExpiry, MinExpiry},
		"own":       {48 * time.Hour, 48 * time.Hour},
	} {
		chain, err := root.Issue(random(), now, greedy, Leaf{NodeID: "node", ClusterID: "swarm", OU: WorkerRole, Expiry: c.expiry})
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := root.Verify(chain, now)
		if err != nil {
			t.Fatal(err)
		}
		if !leaf.NotAfter.Equal(now.Add(c.want)) || !leaf.NotBefore.Equal(now.Add(-time.Hour)) {
			t.Errorf("%s: from %s to %s", name, leaf.NotBefore, leaf.NotAfter)
		}
		if leaf.Subject.CommonName != "node" || !slices.Equal(leaf.DNSNames, []string{WorkerRole, "node"}) || !slices.Equal(leaf.Subject.OrganizationalUnit, []string{WorkerRole}) {
			t.Errorf("the request chose its names: %s %v", leaf.Subject, leaf.DNSNames)
		}
	}
	known, err := ParseRoot(root.CertPEM, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := known.Issue(random(), now, greedy, Leaf{}); model.KindOf(err) != model.Precondition {
		t.Errorf("issued without a key: %v", err)
	}
	forged := slices.Clone(der)
	forged[len(forged)-1] ^= 1
	if _, err := root.Issue(random(), now, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: forged}), Leaf{}); err == nil {
		t.Error("a request that its key did not sign is accepted")
	}
	root.Intermediates = []byte(sample(t, "root"))
	chain, err := root.Issue(random(), now, greedy, Leaf{NodeID: "node", ClusterID: "swarm", OU: WorkerRole})
	if err != nil || !bytes.HasSuffix(chain, root.Intermediates) {
		t.Errorf("intermediates are not handed out: %v", err)
	}
	if RoleOU(api.NodeRole_MANAGER) != ManagerRole || RoleOU(api.NodeRole_WORKER) != WorkerRole {
		t.Error("roles are confused")
	}
}

func TestParseRootRefuses(t *testing.T) {
	root, err := NewRoot(random(), sampleTime())
	if err != nil {
		t.Fatal(err)
	}
	other, err := NewRoot(random(), sampleTime())
	if err != nil {
		t.Fatal(err)
	}
	weak, err := rsa.GenerateKey(random(), 1024)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: sampleTime().AddDate(9, 0, 0), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(random(), template, template, weak.Public(), weak)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ cert, key []byte }{
		"nothing":           {nil, nil},
		"no PEM":            {[]byte("root"), nil},
		"a key":             {root.KeyPEM, nil},
		"a leaf":            {[]byte(sample(t, "certificate")), nil},
		"a leaf in there":   {append(slices.Clone(root.CertPEM), sample(t, "certificate")...), nil},
		"junk at the end":   {append(slices.Clone(root.CertPEM), "junk"...), nil},
		"another one's key": {root.CertPEM, other.KeyPEM},
		"1024 bit RSA":      {encodeCert(der), nil},
	} {
		if _, err := ParseRoot(c.cert, c.key); model.KindOf(err) != model.Invalid || err == nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	bundle := append(slices.Clone(root.CertPEM), other.CertPEM...)
	both, err := ParseRoot(bundle, root.KeyPEM)
	if err != nil || len(both.Certs) != 2 || !bytes.Equal(both.CertPEM, bundle) {
		t.Errorf("a bundle: %v", err)
	}
	if _, err := ParseRoot(bundle, other.KeyPEM); err == nil {
		t.Error("the second certificate signs")
	}
	for _, curve := range []elliptic.Curve{elliptic.P384(), elliptic.P521()} {
		key, err := ecdsa.GenerateKey(curve, random())
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.CreateCertificate(random(), template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseRoot(encodeCert(der), nil); err != nil {
			t.Errorf("%s: %v", curve.Params().Name, err)
		}
	}
}

func TestNormalizePEM(t *testing.T) {
	root := sample(t, "root")
	dirty := "junk\n" + strings.Replace(root, "CERTIFICATE-----\n", "CERTIFICATE-----\nHeader: x\n\n", 1) + "more junk\n" + root
	if diff := cmp.Diff(root+root, string(NormalizePEM([]byte(dirty)))); diff != "" {
		t.Error(diff)
	}
}

// TestRenewAt holds renewal to its window: a whole number of minutes into the time from
// half to four fifths of a certificate's life.
func TestRenewAt(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		life := time.Duration(rapid.Int64Range(1, 100*24*3600).Draw(t, "life")) * time.Second
		cert := &x509.Certificate{NotBefore: sampleTime(), NotAfter: sampleTime().Add(life)}
		seed := rapid.SliceOfN(rapid.Byte(), 8, 8).Draw(t, "random")
		at, err := RenewAt(cert, bytes.NewReader(seed))
		if err != nil {
			t.Fatal(err)
		}
		if early := at.Sub(cert.NotBefore); early < life/2 || early > life*8/10 {
			t.Fatalf("renewed after %s of %s", early, life)
		}
		if rest := at.Sub(cert.NotBefore.Add(life / 2)); rest%time.Minute != 0 {
			t.Fatalf("%s after half its life", rest)
		}
		if again, _ := RenewAt(cert, bytes.NewReader(seed)); !again.Equal(at) {
			t.Fatal("the same randomness gives another time")
		}
	})
	cert := &x509.Certificate{NotBefore: sampleTime(), NotAfter: sampleTime().Add(DefaultExpiry)}
	var first, last time.Time
	source := random()
	for range 1000 {
		at, err := RenewAt(cert, source)
		if err != nil {
			t.Fatal(err)
		}
		if first.IsZero() || at.Before(first) {
			first = at
		}
		if at.After(last) {
			last = at
		}
	}
	if spread := last.Sub(first); spread < DefaultExpiry*3/10*9/10 {
		t.Errorf("1000 nodes renew within %s", spread)
	}
	if _, err := RenewAt(cert, strings.NewReader("short")); err == nil {
		t.Error("chosen without randomness")
	}
}

func FuzzParseToken(f *testing.F) {
	f.Add(strings.TrimSpace(sample(f, "token")))
	f.Add(strings.TrimSpace(sample(f, "token-fips")))
	f.Add("SWMTKN-2-0-" + strings.Repeat("0", 50) + "-" + strings.Repeat("0", 25))
	f.Fuzz(func(t *testing.T, text string) {
		token, err := ParseToken(text)
		if err != nil {
			return
		}
		version := "1-"
		if token.FIPS {
			version = "2-1-"
		} else if strings.HasPrefix(text, "SWMTKN-2-") {
			version = "2-0-"
		}
		if again := "SWMTKN-" + version + base36(token.Digest[:], digestLength) + text[len(text)-secretLength-1:]; again != text {
			t.Errorf("%s written again is %s", text, again)
		}
	})
}

func FuzzUnlockKey(f *testing.F) {
	f.Add(strings.TrimSpace(sample(f, "unlock-key")))
	f.Add("SWMKEY-1-")
	f.Fuzz(func(t *testing.T, text string) {
		k, err := ParseUnlockKey(text)
		if err != nil {
			return
		}
		if again, err := ParseUnlockKey(EncodeUnlockKey(k)); err != nil || !bytes.Equal(again, k) {
			t.Errorf("%x written and read is %x, %v", k, again, err)
		}
	})
}

func FuzzParseCerts(f *testing.F) {
	f.Add([]byte(sample(f, "root")), []byte(sample(f, "key")))
	f.Add([]byte(sample(f, "certificate")+sample(f, "root")), []byte(nil))
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n"), []byte(nil))
	f.Fuzz(func(t *testing.T, certs, key []byte) {
		list, err := ParseCerts(certs)
		if err == nil {
			normal := NormalizePEM(certs)
			again, err := ParseCerts(normal)
			if err != nil || len(again) != len(list) {
				t.Errorf("%d certificates, normalized %d, %v", len(list), len(again), err)
			}
			if !bytes.Equal(NormalizePEM(normal), normal) {
				t.Error("normal form is not normal")
			}
		}
		if root, err := ParseRoot(certs, key); err == nil && (len(root.Certs) == 0 || len(key) > 0 && root.Key == nil) {
			t.Error("a root without certificate, or without its key")
		}
		if csr, err := ParseCSR(certs); err == nil && csr.CheckSignature() != nil {
			t.Error("a request that nobody signed")
		}
	})
}

func FuzzDecodeKeyFile(f *testing.F) {
	f.Add([]byte(sample(f, "key")), []byte(nil))
	f.Add([]byte(sample(f, "key-locked")), kek())
	f.Add([]byte("-----BEGIN EC PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,00112233445566778899aabbccddeeff\n\nAAAA\n-----END EC PRIVATE KEY-----\n"), kek())
	f.Fuzz(func(t *testing.T, data, k []byte) {
		file, err := DecodeKeyFile(data, k)
		if err != nil {
			return
		}
		again, err := EncodeKeyFile(random(), file, k)
		if err != nil {
			return // a curve that PKCS#8 does not know
		}
		read, err := DecodeKeyFile(again, k)
		if err != nil || !samePublicKey(read.Key.Public(), file.Key.Public()) {
			t.Fatalf("written and read again: %v\n%s", err, again)
		}
		if diff := cmp.Diff(file.Headers, read.Headers); diff != "" {
			t.Errorf("headers change:\n%s", diff)
		}
	})
}

// FuzzIssue signs what a stranger calls a certificate request.
func FuzzIssue(f *testing.F) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	root, err := NewRoot(random(), now)
	if err != nil {
		f.Fatal(err)
	}
	key, err := NewKey(random())
	if err != nil {
		f.Fatal(err)
	}
	csr, err := NewCSR(random(), key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(csr)
	f.Add(csr[:len(csr)/2])
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n"))
	f.Fuzz(func(t *testing.T, request []byte) {
		chain, err := root.Issue(random(), now, request, Leaf{NodeID: "n", ClusterID: "c", OU: WorkerRole, Expiry: time.Hour})
		if err != nil {
			return
		}
		certs, err := ParseCerts(chain)
		if err != nil {
			t.Fatal(err)
		}
		if s := certs[0].Subject; s.CommonName != "n" || len(s.OrganizationalUnit) != 1 || s.OrganizationalUnit[0] != WorkerRole || certs[0].IsCA {
			t.Errorf("the request decided about its certificate: %v", s)
		}
	})
}
