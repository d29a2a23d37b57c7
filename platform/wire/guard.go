package wire

import (
	"context"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/pki"
)

// Guard authorizes every call of a server and forwards to the leader what only it serves.
type Guard struct {
	// Credentials tell the swarm that callers must belong to.
	Credentials *Credentials
	// Removed reports whether a node was removed from the swarm; its certificate is void.
	Removed func(nodeID string) bool
	// Role returns the role that the swarm gives a node, as the organizational unit of
	// certificates, and "" for a node that this manager does not know. A manager's
	// certificate that is older than the node's demotion counts as a worker's. Nil believes
	// certificates.
	Role func(nodeID string) string
	// Conns remembers who is connected; it may be nil.
	Conns *Conns
	// Leading reports whether this manager leads.
	Leading func() bool
	// Leader connects to the leader, or fails with model.ErrNoLeader. The connection is nil
	// when this manager leads by then.
	Leader func(ctx context.Context) (grpc.ClientConnInterface, error)
	// Refused hears of every call that was refused, with what the caller's certificate says;
	// it may be nil.
	Refused func(caller Identity, method string, err error)
	// Local makes every caller this node itself, but for calls that it passes on for others:
	// for a listener that only it can reach.
	Local bool
}

// method is what the guard knows of one method.
type method struct {
	rule       *skepv1.Access
	leaderOnly bool
	// raft is set for the messages of raft's members, who are told apart there: one that was
	// taken out must hear of it, whatever its certificate says.
	raft bool
	desc protoreflect.MethodDescriptor
}

// methods reads the rules of all linked-in methods of our packages, by their full path.
func methods() map[string]method {
	// Services that only the leader executes; other managers pass the calls on.
	leaderServices := []protoreflect.FullName{
		"docker.swarmkit.v1.Control", "docker.swarmkit.v1.Logs",
		"docker.swarmkit.v1.CA", "docker.swarmkit.v1.NodeCA", "docker.swarmkit.v1.Dispatcher",
		"docker.swarmkit.v1.ResourceAllocator", "docker.swarmkit.v1.LogBroker",
		"docker.swarmkit.v1.RaftMembership", "skep.v1.Insight", "skep.v1.Networks", "skep.v1.Tokens", "skep.v1.Enrollment", "skep.v1.Secrets",
		"skep.v1.Unlock",
	}
	raftMethods := []protoreflect.FullName{"docker.swarmkit.v1.Raft.ProcessRaftMessage", "docker.swarmkit.v1.Raft.StreamRaftMessage"}
	out := make(map[string]method)
	protoregistry.GlobalFiles.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		if f.Package() != api.File_docker_swarmkit_v1_types_proto.Package() && f.Package() != skepv1.File_skep_v1_access_proto.Package() {
			return true
		}
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			for j := range s.Methods().Len() {
				m := s.Methods().Get(j)
				rule, _ := proto.GetExtension(m.Options(), skepv1.E_Access).(*skepv1.Access)
				out["/"+string(s.FullName())+"/"+string(m.Name())] = method{
					rule: rule, leaderOnly: slices.Contains(leaderServices, s.FullName()), desc: m,
					raft: slices.Contains(raftMethods, m.FullName()),
				}
			}
		}
		return true
	})
	return out
}

// now returns who a certificate makes somebody by now.
func (g *Guard) now(id Identity) Identity {
	if g.Role != nil && id.Is(pki.ManagerRole) && g.Role(id.NodeID) == pki.WorkerRole {
		id.OUs = []string{pki.WorkerRole}
	}
	return id
}

func denied(format string, args ...any) error {
	return status.Errorf(codes.PermissionDenied, "Permission denied: "+format, args...)
}

