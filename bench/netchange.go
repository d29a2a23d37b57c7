package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api/skepv1"
)

const (
	// changeRounds are the changes whose cost is measured.
	changeRounds = 100
	// changeNodes program each change at once, fanRounds times.
	changeNodes = 50
	fanRounds   = 20
	manyTasks   = 10000
)

// netchange measures what changes cost on one node.
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
	return nil
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

// fanOut returns how long it takes until one change is in the kernels of many nodes that
// are told of it at once: each a network namespace with a data plane and a sandbox, all in
// this process. What the manager adds before is in fanLeader.
func (b *bench) fanOut(ctx context.Context) (err error) {
	l := &netLab{dir: filepath.Join(b.work, "fanout")}
	defer func() { err = errors.Join(err, l.close(context.WithoutCancel(ctx))) }()
	u := &skepv1.NetworkUpdate{
		Complete: true, Version: 1,
		Networks: []*skepv1.OverlayNetwork{{Id: "wide", Name: "wide", Subnets: []*skepv1.OverlaySubnet{{Subnet: "10.16.0.0/16", Gateway: "10.16.0.1", Vni: 4100}}}},
		Services: []*skepv1.BalancedService{{Id: "s", Name: "s", Virtual: true, Vips: []*skepv1.VirtualAddress{{NetworkId: "wide", Addr: "10.16.9.9/16"}}}},
	}
	task := func(i int) string { return fmt.Sprintf("10.16.1.%d/16", 1+i) }
	for i := range changeNodes {
		n, err := l.loneNode(i)
		if err != nil {
			return err
		}
		u.Endpoints = append(u.Endpoints, n.endpoint("wide", fmt.Sprint("t", i), "s", task(i)))
	}
	for i, n := range l.nodes {
		mine := proto.CloneOf(u)
		mine.Node = &skepv1.LocalNode{Id: n.id, DataAddr: n.addr.String()}
		if err := n.Apply(ctx, mine); err != nil {
			return err
		}
		ns, err := n.attach(ctx, fmt.Sprint("t", i), "wide", task(i))
		if err != nil {
			return err
		}
		l.open = append(l.open, ns)
	}
	var each, last []float64
	for i := range fanRounds {
		e := proto.CloneOf(u.GetEndpoints()[i%changeNodes])
		for _, e.Routable = range []bool{false, true} {
			if err := sleep(ctx, 50*time.Millisecond); err != nil {
				return err
			}
			change := &skepv1.NetworkUpdate{Version: uint64(2 + i), Endpoints: []*skepv1.OverlayEndpoint{proto.CloneOf(e)}}
			took, err := l.applyAll(ctx, change)
			if err != nil {
				return err
			}
			each, last = append(each, took...), append(last, quantile(took, 1))
		}
	}
	name := fmt.Sprintf("g. endpoint change at %d nodes at once: ", changeNodes)
	b.add(row{name + "a node, p50", quantile(each, 0.5), "ms", "all in one process on this machine", ""})
	b.add(row{name + "a node, p99", quantile(each, 0.99), "ms", fmt.Sprintf("n=%d", len(each)), "< 1000"})
	b.add(row{name + "the last node", quantile(last, 0.5), "ms", spread(last), ""})
	return nil
}

// applyAll gives all nodes an update and returns when each had programmed it, in ms.
func (l *netLab) applyAll(ctx context.Context, u *skepv1.NetworkUpdate) ([]float64, error) {
	took, errs := make([]float64, len(l.nodes)), make([]error, len(l.nodes))
	var group sync.WaitGroup
	begin := time.Now()
	for i, n := range l.nodes {
		group.Go(func() {
			errs[i] = n.Apply(ctx, proto.CloneOf(u))
			took[i] = 1e3 * time.Since(begin).Seconds()
		})
	}
	group.Wait()
	return took, errors.Join(errs...)
}
