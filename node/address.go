package node

import (
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/skep-dev/skep/core/model"
)

// defaultPort is where managers listen unless told otherwise.
const defaultPort = 2377

// link is one network interface of this machine, as far as choosing an address needs it.
type link struct {
	name     string
	loopback bool
	addrs    []netip.Addr
}

// systemLinks lists the interfaces that are up.
func systemLinks() ([]link, error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return nil, model.Wrap(model.Internal, err, "list network interfaces")
	}
	var links []link
	for _, i := range interfaces {
		if i.Flags&net.FlagUp == 0 {
			continue
		}
		addrs, err := i.Addrs()
		if err != nil {
			return nil, model.Wrap(model.Internal, err, "list addresses of "+i.Name)
		}
		l := link{name: i.Name, loopback: i.Flags&net.FlagLoopback != 0}
		for _, a := range addrs {
			if prefix, err := netip.ParsePrefix(a.String()); err == nil {
				l.addrs = append(l.addrs, prefix.Addr().Unmap())
			}
		}
		links = append(links, l)
	}
	return links, nil
}

// resolveListen turns the user's listen address (IP or interface, port optional) into
// host and port. An empty one is refused with Docker's text.
func resolveListen(links []link, spec string) (netip.AddrPort, error) {
	if spec == "" {
		return netip.AddrPort{}, model.Errorf(model.Invalid, `invalid ListenAddr "": invalid empty address`)
	}
	host, port, err := splitHostPort(spec)
	if err == nil {
		if addr, ok := resolveHost(links, host); ok {
			return netip.AddrPortFrom(addr, port), nil
		}
	}
	return netip.AddrPort{}, model.Errorf(model.Invalid,
		"listen address must be an IP address or network interface (with optional port number)")
}

// resolveAdvertise chooses the address under which others reach this manager: what the
// user said, else the listen address if it is one, else the machine's only address.
// The port is the listener's unless said otherwise.
func resolveAdvertise(links []link, spec string, listen netip.AddrPort) (netip.AddrPort, error) {
	if spec != "" {
		return parseAdvertise(links, spec, listen.Port())
	}
	if !listen.Addr().IsUnspecified() {
		return listen, nil
	}
	addr, err := onlyAddress(links)
	if err != nil {
		return netip.AddrPort{}, err
	}
	return netip.AddrPortFrom(addr, listen.Port()), nil
}

// parseAdvertise reads what the user said; port is the one without a word.
func parseAdvertise(links []link, spec string, port uint16) (netip.AddrPort, error) {
	invalid := model.Errorf(model.Invalid,
		"advertise address must be a non-zero IP address or network interface (with optional port number)")
	host, said, err := splitHostPort(spec)
	if err != nil {
		return netip.AddrPort{}, invalid
	}
	if _, _, hasPort := cutPort(spec); hasPort {
		port = said
	}
	addr, ok := resolveHost(links, host)
	if !ok || addr.IsUnspecified() {
		return netip.AddrPort{}, invalid
	}
	return netip.AddrPortFrom(addr, port), nil
}

// resolveDataPath checks the address for overlay traffic; empty means the advertised one.
func resolveDataPath(links []link, spec string) (string, error) {
	if spec == "" {
		return "", nil
	}
	if addr, ok := resolveHost(links, spec); ok && !addr.IsUnspecified() {
		return addr.String(), nil
	}
	return "", model.Errorf(model.Invalid,
		"data path address must be a non-zero IP address or network interface (without a port number)")
}

// onlyAddress returns the machine's address if there is no choice. IPv4 goes before IPv6.
func onlyAddress(links []link) (netip.Addr, error) {
	for _, want4 := range []bool{true, false} {
		var found netip.Addr
		var on string
		for _, l := range links {
			if l.loopback || internalLink(l.name) {
				continue
			}
			for _, a := range l.addrs {
				if a.Is4() != want4 || !a.IsGlobalUnicast() {
					continue
				}
				switch {
				case !found.IsValid():
					found, on = a, l.name
				case on == l.name:
					return netip.Addr{}, model.Errorf(model.Invalid,
						"could not choose an IP address to advertise since this system has multiple addresses on interface %s (%s and %s)", on, found, a)
				default:
					return netip.Addr{}, model.Errorf(model.Invalid,
						"could not choose an IP address to advertise since this system has multiple addresses on different interfaces (%s on %s and %s on %s)", found, on, a, l.name)
				}
			}
		}
		if found.IsValid() {
			return found, nil
		}
	}
	return netip.Addr{}, model.Errorf(model.Invalid, "could not find the system's IP address")
}

// internalLink reports whether an interface belongs to container networks.
func internalLink(name string) bool {
	for _, prefix := range []string{"docker", "skep", "br-", "veth"} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	mesh, is := strings.CutPrefix(name, "ing") // and what follows skep in the local bridge's name
	return is && len(mesh) == 8
}

// resolveHost turns an IP address or interface name into an address. A name stands for
// the interface's only IPv4 address, else its only IPv6 address.
func resolveHost(links []link, host string) (netip.Addr, bool) {
	if addr, err := netip.ParseAddr(host); err == nil {
		return addr.Unmap(), true
	}
	for _, l := range links {
		if l.name != host {
			continue
		}
		var best netip.Addr
		for _, a := range l.addrs {
			if !best.IsValid() || (a.Is4() && !best.Is4()) {
				best = a
			}
		}
		return best, best.IsValid()
	}
	return netip.Addr{}, false
}

// splitHostPort splits host[:port]; without a port it is defaultPort.
func splitHostPort(spec string) (host string, port uint16, err error) {
	host, text, ok := cutPort(spec)
	if !ok {
		return host, defaultPort, nil
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return "", 0, model.Errorf(model.Invalid, "port %q is not a number below 65536", text)
	}
	return host, uint16(n), nil
}

// cutPort cuts the port off, if there is one. IPv6 addresses with a port need brackets.
func cutPort(spec string) (host, port string, ok bool) {
	if h, p, err := net.SplitHostPort(spec); err == nil {
		return h, p, true
	}
	return strings.Trim(spec, "[]"), "", false
}

// withDefaultPort returns addr, an IP address or host name, with the default port if it
// has none.
func withDefaultPort(addr string) string {
	host, port, ok := cutPort(addr)
	if !ok {
		port = strconv.Itoa(defaultPort)
	}
	return net.JoinHostPort(host, port)
}
