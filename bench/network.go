package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/skep-dev/skep/api/skepv1"
)

const (
	// networkRounds are the rounds in which all ways are measured, one after the other.
	networkRounds = 7
	streamTime    = time.Second
	requestTime   = 500 * time.Millisecond
	connectTime   = 700 * time.Millisecond
)

// way is one way from a client to a server. Its figures are given as ratios to those of
// another, its plain way, in the same round.
type way struct {
	name  string
	from  netns.NsHandle
	to    string
	plain string // empty for a plain way itself
	// stream and connect are the ratios wanted, zero where none is.
	stream, connect float64
	seen            []figures
}

// figures are one measurement of a way.
type figures struct {
	stream   float64 // Gbit/s of one connection
	p50, p99 float64 // µs from a byte to its answer
	connect  float64 // connections with one answer, one after the other, per second
	setup    float64 // µs that one of these takes, lower quartile: what others do meanwhile counts less
}

// network measures the data plane itself, without containers: clients and servers in this
// process, in namespaces that the data plane made for them.
func (b *bench) network(ctx context.Context) (err error) {
	l, err := newNetLab(filepath.Join(b.work, "net"))
	defer func() { err = errors.Join(err, l.close(context.WithoutCancel(ctx))) }()
	if err != nil {
		return err
	}
	ways, err := l.ways(ctx)
	if err != nil {
		return err
	}
	for round := range networkRounds {
		fmt.Fprintf(os.Stderr, "round %d of %d\n", round+1, networkRounds)
		for _, w := range ways {
			f, err := w.measure(ctx)
			if err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
			w.seen = append(w.seen, f)
		}
	}
	byName := map[string]*way{}
	for _, w := range ways {
		byName[w.name] = w
	}
	for _, w := range ways {
		b.report(w, byName[w.plain])
	}
	return nil
}

// report adds the rows of a way.
func (b *bench) report(w, plain *way) {
	of := func(w *way, pick func(figures) float64) []float64 {
		var out []float64
		for _, f := range w.seen {
			out = append(out, pick(f))
		}
		return out
	}
	for _, m := range []struct {
		name, unit string
		wanted     float64
		pick       func(figures) float64
	}{
		{"stream", "Gbit/s", w.stream, func(f figures) float64 { return f.stream }},
		{"connections", "/s", w.connect, func(f figures) float64 { return f.connect }},
		{"connection p25", "µs", 0, func(f figures) float64 { return f.setup }},
		{"request p50", "µs", 0, func(f figures) float64 { return f.p50 }},
		{"request p99", "µs", 0, func(f figures) float64 { return f.p99 }},
	} {
		values := of(w, m.pick)
		if plain == nil {
			b.add(row{"f. " + w.name + ": " + m.name, quantile(values, 0.5), m.unit, spread(values), ""})
			continue
		}
		ratios := make([]float64, 0, len(values))
		for i, p := range of(plain, m.pick) {
			ratios = append(ratios, values[i]/p)
		}
		wanted := ""
		if m.wanted != 0 {
			wanted = fmt.Sprintf(">= %.2f", m.wanted)
		}
		b.add(row{
			"f. " + w.name + ": " + m.name, quantile(ratios, 0.5), "x " + plain.name, fmt.Sprintf("%.4g %s; ratios %s", quantile(values, 0.5), m.unit, spread(ratios)), wanted,
		})
	}
}

