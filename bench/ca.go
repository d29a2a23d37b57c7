package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
	"github.com/skep-dev/skep/platform/enroll"
	"github.com/skep-dev/skep/platform/keystore"
	"github.com/skep-dev/skep/platform/wire"
)

const (
	// renewers ask for certificates at one time, for this long.
	renewers     = 64
	renewingTime = 10 * time.Second
	// rotateLimit ends a rotation that does not.
	rotateLimit = 5 * time.Minute
)

// authority measures certificates per second and the time of a root rotation, with the
// manager of scale and nodes that do what an agent does about its certificate.
func (b *bench) authority(ctx context.Context) error {
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: scaleFiles, Max: scaleFiles}); err != nil {
		return fmt.Errorf("allow %d open files: %w", scaleFiles, err)
	}
	rate, err := b.renewals(ctx)
	if err != nil {
		return fmt.Errorf("renewals: %w", err)
	}
	b.add(row{"i. certificates issued", rate, "/s", fmt.Sprintf("renewals of %d nodes at a time over mutual TLS, each in the synced log", renewers), ""})
	for field := range strings.SplitSeq(b.rotating, ",") {
		n, err := strconv.Atoi(field)
		if err != nil {
			return fmt.Errorf("rotating: %w", err)
		}
		took, err := b.rotation(ctx, n)
		if err != nil {
			return fmt.Errorf("rotation with %d nodes: %w", n, err)
		}
		wanted := ""
		if n == 1000 {
			wanted = "< 60"
		}
		b.add(row{fmt.Sprintf("i. root rotation, %d nodes", n), took.Seconds(), "s", "from the request until every node trusts the new root alone", wanted})
	}
	return nil
}

// withManager runs f against the manager of scale and n identities in its swarm.
func (b *bench) withManager(ctx context.Context, name string, n int, f func(context.Context, *scaleProcess, []*wire.Credentials) error) error {
	dir := filepath.Join(b.work, name)
	ids, err := writeScaleSwarm(dir, n)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	m, err := startScaleManager(ctx, dir)
	if err != nil {
		return err
	}
	defer m.stop()
	return f(ctx, m, ids)
}

// renewals returns how many certificates are renewed in a second.
func (b *bench) renewals(ctx context.Context) (float64, error) {
	var issued atomic.Int64
	err := b.withManager(ctx, "renewals", renewers, func(ctx context.Context, m *scaleProcess, ids []*wire.Credentials) error {
		ctx, cancel := context.WithTimeout(ctx, renewingTime)
		defer cancel()
		var group errgroup.Group
		for _, creds := range ids {
			group.Go(func() error {
				conn, err := wire.Dial(creds, m.addr, pki.ManagerRole)
				if err != nil {
					return err
				}
				defer conn.Close()
				for {
					if err := renewOnce(ctx, conn); err != nil {
						if ctx.Err() != nil || status.Code(err) == codes.DeadlineExceeded {
							return nil // the manager may notice the end first
						}
						return err
					}
					issued.Add(1)
				}
			})
		}
		return group.Wait()
	})
	return float64(issued.Load()) / renewingTime.Seconds(), err
}

// renewOnce gets one certificate and forgets it.
func renewOnce(ctx context.Context, conn *grpc.ClientConn) error {
	key, err := pki.NewKey(rand.Reader)
	if err != nil {
		return err
	}
	csr, err := pki.NewCSR(rand.Reader, key)
	if err != nil {
		return err
	}
	client := api.NewNodeCAClient(conn)
	resp, err := client.IssueNodeCertificate(ctx, &api.IssueNodeCertificateRequest{Csr: csr})
	if err != nil {
		return err
	}
	issued, err := client.NodeCertificateStatus(ctx, &api.NodeCertificateStatusRequest{NodeId: resp.GetNodeId()})
	if err == nil && issued.GetStatus().GetState() != api.IssuanceStatus_ISSUED {
		err = errors.New(issued.GetStatus().String())
	}
	return err
}

// rotation returns how long it takes to replace the root of a swarm of n connected nodes.
func (b *bench) rotation(ctx context.Context, n int) (took time.Duration, err error) {
	err = b.withManager(ctx, fmt.Sprint("rotation", n), n, func(ctx context.Context, m *scaleProcess, ids []*wire.Credentials) error {
		ctx, cancel := context.WithTimeout(ctx, rotateLimit)
		var nodes sync.WaitGroup
		defer nodes.Wait()
		defer cancel()
		ready, adopted := make(chan struct{}, n), make(chan struct{}, n)
		slots := make(chan struct{}, joinsAtOnce)
		for _, creds := range ids {
			c := &certified{creds: creds, addr: m.addr, ready: ready, adopted: adopted, slots: slots}
			nodes.Go(func() { c.run(ctx) })
		}
		if err := count(ctx, ready, n); err != nil {
			return fmt.Errorf("register nodes: %w", err)
		}
		begin := time.Now()
		var ended float64
		if err := m.ask("rotate", &ended); err != nil {
			return err
		}
		if err := count(ctx, adopted, n); err != nil {
			return fmt.Errorf("hand out the new root: %w", err)
		}
		took = time.Since(begin)
		fmt.Fprintf(os.Stderr, "%d nodes: rotation over after %.1f s, known to all after %.1f s\n", n, ended, took.Seconds())
		return nil
	})
	return took, err
}

