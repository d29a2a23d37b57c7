package wire

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"maps"
	"net"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/pki"
)

func testGuard() *Guard {
	creds := new(Credentials)
	creds.Set(&Material{Leaf: &x509.Certificate{Subject: pkix.Name{CommonName: "self", Organization: []string{"swarm"}, OrganizationalUnit: []string{pki.ManagerRole}}}})
	return &Guard{
		Credentials: creds,
		Removed:     func(nodeID string) bool { return nodeID == "removed" },
		Leading:     func() bool { return true },
	}
}

// callerWith is the context of a call over TLS; no role means no certificate.
func callerWith(ctx context.Context, node, swarm, role string) context.Context {
	info := credentials.TLSInfo{State: tls.ConnectionState{}}
	if role != "" {
		leaf := &x509.Certificate{Subject: pkix.Name{CommonName: node, Organization: []string{swarm}, OrganizationalUnit: []string{role}}}
		info.State.PeerCertificates = []*x509.Certificate{leaf}
		info.State.VerifiedChains = [][]*x509.Certificate{{leaf}}
	}
	return peer.NewContext(ctx, &peer.Peer{Addr: &net.TCPAddr{IP: net.IPv4(10, 0, 0, 9), Port: 9}, AuthInfo: info})
}

// TestAccess walks the descriptors: each method is open to the roles that it declares, in
// this swarm, and to nobody else.
func TestAccess(t *testing.T) {
	guard, table := testGuard(), methods()
	if len(table) < 65 {
		t.Errorf("the guard knows %d methods, SwarmKit alone has 65", len(table))
	}
	for _, name := range slices.Sorted(maps.Keys(table)) {
		m := table[name]
		for _, role := range []string{pki.ManagerRole, pki.WorkerRole, pki.CARole, ""} {
			want := m.rule.GetAnyone() || slices.Contains(m.rule.GetRoles(), role)
			caller, err := guard.authorize(callerWith(t.Context(), "node", "swarm", role), m, true)
			if (err == nil) != want || err != nil && status.Code(err) != codes.PermissionDenied {
				t.Errorf("%s by %q: %v", name, role, err)
			}
			if err == nil && role != "" && (caller.NodeID != "node" || !caller.Is(role)) {
				t.Errorf("%s by %q: taken for %+v", name, role, caller)
			}
		}
		for _, c := range []struct{ node, swarm string }{{"node", "other"}, {"removed", "swarm"}, {"", "swarm"}} {
			caller, err := guard.authorize(callerWith(t.Context(), c.node, c.swarm, pki.ManagerRole), m, true)
			if m.rule.GetAnyone() {
				if c.node != "" && (err != nil || !caller.Anonymous()) {
					t.Errorf("%s by %+v: taken for %+v, %v", name, c, caller, err)
				}
			} else if status.Code(err) != codes.PermissionDenied {
				t.Errorf("%s by %+v: %v", name, c, err)
			}
		}
	}
}

// TestSecurityTable holds the table of docs/security.md: it has every method, with the roles
// that its .proto declares.
func TestSecurityTable(t *testing.T) {
	doc, err := os.ReadFile("../../docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	told := map[string]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| `(/[^`]+)` \\| ([a-z, ]+) \\| (.+) \\|$").FindAllStringSubmatch(string(doc), -1) {
		told[row[1]] = row[2]
		if open := strings.Contains(row[2], "worker") || row[2] == "anyone"; open == (row[3] == "nothing") {
			t.Errorf("%s is open to %s, and a worker's certificate reaches %s", row[1], row[2], row[3])
		}
	}
	used := map[string]bool{}
	for name, m := range methods() {
		row := name
		if _, ok := told[row]; !ok {
			row = name[:strings.LastIndex(name, "/")] + "/*"
		}
		used[row] = true
		var roles []string
		for _, role := range []string{pki.WorkerRole, pki.ManagerRole, pki.CARole} {
			if slices.Contains(m.rule.GetRoles(), role) {
				roles = append(roles, strings.TrimPrefix(role, "swarm-"))
			}
		}
		want := strings.Join(roles, ", ")
		if m.rule.GetAnyone() {
			want = "anyone"
		}
		if told[row] != want {
			t.Errorf("docs/security.md has %q for %s, its .proto %q", told[row], name, want)
		}
	}
	for row := range told {
		if !used[row] {
			t.Errorf("docs/security.md has %s, which is no method", row)
		}
	}
}

// TestUndeclared refuses methods without a rule to everybody, the node itself included.
func TestUndeclared(t *testing.T) {
	for name, c := range map[string]struct {
		m     method
		known bool
	}{
		"unknown":    {method{}, false},
		"no rule":    {method{}, true},
		"empty rule": {method{rule: new(skepv1.Access)}, true},
	} {
		for _, local := range []bool{false, true} {
			guard := testGuard()
			guard.Local = local
			if _, err := guard.authorize(callerWith(t.Context(), "node", "swarm", pki.ManagerRole), c.m, c.known); status.Code(err) != codes.PermissionDenied {
				t.Errorf("%s, local %v: %v", name, local, err)
			}
		}
	}
}

// TestUndeclaredOverTheWire calls a service that the swarm's packages do not declare.
func TestUndeclaredOverTheWire(t *testing.T) {
	local, err := NewLocal(testGuard())
	if err != nil {
		t.Fatal(err)
	}
	called := false
	local.Server.RegisterService(&grpc.ServiceDesc{
		ServiceName: "foreign.Service", HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{MethodName: "Call", Handler: func(_ any, ctx context.Context, dec func(any) error, through grpc.UnaryServerInterceptor) (any, error) {
			in := new(skepv1.Access)
			if err := dec(in); err != nil {
				return nil, err
			}
			return through(ctx, in, &grpc.UnaryServerInfo{FullMethod: "/foreign.Service/Call"}, func(context.Context, any) (any, error) {
				called = true
				return in, nil
			})
		}}},
		Streams: []grpc.StreamDesc{{StreamName: "Stream", ServerStreams: true, Handler: func(any, grpc.ServerStream) error {
			called = true
			return nil
		}}},
	}, struct{}{})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- local.Serve(ctx) }()
	if err := local.Conn.Invoke(t.Context(), "/foreign.Service/Call", new(skepv1.Access), new(skepv1.Access)); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a call: %v", err)
	}
	stream, err := local.Conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true}, "/foreign.Service/Stream")
	if err == nil {
		err = stream.RecvMsg(new(skepv1.Access))
	}
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("a stream: %v", err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if called {
		t.Error("the service was reached")
	}
}