// ways makes two nodes, what runs on them, and the same without Skep, and returns the ways
// between them. A kind of network that is to be compared, such as an encrypted one, needs a
// network of its own here, two tasks on it and a way with the plain one that it is held to.
func (l *netLab) ways(ctx context.Context) ([]*way, error) {
	const veth, vxlan, host = "plain veth", "plain VXLAN", "plain host"
	left, right, err := l.plainVeth()
	if err != nil {
		return nil, err
	}
	near, far, err := l.plainVXLAN()
	if err != nil {
		return nil, err
	}
	outside, err := l.host(30)
	if err != nil {
		return nil, err
	}
	var nodes []*netNode
	for i := range 2 {
		ns, err := l.host(i + 1)
		if err != nil {
			return nil, err
		}
		n, err := l.node(fmt.Sprint("node", i+1), ns, wireAddr(i+1).Addr())
		if err != nil {
			return nil, err
		}
		nodes = append(nodes, n)
	}
	a, z := nodes[0], nodes[1]
	published := func(id string, port uint32, source skepv1.MeshSource, vip string) *skepv1.BalancedService {
		s := &skepv1.BalancedService{Id: id, Name: id, Virtual: true, MeshSource: source, Ports: []*skepv1.MeshPort{{Protocol: 6, Target: 80, Published: port}}}
		if vip != "" {
			s.Vips = []*skepv1.VirtualAddress{{NetworkId: "front", Addr: vip}}
		}
		return s
	}
	const keep, masquerade = skepv1.MeshSource_MESH_SOURCE_KEEP, skepv1.MeshSource_MESH_SOURCE_MASQUERADE
	leg := func(n *netNode, addr string) *skepv1.OverlayEndpoint {
		e := n.endpoint("ingress", n.id, "", addr)
		e.Name = ""
		return e
	}
	u := &skepv1.NetworkUpdate{
		Complete: true, Version: 1,
		Networks: []*skepv1.OverlayNetwork{
			{Id: "ingress", Name: "ingress", Ingress: true, Subnets: []*skepv1.OverlaySubnet{{Subnet: "10.0.0.0/24", Gateway: "10.0.0.1", Vni: 4096}}},
			{Id: "front", Name: "front", Subnets: []*skepv1.OverlaySubnet{{Subnet: "10.0.1.0/24", Gateway: "10.0.1.1", Vni: 4097}}},
		},
		Services: []*skepv1.BalancedService{
			published("here", 8080, keep, "10.0.1.100/24"), published("there", 8081, keep, "10.0.1.101/24"), published("hidden", 8082, masquerade, ""),
		},
		Endpoints: []*skepv1.OverlayEndpoint{
			leg(a, "10.0.0.200/24"), leg(z, "10.0.0.201/24"),
			a.endpoint("front", "client", "", "10.0.1.2/24"), a.endpoint("front", "h", "here", "10.0.1.3/24"), z.endpoint("front", "t", "there", "10.0.1.4/24"),
			a.endpoint("ingress", "h", "here", "10.0.0.3/24"), z.endpoint("ingress", "t", "there", "10.0.0.4/24"), z.endpoint("ingress", "s", "hidden", "10.0.0.5/24"),
		},
	}
	for i, n := range nodes {
		u.Node = &skepv1.LocalNode{Id: n.id, DataAddr: n.addr.String(), IngressAddr: fmt.Sprintf("10.0.0.%d/24", 200+i)}
		if err := n.Apply(ctx, u); err != nil {
			return nil, err
		}
	}
	var client netns.NsHandle
	for _, c := range []struct {
		n                 *netNode
		id, network, addr string
	}{
		{a, "client", "front", "10.0.1.2/24"},
		{a, "h", "front", "10.0.1.3/24"},
		{z, "t", "front", "10.0.1.4/24"},
		{a, "h-edge", "ingress", "10.0.0.3/24"},
		{z, "t-edge", "ingress", "10.0.0.4/24"},
		{z, "s-edge", "ingress", "10.0.0.5/24"},
	} {
		ns, err := c.n.attach(ctx, c.id, c.network, c.addr)
		if err != nil {
			return nil, err
		}
		l.open = append(l.open, ns)
		if c.id == "client" {
			client = ns
			continue
		}
		if err := serveFigures(ctx, ns); err != nil {
			return nil, err
		}
	}
	for _, ns := range []netns.NsHandle{right, far, a.ns} {
		if err := serveFigures(ctx, ns); err != nil {
			return nil, err
		}
	}
	return []*way{
		{name: veth, from: left, to: "10.9.0.2:80"},
		{name: vxlan, from: near, to: "10.9.1.2:80"},
		{name: host, from: outside, to: "192.0.2.1:80"},
		{name: "task to task, one host", from: client, to: "10.0.1.3:80", plain: veth},
		{name: "service address, one host", from: client, to: "10.0.1.100:80", plain: "task to task, one host", stream: 0.95, connect: 0.8},
		{name: "task to task, two hosts", from: client, to: "10.0.1.4:80", plain: vxlan, stream: 0.95},
		{name: "service address, two hosts", from: client, to: "10.0.1.101:80", plain: "task to task, two hosts", stream: 0.95, connect: 0.8},
		{name: "published port, task on the entry node", from: outside, to: "192.0.2.1:8080", plain: host},
		{name: "published port, task elsewhere", from: outside, to: "192.0.2.1:8081", plain: vxlan},
		{name: "published port, task elsewhere, masqueraded", from: outside, to: "192.0.2.1:8082", plain: vxlan},
	}, nil
}

// plainVeth is two namespaces joined by a pair of links.
func (l *netLab) plainVeth() (left, right netns.NsHandle, err error) {
	if left, err = l.namespace(); err != nil {
		return left, right, err
	}
	if right, err = l.namespace(); err != nil {
		return left, right, err
	}
	return left, right, pair(left, "eth0", netip.MustParsePrefix("10.9.0.1/24"), right, "eth0", netip.MustParsePrefix("10.9.0.2/24"))
}

