package ca

import (
	"context"
	"crypto/rand"
	"log/slog"
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
)

// signRetry is how long to wait after a failure that may pass.
const signRetry = 2 * time.Second

// Run signs requests as they appear, for one term of leadership, until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	at := s.state.Follow()
	due := map[string]bool{}
	for node := range at.Snapshot().Nodes() {
		due[node.GetId()] = wanted(node)
	}
	for {
		again := false
		for id, want := range due {
			if !want {
				delete(due, id)
				continue
			}
			err := s.sign(ctx, id)
			if err != nil {
				s.log.Warn("certificate not signed, trying again", slog.String("node_id", id), slog.Any("error", err))
				again = true
				continue
			}
			delete(due, id)
		}
		if ctx.Err() != nil {
			return nil //nolint:nilerr // the term has ended
		}
		var retry <-chan time.Time
		if again {
			retry = time.After(signRetry)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-retry:
		case <-at.Changed():
			events, reset := at.Drain()
			if reset {
				for node := range at.Snapshot().Nodes() {
					due[node.GetId()] = wanted(node)
				}
			}
			for _, e := range events {
				if node, ok := e.New.(*api.Node); ok && wanted(node) {
					due[node.GetId()] = true
				}
			}
		}
	}
}

// wanted reports whether a node waits for a certificate.
func wanted(node *api.Node) bool {
	switch node.GetCertificate().GetStatus().GetState() {
	case api.IssuanceStatus_RENEW:
		return true
	case api.IssuanceStatus_PENDING:
		return node.GetSpec().GetMembership() == api.NodeSpec_ACCEPTED
	case api.IssuanceStatus_UNKNOWN, api.IssuanceStatus_ISSUED, api.IssuanceStatus_FAILED, api.IssuanceStatus_ROTATE:
		return false
	default:
		return false
	}
}

// sign issues one certificate and writes it to the node.
func (s *Server) sign(ctx context.Context, nodeID string) error {
	view := s.state.View()
	node, cluster := view.Node(nodeID), view.Cluster()
	if node == nil || cluster == nil || !wanted(node) {
		return nil
	}
	request := node.GetCertificate()
	root, err := signer(cluster)
	var chain []byte
	if err == nil {
		chain, err = root.Issue(rand.Reader, time.Now(), request.GetCsr(), pki.Leaf{
			NodeID: request.GetCn(), ClusterID: cluster.GetId(), OU: pki.RoleOU(request.GetRole()),
			Expiry: cluster.GetSpec().GetCaConfig().GetNodeCertExpiry().AsDuration(),
		})
	}
	_, updateErr := s.state.Update(ctx, func(tx *store.Tx) error {
		node := tx.Snapshot().Node(nodeID)
		if node == nil || string(node.GetCertificate().GetCsr()) != string(request.GetCsr()) {
			return nil // removed, or asked again
		}
		node = model.Clone(node)
		node.Certificate.Status = &api.IssuanceStatus{State: api.IssuanceStatus_ISSUED}
		node.Certificate.Certificate = chain
		if err != nil {
			node.Certificate.Status = &api.IssuanceStatus{State: api.IssuanceStatus_FAILED, Err: err.Error()}
		}
		return tx.Update(node)
	})
	return updateErr
}

// signer returns the authority that signs now. During a rotation of the root that is the
// new one, with the certificate that the old one gave it as an intermediate.
func signer(cluster *api.Cluster) (*pki.Root, error) {
	ca := cluster.GetRootCa()
	if rotation := ca.GetRootRotation(); rotation != nil {
		root, err := pki.ParseRoot(rotation.GetCaCert(), rotation.GetCaKey())
		if err != nil {
			return nil, err
		}
		root.Intermediates = rotation.GetCrossSignedCaCert()
		return root, nil
	}
	return pki.ParseRoot(ca.GetCaCert(), ca.GetCaKey())
}
