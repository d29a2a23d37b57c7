package devnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	netnsDir   = "/run/netns"
	bridgeName = "br0"
	nodeLink   = "eth0"
)

// makeNetNS makes a named network namespace, as `ip netns` shows it.
func makeNetNS(name string) error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return fmt.Errorf("make %s: %w", netnsDir, err)
	}
	path := filepath.Join(netnsDir, name)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("make network namespace: %w", err)
	}
	_ = f.Close()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its new namespace
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("make network namespace: %w", err)
			return
		}
		source := fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())
		if err := unix.Mount(source, path, "", unix.MS_BIND, ""); err != nil {
			done <- fmt.Errorf("name network namespace %s: %w", name, err)
			return
		}
		done <- nil
	}()
	if err := <-done; err != nil {
		_ = os.Remove(path)
		return err
	}
	return nil
}

// removeNetNS removes a named network namespace if it is there.
func removeNetNS(name string) error {
	path := filepath.Join(netnsDir, name)
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount network namespace %s: %w", name, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove network namespace %s: %w", name, err)
	}
	return nil
}

// netnsInode returns what identifies a named namespace, 0 if there is none.
func netnsInode(name string) uint64 {
	var fs unix.Statfs_t
	var st unix.Stat_t
	path := filepath.Join(netnsDir, name)
	if unix.Statfs(path, &fs) != nil || fs.Type != unix.NSFS_MAGIC || unix.Stat(path, &st) != nil {
		return 0
	}
	return st.Ino
}

// within runs f with a netlink handle of a named namespace.
func within(name string, f func(ns netns.NsHandle, h *netlink.Handle) error) error {
	ns, err := netns.GetFromPath(filepath.Join(netnsDir, name))
	if err != nil {
		return fmt.Errorf("open network namespace %s: %w", name, err)
	}
	defer ns.Close() //nolint:errcheck // only read
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("enter network namespace %s: %w", name, err)
	}
	defer h.Close()
	return f(ns, h)
}

// makeBridge makes the swarm's bridge in a namespace of its own.
func (s *Swarm) makeBridge() error {
	if err := makeNetNS(s.bridgeNS()); err != nil {
		return err
	}
	return within(s.bridgeNS(), func(_ netns.NsHandle, h *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = bridgeName
		br := &netlink.Bridge{LinkAttrs: attrs}
		if err := h.LinkAdd(br); err != nil {
			return fmt.Errorf("make bridge: %w", err)
		}
		if err := h.LinkSetUp(br); err != nil {
			return fmt.Errorf("set bridge up: %w", err)
		}
		return nil
	})
}

// plug makes a node's namespace and connects it with the bridge.
func (s *Swarm) plug(n Node) error {
	if err := makeNetNS(n.NetNS); err != nil {
		return err
	}
	return within(n.NetNS, func(ns netns.NsHandle, node *netlink.Handle) error {
		return within(s.bridgeNS(), func(_ netns.NsHandle, bridge *netlink.Handle) error {
			br, err := bridge.LinkByName(bridgeName)
			if err != nil {
				return fmt.Errorf("find bridge: %w", err)
			}
			if old, err := bridge.LinkByName(n.Name); err == nil {
				if err := bridge.LinkDel(old); err != nil {
					return fmt.Errorf("remove old link: %w", err)
				}
			}
			attrs := netlink.NewLinkAttrs()
			attrs.Name, attrs.MasterIndex = n.Name, br.Attrs().Index
			veth := &netlink.Veth{LinkAttrs: attrs, PeerName: nodeLink, PeerNamespace: netlink.NsFd(ns)}
			if err := bridge.LinkAdd(veth); err != nil {
				return fmt.Errorf("make link of %s: %w", n.Name, err)
			}
			if err := bridge.LinkSetUp(veth); err != nil {
				return fmt.Errorf("set link of %s up: %w", n.Name, err)
			}
			return s.address(node, n)
		})
	})
}

func (s *Swarm) address(node *netlink.Handle, n Node) error {
	addr, err := netip.ParseAddr(n.Addr)
	if err != nil {
		return fmt.Errorf("read address of %s: %w", n.Name, err)
	}
	lo, err := node.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find loopback of %s: %w", n.Name, err)
	}
	if err := node.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set loopback of %s up: %w", n.Name, err)
	}
	eth, err := node.LinkByName(nodeLink)
	if err != nil {
		return fmt.Errorf("find link of %s: %w", n.Name, err)
	}
	// The hardware address survives the loss of a node, as a machine's does: neighbours
	// that remember it find the node at once when it returns.
	b := addr.As4()
	if err := node.LinkSetHardwareAddr(eth, net.HardwareAddr{0x02, 0x5e, b[0], b[1], b[2], b[3]}); err != nil {
		return fmt.Errorf("give %s its hardware address: %w", n.Name, err)
	}
	ip := &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(s.Subnet.Bits(), 32)}
	if err := node.AddrAdd(eth, &netlink.Addr{IPNet: ip}); err != nil {
		return fmt.Errorf("give %s its address: %w", n.Name, err)
	}
	if err := node.LinkSetUp(eth); err != nil {
		return fmt.Errorf("set link of %s up: %w", n.Name, err)
	}
	return nil
}

