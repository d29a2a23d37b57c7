package cfssl

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/wire"
)

func newRoot(t *testing.T) *pki.Root {
	t.Helper()
	root, err := pki.NewRoot(rand.Reader, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func newCSR(t *testing.T) ([]byte, crypto.Signer) {
	t.Helper()
	key, err := pki.NewKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.NewCSR(rand.Reader, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr, key
}

// newClient returns a client with a manager's certificate from root.
func newClient(t *testing.T, root *pki.Root) *Client {
	t.Helper()
	csr, key := newCSR(t)
	chain, err := root.Issue(rand.Reader, time.Now(), csr, pki.Leaf{NodeID: "m", ClusterID: "c", OU: pki.ManagerRole})
	if err != nil {
		t.Fatal(err)
	}
	material, err := wire.NewMaterial(root, chain, key)
	if err != nil {
		t.Fatal(err)
	}
	creds := new(wire.Credentials)
	creds.Set(material)
	return &Client{Credentials: creds}
}

// serve is an authority behind mutual TLS with a certificate from root.
func serve(t *testing.T, root *pki.Root, answer http.HandlerFunc) *api.ExternalCA {
	t.Helper()
	_, key := newCSR(t)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}, root.Certs[0], key.Public(), root.Key)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(answer)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.TLS = &tls.Config{
		MinVersion:   tls.VersionTLS12,
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
		ClientAuth:   tls.RequireAndVerifyClientCert, ClientCAs: root.Pool(),
	}
	s.StartTLS()
	t.Cleanup(s.Close)
	return &api.ExternalCA{Url: s.URL + "/api/v1/cfssl/sign"}
}

// signing answers as CFSSL does: it takes names and subject from the request, and adds the
// extensions asked for.
func signing(t *testing.T, root *pki.Root, seen *request) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var req request
		if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
			t.Error(err)
		}
		*seen = req
		if r.Method != http.MethodPost || r.Header.Get("Content-Type") != "application/json" || r.TLS.PeerCertificates[0].Subject.CommonName != "m" {
			t.Errorf("%s %s by %v", r.Method, r.Header, r.TLS.PeerCertificates[0].Subject)
		}
		var cert []byte
		if req.Profile == crossProfile {
			cross, err := pki.ParseCSR([]byte(req.Request))
			if err != nil {
				t.Error(err)
				return
			}
			template := &x509.Certificate{
				SerialNumber: big.NewInt(2), RawSubject: cross.RawSubject, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
				IsCA: true, BasicConstraintsValid: true, AuthorityKeyId: root.Certs[0].SubjectKeyId, ExtraExtensions: cross.Extensions,
			}
			der, err := x509.CreateCertificate(rand.Reader, template, root.Certs[0], cross.PublicKey, root.Key)
			if err != nil {
				t.Error(err)
			}
			cert = append([]byte("junk before\n"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
		} else {
			var err error
			cert, err = root.Issue(rand.Reader, time.Now(), []byte(req.Request), pki.Leaf{
				NodeID: req.Subject.CN, ClusterID: req.Subject.Names[0].O, OU: req.Subject.Names[0].OU,
			})
			if err != nil {
				t.Error(err)
			}
		}
		fmt.Fprintf(w, `{"success":true,"result":{"certificate":%q},"errors":[],"messages":[]}`, cert)
	}
}