func count(ctx context.Context, from <-chan struct{}, n int) error {
	for range n {
		select {
		case <-from:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// certified is a node as far as its certificate goes: a session, heartbeats, renewal when
// it is asked for, and a new session when it has something new to tell.
type certified struct {
	creds          *wire.Credentials
	addr           string
	ready, adopted chan<- struct{}
	// slots bound the handshakes in flight before all are ready.
	slots chan struct{}
	once  sync.Once
	// news has a value when certificate or root changed.
	news chan struct{}
}

func (c *certified) run(ctx context.Context) {
	c.news = make(chan struct{}, 1)
	renewer := enroll.NewRenewer(enroll.Renewer{
		Credentials: c.creds, Save: c.save, Log: slog.New(slog.DiscardHandler),
		Connect: func(context.Context) (grpc.ClientConnInterface, func(), error) {
			conn, err := wire.Dial(c.creds, c.addr, pki.ManagerRole)
			return conn, func() { _ = conn.Close() }, err
		},
	})
	var group sync.WaitGroup
	group.Go(func() { _ = renewer.Run(ctx) })
	for session := ""; ctx.Err() == nil; {
		_ = c.session(ctx, &session, renewer)
		_ = sleep(ctx, 10*time.Millisecond)
	}
	group.Wait()
}

func (c *certified) changed() {
	select {
	case c.news <- struct{}{}:
	default:
	}
}

func (c *certified) save(_ context.Context, id keystore.Identity) error {
	root, err := pki.ParseRoot(id.RootPEM, nil)
	if err != nil {
		return err
	}
	m, err := wire.NewMaterial(root, id.ChainPEM, id.Key)
	if err == nil {
		c.creds.Set(m)
		c.changed()
	}
	return err
}

// session registers with what the certificate says and serves until that changes.
func (c *certified) session(ctx context.Context, id *string, renewer *enroll.Renewer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c.slots <- struct{}{}
	leave := sync.OnceFunc(func() { <-c.slots })
	defer leave()
	conn, err := wire.Dial(c.creds, c.addr, pki.ManagerRole)
	if err != nil {
		return err
	}
	defer conn.Close()
	now := c.creds.Current()
	chain, err := pki.ParseCerts(now.ChainPEM)
	if err != nil {
		return err
	}
	issuer := now.Root.SelfIssuer(chain)
	client := api.NewDispatcherClient(conn)
	stream, err := client.Session(ctx, &api.SessionRequest{SessionId: *id, Description: &api.NodeDescription{
		Hostname: "sim-" + c.creds.NodeID(), Platform: &api.Platform{Architecture: "x86_64", Os: "linux"}, Resources: &api.Resources{NanoCpus: 1e9},
		Engine:  &api.EngineDescription{EngineVersion: "simulated"},
		TlsInfo: &api.NodeTLSInfo{TrustRoot: now.Root.CertPEM, CertIssuerSubject: issuer.Subject, CertIssuerPublicKey: issuer.PublicKey},
	}})
	if err != nil {
		return err
	}
	var group sync.WaitGroup
	defer group.Wait()
	defer cancel()
	group.Go(func() {
		select {
		case <-c.news:
		case <-ctx.Done():
		}
		cancel()
	})
	asked := false
	for first := true; ; first = false {
		msg, err := stream.Recv()
		if err != nil {
			return err
		}
		if first {
			*id = msg.GetSessionId()
			leave()
			c.once.Do(func() { c.ready <- struct{}{} })
			group.Go(func() { beat(ctx, client, *id) })
		}
		if state := msg.GetNode().GetCertificate().GetStatus().GetState(); state == api.IssuanceStatus_ROTATE && !asked {
			asked = true
			renewer.Force("")
		}
		if string(msg.GetRootCA()) != string(c.creds.Current().Root.CertPEM) {
			if err := c.adopt(msg.GetRootCA()); err != nil {
				return err
			}
		}
	}
}

func (c *certified) adopt(rootPEM []byte) error {
	root, err := pki.ParseRoot(rootPEM, nil)
	if err != nil {
		return err
	}
	next := *c.creds.Current()
	if _, err := root.Verify(next.ChainPEM, time.Now()); err != nil {
		return err
	}
	next.Root = root
	c.creds.Set(&next)
	c.adopted <- struct{}{}
	c.changed()
	return nil
}

func beat(ctx context.Context, client api.DispatcherClient, session string) {
	for {
		resp, err := client.Heartbeat(ctx, &api.HeartbeatRequest{SessionId: session})
		if err != nil || sleep(ctx, resp.GetPeriod().AsDuration()) != nil {
			return
		}
	}
}

// rotate replaces the root and returns after how many seconds that was over.
func (m *scaleManager) rotate(ctx context.Context) (float64, error) {
	// The manager itself has no agent here that could renew.
	if _, err := m.replica.Update(ctx, func(tx *store.Tx) error { return tx.Remove(model.Nodes, m.swarm.ManagerID) }); err != nil {
		return 0, err
	}
	begin := time.Now()
	cluster := m.replica.View().Cluster()
	spec := model.Clone(cluster.GetSpec())
	if spec.CaConfig == nil {
		spec.CaConfig = new(api.CAConfig)
	}
	spec.CaConfig.ForceRotate++
	if _, err := m.control.UpdateCluster(ctx, &api.UpdateClusterRequest{
		ClusterId: cluster.GetId(), ClusterVersion: cluster.GetMeta().GetVersion(), Spec: spec,
	}); err != nil {
		return 0, err
	}
	for cursor := m.replica.Follow(); cursor.Snapshot().Cluster().GetRootCa().GetRootRotation() != nil; {
		if _, _, err := cursor.Next(ctx); err != nil {
			return 0, err
		}
	}
	return time.Since(begin).Seconds(), nil
}
