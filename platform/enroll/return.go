package enroll

import (
	"context"
	"crypto"
	"crypto/rand"
	"time"

	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/keystore"
	"github.com/skep-dev/skep/platform/wire"
)

// Return gets a certificate for a node whose own has expired from the manager at addr, by
// proof of the old key: TLS with an expired certificate is refused. Denied means that the
// swarm does not take the node back.
func Return(ctx context.Context, creds *wire.Credentials, addr string) (keystore.Identity, error) {
	now := creds.Current()
	old, ok := creds.Certificate().PrivateKey.(crypto.Signer)
	if !ok {
		return keystore.Identity{}, model.Errorf(model.Internal, "the node's key cannot sign")
	}
	nobody := &wire.Credentials{Network: creds.Network}
	nobody.Set(&wire.Material{Root: now.Root})
	conn, err := wire.Dial(nobody, addr, pki.CARole)
	if err != nil {
		return keystore.Identity{}, err
	}
	defer conn.Close() //nolint:errcheck // nothing is lost
	key, err := pki.NewKey(rand.Reader)
	if err != nil {
		return keystore.Identity{}, err
	}
	req := &skepv1.ReturnRequest{Certificate: now.ChainPEM}
	if req.Csr, err = pki.NewCSR(rand.Reader, key); err != nil {
		return keystore.Identity{}, err
	}
	if req.Signature, err = pki.SignReturn(rand.Reader, old, req.GetCsr()); err != nil {
		return keystore.Identity{}, err
	}
	call, cancel := context.WithTimeout(ctx, callTimeout)
	resp, err := skepv1.NewEnrollmentClient(conn).Return(call, req)
	cancel()
	if err != nil {
		return keystore.Identity{}, wire.FromStatus(err)
	}
	chain, err := await(ctx, conn, resp.GetNodeId(), req.GetCsr())
	if err != nil {
		return keystore.Identity{}, err
	}
	if _, err := now.Root.Verify(chain, time.Now()); err != nil {
		return keystore.Identity{}, err
	}
	return keystore.Identity{RootPEM: now.Root.CertPEM, ChainPEM: chain, Key: key}, nil
}
