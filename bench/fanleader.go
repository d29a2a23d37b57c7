package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/control/dispatcher"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
	"github.com/skep-dev/skep/e2e/testimage"
)

// fanLeader returns how long a change of an endpoint takes from its write at the leader to
// the nodes' kernels, and back to the leader that all have said so. The manager is that of
// scale: a process with a raft log on disk and a dispatcher over mutual TLS. Each of the
// nodes, all in this process, has a session, a stream of its networks, a data plane in a
// namespace of its own, and one task of a service in a sandbox.
func (b *bench) fanLeader(ctx context.Context) (err error) {
	dir := filepath.Join(b.work, "fanleader")
	ids, err := writeScaleSwarm(dir, changeNodes)
	if err != nil {
		return err
	}
	l := &netLab{dir: filepath.Join(dir, "nodes")}
	defer func() { err = errors.Join(err, l.close(context.WithoutCancel(ctx))) }()
	var nodes []*netNode
	for i := range ids {
		n, err := l.loneNode(i)
		if err != nil {
			return err
		}
		nodes = append(nodes, n)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	m, err := startScaleManager(ctx, dir)
	if err != nil {
		return err
	}
	defer m.stop()
	var group sync.WaitGroup
	defer group.Wait()
	defer cancel()
	if err := joinAll(ctx, &group, m.addr, ids, nodes); err != nil {
		return err
	}
	var running int
	if err := m.ask("spread", &running); err != nil {
		return err
	}
	var each, last []float64
	for range 2 * fanRounds {
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return err
		}
		var took []float64
		if err := m.ask("change", &took); err != nil {
			return err
		}
		each, last = append(each, took...), append(last, quantile(took, 1))
	}
	for _, n := range nodes {
		if found, err := n.Check(ctx); err != nil || len(found) > 0 {
			return fmt.Errorf("after the changes: %q, %w", found, err)
		}
	}
	name := fmt.Sprintf("g. endpoint change through the leader, %d nodes: ", changeNodes)
	b.add(row{name + "a node, p50", quantile(each, 0.5), "ms", "from the write to the node's report at the leader", ""})
	b.add(row{name + "a node, p99", quantile(each, 0.99), "ms", fmt.Sprintf("n=%d", len(each)), "< 1000"})
	b.add(row{name + "the last node", quantile(last, 0.5), "ms", spread(last), ""})
	b.add(row{name + "the last node, p99", quantile(last, 0.99), "ms", fmt.Sprintf("n=%d", len(last)), "< 1000"})
	return nil
}

// loneNode makes a node in a namespace that is joined to nothing, with an address.
func (l *netLab) loneNode(number int) (*netNode, error) {
	ns, err := l.namespace()
	if err != nil {
		return nil, err
	}
	addr := wireAddr(1 + number).Addr()
	err = inNS(ns, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.AddrAdd(lo, &netlink.Addr{IPNet: prefixNet(netip.PrefixFrom(addr, 32))})
	})
	if err != nil {
		return nil, err
	}
	return l.node(fmt.Sprint("node", number), ns, addr)
}

// programs does for a node what an agent does for its networks, until ctx or the session ends.
func (n *netNode) programs(ctx context.Context, client skepv1.NetworksClient, session string) error {
	stream, err := client.Watch(ctx, &skepv1.WatchNetworksRequest{SessionId: session})
	if err != nil {
		return err
	}
	for {
		u, err := stream.Recv()
		if err != nil {
			return err
		}
		if err := n.Apply(ctx, u); err != nil {
			return err
		}
		if _, err := client.Programmed(ctx, &skepv1.ProgrammedRequest{SessionId: session, Version: u.GetVersion()}); err != nil {
			return err
		}
	}
}

// connect gives a task of the node its sandbox.
func (n *netNode) connect(ctx context.Context, t *api.Task) error {
	for _, a := range t.GetNetworks() {
		if len(a.GetAddresses()) == 0 {
			continue
		}
		if _, err := n.attach(ctx, t.GetId(), a.GetNetwork().GetId(), a.GetAddresses()[0]); err != nil {
			return err
		}
	}
	return nil
}

