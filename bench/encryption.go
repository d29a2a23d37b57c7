package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netns"

	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/wireguard"
)

// encryption measures an encrypted network between two nodes against the clear one between
// the same, ports published through an encrypted ingress network against a clear one, and against WireGuard alone: two programs that speak to each other through the
// links of two userspace devices, with nothing of Skep's between.
func (b *bench) encryption(ctx context.Context) (err error) {
	l, err := newNetLab(filepath.Join(b.work, "enc"))
	defer func() { err = errors.Join(err, l.close(context.WithoutCancel(ctx))) }()
	if err != nil {
		return err
	}
	l.program = []string{filepath.Join(b.bin, "skep"), "wireguard"}
	alone, end, err := l.aloneWireGuard(ctx)
	defer func() { err = errors.Join(err, end(context.WithoutCancel(ctx))) }()
	if err != nil {
		return err
	}
	plain, sealed, err := l.clearAndSealed(ctx)
	if err != nil {
		return err
	}
	outside, err := l.host(30)
	if err != nil {
		return err
	}
	open, err := l.publishedElsewhere(ctx, 3, &skepv1.OverlayNetwork{})
	if err != nil {
		return err
	}
	closed, err := l.publishedElsewhere(ctx, 5, &skepv1.OverlayNetwork{Encrypted: true, Encryption: model.WireGuard, EncryptionPort: 51821})
	if err != nil {
		return err
	}
	edge := &way{name: "published port, task elsewhere", from: outside, to: open, plain: plain.name}
	ways := []*way{
		alone, plain, edge,
		{name: "encrypted, two hosts", from: sealed, to: "10.0.2.3:80", plain: alone.name, stream: 0.9},
		{name: "encrypted against clear, two hosts", from: sealed, to: "10.0.2.3:80", plain: plain.name},
		{name: "published port, encrypted", from: outside, to: closed, plain: alone.name},
		{name: "published port, encrypted against clear", from: outside, to: closed, plain: edge.name},
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
	for _, w := range ways {
		var base *way
		for _, p := range ways {
			if p.name == w.plain {
				base = p
			}
		}
		b.report(w, base)
	}
	return nil
}

// path names a namespace for other processes.
func path(ns netns.NsHandle) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(ns)) }

// aloneWireGuard makes two hosts with a userspace device each, and a server behind one.
func (l *netLab) aloneWireGuard(ctx context.Context) (w *way, end func(context.Context) error, err error) {
	var devices []*wireguard.Process
	end = func(ctx context.Context) error {
		var errs []error
		for _, p := range devices {
			errs = append(errs, p.Close(ctx))
		}
		return errors.Join(errs...)
	}
	const port = 51820
	var keys [2]wireguard.Key
	var inner [2]netns.NsHandle
	for i := range keys {
		if keys[i], err = wireguard.NewPrivateKey(); err != nil {
			return nil, end, err
		}
		host, err := l.host(11 + i)
		if err != nil {
			return nil, end, err
		}
		if inner[i], err = l.namespace(); err != nil {
			return nil, end, err
		}
		base := filepath.Join(l.dir, fmt.Sprint("alone", i))
		if err := os.MkdirAll(base, 0o700); err != nil {
			return nil, end, err
		}
		p, err := wireguard.Start(ctx, l.program, host, wireguard.Serving{Namespace: path(inner[i]), Socket: filepath.Join(base, "s"), MTU: 1440}, filepath.Join(base, "log"))
		if err != nil {
			return nil, end, err
		}
		devices = append(devices, p)
	}
	at := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 9, 2, byte(1 + i)}) }
	for i, p := range devices {
		other := 1 - i
		err := p.Write(wireguard.Changes{Private: keys[i], Port: port, Peers: []wireguard.Change{{
			Key: keys[other].Public(), New: true, Preshared: wireguard.Key{1}, Endpoint: netip.AddrPortFrom(wireAddr(11+other).Addr(), port),
			Add: []netip.Prefix{netip.PrefixFrom(at(other), 32)},
		}}})
		if err == nil {
			err = raise(inner[i], wireguard.Link, netip.PrefixFrom(at(i), 24))
		}
		if err != nil {
			return nil, end, err
		}
	}
	if err := serveFigures(ctx, inner[1]); err != nil {
		return nil, end, err
	}
	return &way{name: "userspace WireGuard alone", from: inner[0], to: "10.9.2.2:80"}, end, nil
}

