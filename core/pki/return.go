package pki

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"io"
	"slices"

	"github.com/skep-dev/skep/core/model"
)

// returnContext keeps the signature of a return apart from all others by the same key.
const returnContext = "skep return\x00"

// SignReturn proves with the key of an expired certificate that csr is its node's request.
func SignReturn(random io.Reader, key crypto.Signer, csr []byte) ([]byte, error) {
	sum := sha256.Sum256(slices.Concat([]byte(returnContext), csr))
	signature, err := key.Sign(random, sum[:], crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("sign request to return: %w", err)
	}
	return signature, nil
}

// Returning returns the certificate of a node that proves with its key that csr is its
// request. Whether the swarm issued the certificate is for the caller to find out.
func Returning(chain, csr, signature []byte) (*x509.Certificate, error) {
	certs, err := ParseCerts(chain)
	if err != nil {
		return nil, err
	}
	if err := certs[0].CheckSignature(x509.ECDSAWithSHA256, slices.Concat([]byte(returnContext), csr), signature); err != nil {
		return nil, model.Wrap(model.Denied, err, "request to return")
	}
	return certs[0], nil
}