// reports takes note of what nodes report to have programmed.
type reports struct {
	skepv1.NetworksServer

	mu      sync.Mutex
	version map[string]uint64 // by session
	came    chan struct{}     // closed and replaced at each report
}

func newReports(d *dispatcher.Dispatcher) *reports {
	return &reports{NetworksServer: d.Networks(), version: map[string]uint64{}, came: make(chan struct{})}
}

func (r *reports) Programmed(ctx context.Context, req *skepv1.ProgrammedRequest) (*skepv1.ProgrammedResponse, error) {
	resp, err := r.NetworksServer.Programmed(ctx, req)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.version[req.GetSessionId()] = max(r.version[req.GetSessionId()], req.GetVersion())
	close(r.came)
	r.came = make(chan struct{})
	return resp, nil
}

// wait returns when so many nodes have reported a version, with the milliseconds since begin
// for each.
func (r *reports) wait(ctx context.Context, nodes int, version uint64, begin time.Time) ([]float64, error) {
	took := map[string]float64{}
	for {
		r.mu.Lock()
		now, came := 1e3*time.Since(begin).Seconds(), r.came
		for id, v := range r.version {
			if _, known := took[id]; v >= version && !known {
				took[id] = now
			}
		}
		r.mu.Unlock()
		if len(took) >= nodes {
			out := make([]float64, 0, len(took))
			for _, t := range took {
				out = append(out, t)
			}
			return out, nil
		}
		select {
		case <-came:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// spread creates a network and a service with a task on each node, and returns how many run
// once all nodes have programmed that.
func (m *scaleManager) spread(ctx context.Context) (int, error) {
	nodes := len(m.swarm.NodeIDs)
	network, err := m.control.CreateNetwork(ctx, &api.CreateNetworkRequest{Spec: &api.NetworkSpec{
		Annotations: &api.Annotations{Name: "wide"}, DriverConfig: &api.Driver{Name: "overlay"},
	}})
	if err != nil {
		return 0, err
	}
	cursor := m.replica.Follow()
	_, err = m.control.CreateService(ctx, &api.CreateServiceRequest{Spec: &api.ServiceSpec{
		Annotations: &api.Annotations{Name: "wide"},
		Task: &api.TaskSpec{
			Runtime:   &api.TaskSpec_Container{Container: &api.ContainerSpec{Image: testimage.V1}},
			Placement: &api.Placement{MaxReplicas: 1},
			Networks:  []*api.NetworkAttachmentConfig{{Target: network.GetNetwork().GetId()}},
		},
		Mode: &api.ServiceSpec_Replicated{Replicated: &api.ReplicatedService{Replicas: uint64(nodes)}},
	}})
	if err != nil {
		return 0, err
	}
	running := func(s *store.Snapshot) (n int) {
		for t := range s.Tasks() {
			if t.GetStatus().GetState() == api.TaskState_RUNNING {
				n++
			}
		}
		return n
	}
	for running(cursor.Snapshot()) < nodes {
		if _, _, err := cursor.Next(ctx); err != nil {
			return 0, err
		}
	}
	_, err = m.reports.wait(ctx, nodes, cursor.Snapshot().Index(), time.Now())
	return running(cursor.Snapshot()), err
}

// change writes that the next task may get connections no more, or again, and returns the
// milliseconds after which each node had programmed it.
func (m *scaleManager) change(ctx context.Context) ([]float64, error) {
	begin := time.Now()
	written, err := m.replica.Update(ctx, func(tx *store.Tx) error {
		tasks := slices.Collect(tx.Snapshot().Tasks())
		t := model.Clone(tasks[m.changes/2%len(tasks)])
		t.Status.State = api.TaskState_STARTING
		if m.changes%2 == 1 {
			t.Status.State = api.TaskState_RUNNING
		}
		return tx.Update(t)
	})
	if err != nil {
		return nil, err
	}
	m.changes++
	return m.reports.wait(ctx, len(m.swarm.NodeIDs), written.Index(), begin)
}