// plainVXLAN is two hosts on the wire with a VXLAN device each.
func (l *netLab) plainVXLAN() (near, far netns.NsHandle, err error) {
	ends := []netns.NsHandle{near, far}
	for i := range ends {
		if ends[i], err = l.host(21 + i); err != nil {
			return near, far, err
		}
		err = inNS(ends[i], func() error {
			attrs := netlink.NewLinkAttrs()
			attrs.Name, attrs.MTU = "vx0", 1450
			return netlink.LinkAdd(&netlink.Vxlan{
				LinkAttrs: attrs, VxlanId: 77, Port: 4789, SrcAddr: wireAddr(21 + i).Addr().AsSlice(), Group: wireAddr(22 - i).Addr().AsSlice(),
			})
		})
		if err == nil {
			err = raise(ends[i], "vx0", netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 9, 1, byte(1 + i)}), 24))
		}
		if err != nil {
			return near, far, err
		}
	}
	return ends[0], ends[1], nil
}

// serveFigures answers on port 80 of a namespace until ctx ends. A connection begins with
// what its client wants: s swallows all and then tells how much that was, e echoes.
func serveFigures(ctx context.Context, ns netns.NsHandle) error {
	var l net.Listener
	err := inNS(ns, func() (err error) {
		l, err = new(net.ListenConfig).Listen(ctx, "tcp4", ":80")
		return err
	})
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go answer(c)
		}
	}()
	return nil
}

func answer(c net.Conn) {
	defer c.Close()
	buf := make([]byte, 256<<10)
	if _, err := io.ReadFull(c, buf[:1]); err != nil {
		return
	}
	sum := uint64(0)
	for swallow := buf[0] == 's'; ; {
		n, err := c.Read(buf)
		sum += uint64(n)
		switch {
		case err != nil && swallow:
			_, _ = c.Write(binary.BigEndian.AppendUint64(nil, sum))
			return
		case err != nil:
			return
		case swallow:
			continue
		}
		if _, err := c.Write(buf[:n]); err != nil {
			return
		}
	}
}

// measure takes all figures of a way once.
func (w *way) measure(ctx context.Context) (f figures, err error) {
	err = inNS(w.from, func() error {
		if f.stream, err = w.streams(ctx); err != nil {
			return err
		}
		if f.p50, f.p99, err = w.requests(ctx); err != nil {
			return err
		}
		f.connect, f.setup, err = w.connects(ctx)
		return err
	})
	return f, err
}

func (w *way) dial(ctx context.Context, what string) (*net.TCPConn, error) {
	d := net.Dialer{Timeout: 5 * time.Second}
	c, err := d.DialContext(ctx, "tcp4", w.to)
	if err != nil {
		return nil, err
	}
	if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return nil, err
	}
	_, err = io.WriteString(c, what)
	tcp, _ := c.(*net.TCPConn)
	return tcp, err
}

func (w *way) streams(ctx context.Context) (float64, error) {
	c, err := w.dial(ctx, "s")
	if err != nil {
		return 0, err
	}
	defer c.Close()
	buf := make([]byte, 256<<10)
	begin := time.Now()
	for time.Since(begin) < streamTime {
		if _, err := c.Write(buf); err != nil {
			return 0, err
		}
	}
	if err := c.CloseWrite(); err != nil {
		return 0, err
	}
	var sum [8]byte
	if _, err := io.ReadFull(c, sum[:]); err != nil {
		return 0, err
	}
	return float64(binary.BigEndian.Uint64(sum[:])) * 8 / time.Since(begin).Seconds() / 1e9, nil
}

func (w *way) requests(ctx context.Context) (p50, p99 float64, err error) {
	c, err := w.dial(ctx, "e")
	if err != nil {
		return 0, 0, err
	}
	defer c.Close()
	var took []float64
	one := []byte{1}
	for begin := time.Now(); time.Since(begin) < requestTime; {
		sent := time.Now()
		if _, err := c.Write(one); err != nil {
			return 0, 0, err
		}
		if _, err := io.ReadFull(c, one); err != nil {
			return 0, 0, err
		}
		took = append(took, float64(time.Since(sent).Nanoseconds())/1e3)
	}
	return quantile(took, 0.5), quantile(took, 0.99), nil
}

func (w *way) connects(ctx context.Context) (rate, setup float64, err error) {
	var took []float64
	begin := time.Now()
	for time.Since(begin) < connectTime {
		from := time.Now()
		c, err := w.dial(ctx, "ex")
		if err != nil {
			return 0, 0, err
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			return 0, 0, err
		}
		_ = c.SetLinger(0) // no port rests for a minute
		_ = c.Close()
		took = append(took, float64(time.Since(from).Nanoseconds())/1e3)
	}
	return float64(len(took)) / time.Since(begin).Seconds(), quantile(took, 0.25), nil
}
