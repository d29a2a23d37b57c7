// Package ca issues the swarm's certificates: it serves the root bundle, takes requests
// from joining and renewing nodes, and signs them on the leader.
//
// Its state is the replicated state: a request is a field of the node object, and the
// signing loop writes the certificate there. What a certificate looks like is core/pki's.
package ca

import (
	"context"
	"crypto/rand"
	"log/slog"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
	"github.com/skep-dev/skep/platform/cfssl"
	"github.com/skep-dev/skep/platform/wire"
)

// Server implements the CA and NodeCA services on the leader.
type Server struct {
	api.UnimplementedCAServer
	api.UnimplementedNodeCAServer
	skepv1.UnimplementedEnrollmentServer

	state    replica.State
	members  func() []*api.RaftMember
	external *cfssl.Client
	log      *slog.Logger

	joins *limiter
}

// Config is what a Server works with. All fields must be set.
type Config struct {
	State replica.State
	// Members are the managers that take part in raft.
	Members func() []*api.RaftMember
	// External reaches the swarm's external CAs, where it has any.
	External *cfssl.Client
	Log      *slog.Logger
}

// New returns a Server; it issues nothing before Run.
func New(c Config) *Server {
	return &Server{state: c.State, members: c.Members, external: c.External, log: c.Log, joins: newLimiter()}
}

// GetRootCACertificate returns the root bundle that join tokens pin.
func (s *Server) GetRootCACertificate(context.Context, *api.GetRootCACertificateRequest) (*api.GetRootCACertificateResponse, error) {
	cluster := s.state.View().Cluster()
	if cluster == nil {
		return nil, status.Error(codes.Aborted, "CA signer is still starting")
	}
	return &api.GetRootCACertificateResponse{Certificate: cluster.GetRootCa().GetCaCert()}, nil
}

// GetUnlockKey returns the key encryption key of managers, empty if there is none.
func (s *Server) GetUnlockKey(ctx context.Context, _ *api.GetUnlockKeyRequest) (*api.GetUnlockKeyResponse, error) {
	state, err := s.state.Read(ctx)
	if err != nil {
		return nil, err
	}
	cluster := state.Cluster()
	if cluster == nil {
		return nil, status.Error(codes.Aborted, "CA signer is still starting")
	}
	return &api.GetUnlockKeyResponse{Version: cluster.GetMeta().GetVersion(), UnlockKey: pki.ManagersKEK(cluster)}, nil
}

// IssueNodeCertificate records a request: a renewal for the caller's own node if it has a
// valid certificate, else a new node if the join token is right.
func (s *Server) IssueNodeCertificate(ctx context.Context, req *api.IssueNodeCertificateRequest) (*api.IssueNodeCertificateResponse, error) {
	if len(req.GetCsr()) == 0 {
		return nil, status.Error(codes.InvalidArgument, "invalid CSR: empty")
	}
	if _, err := pki.ParseCSR(req.GetCsr()); err != nil {
		return nil, err
	}
	if s.state.View().Cluster() == nil {
		return nil, status.Error(codes.Aborted, "CA signer is still starting")
	}
	caller, _ := wire.Caller(ctx)
	if caller.NodeID != "" && (caller.Is(pki.WorkerRole) || caller.Is(pki.ManagerRole)) {
		return s.renew(ctx, caller, req.GetCsr())
	}
	if err := s.joins.admit(caller.Addr, time.Now()); err != nil {
		return nil, err
	}
	return s.join(ctx, caller, req)
}

// checkManager refuses manager certificates to other engines: who holds one may lead.
func checkManager(role api.NodeRole, caller wire.Identity) error {
	if role != api.NodeRole_MANAGER || caller.Skep {
		return nil
	}
	return model.Errorf(model.Precondition, "a Docker Engine can be a worker of a Skep swarm but not a manager: join it with the token that `docker swarm join-token worker` shows")
}

func (s *Server) renew(ctx context.Context, caller wire.Identity, csr []byte) (*api.IssueNodeCertificateResponse, error) {
	nodeID := caller.NodeID
	resp := &api.IssueNodeCertificateResponse{NodeId: nodeID}
	_, err := s.state.Update(ctx, func(tx *store.Tx) error {
		node := tx.Snapshot().Node(nodeID)
		if node == nil {
			return model.Errorf(model.NotFound, "node %s not found when attempting to renew certificate", nodeID)
		}
		if err := checkManager(node.GetRole(), caller); err != nil {
			return err
		}
		node = model.Clone(node)
		node.Certificate = &api.Certificate{
			Csr: csr, Cn: nodeID, Role: node.GetRole(),
			Status: &api.IssuanceStatus{State: api.IssuanceStatus_RENEW},
		}
		resp.NodeMembership = node.GetSpec().GetMembership()
		return tx.Update(node)
	})
	return resp, err
}

