package dataplane

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

// reservation holds one host port: a bound socket that does not listen, so that nobody
// else can have the port and nothing answers where the rules do not reach.
type reservation struct {
	fd   int
	port runtime.PortBinding
}

func (r *reservation) close() { _ = unix.Close(r.fd) }

// reserve holds the ports of a container and chooses those that are open. fresh reports
// whether anything was not held before. Callers hold mu.
func (d *Dataplane) reserve(containerID string, want []runtime.PortBinding) (ports []runtime.PortBinding, fresh bool, err error) {
	held := d.reserved[containerID]
	var added []*reservation
	undo := func() {
		for _, r := range added {
			r.close()
		}
	}
	for _, p := range want {
		if r := find(held, p); r != nil {
			ports = append(ports, r.port)
			continue
		}
		var r *reservation
		err := within(d.hostNS, func() (err error) { r, err = bindPort(p); return err })
		if err != nil {
			undo()
			return nil, false, err
		}
		added = append(added, r)
		ports = append(ports, r.port)
	}
	d.reserved[containerID] = append(held, added...)
	return ports, len(added) > 0, nil
}

func find(held []*reservation, p runtime.PortBinding) *reservation {
	for _, r := range held {
		if r.port.Protocol == p.Protocol && r.port.HostIP == p.HostIP && r.port.ContainerPort == p.ContainerPort &&
			(p.HostPort == 0 || r.port.HostPort == p.HostPort) {
			return r
		}
	}
	return nil
}

// bindPort takes one host port; zero takes any that is free.
func bindPort(p runtime.PortBinding) (*reservation, error) {
	if p.Protocol == "" {
		p.Protocol = "tcp"
	}
	host := p.HostIP
	if !host.IsValid() || host.IsUnspecified() {
		host = netip.IPv4Unspecified()
	}
	if !host.Is4() {
		return nil, model.Errorf(model.Unimplemented, "publishing on IPv6 address %s is not implemented by skep yet", host)
	}
	return bindSocket(p, unix.AF_INET, &unix.SockaddrInet4{Port: int(p.HostPort), Addr: host.As4()})
}

// bindPort6 takes one port of all IPv6 addresses, and of those only.
func bindPort6(p runtime.PortBinding) (*reservation, error) {
	return bindSocket(p, unix.AF_INET6, &unix.SockaddrInet6{Port: int(p.HostPort)})
}

func bindSocket(p runtime.PortBinding, family int, at unix.Sockaddr) (*reservation, error) {
	var kind, proto int
	switch p.Protocol {
	case "tcp":
		kind, proto = unix.SOCK_STREAM, unix.IPPROTO_TCP
	case "udp":
		kind, proto = unix.SOCK_DGRAM, unix.IPPROTO_UDP
	case "sctp":
		kind, proto = unix.SOCK_STREAM, unix.IPPROTO_SCTP
	default:
		return nil, model.Errorf(model.Invalid, "invalid protocol %q", p.Protocol)
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, proto)
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.ESOCKTNOSUPPORT) {
		return nil, model.Errorf(model.Unimplemented, "port %d/%s cannot be published: the kernel of this node has no %s", p.ContainerPort, p.Protocol, strings.ToUpper(p.Protocol))
	}
	if err != nil {
		return nil, fmt.Errorf("publish port %d/%s: %w", p.HostPort, p.Protocol, err)
	}
	r := &reservation{fd: fd, port: p}
	if family == unix.AF_INET6 {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if err == nil {
		err = unix.Bind(fd, at)
	}
	if err != nil {
		r.close()
		host := p.HostIP
		if !host.IsValid() {
			host = netip.IPv4Unspecified()
		}
		if errors.Is(err, unix.EADDRINUSE) {
			return nil, model.Errorf(model.Conflict, "Bind for %s:%d failed: port is already allocated", host, p.HostPort)
		}
		return nil, fmt.Errorf("publish %s:%d/%s: %w", host, p.HostPort, p.Protocol, err)
	}
	bound, err := unix.Getsockname(fd)
	if err != nil {
		r.close()
		return nil, fmt.Errorf("publish port %d/%s: %w", p.HostPort, p.Protocol, err)
	}
	if a, ok := bound.(*unix.SockaddrInet4); ok {
		r.port.HostPort = uint16(a.Port)
	}
	return r, nil
}
