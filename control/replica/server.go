package replica

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
)

const (
	// joinTimeout bounds a join but for the time of an election.
	joinTimeout = 5 * time.Second
	// voteCheckTimeout bounds the check that a candidate can be reached.
	voteCheckTimeout = 2 * time.Second
	// maxSnapshot bounds a snapshot received, in bytes.
	maxSnapshot = 2 << 30
)

type raftServer struct {
	api.UnimplementedRaftServer
	r *Replica
}

// RaftServer returns the service that other members send their messages to. It answers
// from the time that Run has started raft.
func (r *Replica) RaftServer() api.RaftServer { return raftServer{r: r} }

// ProcessRaftMessage takes one message.
func (s raftServer) ProcessRaftMessage(
	ctx context.Context, req *api.ProcessRaftMessageRequest,
) (*api.ProcessRaftMessageResponse, error) {
	return &api.ProcessRaftMessageResponse{}, s.r.receive(ctx, req.GetMessage())
}

// StreamRaftMessage takes one message, a snapshot possibly in several parts.
func (s raftServer) StreamRaftMessage(
	stream grpc.ClientStreamingServer[api.StreamRaftMessageRequest, api.StreamRaftMessageResponse],
) error {
	var whole *raftpb.Message
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if whole, err = join(whole, req.GetMessage()); err != nil {
			return err
		}
	}
	if err := s.r.receive(stream.Context(), whole); err != nil {
		return err
	}
	return stream.SendAndClose(&api.StreamRaftMessageResponse{})
}

// join puts the next part of a message to those before it.
func join(whole, part *raftpb.Message) (*raftpb.Message, error) {
	switch {
	case whole == nil:
		return part, nil
	case part.GetType() != raftpb.MsgSnap || whole.GetType() != raftpb.MsgSnap:
		return nil, status.Error(codes.InvalidArgument, "only a snapshot may come in several messages")
	case part.GetIndex() != whole.GetIndex():
		return nil, status.Error(codes.InvalidArgument, "parts of different snapshots in one stream")
	case len(whole.GetSnapshot().GetData())+len(part.GetSnapshot().GetData()) > maxSnapshot:
		return nil, status.Error(codes.ResourceExhausted, "snapshot is too large")
	}
	if whole.Snapshot == nil {
		whole.Snapshot = new(raftpb.Snapshot)
	}
	whole.Snapshot.Data = append(whole.Snapshot.Data, part.GetSnapshot().GetData()...)
	return whole, nil
}

// receive hands a message to the owner. It blocks while too many wait.
func (r *Replica) receive(ctx context.Context, msg *raftpb.Message) error {
	select {
	case <-r.ready:
	default:
		return status.Error(codes.Unavailable, "raft is not running yet")
	}
	if msg == nil || msg.Type == nil && msg.From == nil {
		return nil
	}
	ros := r.members.Load()
	if ros.removed[msg.GetFrom()] {
		return status.Error(codes.NotFound, ErrRemoved.Error())
	}
	if err := r.checkSender(ctx, ros, msg.GetFrom()); err != nil {
		return err
	}
	if msg.GetTo() != ros.self || inProcess(msg.GetType()) {
		return nil
	}
	if err := r.learn(ctx, ros, msg.GetFrom()); err != nil {
		return err
	}
	if msg.GetType() == raftpb.MsgVote && !r.reachable(ctx, msg.GetFrom()) {
		return nil
	}
	select {
	case r.inbox <- msg:
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	case <-r.stopped:
		return status.Error(codes.Unavailable, errStopped.Error())
	}
}

// inProcess reports whether a message is only what a leader tells itself: it is asked by RPC to
// write and to read.
func inProcess(t raftpb.MessageType) bool {
	return t == raftpb.MsgProp || t == raftpb.MsgReadIndex || t == raftpb.MsgReadIndexResp
}

// checkSender refuses messages that come from another node than the member's: else a
// certificate that was a manager's once could speak for those that still are.
func (r *Replica) checkSender(ctx context.Context, ros *roster, from uint64) error {
	caller, _, err := r.cfg.Caller(ctx)
	if err != nil {
		return err
	}
	sender := ros.members[from]
	switch {
	case sender != nil && sender.GetNodeId() != caller:
		return status.Errorf(codes.PermissionDenied, "Permission denied: node %s speaks for raft member %x of node %s", caller, from, sender.GetNodeId())
	case sender == nil:
		// It may have joined a moment ago. A node that is known to be a worker has not, unless
		// it was promoted since.
		if node := r.View().Node(caller); node != nil && node.GetRole() == api.NodeRole_WORKER && !r.certifiedSince(ctx, node) {
			return status.Errorf(codes.PermissionDenied, "Permission denied: node %s is not a manager", caller)
		}
	}
	return nil
}

