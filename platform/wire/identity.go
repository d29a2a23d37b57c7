package wire

import (
	"context"
	"crypto/x509"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/core/pki"
)

// Metadata keys by which a manager passes on whose call it forwards. All are sent even for
// callers without a certificate: else the leader would take the forwarder for the caller.
const (
	keyForwarded = "forwarded_cert"
	keyCN        = "forwarded_cert_cn"
	keyOrg       = "forwarded_cert_org"
	keyOU        = "forwarded_cert_ou"
	keyAddr      = "remote_addr"
	keyRedirect  = "redirect"
	// keySkep is in every unary call of a Skep node. It admits to nothing that is a secret:
	// by it managers refuse what another engine cannot do before it tries.
	keySkep = "skep-node"
)

// markSkep says in a call of this node that it is a Skep node. What a manager passes on for
// others says what they said.
func markSkep(ctx context.Context, name string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	if md, _ := metadata.FromOutgoingContext(ctx); len(md.Get(keyForwarded)) == 0 {
		ctx = metadata.AppendToOutgoingContext(ctx, keySkep, "true")
	}
	return invoke(ctx, name, req, reply, conn, opts...)
}

func saysSkep(ctx context.Context) bool {
	md, _ := metadata.FromIncomingContext(ctx)
	return len(md.Get(keySkep)) > 0
}

// Identity is who makes a call. The zero value is a caller without a certificate.
type Identity struct {
	NodeID    string
	ClusterID string
	// OUs are the organizational units of the certificate, one of them the role.
	OUs []string
	// Addr is the caller's ip:port.
	Addr string
	// Forwarder is the manager that forwarded the call, or "".
	Forwarder string
	// Skep is set when the caller says that it is a Skep node. Docker Engine does not.
	Skep bool
}

// Anonymous reports whether the caller presented no certificate.
func (i Identity) Anonymous() bool { return i.NodeID == "" && len(i.OUs) == 0 }

// Is reports whether the caller has a role.
func (i Identity) Is(role string) bool { return slices.Contains(i.OUs, role) }

type identityKey struct{}

// WithIdentity returns a context in which Caller finds an identity.
func WithIdentity(ctx context.Context, id Identity) context.Context {
	return context.WithValue(ctx, identityKey{}, id)
}

// Caller returns who makes the call that ctx belongs to, after authorization.
func Caller(ctx context.Context) (Identity, bool) {
	id, ok := ctx.Value(identityKey{}).(Identity)
	return id, ok
}

// CallerNode is Caller in the form that services take: the node and its address.
func CallerNode(ctx context.Context) (nodeID, addr string, err error) {
	id, ok := Caller(ctx)
	if !ok || id.NodeID == "" {
		return "", "", status.Error(codes.PermissionDenied, "Permission denied: unauthorized peer role: rpc caller has no certificate")
	}
	return id.NodeID, id.Addr, nil
}

// peerIdentity reads the direct peer of a connection.
func peerIdentity(ctx context.Context) Identity {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Identity{Skep: saysSkep(ctx)}
	}
	id := certified(p.AuthInfo)
	id.Skep = saysSkep(ctx)
	if p.Addr != nil {
		id.Addr = p.Addr.String()
	}
	return id
}

// CallerCertificate returns the certificate that the peer of a call shows, nil without one.
func CallerCertificate(ctx context.Context) *x509.Certificate {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.VerifiedChains) == 0 {
		return nil
	}
	return info.State.VerifiedChains[0][0]
}

// certified reads the certificate that the peer of a connection showed.
func certified(auth credentials.AuthInfo) (id Identity) {
	info, ok := auth.(credentials.TLSInfo)
	if !ok || len(info.State.VerifiedChains) == 0 {
		return id
	}
	subject := info.State.VerifiedChains[0][0].Subject
	id.NodeID, id.OUs = subject.CommonName, subject.OrganizationalUnit
	if len(subject.Organization) > 0 {
		id.ClusterID = subject.Organization[0]
	}
	return id
}

// forwardedIdentity reads the caller that a manager speaks for. ok is false when the call
// was not forwarded.
func forwardedIdentity(ctx context.Context, forwarder Identity) (id Identity, ok bool) {
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get(keyForwarded); len(v) != 1 || v[0] != "true" {
		return Identity{}, false
	}
	first := func(key string) string {
		if v := md.Get(key); len(v) > 0 {
			return v[0]
		}
		return ""
	}
	return Identity{
		NodeID: first(keyCN), ClusterID: first(keyOrg), OUs: md.Get(keyOU),
		Addr: first(keyAddr), Forwarder: forwarder.NodeID, Skep: saysSkep(ctx),
	}, true
}

// forwardContext returns a context for the call to the leader that carries the caller's
// metadata and identity.
func forwardContext(ctx context.Context, caller Identity) context.Context {
	md, _ := metadata.FromIncomingContext(ctx)
	md = md.Copy()
	for _, key := range []string{keyForwarded, keyCN, keyOrg, keyOU, keyAddr, keyRedirect} {
		md.Delete(key)
	}
	md.Set(keyForwarded, "true")
	md.Set(keyCN, caller.NodeID)
	md.Set(keyOrg, caller.ClusterID)
	if len(caller.OUs) > 0 {
		md.Set(keyOU, caller.OUs...)
	}
	md.Set(keyAddr, caller.Addr)
	md.Set(keyRedirect, caller.Addr)
	return metadata.NewOutgoingContext(ctx, md)
}

// authorizeForwarder checks that the direct peer may speak for others.
func authorizeForwarder(forwarder Identity, clusterID string) bool {
	return forwarder.Is(pki.ManagerRole) && forwarder.ClusterID == clusterID
}
