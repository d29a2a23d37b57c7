package sim

import (
	"context"
	"crypto/rand"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/moby/moby/api/types/swarm"
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
	"github.com/skep-dev/skep/platform/keystore"
	"github.com/skep-dev/skep/platform/wire"
)

// rpc is one method of the swarm's packages and who may call it.
type rpc struct {
	name  string
	desc  protoreflect.MethodDescriptor
	roles []string
	all   bool
}

// rpcs walks the descriptors of all that is linked in.
func rpcs() []rpc {
	var list []rpc
	protoregistry.GlobalFiles.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		if f.Package() != "docker.swarmkit.v1" && f.Package() != "skep.v1" {
			return true
		}
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			for j := range s.Methods().Len() {
				m := s.Methods().Get(j)
				rule, _ := proto.GetExtension(m.Options(), skepv1.E_Access).(*skepv1.Access)
				list = append(list, rpc{
					name: fmt.Sprintf("/%s/%s", s.FullName(), m.Name()), desc: m, roles: rule.GetRoles(), all: rule.GetAnyone(),
				})
			}
		}
		return true
	})
	return list
}

// try calls a method with an empty message and returns how that ended.
func (m rpc) try(ctx context.Context, conn *grpc.ClientConn) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	in, err := protoregistry.GlobalTypes.FindMessageByName(m.desc.Input().FullName())
	if err != nil {
		return err
	}
	out, err := protoregistry.GlobalTypes.FindMessageByName(m.desc.Output().FullName())
	if err != nil {
		return err
	}
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: m.desc.IsStreamingServer(), ClientStreams: m.desc.IsStreamingClient()}, m.name)
	if err != nil {
		return err
	}
	if err := s.SendMsg(in.New().Interface()); err != nil {
		return s.RecvMsg(out.New().Interface())
	}
	_ = s.CloseSend()
	return s.RecvMsg(out.New().Interface())
}

// steal returns the credentials on a machine's disk, for use from another address.
func (m *machine) steal(ip string) *wire.Credentials {
	m.w.t.Helper()
	keys, err := keystore.Open(filepath.Join(m.dir, "data", "swarm", "certificates"))
	if err != nil {
		m.w.t.Fatal(err)
	}
	id, err := keys.Load(nil)
	if err != nil {
		m.w.t.Fatal(err)
	}
	root, err := pki.ParseRoot(id.RootPEM, nil)
	if err != nil {
		m.w.t.Fatal(err)
	}
	material, err := wire.NewMaterial(root, id.ChainPEM, id.Key)
	if err != nil {
		m.w.t.Fatal(err)
	}
	c := &wire.Credentials{Network: m.w.net.Host(ip)}
	c.Set(material)
	return c
}

// TestStolenCertificate calls every method at every manager as somebody without a
// certificate, and with a worker's that was stolen: as what it is, and claiming to pass on
// the call of a manager. Before, while and after the swarm has lost its leader, nobody gets
// further than the rules of the .proto files say.
func TestStolenCertificate(t *testing.T) {
	inWorld(t, 11, 4, func(w *world) {
		w.found(3)
		worker := w.machines[3]
		thief := worker.steal("10.0.0.66")
		stranger := &wire.Credentials{Network: w.net.Host("10.0.0.67")}
		stranger.Set(&wire.Material{Root: thief.Current().Root})
		claim := metadata.AppendToOutgoingContext(context.Background(), "forwarded_cert", "true", "forwarded_cert_cn", w.machines[0].id,
			"forwarded_cert_org", thief.ClusterID(), "forwarded_cert_ou", pki.ManagerRole, "remote_addr", "10.0.0.1:1")
		check := func(when string) {
			t.Helper()
			calls := 0
			for _, m := range w.machines[:3] {
				if !m.running() {
					continue
				}
				for _, c := range []struct {
					who   string
					creds *wire.Credentials
					ctx   context.Context //nolint:containedctx // with the claims of one caller
					may   func(rpc) bool
				}{
					{"a stranger", stranger, context.Background(), func(m rpc) bool { return m.all }},
					{"a worker", thief, context.Background(), func(m rpc) bool { return m.all || slices.Contains(m.roles, pki.WorkerRole) }},
					{"a stranger as a forwarder", stranger, claim, func(rpc) bool { return false }},
					{"a worker as a forwarder", thief, claim, func(rpc) bool { return false }},
				} {
					conn, err := wire.Dial(c.creds, m.ip+":2377", pki.ManagerRole)
					if err != nil {
						t.Fatal(err)
					}
					for _, method := range rpcs() {
						if c.may(method) {
							continue
						}
						calls++
						want := codes.PermissionDenied
						if method.name == skepv1.Directory_Managers_FullMethodName {
							want = codes.Unimplemented // only nodes that were demoted serve it
						}
						if err := method.try(c.ctx, conn); status.Code(err) != want {
							t.Errorf("%s the change of leader, %s calls %s at %s: %v", when, c.who, method.name, m.name, err)
						}
					}
					_ = conn.Close()
				}
			}
			if calls < 2*4*40 {
				t.Errorf("only %d calls were tried", calls)
			}
		}
		check("before")
		w.leader().kill()
		check("during")
		w.await("there is a new leader", 20*time.Second, func() error {
			_, err := w.create(service("late", 1))
			return err
		})
		check("after")
	})
}

