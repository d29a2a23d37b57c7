package sim

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/wire"
)

// thief holds a copy of a node's certificate and key, on a machine of its own.
type thief struct {
	w     *world
	creds *wire.Credentials
}

// robbed copies the machine's identity.
func (m *machine) robbed() *thief { return &thief{w: m.w, creds: m.steal("10.0.9.9")} }

// at calls a manager with the stolen identity.
func (t *thief) at(m *machine, call func(context.Context, *grpc.ClientConn) error) codes.Code {
	t.w.t.Helper()
	conn, err := wire.Dial(t.creds, m.ip+":2377", pki.ManagerRole)
	if err != nil {
		t.w.t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.w.t.Context(), 10*time.Second)
	defer cancel()
	return status.Code(call(ctx, conn))
}

func listNodes(ctx context.Context, conn *grpc.ClientConn) error {
	_, err := api.NewControlClient(conn).ListNodes(ctx, new(api.ListNodesRequest))
	return err
}

func unlockKey(ctx context.Context, conn *grpc.ClientConn) error {
	_, err := api.NewCAClient(conn).GetUnlockKey(ctx, new(api.GetUnlockKeyRequest))
	return err
}

func raftMessage(ctx context.Context, conn *grpc.ClientConn) error {
	_, err := api.NewRaftClient(conn).ProcessRaftMessage(ctx, &api.ProcessRaftMessageRequest{
		Message: &raftpb.Message{Type: raftpb.MsgTimeoutNow.Enum(), From: new(uint64(1)), Term: new(uint64(1 << 40))},
	})
	return err
}

func heartbeat(ctx context.Context, conn *grpc.ClientConn) error {
	_, err := api.NewDispatcherClient(conn).Heartbeat(ctx, &api.HeartbeatRequest{SessionId: "of somebody else"})
	return err
}

func renewal(ctx context.Context, conn *grpc.ClientConn) error {
	key, err := pki.NewKey(rand.Reader)
	if err != nil {
		return err
	}
	csr, err := pki.NewCSR(rand.Reader, key)
	if err != nil {
		return err
	}
	_, err = api.NewNodeCAClient(conn).IssueNodeCertificate(ctx, &api.IssueNodeCertificateRequest{Csr: csr})
	return err
}

// forgedForward speaks for a manager, as only managers may.
func forgedForward(manager string) func(context.Context, *grpc.ClientConn) error {
	return func(ctx context.Context, conn *grpc.ClientConn) error {
		cluster := ""
		return listNodes(metadata.AppendToOutgoingContext(ctx, "forwarded_cert", "true", "forwarded_cert_cn", manager,
			"forwarded_cert_org", cluster, "forwarded_cert_ou", pki.ManagerRole, "remote_addr", "10.0.0.1:1"), conn)
	}
}

// Credentials that were copied from a node are worth nothing once it is removed, and no
// more than a worker's once it is demoted, on every manager and on open connections.
func TestStolenCredentials(t *testing.T) {
	inWorld(t, 9, 5, func(w *world) {
		w.found(3)
		managers, demoted, worker := w.machines[:2], w.machines[2], w.machines[4]
		fromManager, fromWorker := demoted.robbed(), worker.robbed()
		for _, m := range managers {
			if code := fromManager.at(m, listNodes); code != codes.OK {
				t.Fatalf("the copy of a manager's certificate is worth nothing yet at %s: %v", m.name, code)
			}
			if code := fromWorker.at(m, heartbeat); code == codes.OK || code == codes.PermissionDenied {
				t.Fatalf("the copy of a worker's certificate is worth nothing yet at %s: %v", m.name, code)
			}
		}
		// Streams that are open when the node goes.
		var streams []grpc.ServerStreamingClient[api.SubscriptionMessage]
		for _, m := range managers {
			conn, err := wire.Dial(fromWorker.creds, m.ip+":2377", pki.ManagerRole)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			s, err := api.NewLogBrokerClient(conn).ListenSubscriptions(w.t.Context(), new(api.ListenSubscriptionsRequest))
			if err != nil {
				t.Fatal(err)
			}
			streams = append(streams, s)
		}
		w.sleep(time.Second)
		worker.kill()
		if err := w.any("DELETE", "/nodes/"+worker.id+"?force=true", nil, nil); err != nil {
			t.Fatal(err)
		}
		for i, s := range streams {
			ended := make(chan error, 1)
			go func() {
				_, err := s.Recv()
				ended <- err
			}()
			select {
			case err := <-ended:
				if err == nil {
					t.Errorf("the stream at %s told something", managers[i].name)
				}
			case <-time.After(2 * time.Second):
				t.Errorf("the stream at %s is still open", managers[i].name)
			}
		}
		if err := w.demote(demoted); err != nil {
			t.Fatal(err)
		}
		w.await("the manager is a worker", time.Minute, func() error {
			var nodes []swarm.Node
			if err := managers[0].call("GET", "/nodes", nil, &nodes); err != nil {
				return err
			}
			for _, n := range nodes {
				if n.ID == demoted.id && (n.ManagerStatus != nil || demoted.certificate().Subject.OrganizationalUnit[0] != pki.WorkerRole) {
					return errors.New("not yet")
				}
			}
			return nil
		})
		synctest.Wait()
		for _, m := range managers {
			for what, call := range map[string]func(context.Context, *grpc.ClientConn) error{
				"list nodes": listNodes, "unlock key": unlockKey, "raft": raftMessage, "speak for a manager": forgedForward(managers[0].id),
			} {
				if code := fromManager.at(m, call); code != codes.PermissionDenied {
					t.Errorf("a demoted manager's old certificate at %s: %s: %v", m.name, what, code)
				}
			}
			for what, call := range map[string]func(context.Context, *grpc.ClientConn) error{"list nodes": listNodes, "heartbeat": heartbeat} {
				if code := fromWorker.at(m, call); code != codes.PermissionDenied {
					t.Errorf("a removed worker's certificate at %s: %s: %v", m.name, what, code)
				}
			}
			if code := fromWorker.at(m, renewal); code != codes.InvalidArgument {
				t.Errorf("a removed worker's certificate is renewed at %s: %v", m.name, code)
			}
		}
		// And the rest of the demoted node's rights when it is removed.
		demoted.kill()
		if err := w.any("DELETE", "/nodes/"+demoted.id+"?force=true", nil, nil); err != nil {
			t.Fatal(err)
		}
		w.sleep(time.Second)
		for _, m := range managers {
			for what, call := range map[string]func(context.Context, *grpc.ClientConn) error{"list nodes": listNodes, "heartbeat": heartbeat, "raft": raftMessage} {
				if code := fromManager.at(m, call); code != codes.PermissionDenied {
					t.Errorf("a removed manager's old certificate at %s: %s: %v", m.name, what, code)
				}
			}
			if code := fromManager.at(m, renewal); code != codes.InvalidArgument {
				t.Errorf("a removed manager's old certificate is renewed at %s: %v", m.name, code)
			}
		}
	})
}

// demote makes a manager a worker.
func (w *world) demote(m *machine) error {
	var n swarm.Node
	if err := w.any("GET", "/nodes/"+m.id, nil, &n); err != nil {
		return err
	}
	n.Spec.Role = swarm.NodeRoleWorker
	return w.any("POST", fmt.Sprintf("/nodes/%s/update?version=%d", m.id, n.Version.Index), n.Spec, nil)
}
