package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/worker/dataplane"
	wruntime "github.com/skep-dev/skep/worker/runtime"
)

const (
	// changeRounds are the changes whose cost is measured.
	changeRounds = 100
	// changeNodes program each change at once, growRounds times.
	changeNodes = 50
	growRounds  = 30
	manyTasks   = 10000
)

// netchange measures what changes cost: on one node's kernel, and from a task that runs to
// the last of many kernels that leads connections to it.
func (b *bench) netchange(ctx context.Context) error {
	var costs []float64
	for _, n := range []int{100, 5000} {
		cost, err := b.oneChange(ctx, n)
		if err != nil {
			return err
		}
		b.add(row{fmt.Sprintf("g. one change at %d endpoints", n), quantile(cost, 0.5), "ms", spread(cost), "flat"})
		costs = append(costs, quantile(cost, 0.5))
	}
	b.add(row{"g. one change, 5000 to 100 endpoints", costs[1] / costs[0], "x", "medians", "flat"})
	return errors.Join(b.tenThousand(ctx), b.fanOut(ctx))
}

// bigNode is a node of a network with many endpoints on another one, ten to a service.
func (b *bench) bigNode(ctx context.Context, endpoints int, services bool) (l *netLab, n *netNode, u *skepv1.NetworkUpdate, err error) {
	l, err = newNetLab(filepath.Join(b.work, fmt.Sprint("big", endpoints, services)))
	if err != nil {
		return l, nil, nil, err
	}
	ns, err := l.host(1)
	if err != nil {
		return l, nil, nil, err
	}
	if n, err = l.node("node1", ns, wireAddr(1).Addr()); err != nil {
		return l, nil, nil, err
	}
	other := &netNode{id: "node2", addr: wireAddr(2).Addr()}
	u = &skepv1.NetworkUpdate{
		Version: 2, Node: &skepv1.LocalNode{Id: n.id, DataAddr: n.addr.String()},
		Networks: []*skepv1.OverlayNetwork{{Id: "big", Name: "big", Subnets: []*skepv1.OverlaySubnet{{Subnet: "10.16.0.0/16", Gateway: "10.16.0.1", Vni: 4100}}}},
	}
	first := proto.CloneOf(u)
	first.Version, first.Complete = 1, true
	if err := n.Apply(ctx, first); err != nil {
		return l, nil, nil, err
	}
	reader, err := n.attach(ctx, "reader", "big", "10.16.255.1/16")
	if err != nil {
		return l, nil, nil, err
	}
	l.open = append(l.open, reader)
	at := netip.MustParseAddr("10.16.1.0")
	for i := range endpoints {
		at = at.Next()
		service := fmt.Sprint("s", i/10)
		u.Endpoints = append(u.Endpoints, other.endpoint("big", fmt.Sprint("t", i), service, at.String()+"/16"))
		if services && i%10 == 0 {
			vip := netip.AddrFrom4([4]byte{10, 16, byte(128 + i/10>>8), byte(i / 10)})
			u.Services = append(u.Services, &skepv1.BalancedService{
				Id: service, Name: service, Virtual: true, Vips: []*skepv1.VirtualAddress{{NetworkId: "big", Addr: vip.String() + "/16"}},
			})
		}
	}
	return l, n, u, nil
}

// oneChange returns the milliseconds that one node takes for a task that may get connections
// no more, and may again.
func (b *bench) oneChange(ctx context.Context, endpoints int) (took []float64, err error) {
	l, n, u, err := b.bigNode(ctx, endpoints, true)
	defer func() { err = errors.Join(err, l.close(context.WithoutCancel(ctx))) }()
	if err != nil {
		return nil, err
	}
	if err := n.Apply(ctx, u); err != nil {
		return nil, err
	}
	for i := range changeRounds {
		e := proto.CloneOf(u.GetEndpoints()[i*endpoints/changeRounds])
		for _, e.Routable = range []bool{false, true} {
			change := &skepv1.NetworkUpdate{Version: u.GetVersion() + uint64(i), Endpoints: []*skepv1.OverlayEndpoint{proto.CloneOf(e)}}
			// The kernel frees what the last change replaced only after a while, and a change that
			// comes before that waits for it.
			if err := sleep(ctx, 50*time.Millisecond); err != nil {
				return nil, err
			}
			begin := time.Now()
			if err := n.Apply(ctx, change); err != nil {
				return nil, err
			}
			took = append(took, 1e3*time.Since(begin).Seconds())
		}
	}
	if found, err := n.Check(ctx); err != nil || len(found) > 0 {
		return nil, fmt.Errorf("after the changes: %q, %w", found, err)
	}
	return took, nil
}

