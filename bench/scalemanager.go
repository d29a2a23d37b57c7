package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/control/ca"
	"github.com/skep-dev/skep/control/dispatcher"
	"github.com/skep-dev/skep/control/manager"
	"github.com/skep-dev/skep/control/ops"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
	"github.com/skep-dev/skep/e2e/testimage"
	"github.com/skep-dev/skep/platform/cfssl"
	"github.com/skep-dev/skep/platform/wire"
)

// scaleManager is a manager as package node assembles it, without what a load of tasks
// does not touch.
type scaleManager struct {
	dir      string
	swarm    scaleSwarm
	creds    *wire.Credentials
	replica  *replica.Replica
	registry *prometheus.Registry
	control  *ops.Ops
	reports  *reports
	changes  int // written by change
	listen   net.Listener
}

// runScaleManager is the process that scale starts: it answers commands from its standard
// input by lines of JSON until that is closed.
func runScaleManager(ctx context.Context, dir string) error {
	m := &scaleManager{dir: dir, registry: prometheus.NewRegistry()}
	if err := m.read(); err != nil {
		return err
	}
	var config net.ListenConfig
	var err error
	if m.listen, err = config.Listen(ctx, "tcp", "127.0.0.1:0"); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	group, ctx := errgroup.WithContext(ctx)
	m.run(ctx, group)
	group.Go(func() error {
		defer cancel()
		return m.serve(ctx)
	})
	err = group.Wait()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// read takes over what the parent left.
func (m *scaleManager) read() error {
	data, err := os.ReadFile(filepath.Join(m.dir, "swarm.json"))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, &m.swarm); err != nil {
		return err
	}
	root, err := pki.ParseRoot(m.swarm.Root, m.swarm.Key)
	if err != nil {
		return err
	}
	key, err := pki.ParseKey(m.swarm.Own)
	if err != nil {
		return err
	}
	material, err := wire.NewMaterial(root, m.swarm.Chain, key)
	if err != nil {
		return err
	}
	m.creds = new(wire.Credentials)
	m.creds.Set(material)
	return nil
}

// run starts the parts of the manager.
func (m *scaleManager) run(ctx context.Context, group *errgroup.Group) {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	m.replica = replica.New(replica.Config{
		NodeID: m.swarm.ManagerID, Addr: m.listen.Addr().String(), Dir: filepath.Join(m.dir, "raft"),
		Keys: replica.StaticKey(strings.Repeat("k", 32)),
		Dial: func(_ context.Context, addr string) (*grpc.ClientConn, error) {
			return wire.Dial(m.creds, addr, pki.ManagerRole)
		},
		Caller: wire.CallerNode, Log: log, Registerer: m.registry,
	})
	m.control = ops.New(ops.Config{State: m.replica, Membership: m.replica})
	dispatch := dispatcher.New(dispatcher.Config{
		State: m.replica, Members: m.replica.Members, NodeID: m.swarm.ManagerID, Caller: wire.CallerNode, Log: log, Registerer: m.registry,
	})
	authority := ca.New(ca.Config{State: m.replica, External: &cfssl.Client{Credentials: m.creds}, Log: log})
	leader := manager.New(manager.Config{
		State: m.replica, Membership: m.replica, NodeID: m.swarm.ManagerID, Log: log, Registerer: m.registry,
		Bootstrap: &manager.Bootstrap{
			ClusterID: m.swarm.ClusterID, RootCA: &api.RootCA{CaCert: m.swarm.Root, CaKey: m.swarm.Key, JoinTokens: new(api.JoinTokens)},
		},
	})
	server := wire.NewServer(&wire.Guard{
		Credentials: m.creds,
		Removed:     func(string) bool { return false },
		Leading:     func() bool { return true },
		Leader:      func(context.Context) (grpc.ClientConnInterface, error) { return nil, model.ErrNoLeader },
	})
	api.RegisterDispatcherServer(server, dispatch)
	api.RegisterNodeCAServer(server, authority)
	api.RegisterRaftServer(server, m.replica.RaftServer())
	m.reports = newReports(dispatch)
	skepv1.RegisterNetworksServer(server, m.reports)
	group.Go(func() error { return m.replica.Run(ctx) })
	group.Go(func() error {
		return m.replica.RunTerms(ctx, func(ctx context.Context) error {
			term, ctx := errgroup.WithContext(ctx)
			term.Go(func() error { return leader.RunTerm(ctx) })
			term.Go(func() error { return dispatch.Run(ctx) })
			term.Go(func() error { return authority.Run(ctx) })
			return term.Wait()
		})
	})
	group.Go(func() error {
		stop := context.AfterFunc(ctx, server.Stop)
		defer stop()
		if err := server.Serve(m.listen); ctx.Err() == nil {
			return err
		}
		return nil
	})
}

