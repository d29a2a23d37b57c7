// Package cfssl asks external certificate authorities to sign, by the HTTP protocol of
// CFSSL over mutual TLS (docs/ca.md).
//
// A Client has no state beside the credentials it presents and may be used from any
// goroutine. Which authorities a swarm uses, and whether what they sign is right, is for
// its callers to decide; the package only tells failures that may pass (model.Unavailable)
// from those that will not.
package cfssl

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/wire"
)

const (
	// callTimeout bounds the attempt with one authority.
	callTimeout = 5 * time.Second
	// maxAnswer bounds what is read of an answer.
	maxAnswer = 256 << 10
	// crossProfile is the signing profile that an authority must have for root rotations.
	crossProfile = "CA"
)

// Client asks the external authorities of one swarm.
type Client struct {
	// Credentials are presented to authorities; they may have no certificate yet.
	Credentials *wire.Credentials
}

// Check refuses authorities that could not be used.
func Check(cas []*api.ExternalCA) error {
	for _, ca := range cas {
		u, err := url.Parse(ca.GetUrl())
		switch {
		case ca.GetProtocol() != api.ExternalCA_CFSSL:
			return model.Errorf(model.Invalid, "external CA %s: unknown protocol %s", ca.GetUrl(), ca.GetProtocol())
		case err != nil || u.Host == "":
			return model.Errorf(model.Invalid, "external CA: %q is not a URL", ca.GetUrl())
		case u.Scheme != "https":
			return model.Errorf(model.Invalid, "external CA %s: the URL must begin with https://, or anybody could have certificates signed", ca.GetUrl())
		case u.User != nil:
			return model.Errorf(model.Invalid, "external CA %s: managers identify themselves by their certificates; leave user and password out", u.Redacted())
		}
		for option := range ca.GetOptions() {
			if option != "profile" && option != "label" {
				return model.Errorf(model.Invalid, "external CA %s: unknown option %q; profile and label are known", ca.GetUrl(), option)
			}
		}
		if len(ca.GetCaCert()) > 0 {
			if _, err := pki.ParseRoot(pki.NormalizePEM(ca.GetCaCert()), nil); err != nil {
				return model.Wrap(model.Invalid, err, fmt.Sprintf("external CA %s: cacert", ca.GetUrl()))
			}
		}
	}
	return nil
}

// For returns the authorities for a root. One without a certificate is for the present root.
func For(cas []*api.ExternalCA, present, root []byte) []*api.ExternalCA {
	want := pki.NormalizePEM(root)
	return slices.DeleteFunc(slices.Clone(cas), func(ca *api.ExternalCA) bool {
		own := pki.NormalizePEM(ca.GetCaCert())
		if len(own) == 0 {
			own = pki.NormalizePEM(present)
		}
		return !bytes.Equal(own, want)
	})
}

// Sign has a node's certificate request signed by the first of the authorities that does.
// Roots are those that the authorities' own certificates must come from.
func (c *Client) Sign(ctx context.Context, cas []*api.ExternalCA, roots []*x509.Certificate, csr []byte, leaf pki.Leaf) ([]byte, error) {
	return c.first(ctx, cas, roots, request{
		Hosts: leaf.Names(), Request: string(csr),
		Subject: &subject{CN: leaf.NodeID, Names: []name{{O: leaf.ClusterID, OU: leaf.OU}}},
	})
}

// CrossSign has a root certified by the first of the authorities that does.
func (c *Client) CrossSign(ctx context.Context, cas []*api.ExternalCA, roots []*x509.Certificate, to *pki.Root) ([]byte, error) {
	csr, err := pki.CrossRequest(rand.Reader, to)
	if err != nil {
		return nil, err
	}
	cert := to.Certs[0]
	r := request{Request: string(csr), Profile: crossProfile, Subject: &subject{CN: cert.Subject.CommonName}}
	for i := range max(len(cert.Subject.Organization), len(cert.Subject.OrganizationalUnit)) {
		var n name
		if i < len(cert.Subject.Organization) {
			n.O = cert.Subject.Organization[i]
		}
		if i < len(cert.Subject.OrganizationalUnit) {
			n.OU = cert.Subject.OrganizationalUnit[i]
		}
		r.Subject.Names = append(r.Subject.Names, n)
	}
	const basicConstraints = "2.5.29.19"
	for _, e := range cert.Extensions {
		if e.Id.String() == basicConstraints {
			r.Extensions = append(r.Extensions, extension{ID: basicConstraints, Critical: e.Critical, Value: hex.EncodeToString(e.Value)})
		}
	}
	return c.first(ctx, cas, roots, r)
}

// Reachable returns an error unless TLS with one of the authorities works.
func (c *Client) Reachable(ctx context.Context, cas []*api.ExternalCA, roots []*x509.Certificate) error {
	var errs []error
	for _, ca := range cas {
		u, err := url.Parse(ca.GetUrl())
		if err != nil {
			return model.Wrap(model.Invalid, err, "external CA")
		}
		port := u.Port()
		if port == "" {
			port = "443"
		}
		call, cancel := context.WithTimeout(ctx, callTimeout)
		dialer := &tls.Dialer{Config: c.config(roots, u.Hostname())}
		conn, err := dialer.DialContext(call, "tcp", net.JoinHostPort(u.Hostname(), port))
		cancel()
		if err == nil {
			return conn.Close()
		}
		errs = append(errs, fmt.Errorf("%s: %w", ca.GetUrl(), err))
	}
	if len(errs) == 0 {
		return model.Errorf(model.Invalid, "there must be an external CA for a root whose key the swarm does not have: give one with --external-ca")
	}
	return model.Wrap(model.Invalid, errors.Join(errs...), "no external CA can be reached")
}