func TestSign(t *testing.T) {
	root := newRoot(t)
	c := newClient(t, root)
	var seen request
	ca := serve(t, root, signing(t, root, &seen))
	ca.Options = map[string]string{"profile": "node", "label": "primary"}
	for ou, names := range map[string][]string{pki.WorkerRole: {"swarm-worker", "n"}, pki.ManagerRole: {"swarm-manager", "n", "swarm-ca"}} {
		csr, _ := newCSR(t)
		leaf := pki.Leaf{NodeID: "n", ClusterID: "c", OU: ou}
		chain, err := c.Sign(t.Context(), []*api.ExternalCA{ca}, root.Certs, csr, leaf)
		if err != nil {
			t.Fatal(err)
		}
		if err := pki.CheckIssued(root, csr, chain, leaf, time.Now()); err != nil {
			t.Error(err)
		}
		if !slices.Equal(seen.Hosts, names) || seen.Request != string(csr) || seen.Profile != "node" || seen.Label != "primary" {
			t.Errorf("asked %+v", seen)
		}
		// What was not asked for is noticed.
		other, _ := newCSR(t)
		for what, err := range map[string]error{
			"key":     pki.CheckIssued(root, other, chain, leaf, time.Now()),
			"node":    pki.CheckIssued(root, csr, chain, pki.Leaf{NodeID: "x", ClusterID: "c", OU: ou}, time.Now()),
			"cluster": pki.CheckIssued(root, csr, chain, pki.Leaf{NodeID: "n", ClusterID: "x", OU: ou}, time.Now()),
			"role":    pki.CheckIssued(root, csr, chain, pki.Leaf{NodeID: "n", ClusterID: "c", OU: "x"}, time.Now()),
			"root":    pki.CheckIssued(newRoot(t), csr, chain, leaf, time.Now()),
		} {
			if err == nil {
				t.Errorf("a certificate for another %s passes", what)
			}
		}
	}
}

func TestCrossSign(t *testing.T) {
	root, to := newRoot(t), newRoot(t)
	var seen request
	ca := serve(t, root, signing(t, root, &seen))
	cross, err := newClient(t, root).CrossSign(t.Context(), []*api.ExternalCA{ca}, root.Certs, to)
	if err != nil {
		t.Fatal(err)
	}
	if err := pki.CheckCross(root, to, cross, time.Now()); err != nil {
		t.Error(err)
	}
	// SEQUENCE { BOOLEAN TRUE }: a CA, of any depth.
	if len(seen.Extensions) != 1 || seen.Extensions[0] != (extension{ID: "2.5.29.19", Critical: true, Value: hex.EncodeToString([]byte{0x30, 3, 1, 1, 255})}) {
		t.Errorf("asked for the extensions %v", seen.Extensions)
	}
}

func TestFailures(t *testing.T) {
	root, stranger := newRoot(t), newRoot(t)
	c := newClient(t, root)
	csr, _ := newCSR(t)
	text := func(code int, body string) *api.ExternalCA {
		return serve(t, root, func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(code)
			_, _ = io.WriteString(w, body)
		})
	}
	stuck := serve(t, root, func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // only then the server notices that the client has gone
		<-r.Context().Done()
	})
	gone := serve(t, root, nil)
	gone.Url = strings.Replace(gone.GetUrl(), "127.0.0.1:", "127.0.0.1:1", 1) // no port has six digits, or nobody listens
	redirecting := serve(t, root, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "https://127.0.0.1:1/", http.StatusFound)
	})
	var seen request
	good := serve(t, root, signing(t, root, &seen))
	for name, tt := range map[string]struct {
		cas  []*api.ExternalCA
		kind model.Kind
		text string
	}{
		"none":           {nil, model.Precondition, "no external CA is configured"},
		"server error":   {[]*api.ExternalCA{text(500, "oops\nmore")}, model.Unavailable, "500 Internal Server Error: oops"},
		"not JSON":       {[]*api.ExternalCA{text(200, "<html>")}, model.Unavailable, "the answer is not CFSSL's"},
		"endless":        {[]*api.ExternalCA{text(200, `{"success":true,"result":{"certificate":"`+strings.Repeat("x", 2*maxAnswer))}, model.Unavailable, "the answer is not CFSSL's"},
		"refused":        {[]*api.ExternalCA{text(200, `{"success":false,"errors":[{"code":5300,"message":"policy"}]}`)}, model.Denied, "it did not sign: policy (5300)"},
		"no certificate": {[]*api.ExternalCA{text(200, `{"success":true,"result":{}}`)}, model.Denied, "it signed without a certificate"},
		"stuck":          {[]*api.ExternalCA{stuck}, model.Unavailable, "deadline exceeded"},
		"nobody":         {[]*api.ExternalCA{gone}, model.Unavailable, "dial tcp"},
		"redirect":       {[]*api.ExternalCA{redirecting}, model.Unavailable, "302 Found"},
		"stranger":       {[]*api.ExternalCA{serve(t, stranger, nil)}, model.Unavailable, "certificate"},
		"second is good": {[]*api.ExternalCA{text(200, `{"success":false}`), text(500, ""), good}, model.Internal, ""},
		"passing counts": {[]*api.ExternalCA{text(200, `{"success":false}`), text(500, "")}, model.Unavailable, "it says no reason"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			if name == "stuck" {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, 100*time.Millisecond)
				defer cancel()
			}
			_, err := c.Sign(ctx, tt.cas, root.Certs, csr, pki.Leaf{NodeID: "n", ClusterID: "c", OU: pki.WorkerRole})
			if tt.text == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if model.KindOf(err) != tt.kind || !strings.Contains(fmt.Sprint(err), tt.text) {
				t.Errorf("got %v (%v), want %q (%v)", err, model.KindOf(err), tt.text, tt.kind)
			}
		})
	}
	if err := c.Reachable(t.Context(), []*api.ExternalCA{gone, good}, root.Certs); err != nil {
		t.Error(err)
	}
	for _, cas := range [][]*api.ExternalCA{nil, {gone}, {serve(t, stranger, nil)}} {
		if err := c.Reachable(t.Context(), cas, root.Certs); model.KindOf(err) != model.Invalid {
			t.Errorf("reachable: %v", err)
		}
	}
	// Without a certificate of its own a client is not served.
	if _, err := (&Client{Credentials: new(wire.Credentials)}).Sign(t.Context(), []*api.ExternalCA{good}, root.Certs, csr, pki.Leaf{}); err == nil {
		t.Error("a stranger had something signed")
	}
}

