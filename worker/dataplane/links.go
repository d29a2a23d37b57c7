package dataplane

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	goruntime "runtime"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/model"
)

// freeNetwork chooses a private network that no address or route of this machine overlaps.
func freeNetwork() (netip.Prefix, error) {
	var taken []netip.Prefix
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		if addr, ok := netip.AddrFromSlice(r.Dst.IP.To4()); ok {
			if ones, _ := r.Dst.Mask.Size(); ones > 0 {
				taken = append(taken, netip.PrefixFrom(addr, ones))
			}
		}
	}
	var candidates []netip.Prefix
	for i := 17; i <= 31; i++ {
		candidates = append(candidates, netip.PrefixFrom(netip.AddrFrom4([4]byte{172, byte(i), 0, 1}), 16))
	}
	for i := 0; i < 256; i += 16 {
		candidates = append(candidates, netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 168, byte(i), 1}), 20))
	}
	for _, c := range candidates {
		free := true
		for _, t := range taken {
			free = free && !c.Overlaps(t)
		}
		if free {
			return c, nil
		}
	}
	return netip.Prefix{}, model.Errorf(model.Exhausted, "no private network is free for containers; name one with --bip")
}

// claimNetwork chooses a free network and takes it by making the bridge, one daemon of
// this network namespace after the other: two that looked at the same time, or before
// either had a container, would choose the same.
func (d *Dataplane) claimNetwork() error {
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close() //nolint:errcheck // gives the lock back
	if err := unix.Flock(int(ns.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock network namespace: %w", err)
	}
	address, err := freeNetwork()
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.state.Address = address
	return d.ensureBridge()
}

// ensureBridge makes the bridge and the table, or mends them. Callers hold mu.
func (d *Dataplane) ensureBridge() error {
	link, err := netlink.LinkByName(d.bridge)
	if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = d.bridge
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil && !errors.Is(err, syscall.EEXIST) {
			return fmt.Errorf("make bridge %s: %w", d.bridge, err)
		}
		link, err = netlink.LinkByName(d.bridge)
	}
	if err != nil {
		return fmt.Errorf("find bridge %s: %w", d.bridge, err)
	}
	address := &netlink.Addr{IPNet: ipNet(d.state.Address)}
	if err := netlink.AddrAdd(link, address); err != nil && !errors.Is(err, syscall.EEXIST) {
		return fmt.Errorf("address bridge %s: %w", d.bridge, err)
	}
	if link.Attrs().Flags&net.FlagUp == 0 {
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("raise bridge %s: %w", d.bridge, err)
		}
	}
	for file, value := range map[string]string{
		"net/ipv4/ip_forward":                           "1",
		"net/ipv4/conf/" + d.bridge + "/route_localnet": "1",
	} {
		if err := sysctl(file, value); err != nil {
			return err
		}
	}
	return d.ensureTable()
}

// sysctl writes a setting if it is not so yet.
func sysctl(file, value string) error {
	path := filepath.Join("/proc/sys", file)
	if data, err := os.ReadFile(path); err == nil && len(data) > 0 && string(data[:len(data)-1]) == value {
		return nil
	}
	if err := os.WriteFile(path, []byte(value), 0o644); err != nil { //nolint:gosec // the kernel's file
		return fmt.Errorf("set %s: %w", file, err)
	}
	return nil
}

func (d *Dataplane) removeBridge() error {
	link, err := netlink.LinkByName(d.bridge)
	if err != nil {
		return nil //nolint:nilerr // there is none
	}
	return netlink.LinkDel(link)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}
}

// mac derives a hardware address from an IP address, so that neighbours' caches stay right
// when a container comes back.
func mac(a netip.Addr) net.HardwareAddr {
	b := a.As4()
	return net.HardwareAddr{0x02, 0x53, b[0], b[1], b[2], b[3]}
}

func (d *Dataplane) netns(containerID string) string {
	return filepath.Join(d.cfg.ExecDir, containerID)
}