// TestStolenCertificateReachesItsOwnTasksOnly opens a session with a stolen certificate. It
// brings the tasks of the node and their secrets, and nothing of other nodes; a renewal
// brings the same role again.
func TestStolenCertificateReachesItsOwnTasksOnly(t *testing.T) {
	inWorld(t, 12, 3, func(w *world) {
		w.found(1)
		victim, other := w.machines[1], w.machines[2]
		ids := map[string]string{}
		for _, m := range []*machine{victim, other} {
			var made swarm.SecretCreateResponse
			m0 := w.machines[0]
			m0.must("POST", "/secrets/create", swarm.SecretSpec{Annotations: swarm.Annotations{Name: "of-" + m.name}, Data: []byte("of " + m.name)}, &made)
			s := service("on-"+m.name, 1)
			s.TaskTemplate.Placement = &swarm.Placement{Constraints: []string{"node.id==" + m.id}}
			s.TaskTemplate.ContainerSpec.Secrets = []*swarm.SecretReference{{
				SecretID: made.ID, SecretName: "of-" + m.name, File: &swarm.SecretReferenceFileTarget{Name: "s", UID: "0", GID: "0", Mode: 0o400},
			}}
			ids[m.name] = w.mustCreate(s)
		}
		w.await("both run", time.Minute, w.converged)
		tasks, err := w.tasks(ids[other.name])
		if err != nil || len(tasks) != 1 {
			t.Fatal(tasks, err)
		}
		thief := victim.steal("10.0.0.66")
		victim.isolate() // it would take its session back
		conn, err := wire.Dial(thief, w.machines[0].ip+":2377", pki.ManagerRole)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		dispatcher := api.NewDispatcherClient(conn)
		session, err := dispatcher.Session(ctx, &api.SessionRequest{Description: &api.NodeDescription{Hostname: other.name}})
		if err != nil {
			t.Fatal(err)
		}
		hello, err := session.Recv()
		if err != nil || hello.GetNode().GetId() != victim.id {
			t.Fatalf("a session as %s: %v", hello.GetNode().GetId(), err)
		}
		assignments, err := dispatcher.Assignments(ctx, &api.AssignmentsRequest{SessionId: hello.GetSessionId()})
		if err != nil {
			t.Fatal(err)
		}
		all, err := assignments.Recv()
		if err != nil {
			t.Fatal(err)
		}
		secrets := 0
		for _, c := range all.GetChanges() {
			if s := c.GetAssignment().GetSecret(); s != nil {
				if secrets++; string(s.GetSpec().GetData()) != "of "+victim.name {
					t.Errorf("the thief gets the secret %s", s.GetSpec().GetAnnotations().GetName())
				}
			}
			if task := c.GetAssignment().GetTask(); task != nil && task.GetNodeId() != victim.id {
				t.Errorf("the thief gets a task of %s", task.GetNodeId())
			}
		}
		if secrets != 1 {
			t.Errorf("%d secrets came, so the test shows nothing", secrets)
		}
		// The status of another node's task is not the thief's to say.
		_, err = dispatcher.UpdateTaskStatus(ctx, &api.UpdateTaskStatusRequest{SessionId: hello.GetSessionId(), Updates: []*api.UpdateTaskStatusRequest_TaskStatusUpdate{
			{TaskId: tasks[0].ID, Status: &api.TaskStatus{State: api.TaskState_FAILED}},
		}})
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("the status of another node's task: %v", err)
		}
		key, err := pki.NewKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		csr, err := pki.NewCSR(rand.Reader, key)
		if err != nil {
			t.Fatal(err)
		}
		issued, err := api.NewNodeCAClient(conn).IssueNodeCertificate(ctx, &api.IssueNodeCertificateRequest{Csr: csr, Role: api.NodeRole_MANAGER}) //nolint:staticcheck // what a thief would ask for
		if err != nil || issued.GetNodeId() != victim.id {
			t.Fatalf("a renewal for %s: %v", issued.GetNodeId(), err)
		}
		state, err := api.NewNodeCAClient(conn).NodeCertificateStatus(ctx, &api.NodeCertificateStatusRequest{NodeId: issued.GetNodeId()})
		if err != nil {
			t.Fatal(err)
		}
		chain, err := pki.ParseCerts(state.GetCertificate().GetCertificate())
		if err != nil {
			t.Fatal(err)
		}
		if got := chain[0].Subject; got.CommonName != victim.id || !slices.Equal(got.OrganizationalUnit, []string{pki.WorkerRole}) {
			t.Errorf("the renewal names %v", got)
		}
	})
}