// authorize decides about one call and returns the caller.
func (g *Guard) authorize(ctx context.Context, m method, known bool) (Identity, error) {
	if !known || m.rule == nil || (len(m.rule.GetRoles()) == 0 && !m.rule.GetAnyone()) {
		return Identity{}, denied("the method declares no access rule")
	}
	clusterID := g.Credentials.ClusterID()
	direct := peerIdentity(ctx)
	if g.Local {
		direct = Identity{NodeID: g.Credentials.NodeID(), ClusterID: clusterID, OUs: []string{g.Credentials.Role()}, Addr: "@", Skep: true}
	}
	caller, forwarded := forwardedIdentity(ctx, direct)
	if g.Local && !forwarded {
		// A call that this manager passes on to itself, having become the leader meanwhile,
		// stays its caller's: else a worker would be taken for this manager.
		return direct, nil
	}
	if forwarded {
		if !authorizeForwarder(g.now(direct), clusterID) {
			return Identity{}, denied("unauthorized forwarder")
		}
		if g.Removed(direct.NodeID) {
			return Identity{}, denied("node %s was removed from swarm", direct.NodeID)
		}
	} else {
		caller = direct
	}
	if (!m.leaderOnly || g.Leading()) && !m.raft {
		caller = g.now(caller) // else the leader, who knows best, decides
	}
	if m.rule.GetAnyone() {
		// Whoever has a certificate is still known by it, unless it is void.
		if caller.ClusterID != clusterID || g.Removed(caller.NodeID) {
			caller = Identity{Addr: caller.Addr, Forwarder: caller.Forwarder, Skep: caller.Skep}
		}
		return caller, nil
	}
	switch {
	case caller.NodeID == "" || caller.ClusterID == "" || len(caller.OUs) == 0:
		return Identity{}, denied("unauthorized peer role: rpc caller has no certificate")
	case caller.ClusterID != clusterID:
		return Identity{}, denied("unauthorized peer organization: %s", caller.ClusterID)
	case !slices.ContainsFunc(m.rule.GetRoles(), caller.Is):
		return Identity{}, denied("unauthorized peer role: %s", strings.Join(caller.OUs, ", "))
	case g.Removed(caller.NodeID):
		return Identity{}, denied("node %s was removed from swarm", caller.NodeID)
	}
	return caller, nil
}

// targets returns the function that says where a call goes now: to the leader, or nil when
// it is served here.
func (g *Guard) targets(ctx context.Context, m method, caller Identity) func(context.Context) (grpc.ClientConnInterface, error) {
	return func(wait context.Context) (grpc.ClientConnInterface, error) {
		if !m.leaderOnly || g.Leading() {
			return nil, nil //nolint:nilnil // nil is the answer "here"
		}
		md, _ := metadata.FromIncomingContext(ctx)
		if caller.Forwarder != "" || len(md.Get(keyRedirect)) > 0 {
			return nil, status.Errorf(codes.ResourceExhausted, redirected+"%v", md.Get(keyRedirect))
		}
		return g.Leader(wait)
	}
}

// admit authorizes a call and tells who was refused.
func (g *Guard) admit(ctx context.Context, name string, m method, known bool) (Identity, error) {
	caller, err := g.authorize(ctx, m, known)
	if err != nil && g.Refused != nil {
		g.Refused(peerIdentity(ctx), name, err)
	}
	return caller, err
}

// ServerOptions returns the interceptors that every server of a manager must have.
func (g *Guard) ServerOptions() []grpc.ServerOption {
	table := methods()
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			m, known := table[info.FullMethod]
			caller, err := g.admit(ctx, info.FullMethod, m, known)
			if err != nil {
				return nil, err
			}
			var resp any
			err = callLeader(ctx, g.targets(ctx, m, caller), func(conn grpc.ClientConnInterface) (unsent bool, err error) {
				if conn == nil {
					resp, err = handler(WithIdentity(ctx, caller), req)
					err = ToStatus(err)
					return unread(err), err
				}
				resp, unsent, err = forwardUnary(forwardContext(ctx, caller), conn, info.FullMethod, m, req)
				return unsent, err
			})
			return resp, err
		}),
		grpc.ChainStreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
			m, known := table[info.FullMethod]
			caller, err := g.admit(stream.Context(), info.FullMethod, m, known)
			if err != nil {
				return err
			}
			ctx := stream.Context()
			return callLeader(ctx, g.targets(ctx, m, caller), func(conn grpc.ClientConnInterface) (unsent bool, err error) {
				if conn == nil {
					return false, ToStatus(handler(srv, &identified{ServerStream: stream, ctx: WithIdentity(ctx, caller)}))
				}
				return forwardStream(forwardContext(ctx, caller), conn, info, m, stream)
			})
		}),
	}
}

// identified is a stream whose context knows the caller.
type identified struct {
	grpc.ServerStream

	ctx context.Context //nolint:containedctx // grpc's way to replace a stream's context
}

// Context returns the context with the caller's identity.
func (s *identified) Context() context.Context { return s.ctx }