// makeNamespace pins a new network namespace with its loopback up, unless it is there.
func (d *Dataplane) makeNamespace(containerID string) error {
	path := d.netns(containerID)
	if ns, err := netns.GetFromPath(path); err == nil {
		defer ns.Close() //nolint:errcheck // only looked at
		var st unix.Statfs_t
		if unix.Statfs(path, &st) == nil && st.Type == unix.NSFS_MAGIC {
			return nil
		}
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("make network namespace: %w", err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("make network namespace: %w", err)
	}
	if err := unshareTo(path); err != nil {
		return errors.Join(fmt.Errorf("make network namespace: %w", err), os.Remove(path))
	}
	h, err := handleAt(path)
	if err != nil {
		return err
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find loopback: %w", err)
	}
	return h.LinkSetUp(lo)
}

// unshareTo makes a namespace on a thread of its own and mounts it at path. The thread
// returns to the old namespace before it is used for anything else.
func unshareTo(path string) error {
	done := make(chan error, 1)
	go func() {
		goruntime.LockOSThread()
		old, err := netns.Get()
		if err != nil {
			done <- err
			return
		}
		defer old.Close() //nolint:errcheck // a read-only descriptor
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- err
			goruntime.UnlockOSThread()
			return
		}
		err = unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), path, "", unix.MS_BIND, "")
		if back := netns.Set(old); back != nil {
			done <- errors.Join(err, back) // the thread stays locked and dies with this goroutine
			return
		}
		goruntime.UnlockOSThread()
		done <- err
	}()
	return <-done
}

func handleAt(path string) (*netlink.Handle, error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close() //nolint:errcheck // the handle has its own
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("enter network namespace: %w", err)
	}
	return h, nil
}

// removeNamespace unmounts a namespace; the kernel reaps its links.
func (d *Dataplane) removeNamespace(containerID string) error {
	path := d.netns(containerID)
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount network namespace: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove network namespace: %w", err)
	}
	return nil
}

// connect makes the namespace of a container with a link to the bridge. Callers hold mu.
func (d *Dataplane) connect(containerID string, addr netip.Addr) error {
	if err := d.makeNamespace(containerID); err != nil {
		return err
	}
	path := d.netns(containerID)
	h, err := handleAt(path)
	if err != nil {
		return err
	}
	defer h.Close()
	if _, err := h.LinkByName("eth0"); err != nil {
		if err := d.addVeth(path, addr); err != nil {
			return err
		}
	}
	eth, err := h.LinkByName("eth0")
	if err != nil {
		return fmt.Errorf("find eth0: %w", err)
	}
	prefix := netip.PrefixFrom(addr, d.state.Address.Bits())
	if err := h.AddrAdd(eth, &netlink.Addr{IPNet: ipNet(prefix)}); err != nil && !errors.Is(err, syscall.EEXIST) {
		return fmt.Errorf("address eth0: %w", err)
	}
	if err := h.LinkSetUp(eth); err != nil {
		return fmt.Errorf("raise eth0: %w", err)
	}
	route := &netlink.Route{LinkIndex: eth.Attrs().Index, Gw: d.state.Address.Addr().AsSlice()}
	if err := h.RouteAdd(route); err != nil && !errors.Is(err, syscall.EEXIST) {
		return fmt.Errorf("add default route: %w", err)
	}
	return nil
}

// addVeth makes a pair of links: one end on the bridge, eth0 in the namespace.
func (d *Dataplane) addVeth(path string, addr netip.Addr) error {
	bridge, err := netlink.LinkByName(d.bridge)
	if err != nil {
		return fmt.Errorf("find bridge %s: %w", d.bridge, err)
	}
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close() //nolint:errcheck // a read-only descriptor
	attrs := netlink.NewLinkAttrs()
	b := addr.As4()
	attrs.Name = fmt.Sprintf("%.6s%02x%02x%02x%02x", vethPrefix(d.bridge), b[0], b[1], b[2], b[3])
	attrs.MasterIndex = bridge.Attrs().Index
	attrs.Flags = net.FlagUp
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerHardwareAddr: mac(addr), PeerNamespace: netlink.NsFd(int(ns))}
	err = netlink.LinkAdd(veth)
	if errors.Is(err, syscall.EEXIST) {
		// The kernel has not yet reaped the link of the address's last holder.
		if old, findErr := netlink.LinkByName(attrs.Name); findErr == nil {
			if err := netlink.LinkDel(old); err != nil {
				return fmt.Errorf("remove stale link: %w", err)
			}
		}
		err = netlink.LinkAdd(veth)
	}
	if err != nil {
		return fmt.Errorf("make link to the bridge: %w", err)
	}
	return nil
}

// vethPrefix tells the links of several daemons in one namespace apart.
func vethPrefix(bridge string) string {
	if len(bridge) > 4 {
		return "sk" + bridge[len(bridge)-4:]
	}
	return "sk" + bridge
}