func (s *Server) join(ctx context.Context, caller wire.Identity, req *api.IssueNodeCertificateRequest) (*api.IssueNodeCertificateResponse, error) {
	id, err := model.NewID(rand.Reader)
	if err != nil {
		return nil, err
	}
	_, err = s.state.Update(ctx, func(tx *store.Tx) error {
		cluster := tx.Snapshot().Cluster()
		tokens := cluster.GetRootCa().GetJoinTokens()
		var role api.NodeRole
		switch {
		case pki.SameToken(req.GetToken(), tokens.GetManager()):
			role = api.NodeRole_MANAGER
		case pki.SameToken(req.GetToken(), tokens.GetWorker()):
			role = api.NodeRole_WORKER
		default:
			if role, err = useLimited(tx, req.GetToken()); err != nil {
				return err
			}
		}
		if err := checkManager(role, caller); err != nil {
			return err
		}
		return tx.Create(&api.Node{
			Id: id,
			Spec: &api.NodeSpec{
				Annotations: new(api.Annotations), DesiredRole: role,
				Membership: api.NodeSpec_ACCEPTED, Availability: req.GetAvailability(),
			},
			Status: new(api.NodeStatus),
			Role:   role,
			Certificate: &api.Certificate{
				Csr: req.GetCsr(), Cn: id, Role: role,
				Status: &api.IssuanceStatus{State: api.IssuanceStatus_PENDING},
			},
			VXLANUDPPort: cluster.GetVXLANUDPPort(),
		})
	})
	if err != nil {
		return nil, err
	}
	s.log.Info("node asks to join", slog.String("node_id", id))
	return &api.IssueNodeCertificateResponse{NodeId: id, NodeMembership: api.NodeSpec_ACCEPTED}, nil
}

// useLimited counts one use of a limited token and returns the role that it gives.
func useLimited(tx *store.Tx, token string) (api.NodeRole, error) {
	s := tx.Snapshot()
	r, ok := s.Get(model.Resources, s.IDByName(model.Resources, pki.TokenName(token))).(*api.Resource)
	if token == "" || !ok || r.GetKind() != pki.TokenKind {
		return 0, model.Errorf(model.Invalid, "A valid join token is necessary to join this cluster")
	}
	t, err := pki.Limited(r)
	if err != nil {
		return 0, err
	}
	if why := pki.Void(t, s.Cluster().GetRootCa(), tx.Now()); why != "" {
		return 0, model.Errorf(model.Invalid, "A valid join token is necessary to join this cluster: this one admits nobody any more, %s", why)
	}
	t.Used++
	if r, err = pki.PutLimited(r, t); err != nil {
		return 0, err
	}
	role := api.NodeRole_WORKER
	if t.GetRole() == pki.ManagerRole {
		role = api.NodeRole_MANAGER
	}
	return role, tx.Update(r)
}

// NodeCertificateStatus waits until a node's certificate is issued or has failed, as long
// as the caller's deadline allows.
func (s *Server) NodeCertificateStatus(ctx context.Context, req *api.NodeCertificateStatusRequest) (*api.NodeCertificateStatusResponse, error) {
	if req.GetNodeId() == "" {
		return nil, status.Error(codes.InvalidArgument, "node id must be provided")
	}
	for at := s.state.Follow(); ; {
		node := at.Snapshot().Node(req.GetNodeId())
		if node == nil {
			return nil, status.Errorf(codes.NotFound, "node %s not found", req.GetNodeId())
		}
		switch node.GetCertificate().GetStatus().GetState() {
		case api.IssuanceStatus_ISSUED, api.IssuanceStatus_FAILED, api.IssuanceStatus_ROTATE:
			return &api.NodeCertificateStatusResponse{Status: node.GetCertificate().GetStatus(), Certificate: node.GetCertificate()}, nil
		case api.IssuanceStatus_UNKNOWN, api.IssuanceStatus_RENEW, api.IssuanceStatus_PENDING:
		}
		if _, _, err := at.Next(ctx); err != nil {
			return nil, err
		}
	}
}
