package ca

import (
	"bytes"
	"context"
	"log/slog"
	"slices"
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
	"github.com/skep-dev/skep/platform/wire"
)

// Return takes the request of a node whose certificate has expired. The swarm must still
// know the node, and the certificate must be the last one that it issued for it.
//
// A manager that takes no part in raft, since another one went on alone, returns as a worker
// and is promoted anew: so it gives up its old state, with which it and others like it would
// be a second swarm.
func (s *Server) Return(ctx context.Context, req *skepv1.ReturnRequest) (*skepv1.ReturnResponse, error) {
	caller, _ := wire.Caller(ctx)
	if err := s.joins.admit(caller.Addr, time.Now()); err != nil {
		return nil, err
	}
	if _, err := pki.ParseCSR(req.GetCsr()); err != nil {
		return nil, err
	}
	leaf, err := pki.Returning(req.GetCertificate(), req.GetCsr(), req.GetSignature())
	if err != nil {
		return nil, err
	}
	id := leaf.Subject.CommonName
	refused := model.Errorf(model.Denied, "the certificate of node %q does not let it return: join it again with a token", id)
	lost := !slices.ContainsFunc(s.members(), func(m *api.RaftMember) bool { return m.GetNodeId() == id })
	_, err = s.state.Update(ctx, func(tx *store.Tx) error {
		cluster, node := tx.Snapshot().Cluster(), tx.Snapshot().Node(id)
		if _, removed := cluster.GetBlacklistedCertificates()[id]; removed || node == nil {
			return refused
		}
		last, err := pki.ParseCerts(node.GetCertificate().GetCertificate())
		if err != nil || !bytes.Equal(last[0].Raw, leaf.Raw) {
			return refused
		}
		node = model.Clone(node)
		if lost {
			node.Role = api.NodeRole_WORKER
		}
		node.Certificate = &api.Certificate{
			Csr: req.GetCsr(), Cn: id, Role: node.GetRole(), Certificate: node.GetCertificate().GetCertificate(),
			Status: &api.IssuanceStatus{State: api.IssuanceStatus_RENEW},
		}
		return tx.Update(node)
	})
	if err != nil {
		return nil, err
	}
	s.log.Info("node returns with an expired certificate", slog.String("node_id", id))
	return &skepv1.ReturnResponse{NodeId: id}, nil
}
