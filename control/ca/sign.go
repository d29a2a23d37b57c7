package ca

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
	"github.com/skep-dev/skep/platform/cfssl"
)

const (
	// signRetry is how long to wait after a failure that may pass.
	signRetry = 2 * time.Second
	// signBatch is how many certificates are issued with one write.
	signBatch = 64
	// signParallel is how many certificates are asked of an external CA at one time.
	signParallel = 16
)

// Run issues certificates and rotates the root, for one term of leadership, until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return s.runSigning(ctx) })
	group.Go(func() error { return s.runRotation(ctx) })
	return group.Wait()
}

// runSigning signs requests as they appear.
func (s *Server) runSigning(ctx context.Context) error {
	at := s.state.Follow()
	due := map[string]bool{}
	all := func() {
		for node := range at.Snapshot().Nodes() {
			if wanted(node) {
				due[node.GetId()] = true
			}
		}
	}
	for all(); ; {
		again := false
		for batch := range slices.Chunk(slices.Sorted(maps.Keys(due)), signBatch) {
			done, err := s.sign(ctx, batch)
			for _, id := range done {
				delete(due, id)
			}
			if err != nil {
				s.log.Warn("certificates not signed, trying again", slog.Any("error", err), slog.Int("waiting", len(due)))
				again = true
				break
			}
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
				all()
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

// issued is the outcome of one request.
type issued struct {
	request *api.Certificate
	chain   []byte
	err     error // final, if set
}

// sign issues the certificates of some nodes and writes them. It returns the nodes that
// need nothing more, and an error if others are to be tried again.
func (s *Server) sign(ctx context.Context, ids []string) (done []string, err error) {
	view := s.state.View()
	cluster := view.Cluster()
	if cluster == nil {
		return ids, nil
	}
	out := make([]*issued, len(ids))
	signer, signerErr := pki.Signer(cluster.GetRootCa())
	var (
		group   errgroup.Group
		mu      sync.Mutex
		passing error
	)
	group.SetLimit(signParallel)
	for i, id := range ids {
		node := view.Node(id)
		if node == nil || !wanted(node) {
			done = append(done, id)
			continue
		}
		one := &issued{request: node.GetCertificate(), err: signerErr}
		out[i] = one
		if signerErr != nil {
			continue
		}
		group.Go(func() error {
			var err error
			one.chain, err = s.issue(ctx, cluster, signer, one.request)
			if model.KindOf(err) == model.Unavailable {
				mu.Lock()
				out[i], passing = nil, fmt.Errorf("node %s: %w", id, err)
				mu.Unlock()
				return nil
			}
			one.err = err
			return nil
		})
	}
	_ = group.Wait() // its functions return no error
	_, err = s.state.Update(ctx, func(tx *store.Tx) error {
		if !proto.Equal(tx.Snapshot().Cluster().GetRootCa(), cluster.GetRootCa()) {
			return model.Errorf(model.Unavailable, "the root certificate has changed")
		}
		for i, id := range ids {
			if err := record(tx, id, out[i]); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return done, err
	}
	for i, id := range ids {
		if out[i] != nil {
			done = append(done, id)
		}
	}
	return done, passing
}

// issue signs one request: by an external CA if there is one for the root in force, else
// by the root's own key.
func (s *Server) issue(ctx context.Context, cluster *api.Cluster, root *pki.Root, request *api.Certificate) ([]byte, error) {
	leaf := pki.Leaf{
		NodeID: request.GetCn(), ClusterID: cluster.GetId(), OU: pki.RoleOU(request.GetRole()),
		Expiry: cluster.GetSpec().GetCaConfig().GetNodeCertExpiry().AsDuration(),
	}
	present := cluster.GetRootCa().GetCaCert()
	outside := cfssl.For(cluster.GetSpec().GetCaConfig().GetExternalCas(), present, root.CertPEM)
	if len(outside) == 0 {
		return root.Issue(rand.Reader, time.Now(), request.GetCsr(), leaf)
	}
	roots, err := pki.ParseCerts(slices.Concat(present, root.CertPEM))
	if err != nil {
		return nil, err
	}
	cert, err := s.external.Sign(ctx, outside, roots, request.GetCsr(), leaf)
	if err != nil {
		return nil, err
	}
	chain := slices.Concat(cert, root.Intermediates)
	if err := pki.CheckIssued(root, request.GetCsr(), chain, leaf, time.Now()); err != nil {
		return nil, fmt.Errorf("the external CA signed something else: %w", err)
	}
	return chain, nil
}

// record writes the outcome of a request to its node.
func record(tx *store.Tx, nodeID string, one *issued) error {
	node := tx.Snapshot().Node(nodeID)
	if one == nil || node == nil || string(node.GetCertificate().GetCsr()) != string(one.request.GetCsr()) {
		return nil // removed, or asked again
	}
	node = model.Clone(node)
	node.Certificate.Status = &api.IssuanceStatus{State: api.IssuanceStatus_ISSUED}
	node.Certificate.Certificate = one.chain
	if one.err != nil {
		node.Certificate.Status = &api.IssuanceStatus{State: api.IssuanceStatus_FAILED, Err: one.err.Error()}
	}
	return tx.Update(node)
}