// The bodies of CFSSL's requests and answers.
type (
	request struct {
		Hosts         []string    `json:"hosts"`
		Request       string      `json:"certificate_request"`
		Subject       *subject    `json:"subject,omitempty"`
		Profile       string      `json:"profile"`
		CRLOverride   string      `json:"crl_override"`
		Label         string      `json:"label"`
		Extensions    []extension `json:"extensions,omitempty"`
		NotBefore     time.Time
		NotAfter      time.Time
		ReturnPrecert bool
		Metadata      any `json:"metadata"`
	}
	subject struct {
		CN           string
		Names        []name `json:"names"`
		SerialNumber string
	}
	name struct {
		O  string `json:",omitempty"`
		OU string `json:",omitempty"`
	}
	extension struct {
		ID       string `json:"id"`
		Critical bool   `json:"critical"`
		Value    string `json:"value"`
	}
)

// first asks the authorities in their order until one signs. A failure that will not pass
// counts only if there is none that may.
func (c *Client) first(ctx context.Context, cas []*api.ExternalCA, roots []*x509.Certificate, r request) ([]byte, error) {
	var passing, final error
	for _, ca := range cas {
		cert, err := c.ask(ctx, ca, roots, r)
		switch {
		case err == nil:
			return cert, nil
		case model.KindOf(err) == model.Unavailable:
			passing = errors.Join(passing, err)
		default:
			final = errors.Join(final, err)
		}
	}
	switch {
	case passing != nil:
		return nil, model.Wrap(model.Unavailable, errors.Join(passing, final), "external CA")
	case final != nil:
		return nil, model.Wrap(model.Denied, final, "external CA")
	}
	return nil, model.Errorf(model.Precondition, "no external CA is configured for this root certificate")
}

// ask posts a request to one authority.
func (c *Client) ask(ctx context.Context, ca *api.ExternalCA, roots []*x509.Certificate, r request) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if profile := ca.GetOptions()["profile"]; profile != "" && r.Profile == "" {
		r.Profile = profile
	}
	r.Label = ca.GetOptions()["label"]
	body, err := json.Marshal(r)
	if err != nil {
		return nil, model.Wrap(model.Internal, err, "ask external CA")
	}
	post, err := http.NewRequestWithContext(ctx, http.MethodPost, ca.GetUrl(), bytes.NewReader(body))
	if err != nil {
		return nil, model.Wrap(model.Invalid, err, "ask external CA")
	}
	post.Header.Set("Content-Type", "application/json")
	transport := &http.Transport{TLSClientConfig: c.config(roots, post.URL.Hostname()), DisableKeepAlives: true}
	client := &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	resp, err := client.Do(post)
	if err != nil {
		return nil, model.Wrap(model.Unavailable, err, "ask external CA")
	}
	defer resp.Body.Close() //nolint:errcheck // read or not, it is over
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, model.Wrap(model.Unavailable, err, "ask external CA")
	}
	if resp.StatusCode != http.StatusOK {
		return nil, model.Errorf(model.Unavailable, "%s answers %s: %s", ca.GetUrl(), resp.Status, firstLine(data))
	}
	cert, err := parseAnswer(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", ca.GetUrl(), err)
	}
	return cert, nil
}

// parseAnswer reads the certificate out of an answer, normalized.
func parseAnswer(data []byte) ([]byte, error) {
	var answer struct {
		Success bool `json:"success"`
		Result  struct {
			Certificate string `json:"certificate"`
		} `json:"result"`
		Errors []struct {
			Code    int    `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
	}
	if err := json.Unmarshal(data, &answer); err != nil {
		return nil, model.Wrap(model.Unavailable, err, "the answer is not CFSSL's")
	}
	if !answer.Success {
		var texts []string
		for _, e := range answer.Errors {
			texts = append(texts, fmt.Sprintf("%s (%d)", e.Message, e.Code))
		}
		if len(texts) == 0 {
			texts = []string{"it says no reason"}
		}
		return nil, model.Errorf(model.Denied, "it did not sign: %s", strings.Join(texts, ", "))
	}
	cert := pki.NormalizePEM([]byte(answer.Result.Certificate))
	if _, err := pki.ParseCerts(cert); err != nil {
		return nil, model.Wrap(model.Denied, err, "it signed without a certificate")
	}
	return cert, nil
}

func firstLine(data []byte) string {
	line, _, _ := strings.Cut(string(data[:min(len(data), 200)]), "\n")
	return strings.ToValidUTF8(line, "?")
}

// config is for TLS with an authority whose certificate must come from one of the roots.
func (c *Client) config(roots []*x509.Certificate, host string) *tls.Config {
	pool := x509.NewCertPool()
	for _, cert := range roots {
		pool.AddCert(cert)
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS12, RootCAs: pool, ServerName: host,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if cert := c.Credentials.Certificate(); cert != nil {
				return cert, nil
			}
			return new(tls.Certificate), nil
		},
	}
}