// serve makes the nodes and answers the parent.
func (m *scaleManager) serve(ctx context.Context) error {
	if err := m.admit(ctx); err != nil {
		return fmt.Errorf("admit nodes: %w", err)
	}
	out := json.NewEncoder(os.Stdout)
	if err := out.Encode(m.listen.Addr().String()); err != nil {
		return err
	}
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		var s any
		var err error
		switch in.Text() {
		case "rotate":
			s, err = m.rotate(ctx)
		case "spread":
			s, err = m.spread(ctx)
		case "change":
			s, err = m.change(ctx)
		default:
			s, err = m.load(ctx)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", in.Text(), err)
		}
		if err := out.Encode(s); err != nil {
			return err
		}
	}
	return nil
}

// admit writes the nodes, as the CA would have when they joined.
func (m *scaleManager) admit(ctx context.Context) error {
	cursor := m.replica.Follow()
	for cursor.Snapshot().Cluster() == nil {
		if _, _, err := cursor.Next(ctx); err != nil {
			return err
		}
	}
	for ids := range slices.Chunk(m.swarm.NodeIDs, 200) {
		_, err := m.replica.Update(ctx, func(tx *store.Tx) error {
			for _, id := range ids {
				if err := tx.Create(&api.Node{
					Id:   id,
					Spec: &api.NodeSpec{Membership: api.NodeSpec_ACCEPTED},
					Certificate: &api.Certificate{
						Cn: id, Status: &api.IssuanceStatus{State: api.IssuanceStatus_ISSUED},
					},
				}); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// load creates the services and waits until all their tasks run.
func (m *scaleManager) load(ctx context.Context) (*scaled, error) {
	s := &scaled{Tasks: scaleServices * scaleReplicas}
	var err error
	if s.Before, err = residentMB(os.Getpid()); err != nil {
		return nil, err
	}
	if file := os.Getenv("SCALE_PROFILE"); file != "" {
		f, err := os.Create(fmt.Sprintf("%s.%d", file, len(m.swarm.NodeIDs)))
		if err != nil {
			return nil, err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return nil, err
		}
		defer pprof.StopCPUProfile()
	}
	cursor := m.replica.Follow()
	cpu, deciding, begin := processorSeconds(), m.decidingSeconds(), time.Now()
	for i := range scaleServices {
		if _, err := m.control.CreateService(ctx, &api.CreateServiceRequest{Spec: scaleService(i)}); err != nil {
			return nil, err
		}
	}
	assigned, running := 0, 0
	for running < s.Tasks {
		events, _, err := cursor.Next(ctx)
		if err != nil {
			return nil, err
		}
		for _, e := range events {
			now, _ := e.New.(*api.Task)
			old, _ := e.Old.(*api.Task)
			before, after := old.GetStatus().GetState(), now.GetStatus().GetState()
			if before < api.TaskState_ASSIGNED && after >= api.TaskState_ASSIGNED {
				assigned++
			}
			if before < api.TaskState_RUNNING && after == api.TaskState_RUNNING {
				running++
			}
		}
		if assigned >= s.Tasks && s.Assigned == 0 {
			s.Assigned = time.Since(begin).Seconds()
			s.Deciding = m.decidingSeconds() - deciding
		}
	}
	if assigned > s.Tasks {
		return nil, fmt.Errorf("%d placements for %d tasks: nodes were lost", assigned, s.Tasks)
	}
	s.Running, s.CPU = time.Since(begin).Seconds(), processorSeconds()-cpu
	s.Resident, err = residentMB(os.Getpid())
	return s, err
}

func scaleService(i int) *api.ServiceSpec {
	return &api.ServiceSpec{
		Annotations: &api.Annotations{Name: fmt.Sprint("scale", i)},
		Task: &api.TaskSpec{
			Runtime:   &api.TaskSpec_Container{Container: &api.ContainerSpec{Image: testimage.V1}},
			Resources: &api.ResourceRequirements{Reservations: &api.Resources{NanoCpus: 1e7, MemoryBytes: 4 << 20}},
		},
		Mode: &api.ServiceSpec_Replicated{Replicated: &api.ReplicatedService{Replicas: scaleReplicas}},
	}
}

// decidingSeconds returns the time that the scheduler has spent on decisions.
func (m *scaleManager) decidingSeconds() float64 {
	families, err := m.registry.Gather()
	if err != nil {
		return 0
	}
	for _, f := range families {
		if f.GetName() != "skep_manager_deciding_seconds" {
			continue
		}
		for _, metric := range f.GetMetric() {
			for _, l := range metric.GetLabel() {
				if l.GetValue() == "placement" {
					return metric.GetHistogram().GetSampleSum()
				}
			}
		}
	}
	return 0
}

// processorSeconds returns the processor time of this process.
func processorSeconds() float64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}
