package wire

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"sync/atomic"
	"time"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
)

// Credentials are a node's certificate, key and trusted roots. They can be swapped; new
// handshakes use the newest.
type Credentials struct {
	// Network is where connections go; nil is TCP.
	Network Network
	// Unknown is called when a manager's certificate comes from no root that is trusted; it
	// must not block. Nil does nothing.
	Unknown func()

	current atomic.Pointer[Material]
}

// Material is one state of Credentials. It is not changed.
type Material struct {
	Root *pki.Root
	// Leaf is nil while the node has no certificate.
	Leaf *x509.Certificate
	// ChainPEM is the leaf and its intermediates.
	ChainPEM []byte
	tls      tls.Certificate
}

// NewMaterial checks that chain and key belong together and to the root.
func NewMaterial(root *pki.Root, chainPEM []byte, key crypto.Signer) (*Material, error) {
	chain, err := pki.ParseCerts(chainPEM)
	if err != nil {
		return nil, err
	}
	m := &Material{Root: root, Leaf: chain[0], ChainPEM: chainPEM, tls: tls.Certificate{PrivateKey: key, Leaf: chain[0]}}
	for _, c := range chain {
		m.tls.Certificate = append(m.tls.Certificate, c.Raw)
	}
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(chain[0].PublicKey) {
		return nil, model.Errorf(model.Invalid, "the node's key does not belong to its certificate")
	}
	return m, nil
}

// Set replaces the material.
func (c *Credentials) Set(m *Material) { c.current.Store(m) }

// Current returns the newest material, or nil before the first Set.
func (c *Credentials) Current() *Material { return c.current.Load() }

// Certificate returns the node's certificate as TLS presents it, or nil without one.
func (c *Credentials) Certificate() *tls.Certificate {
	if m := c.Current(); m != nil && m.Leaf != nil {
		return &m.tls
	}
	return nil
}

// NodeID returns the node's id, or "" without a certificate.
func (c *Credentials) NodeID() string {
	if m := c.Current(); m != nil && m.Leaf != nil {
		return m.Leaf.Subject.CommonName
	}
	return ""
}

// ClusterID returns the swarm's id, or "" without a certificate.
func (c *Credentials) ClusterID() string {
	if m := c.Current(); m != nil && m.Leaf != nil && len(m.Leaf.Subject.Organization) > 0 {
		return m.Leaf.Subject.Organization[0]
	}
	return ""
}

// Role returns the organizational unit of the certificate, or "" without one.
func (c *Credentials) Role() string {
	if m := c.Current(); m != nil && m.Leaf != nil && len(m.Leaf.Subject.OrganizationalUnit) > 0 {
		return m.Leaf.Subject.OrganizationalUnit[0]
	}
	return ""
}

// suites are those of TLS 1.2; 1.3 has its own.
func suites() []uint16 {
	return []uint16{
		tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
		tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
		tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
	}
}

// ServerTLS returns the configuration of a manager's listener: client certificates are
// optional, for joining nodes have none, but verified if given.
func (c *Credentials) ServerTLS() *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS12,
		CipherSuites: suites(),
		NextProtos:   []string{"h2"},
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			m := c.Current()
			if m == nil || m.Leaf == nil {
				return nil, model.Errorf(model.Unavailable, "this node has no certificate")
			}
			return &tls.Config{
				MinVersion:   tls.VersionTLS12,
				CipherSuites: suites(),
				NextProtos:   []string{"h2"},
				Certificates: []tls.Certificate{m.tls},
				ClientAuth:   tls.VerifyClientCertIfGiven,
				ClientCAs:    m.Root.Pool(),
			}, nil
		},
	}
}

// ClientTLS returns the configuration for connections to managers that must have the
// given server name in their certificate: pki.ManagerRole, or pki.CARole; AnyRole takes every
// certificate of the swarm.
func (c *Credentials) ClientTLS(serverName string) *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS12,
		CipherSuites: suites(),
		NextProtos:   []string{"h2"},
		ServerName:   serverName,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if m := c.Current(); m != nil && m.Leaf != nil {
				return &m.tls, nil
			}
			return new(tls.Certificate), nil
		},
		// The roots may change while this configuration is in use, so the peer is verified
		// below, against those of the moment.
		InsecureSkipVerify: true, //nolint:gosec // VerifyConnection does it
		VerifyConnection: func(state tls.ConnectionState) error {
			m := c.Current()
			if m == nil {
				return model.Errorf(model.Unavailable, "this node has no root certificate")
			}
			err := verifyServer(m.Root, state, serverName)
			if _, unknown := errors.AsType[x509.UnknownAuthorityError](err); unknown && c.Unknown != nil {
				c.Unknown()
			}
			return err
		},
	}
}

func verifyServer(root *pki.Root, state tls.ConnectionState, serverName string) error {
	if len(state.PeerCertificates) == 0 {
		return model.Errorf(model.Denied, "the manager presented no certificate")
	}
	intermediates := x509.NewCertPool()
	for _, cert := range state.PeerCertificates[1:] {
		intermediates.AddCert(cert)
	}
	_, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{
		Roots:         root.Pool(),
		Intermediates: intermediates,
		DNSName:       serverName, // not looked at when empty
		CurrentTime:   time.Now(),
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	return err
}
