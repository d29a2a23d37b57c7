package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/worker/dataplane"
	wruntime "github.com/skep-dev/skep/worker/runtime"
)

// inNS runs f in a network namespace, on a thread that ends with it.
func inNS(ns netns.NsHandle, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread is of no use to others
		if err := netns.Set(ns); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

// newNS makes a namespace that lives as long as its handle is open.
func newNS() (netns.NsHandle, error) {
	var ns netns.NsHandle
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		var err error
		if ns, err = netns.New(); err == nil {
			var lo netlink.Link
			if lo, err = netlink.LinkByName("lo"); err == nil {
				err = netlink.LinkSetUp(lo)
			}
		}
		done <- err
	}()
	return ns, <-done
}

func prefixNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// pair joins two namespaces by links with addresses.
func pair(a netns.NsHandle, nameA string, addrA netip.Prefix, b netns.NsHandle, nameB string, addrB netip.Prefix) error {
	err := inNS(a, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.Flags = nameA, net.FlagUp
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: nameB, PeerNamespace: netlink.NsFd(int(b))})
	})
	if err != nil {
		return err
	}
	return errors.Join(raise(a, nameA, addrA), raise(b, nameB, addrB))
}

// raise gives a link its address, if it has one, and raises it.
func raise(ns netns.NsHandle, name string, addr netip.Prefix) error {
	return inNS(ns, func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if addr.IsValid() {
			if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: prefixNet(addr)}); err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(link)
	})
}

// netLab is two nodes and hosts without Skep, joined by a bridge.
type netLab struct {
	dir   string
	wire  netns.NsHandle
	nodes []*netNode
	open  []netns.NsHandle
	// program runs userspace WireGuard devices; nil for nodes without.
	program []string
}

type netNode struct {
	*dataplane.Dataplane

	id   string
	ns   netns.NsHandle
	addr netip.Addr
}

func newNetLab(dir string) (*netLab, error) {
	l := &netLab{dir: dir}
	var err error
	if l.wire, err = l.namespace(); err != nil {
		return l, err
	}
	return l, inNS(l.wire, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.Flags = "wire", net.FlagUp
		return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs})
	})
}

func (l *netLab) namespace() (netns.NsHandle, error) {
	ns, err := newNS()
	if err == nil {
		l.open = append(l.open, ns)
	}
	return ns, err
}

// host makes a namespace on the wire, at 192.0.2.NUMBER.
func (l *netLab) host(number int) (netns.NsHandle, error) {
	ns, err := l.namespace()
	if err != nil {
		return ns, err
	}
	port := fmt.Sprint("w", number)
	if err := pair(l.wire, port, netip.Prefix{}, ns, "eth0", wireAddr(number)); err != nil {
		return ns, err
	}
	return ns, inNS(l.wire, func() error {
		link, err := netlink.LinkByName(port)
		if err != nil {
			return err
		}
		bridge, err := netlink.LinkByName("wire")
		if err != nil {
			return err
		}
		return netlink.LinkSetMasterByIndex(link, bridge.Attrs().Index)
	})
}

func wireAddr(number int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(number)}), 24)
}

// node makes the data plane of a node in a namespace.
func (l *netLab) node(id string, ns netns.NsHandle, addr netip.Addr) (*netNode, error) {
	n := &netNode{id: id, ns: ns, addr: addr}
	err := inNS(ns, func() (err error) {
		n.Dataplane, err = dataplane.New(dataplane.Config{
			Dir: filepath.Join(l.dir, n.id, "d"), ExecDir: filepath.Join(l.dir, n.id, "x"), Address: netip.MustParsePrefix("172.30.0.1/16"),
			Log:       slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
			WireGuard: l.program,
		})
		return err
	})
	if err == nil {
		l.nodes = append(l.nodes, n)
	}
	return n, err
}

// attach connects a container to a network.
func (n *netNode) attach(ctx context.Context, id, network, addr string) (netns.NsHandle, error) {
	s, err := n.Attach(ctx, wruntime.SandboxRequest{ContainerID: id, Name: id, Mode: "bridge", Overlays: []wruntime.OverlayRequest{
		{NetworkID: network, Name: network, Address: netip.MustParsePrefix(addr)},
	}})
	if err != nil {
		return 0, err
	}
	return netns.GetFromPath(s.NetNS)
}

// endpoint describes a task on the node.
func (n *netNode) endpoint(network, task, service, addr string) *skepv1.OverlayEndpoint {
	return &skepv1.OverlayEndpoint{
		Key: &skepv1.EndpointKey{NetworkId: network, TaskId: task}, ServiceId: service, Name: task, NodeId: n.id, NodeAddr: n.addr.String(),
		Addresses: []string{addr}, Routable: true, KeepsSource: true,
	}
}

func (l *netLab) close(ctx context.Context) error {
	var errs []error
	for _, n := range l.nodes {
		errs = append(errs, n.Destroy(ctx), n.Close())
	}
	for _, ns := range l.open {
		errs = append(errs, ns.Close())
	}
	return errors.Join(errs...)
}