// tenThousand programs and compares very many endpoints.
func (b *bench) tenThousand(ctx context.Context) error {
	for _, c := range []struct {
		services        bool
		what            string
		program, differ string
	}{
		{false, "endpoints", "< 100", "< 60"},
		{true, "endpoints of 1000 services", "", ""},
	} {
		var programmed, compared []float64
		for range 5 {
			p, d, err := b.programAndCompare(ctx, c.services)
			if err != nil {
				return err
			}
			programmed, compared = append(programmed, p), append(compared, d...)
		}
		b.add(row{fmt.Sprintf("g. %d %s programmed", manyTasks, c.what), quantile(programmed, 0.5), "ms", spread(programmed), c.program})
		b.add(row{fmt.Sprintf("g. %d %s compared", manyTasks, c.what), quantile(compared, 0.5), "ms", spread(compared), c.differ})
	}
	return nil
}

func (b *bench) programAndCompare(ctx context.Context, services bool) (program float64, compare []float64, err error) {
	l, n, u, err := b.bigNode(ctx, manyTasks, services)
	defer func() { err = errors.Join(err, l.close(context.WithoutCancel(ctx))) }()
	if err != nil {
		return 0, nil, err
	}
	begin := time.Now()
	if err := n.Apply(ctx, u); err != nil {
		return 0, nil, err
	}
	program = 1e3 * time.Since(begin).Seconds()
	for range 5 {
		begin = time.Now()
		found, err := n.Check(ctx)
		if err != nil || len(found) > 0 {
			return 0, nil, fmt.Errorf("after programming: %q, %w", found, err)
		}
		compare = append(compare, 1e3*time.Since(begin).Seconds())
	}
	return program, compare, nil
}

// watcher is a simulated node with a real data plane. Its tasks are sandboxes, in which
// nothing runs.
type watcher struct {
	*dataplane.Dataplane

	applied func(u *skepv1.NetworkUpdate)
}

// start connects a task to its networks.
func (w *watcher) start(ctx context.Context, t *api.Task) error {
	req := wruntime.SandboxRequest{ContainerID: t.GetId(), Name: t.GetId(), Mode: "bridge"}
	for _, a := range t.GetNetworks() {
		req.Overlays = append(req.Overlays, wruntime.OverlayRequest{
			NetworkID: a.GetNetwork().GetId(), Name: a.GetNetwork().GetId(), Address: netip.MustParsePrefix(a.GetAddresses()[0]),
		})
	}
	_, err := w.Attach(ctx, req)
	return err
}

// watch programs what the manager says of networks.
func (w *watcher) watch(ctx context.Context, conn grpc.ClientConnInterface, session string) error {
	client := skepv1.NewNetworksClient(conn)
	stream, err := client.Watch(ctx, &skepv1.WatchNetworksRequest{SessionId: session})
	if err != nil {
		return err
	}
	for {
		u, err := stream.Recv()
		if err != nil {
			return err
		}
		if err := w.Apply(ctx, u); err != nil {
			continue // a node's first updates come before its own address; the next one programs all
		}
		w.applied(u)
		if _, err := client.Programmed(ctx, &skepv1.ProgrammedRequest{SessionId: session, Version: u.GetVersion()}); err != nil {
			return err
		}
	}
}

// grown follows a task from the moment at which its node says that it runs, to the last node
// that leads connections to it.
type grown struct {
	mu      sync.Mutex
	ran     map[string]time.Time
	took    map[string]map[string]float64 // seconds, by task and node
	changed chan struct{}
}