// clearAndSealed makes two nodes with tasks on a clear and on an encrypted network, and
// returns the way through the first and the client's namespace on the second.
func (l *netLab) clearAndSealed(ctx context.Context) (*way, netns.NsHandle, error) {
	for i := range 2 {
		ns, err := l.host(i + 1)
		if err != nil {
			return nil, 0, err
		}
		if _, err := l.node(fmt.Sprint("node", i+1), ns, wireAddr(i+1).Addr()); err != nil {
			return nil, 0, err
		}
	}
	a, z := l.nodes[0], l.nodes[1]
	u := &skepv1.NetworkUpdate{
		Complete: true, Version: 1,
		Networks: []*skepv1.OverlayNetwork{
			{Id: "clear", Name: "clear", Subnets: []*skepv1.OverlaySubnet{{Subnet: "10.0.1.0/24", Gateway: "10.0.1.1", Vni: 4097}}},
			{
				Id: "sealed", Name: "sealed", Encrypted: true, Encryption: model.WireGuard, EncryptionPort: 51820,
				Subnets: []*skepv1.OverlaySubnet{{Subnet: "10.0.2.0/24", Gateway: "10.0.2.1", Vni: 4098}},
			},
		},
		Endpoints: []*skepv1.OverlayEndpoint{
			a.endpoint("clear", "c1", "", "10.0.1.2/24"), z.endpoint("clear", "c2", "", "10.0.1.3/24"),
			a.endpoint("sealed", "s1", "", "10.0.2.2/24"), z.endpoint("sealed", "s2", "", "10.0.2.3/24"),
		},
	}
	for i, n := range l.nodes {
		other := l.nodes[1-i]
		u.Node = &skepv1.LocalNode{Id: n.id, DataAddr: n.addr.String()}
		u.Peers = []*skepv1.NetworkPeer{other.peer("sealed")}
		if err := n.Apply(ctx, u); err != nil {
			return nil, 0, err
		}
	}
	clients := map[string]netns.NsHandle{}
	for _, c := range []struct {
		n                 *netNode
		id, network, addr string
	}{
		{a, "c1", "clear", "10.0.1.2/24"},
		{z, "c2", "clear", "10.0.1.3/24"},
		{a, "s1", "sealed", "10.0.2.2/24"},
		{z, "s2", "sealed", "10.0.2.3/24"},
	} {
		ns, err := c.n.attach(ctx, c.id, c.network, c.addr)
		if err != nil {
			return nil, 0, err
		}
		l.open = append(l.open, ns)
		clients[c.id] = ns
		if c.n == z {
			if err := serveFigures(ctx, ns); err != nil {
				return nil, 0, err
			}
		}
	}
	return &way{name: "clear, two hosts", from: clients["c1"], to: "10.0.1.3:80"}, clients["s1"], nil
}

// publishedElsewhere makes two nodes with an ingress network like the one given, and returns
// where the first leads to a task on the second.
func (l *netLab) publishedElsewhere(ctx context.Context, first int, in *skepv1.OverlayNetwork) (at string, err error) {
	var nodes []*netNode
	for i := first; i < first+2; i++ {
		ns, err := l.host(i)
		if err != nil {
			return "", err
		}
		n, err := l.node(fmt.Sprint("node", i), ns, wireAddr(i).Addr())
		if err != nil {
			return "", err
		}
		nodes = append(nodes, n)
	}
	in.Id, in.Name, in.Ingress = "ingress", "ingress", true
	in.Subnets = []*skepv1.OverlaySubnet{{Subnet: "10.0.0.0/24", Gateway: "10.0.0.1", Vni: 4096}}
	u := &skepv1.NetworkUpdate{
		Complete: true, Version: 1, Networks: []*skepv1.OverlayNetwork{in},
		Services: []*skepv1.BalancedService{{
			Id: "there", Name: "there", Virtual: true, MeshSource: skepv1.MeshSource_MESH_SOURCE_KEEP, Ports: []*skepv1.MeshPort{{Protocol: 6, Target: 80, Published: 8080}},
		}},
		Endpoints: []*skepv1.OverlayEndpoint{nodes[1].endpoint("ingress", "t", "there", "10.0.0.4/24")},
	}
	for i, n := range nodes {
		leg := n.endpoint("ingress", n.id, "", fmt.Sprintf("10.0.0.%d/24", 200+i))
		leg.Name = ""
		u.Endpoints = append(u.Endpoints, leg)
	}
	for i, n := range nodes {
		u.Node = &skepv1.LocalNode{Id: n.id, DataAddr: n.addr.String(), IngressAddr: fmt.Sprintf("10.0.0.%d/24", 200+i)}
		u.Peers = nil
		if in.GetEncrypted() {
			u.Peers = append(u.Peers, nodes[1-i].peer("ingress"))
		}
		if err := n.Apply(ctx, u); err != nil {
			return "", err
		}
	}
	ns, err := nodes[1].attach(ctx, "t", "ingress", "10.0.0.4/24")
	if err != nil {
		return "", err
	}
	l.open = append(l.open, ns)
	return netip.AddrPortFrom(nodes[0].addr, 8080).String(), serveFigures(ctx, ns)
}

// peer is what the other node of an encrypted network is told of this one.
func (n *netNode) peer(network string) *skepv1.NetworkPeer {
	shared := make([]byte, 32)
	shared[0] = 1
	return &skepv1.NetworkPeer{
		Key: &skepv1.PeerKey{NetworkId: network, NodeId: n.id}, Addr: n.addr.String(), PublicKey: publicKey(n.Labels()), PresharedKey: shared,
	}
}

// publicKey reads a node's key from its labels.
func publicKey(labels []string) []byte {
	for _, l := range labels {
		if text, ok := strings.CutPrefix(l, model.WireGuardKeyLabel+"="); ok {
			var key []byte
			if _, err := fmt.Sscanf(text, "%x", &key); err == nil {
				return key
			}
		}
	}
	return nil
}