// isCut reports whether the node's link is down.
func (s *Swarm) isCut(n Node) (bool, error) {
	cut := false
	err := within(s.bridgeNS(), func(_ netns.NsHandle, h *netlink.Handle) error {
		link, err := h.LinkByName(n.Name)
		if err == nil {
			cut = link.Attrs().Flags&net.FlagUp == 0
		}
		return err
	})
	return cut, err
}

// Cut pulls the node's cable: everything that it sends and is sent is lost in silence.
func (s *Swarm) Cut(n Node) error { return s.setLink(n, false) }

// Heal plugs the cable in again and mends every partition between the node and others.
func (s *Swarm) Heal(n Node) error {
	if err := s.setLink(n, true); err != nil {
		return err
	}
	for _, other := range s.Nodes {
		if other.Name == n.Name {
			continue
		}
		if err := join(s.deaf(n, other, false), s.deaf(other, n, false)); err != nil {
			return err
		}
	}
	return nil
}

// Partition loses what two nodes send each other; both still reach all others.
func (s *Swarm) Partition(a, b Node) error {
	return join(s.deaf(a, b, true), s.deaf(b, a, true))
}

func join(errs ...error) error { return errors.Join(errs...) }

func (s *Swarm) setLink(n Node, up bool) error {
	return within(s.bridgeNS(), func(_ netns.NsHandle, h *netlink.Handle) error {
		link, err := h.LinkByName(n.Name)
		if err != nil {
			return fmt.Errorf("find link of %s: %w", n.Name, err)
		}
		set := h.LinkSetDown
		if up {
			set = h.LinkSetUp
		}
		if err := set(link); err != nil {
			return fmt.Errorf("set link of %s: %w", n.Name, err)
		}
		return nil
	})
}

// deaf makes from send to nobody what is meant for to: the neighbour's hardware address
// is fixed to one that no one has. Senders see no error, as on a broken wire.
func (s *Swarm) deaf(from, to Node, on bool) error {
	return within(from.NetNS, func(_ netns.NsHandle, h *netlink.Handle) error {
		eth, err := h.LinkByName(nodeLink)
		if err != nil {
			return fmt.Errorf("find link of %s: %w", from.Name, err)
		}
		neigh := &netlink.Neigh{
			LinkIndex: eth.Attrs().Index, Family: netlink.FAMILY_V4, State: netlink.NUD_PERMANENT, IP: net.ParseIP(to.Addr),
			HardwareAddr: net.HardwareAddr{0x02, 0, 0, 0, 0xde, 0xad},
		}
		if on {
			if err := h.NeighSet(neigh); err != nil {
				return fmt.Errorf("part %s from %s: %w", from.Name, to.Name, err)
			}
			return nil
		}
		known, err := h.NeighList(eth.Attrs().Index, netlink.FAMILY_V4)
		if err != nil {
			return fmt.Errorf("list neighbours of %s: %w", from.Name, err)
		}
		for _, k := range known {
			if k.IP.Equal(neigh.IP) && k.State == netlink.NUD_PERMANENT {
				if err := h.NeighDel(&k); err != nil {
					return fmt.Errorf("bring %s to %s: %w", from.Name, to.Name, err)
				}
			}
		}
		return nil
	})
}

// freeSubnet chooses a /24 for a swarm: not one of another dev swarm nor one that the
// machine reaches, so that addresses of different swarms can never be confused.
func freeSubnet(cfg Config) (netip.Prefix, error) {
	names, err := Names(cfg)
	if err != nil {
		return netip.Prefix{}, err
	}
	var taken []netip.Prefix
	for _, name := range names {
		if s, err := Open(cfg, name); err == nil {
			taken = append(taken, s.Subnet)
		}
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		if addr, ok := netip.AddrFromSlice(r.Dst.IP.To4()); ok {
			if bits, _ := r.Dst.Mask.Size(); bits > 0 {
				taken = append(taken, netip.PrefixFrom(addr, bits))
			}
		}
	}
	for i := range 250 * 100 {
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(211 + i/250%40), byte(1 + i%250), 0}), 24)
		free := true
		for _, t := range taken {
			free = free && !t.Overlaps(p)
		}
		if free {
			return p, nil
		}
	}
	return netip.Prefix{}, errors.New("choose a subnet: every candidate is in use")
}
