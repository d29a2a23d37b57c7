package wire

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/pki"
)

// A manager's certificate that is older than the demotion of its node is a worker's, for
// its own calls and as a forwarder.
func TestDemotedManager(t *testing.T) {
	guard := testGuard()
	guard.Role = func(nodeID string) string {
		return map[string]string{"demoted": pki.WorkerRole, "manager": pki.ManagerRole}[nodeID]
	}
	for name, m := range methods() {
		if m.raft {
			if _, err := guard.authorize(callerWith(t.Context(), "demoted", "swarm", pki.ManagerRole), m, true); err != nil {
				t.Errorf("%s: %v, although raft has to tell it that it was taken out", name, err)
			}
			continue
		}
		worker := m.rule.GetAnyone() || slices.Contains(m.rule.GetRoles(), pki.WorkerRole)
		caller, err := guard.authorize(callerWith(t.Context(), "demoted", "swarm", pki.ManagerRole), m, true)
		if (err == nil) != worker || caller.Is(pki.ManagerRole) {
			t.Errorf("%s: taken for %+v, %v", name, caller, err)
		}
		for _, node := range []string{"manager", "not known yet"} {
			if _, err := guard.authorize(callerWith(t.Context(), node, "swarm", pki.ManagerRole), m, true); err != nil {
				t.Errorf("%s by %s: %v", name, node, err)
			}
		}
		// It speaks for nobody.
		ctx := forwardedBy(callerWith(t.Context(), "demoted", "swarm", pki.ManagerRole), Identity{NodeID: "manager", ClusterID: "swarm", OUs: []string{pki.ManagerRole}})
		if _, err := guard.authorize(ctx, m, true); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s forwarded by a demoted manager: %v", name, err)
		}
		// Who was demoted is not let in by forwarding either.
		ctx = forwardedBy(callerWith(t.Context(), "manager", "swarm", pki.ManagerRole), Identity{NodeID: "demoted", ClusterID: "swarm", OUs: []string{pki.ManagerRole}})
		caller, err = guard.authorize(ctx, m, true)
		if (err == nil) != worker || caller.Is(pki.ManagerRole) {
			t.Errorf("%s forwarded for a demoted manager: taken for %+v, %v", name, caller, err)
		}
	}
	// A manager that does not lead may not have heard of a promotion: the leader decides.
	guard.Leading = func() bool { return false }
	table := methods()
	if _, err := guard.authorize(callerWith(t.Context(), "demoted", "swarm", pki.ManagerRole), table["/docker.swarmkit.v1.Control/ListNodes"], true); err != nil {
		t.Errorf("a follower decides for the leader: %v", err)
	}
	if _, err := guard.authorize(callerWith(t.Context(), "demoted", "swarm", pki.ManagerRole), table["/docker.swarmkit.v1.Raft/ResolveAddress"], true); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a demoted manager asks for addresses: %v", err)
	}
}

// Connections of a node whose certificate became void are closed under it.
func TestCloseVoidConnections(t *testing.T) {
	inRig(t, func(r *rig) {
		conns := map[string]*grpc.ClientConn{}
		for _, who := range [][2]string{{"good", pki.WorkerRole}, {"bad", pki.WorkerRole}, {"", ""}} {
			conn := r.dial(r.creds("10.0.0.9", who[0], "swarm", who[1]), leaderAddr, pki.ManagerRole)
			conns[who[0]] = conn
			if _, err := api.NewNodeCAClient(conn).NodeCertificateStatus(r.Context(), new(api.NodeCertificateStatusRequest)); err != nil {
				t.Fatal(err)
			}
		}
		open := func() (peers []string) {
			r.conns.CloseIf(func(peer Identity) bool {
				peers = append(peers, peer.NodeID)
				return false
			})
			slices.Sort(peers)
			return peers
		}
		if got := open(); !slices.Equal(got, []string{"bad", "good"}) {
			t.Errorf("connections of %v are known", got)
		}
		if n := r.conns.CloseIf(func(peer Identity) bool {
			return peer.NodeID == "bad" && peer.Is(pki.WorkerRole) && peer.ClusterID == "swarm"
		}); n != 1 {
			t.Errorf("%d connections were closed", n)
		}
		synctest.Wait()
		for who, conn := range conns {
			if up := conn.GetState() == connectivity.Ready; up == (who == "bad") {
				t.Errorf("the connection of %q is %v", who, conn.GetState())
			}
		}
		if got := open(); !slices.Equal(got, []string{"good"}) {
			t.Errorf("connections of %v are known", got)
		}
		if err := conns["good"].Close(); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if got := open(); len(got) > 0 {
			t.Errorf("connections of %v are known", got)
		}
	})
}

// forwardedBy is the context of a call that the peer of ctx forwards for a caller.
func forwardedBy(ctx context.Context, caller Identity) context.Context {
	md, _ := metadata.FromOutgoingContext(forwardContext(ctx, caller))
	md.Delete(keyRedirect)
	return metadata.NewIncomingContext(ctx, md)
}