func (g *grown) running(task string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ran[task] = time.Now()
}

func (g *grown) applied(node string, u *skepv1.NetworkUpdate) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, e := range u.GetEndpoints() {
		task := e.GetKey().GetTaskId()
		began, ran := g.ran[task]
		if _, twice := g.took[task][node]; !ran || twice || !e.GetRoutable() {
			continue
		}
		if g.took[task] == nil {
			g.took[task] = map[string]float64{}
		}
		g.took[task][node] = time.Since(began).Seconds()
	}
	select {
	case g.changed <- struct{}{}:
	default:
	}
}

// await returns when every node leads to as many tasks.
func (g *grown) await(ctx context.Context, tasks, nodes int) error {
	for {
		g.mu.Lock()
		done := 0
		for _, list := range g.took {
			if len(list) >= nodes {
				done++
			}
		}
		g.mu.Unlock()
		if done >= tasks {
			return nil
		}
		select {
		case <-g.changed:
		case <-time.After(time.Minute):
			return fmt.Errorf("%d of %d tasks are known to all %d nodes after a minute", done, tasks, nodes)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// fanOut measures a real manager, in a process of its own, and 50 nodes with a session and
// a kernel's network namespace each: from the report that a task runs, over the log and the
// dispatcher, to the kernels that lead connections to it.
func (b *bench) fanOut(ctx context.Context) (err error) {
	dir := filepath.Join(b.work, "fanout")
	ids, err := writeScaleSwarm(dir, changeNodes)
	if err != nil {
		return err
	}
	l := &netLab{dir: filepath.Join(dir, "nodes")}
	defer func() { err = errors.Join(err, l.close(context.WithoutCancel(ctx))) }()
	g := &grown{ran: map[string]time.Time{}, took: map[string]map[string]float64{}, changed: make(chan struct{}, 1)}
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
	joined := make(chan error, 2*changeNodes)
	for _, creds := range ids {
		ns, err := l.namespace()
		if err != nil {
			return err
		}
		n, err := l.node(creds.NodeID(), ns, netip.MustParseAddr("127.0.0.1"))
		if err != nil {
			return err
		}
		w := &watcher{Dataplane: n.Dataplane, applied: func(u *skepv1.NetworkUpdate) { g.applied(n.id, u) }}
		group.Go(func() {
			err := simulate(ctx, m.addr, creds, simulated{joined: func() { joined <- nil }, watch: w.watch, start: func(ctx context.Context, t *api.Task) error {
				err := w.start(ctx, t)
				g.running(t.GetId())
				return err
			}})
			if err != nil && ctx.Err() == nil {
				fmt.Fprintln(os.Stderr, "simulated node:", err)
				joined <- err
			}
		})
	}
	for range ids {
		if err := <-joined; err != nil {
			return err
		}
	}
	// One task on each node first, so that all have the network; then one more at a time.
	var answer string
	for i := range growRounds + 1 {
		if err := m.ask(fmt.Sprint("grow ", changeNodes+i), &answer); err != nil {
			return err
		}
		if err := g.await(ctx, changeNodes+i, changeNodes); err != nil {
			return err
		}
		if i == 0 {
			g.mu.Lock()
			clear(g.ran)
			g.mu.Unlock()
		}
	}
	var each, last []float64
	for task := range g.ran {
		list := slices.Collect(maps.Values(g.took[task]))
		each = append(each, list...)
		last = append(last, quantile(list, 1))
	}
	b.add(row{fmt.Sprintf("g. endpoint change at %d nodes, p50", changeNodes), 1e3 * quantile(each, 0.5), "ms", "from the report that a task runs to a kernel that leads to it", ""})
	b.add(row{fmt.Sprintf("g. endpoint change at %d nodes, p99", changeNodes), 1e3 * quantile(each, 0.99), "ms", fmt.Sprintf("n=%d", len(each)), "< 1000"})
	b.add(row{fmt.Sprintf("g. endpoint change at %d nodes, last node", changeNodes), 1e3 * quantile(last, 0.5), "ms", "s: " + spread(last), ""})
	return nil
}