// certifiedSince reports whether the caller shows a newer certificate than the one that the
// state has of its node: what the state says is old then, and the certificate, which says
// that the node is a manager, is right. That of a node that was demoted is in the state, or
// older than what is: of two that begin in one minute, as they are dated, neither is newer.
func (r *Replica) certifiedSince(ctx context.Context, node *api.Node) bool {
	if r.cfg.CallerCertificate == nil {
		return false
	}
	shown := r.cfg.CallerCertificate(ctx)
	known, err := pki.ParseCerts(node.GetCertificate().GetCertificate())
	return err == nil && shown != nil && shown.NotBefore.After(known[0].NotBefore)
}

// keyAddr is where a member says in its calls that it can be reached.
const keyAddr = "skep-raft-addr"

// learn makes the address of a sender known that is in no log of ours yet: those who know it
// may be away.
func (r *Replica) learn(ctx context.Context, ros *roster, from uint64) error {
	md, _ := metadata.FromIncomingContext(ctx)
	addr := md.Get(keyAddr)
	if len(addr) != 1 || ros.members[from] != nil || r.peers.get(from) != nil {
		return nil
	}
	return r.call(ctx, func(m *member) { m.r.peers.addUnknown(from, addr[0]) })
}

// reachable reports whether a candidate can be reached at its address: as leader it must
// be.
func (r *Replica) reachable(ctx context.Context, id uint64) bool {
	if r.peers.active(id) {
		return true
	}
	addr := r.members.Load().members[id].GetAddr()
	if p := r.peers.get(id); addr == "" && p != nil {
		addr = p.addr
	}
	return addr != "" && r.checkHealth(ctx, addr, voteCheckTimeout) == nil
}

// checkHealth asks the manager at addr whether it serves raft.
func (r *Replica) checkHealth(ctx context.Context, addr string, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	conn, err := r.cfg.Dial(ctx, addr)
	if err != nil {
		return fmt.Errorf("check health of %s: %w", addr, err)
	}
	defer conn.Close() //nolint:errcheck // nothing is lost
	res, err := api.NewHealthClient(conn).Check(ctx, &api.HealthCheckRequest{Service: HealthRaft}, grpc.WaitForReady(true))
	if err != nil {
		return fmt.Errorf("check health of %s: %w", addr, err)
	}
	if res.GetStatus() != api.HealthCheckResponse_SERVING {
		return fmt.Errorf("check health of %s: not serving", addr)
	}
	return nil
}

// ResolveAddress returns the address of a member.
func (s raftServer) ResolveAddress(
	_ context.Context, req *api.ResolveAddressRequest,
) (*api.ResolveAddressResponse, error) {
	m := s.r.members.Load().members[req.GetRaftId()]
	if m == nil {
		return nil, status.Errorf(codes.NotFound, "member %x not found", req.GetRaftId())
	}
	return &api.ResolveAddressResponse{Addr: m.GetAddr()}, nil
}

type membershipServer struct {
	api.UnimplementedRaftMembershipServer
	r *Replica
}

// MembershipServer returns the service by which managers join and leave. Only the leader
// serves it; forwarding to the leader is for others.
func (r *Replica) MembershipServer() api.RaftMembershipServer { return membershipServer{r: r} }

// Join makes the caller a member after checking that it can be reached.
func (s membershipServer) Join(ctx context.Context, req *api.JoinRequest) (*api.JoinResponse, error) {
	r := s.r
	if leading, _ := r.Leading(); !leading {
		return nil, status.Error(codes.FailedPrecondition, "raft: this manager is not the leader")
	}
	nodeID, from, err := r.cfg.Caller(ctx)
	if err != nil {
		return nil, err
	}
	addr, err := completeAddr(req.GetAddr(), from)
	if err != nil {
		return nil, err
	}
	if err := r.checkHealth(ctx, addr, joinTimeout); err != nil {
		return nil, model.Wrap(model.Unavailable, err, "join raft: the manager cannot be reached at its address")
	}
	id, err := r.AddMember(ctx, nodeID, addr)
	if err != nil {
		return nil, err
	}
	res := &api.JoinResponse{RaftId: id}
	ros := r.members.Load()
	for _, other := range ros.ids() {
		res.Members = append(res.Members, proto.CloneOf(ros.members[other]))
	}
	return res, nil
}

// completeAddr replaces an unspecified address by that of the caller.
func completeAddr(addr, from string) (string, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", status.Errorf(codes.InvalidArgument, "invalid address %q in raft join request", addr)
	}
	if ip, err := netip.ParseAddr(host); host != "" && (err != nil || !ip.IsUnspecified()) {
		return addr, nil //nolint:nilerr // a host name
	}
	if caller, _, err := net.SplitHostPort(from); err == nil {
		from = caller
	}
	if from == "" {
		return "", status.Error(codes.InvalidArgument, "raft join request without address")
	}
	return net.JoinHostPort(from, port), nil
}

// Leave removes a member.
func (s membershipServer) Leave(ctx context.Context, req *api.LeaveRequest) (*api.LeaveResponse, error) {
	if leading, _ := s.r.Leading(); !leading {
		return nil, status.Error(codes.FailedPrecondition, "raft: this manager is not the leader")
	}
	if err := s.r.RemoveMember(ctx, req.GetNode().GetRaftId()); err != nil {
		return nil, err
	}
	return &api.LeaveResponse{}, nil
}
