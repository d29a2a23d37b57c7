package node

import (
	"context"
	"crypto/rand"
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/manager"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/cfssl"
	"github.com/skep-dev/skep/platform/keystore"
	"github.com/skep-dev/skep/platform/wire"
)

// foundingRoot returns the root that a new swarm begins with: the one of the request, the
// one that lies in the certificate directory, or a new one.
func (s *membership) foundingRoot(ca *api.CAConfig) (*pki.Root, error) {
	now := time.Now()
	if cert, key := ca.GetSigningCaCert(), ca.GetSigningCaKey(); len(cert)+len(key) > 0 {
		if len(cert) == 0 {
			return nil, model.Errorf(model.Invalid, "if a signing CA key is provided, the signing CA cert must also be provided")
		}
		return pki.GivenRoot(now, cert, key)
	}
	cert, key, err := s.keys.Brought()
	if err != nil {
		return nil, err
	}
	// Without its key and an external CA a root is of no use; one may be left of a join.
	if cert != nil && (key != nil || len(cfssl.For(ca.GetExternalCas(), cert, cert)) > 0) {
		return pki.GivenRoot(now, cert, key)
	}
	return pki.NewRoot(rand.Reader, now)
}

// found makes the identity of a new swarm's first manager, and what the swarm begins with.
func found(ctx context.Context, spec *api.ClusterSpec, root *pki.Root) (keystore.Identity, *manager.Bootstrap, error) {
	var ids [2]string
	var err error
	for i := range ids {
		if ids[i], err = model.NewID(rand.Reader); err != nil {
			return keystore.Identity{}, nil, err
		}
	}
	key, err := pki.NewKey(rand.Reader)
	if err != nil {
		return keystore.Identity{}, nil, err
	}
	csr, err := pki.NewCSR(rand.Reader, key)
	if err != nil {
		return keystore.Identity{}, nil, err
	}
	chain, err := firstCertificate(ctx, spec.GetCaConfig(), root, csr, pki.Leaf{
		NodeID: ids[0], ClusterID: ids[1], OU: pki.ManagerRole, Expiry: spec.GetCaConfig().GetNodeCertExpiry().AsDuration(),
	})
	if err != nil {
		return keystore.Identity{}, nil, err
	}
	tokens, err := pki.NewTokens(rand.Reader, root.CertPEM, false)
	if err != nil {
		return keystore.Identity{}, nil, err
	}
	boot := &manager.Bootstrap{
		ClusterID: ids[1], Certificate: chain, Spec: spec,
		RootCA: &api.RootCA{
			CaKey: root.KeyPEM, CaCert: root.CertPEM, CaCertHash: pki.CertHash(root.CertPEM), JoinTokens: tokens,
			LastForcedRotation: spec.GetCaConfig().GetForceRotate(),
		},
	}
	if ca := spec.GetCaConfig(); ca != nil {
		ca.SigningCaCert, ca.SigningCaKey = nil, nil // kept as the root only
	}
	if spec.GetEncryptionConfig().GetAutoLockManagers() {
		kek, err := pki.NewKEK(rand.Reader)
		if err != nil {
			return keystore.Identity{}, nil, err
		}
		boot.UnlockKeys = []*api.EncryptionKey{{Subsystem: pki.ManagerRole, Key: kek}}
	}
	return keystore.Identity{RootPEM: root.CertPEM, ChainPEM: chain, Key: key}, boot, nil
}

// firstCertificate has the first manager's certificate signed: with the root's key where it
// is at hand, for an external CA may know no manager yet.
func firstCertificate(ctx context.Context, ca *api.CAConfig, root *pki.Root, csr []byte, leaf pki.Leaf) ([]byte, error) {
	if root.Key != nil {
		return root.Issue(rand.Reader, time.Now(), csr, leaf)
	}
	client := &cfssl.Client{Credentials: new(wire.Credentials)}
	chain, err := client.Sign(ctx, cfssl.For(ca.GetExternalCas(), root.CertPEM, root.CertPEM), root.Certs, csr, leaf)
	if err != nil {
		return nil, err
	}
	return chain, pki.CheckIssued(root, csr, chain, leaf, time.Now())
}