func TestCheck(t *testing.T) {
	for text, ca := range map[string]*api.ExternalCA{
		"":                          {Url: "https://ca/sign", Options: map[string]string{"profile": "p", "label": "l"}, CaCert: newRoot(t).CertPEM},
		"must begin with https://":  {Url: "http://ca/sign"},
		"is not a URL":              {Url: "ca"},
		"unknown protocol":          {Url: "https://ca", Protocol: 7},
		"unknown option \"colour\"": {Url: "https://ca", Options: map[string]string{"colour": "red"}},
		"leave user and password":   {Url: "https://me:word@ca"},
		"cacert":                    {Url: "https://ca", CaCert: []byte("junk")},
	} {
		err := Check([]*api.ExternalCA{ca})
		if (text == "") != (err == nil) || text != "" && (!strings.Contains(err.Error(), text) || model.KindOf(err) != model.Invalid) {
			t.Errorf("%v: %v, want %q", ca, err, text)
		}
		if err != nil && strings.Contains(err.Error(), "word@") {
			t.Errorf("%v shows the password", err)
		}
	}
}

func TestFor(t *testing.T) {
	present, next := newRoot(t), newRoot(t)
	old, fresh := &api.ExternalCA{Url: "old"}, &api.ExternalCA{Url: "new", CaCert: append([]byte("# comment\n"), next.CertPEM...)}
	all := []*api.ExternalCA{old, fresh}
	for want, root := range map[*api.ExternalCA]*pki.Root{old: present, fresh: next} {
		if got := For(all, present.CertPEM, root.CertPEM); len(got) != 1 || got[0] != want {
			t.Errorf("for %s: %v", want.GetUrl(), got)
		}
	}
	if len(all) != 2 || all[0] != old {
		t.Error("the configuration was changed")
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add([]byte(`{"success":true,"result":{"certificate":"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"},"errors":[],"messages":[]}`))
	f.Add([]byte(`{"success":false,"errors":[{"code":1,"message":"m"}]}`))
	f.Add([]byte(`{"success":true,"result":null}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		cert, err := parseAnswer(data)
		if (err == nil) == (len(cert) == 0) {
			t.Errorf("certificate %q and error %v", cert, err)
		}
		if err == nil {
			if _, err := pki.ParseCerts(cert); err != nil {
				t.Error(err)
			}
		}
	})
}
