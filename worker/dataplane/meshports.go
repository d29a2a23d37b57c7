package dataplane

import (
	"cmp"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/netplan"
	"github.com/skep-dev/skep/worker/runtime"
)

// A published port is held on every node, so that no process of the node can be given it
// and never hear from anybody. One that listens there already keeps it: on that node the
// port is not published, which is said by name, until the process has gone.

// meshPort names a published port: protocol and number.
type meshPort [2]uint16

func meshPortOf(p netplan.Published) meshPort { return meshPort{uint16(p.Protocol), p.Published} }

func (p meshPort) String() string {
	return fmt.Sprintf("%d/%s", p[1], p.protocol())
}

func (p meshPort) protocol() string {
	return map[uint16]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_SCTP: "sctp"}[p[0]]
}

// holdPort holds a published port and reports whether this node may publish it. Callers
// hold mu.
func (d *Dataplane) holdPort(p meshPort) bool {
	if d.mesh.held[p] != nil || p.protocol() == "" {
		return true
	}
	var held []*reservation
	err := within(d.hostNS, func() error {
		r, err := bindPort(runtime.PortBinding{Protocol: p.protocol(), HostPort: p[1]})
		if err != nil {
			return err
		}
		held = append(held, r)
		if d.want.Node().GetIngressAddr6() == "" {
			return nil
		}
		if r, err = bindPort6(runtime.PortBinding{Protocol: p.protocol(), HostPort: p[1], HostIP: netip.IPv6Unspecified()}); err == nil {
			held = append(held, r)
		}
		return err
	})
	if err == nil {
		d.mesh.held[p] = held
		d.setTaken(p, taker{})
		return true
	}
	for _, r := range held {
		r.close()
	}
	var by taker
	if model.KindOf(err) == model.Conflict { // a kernel that cannot hold it has nobody who could listen either
		by = d.holderOf(p)
	}
	d.setTaken(p, by)
	return by.name == ""
}

// taker is who has a published port: a name, and the number of its socket if it has one.
type taker struct {
	name  string
	inode uint32
}

// setTaken notes who has a published port, zero for nobody, and says so when it changes.
func (d *Dataplane) setTaken(p meshPort, by taker) {
	switch had := d.mesh.taken[p]; {
	case by.name == "" && had.name != "":
		delete(d.mesh.taken, p)
		d.mesh.moved = true
		d.cfg.Log.Info("port is published on this node now", slog.String("port", p.String()))
	case by.name != "" && had.name == "":
		d.mesh.moved = true
		d.cfg.Log.Warn("port is not published on this node: somebody else listens there; stop that, or publish another port",
			slog.String("port", p.String()), slog.String("listener", by.name))
		d.mesh.taken[p] = by
	case by.name != "":
		d.mesh.taken[p] = by
	}
	d.metrics.taken.Set(float64(len(d.mesh.taken)))
}

// freePort gives a port back that is published no more.
func (d *Dataplane) freePort(p meshPort) {
	for _, r := range d.mesh.held[p] {
		r.close()
	}
	delete(d.mesh.held, p)
	delete(d.mesh.taken, p)
	d.metrics.taken.Set(float64(len(d.mesh.taken)))
}

// open returns those of the published ports that this node may publish; ports that are
// published no more are given back. Callers hold mu.
func (d *Dataplane) open(ports []netplan.Published) []netplan.Published {
	wanted := map[meshPort]bool{}
	var out []netplan.Published
	for _, p := range ports {
		wanted[meshPortOf(p)] = true
		if d.holdPort(meshPortOf(p)) {
			out = append(out, p)
		}
	}
	for _, p := range slices.Concat(slices.Collect(maps.Keys(d.mesh.held)), slices.Collect(maps.Keys(d.mesh.taken))) {
		if !wanted[p] {
			d.freePort(p)
		}
	}
	return out
}

// sayTaken adds what is not published to what a check found.
func (d *Dataplane) sayTaken(x *drift) {
	for _, p := range slices.SortedFunc(maps.Keys(d.mesh.taken), func(a, b meshPort) int { return cmp.Or(cmp.Compare(a[1], b[1]), cmp.Compare(a[0], b[0])) }) {
		x.say(kindRules, "routing mesh: port %s is not published here: %s listens there", p, d.mesh.taken[p].name)
	}
}

// holderOf says who has a port that cannot be bound, zero if nobody listens there: a
// connection that left from it is no reason against publishing it.
func (d *Dataplane) holderOf(p meshPort) taker {
	for id, held := range d.reserved {
		for _, r := range held {
			if r.port.HostPort == p[1] && r.port.Protocol == p.protocol() {
				return taker{name: fmt.Sprintf("container %.12s", id)}
			}
		}
	}
	var sockets []*netlink.Socket
	err := within(d.hostNS, func() error {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			list := netlink.SocketDiagTCP
			if p[0] == unix.IPPROTO_UDP {
				list = netlink.SocketDiagUDP
			}
			some, err := list(family)
			if err != nil {
				return err
			}
			sockets = append(sockets, some...)
		}
		return nil
	})
	if err != nil { // kernels without the means to ask
		return taker{name: someProcess}
	}
	const listening = 10 // TCP_LISTEN
	for _, s := range sockets {
		if s.ID.SourcePort == p[1] && (p[0] == unix.IPPROTO_UDP || s.State == listening) {
			if had := d.mesh.taken[p]; had.inode == s.INode {
				return had
			}
			return taker{processOf(s.INode), s.INode}
		}
	}
	return taker{}
}

// someProcess is who has a port when its name cannot be found out.
const someProcess = "a process of this node"

// processOf names the process that has a socket.
func processOf(inode uint32) string {
	socket := "socket:[" + strconv.FormatUint(uint64(inode), 10) + "]"
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return someProcess
	}
	for _, link := range links {
		if to, err := os.Readlink(link); err != nil || to != socket {
			continue
		}
		pid := strings.Split(link, "/")[2]
		name, err := os.ReadFile(filepath.Join("/proc", pid, "comm"))
		if err != nil {
			break
		}
		return fmt.Sprintf("%s (process %s)", strings.TrimSpace(string(name)), pid)
	}
	return someProcess
}
