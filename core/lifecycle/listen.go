package lifecycle

import (
	"net/netip"
	"slices"
	"time"

	"github.com/skep-dev/skep/api"
)

// ListenWait is how long after its start a task without a health check is held back at most
// because it does not listen yet. Most servers listen within a second; one that takes longer
// can say so by a check, and one that never listens where it was expected to, since images
// expose more than they serve, must not look as if it hung.
const ListenWait = 5 * time.Second

// Port is a port of a container, by the number of the IP protocol.
type Port struct {
	Protocol uint8
	Number   uint16
}

// Socket takes what comes to an address, unspecified for all, and a port: it listens, or for
// datagrams is bound and not connected.
type Socket struct {
	Protocol uint8
	Addr     netip.AddrPort
	Only6    bool // it takes nothing of IPv4
}

// IP protocols whose sockets tell whether a task listens.
const (
	tcp = 6
	udp = 17
)

// Listeners is where a task is expected to listen before anybody is led to it. The zero value
// expects nothing.
type Listeners struct {
	ports []Port
	all   bool // at all ports, not just one of them
	six   bool // others reach the task by IPv6 as well
}

// Expected returns where a task listens as far as can be known: at the target of every port
// that its service publishes, else at one at least of those that its image exposes. A job
// serves nobody.
func Expected(task *api.Task, exposed []Port) Listeners {
	if task.GetJobIteration() != nil {
		return Listeners{}
	}
	var published []Port
	for _, p := range task.GetEndpoint().GetSpec().GetPorts() {
		switch p.GetProtocol() {
		case api.PortConfig_TCP:
			published = append(published, Port{tcp, uint16(p.GetTargetPort())})
		case api.PortConfig_UDP:
			published = append(published, Port{udp, uint16(p.GetTargetPort())})
		case api.PortConfig_SCTP: // not watched
		}
	}
	if len(published) > 0 {
		return Listeners{published, true, reached6(task)}
	}
	return Listeners{slices.DeleteFunc(slices.Clone(exposed), func(p Port) bool { return p.Protocol != tcp && p.Protocol != udp }), false, reached6(task)}
}

// reached6 reports whether a task has an IPv6 address in one of its networks.
func reached6(task *api.Task) bool {
	return slices.ContainsFunc(task.GetNetworks(), func(n *api.NetworkAttachment) bool {
		return slices.ContainsFunc(n.GetAddresses(), func(text string) bool {
			p, err := netip.ParsePrefix(text)
			return err == nil && p.Addr().Is6()
		})
	})
}

// None reports whether nothing is expected.
func (l Listeners) None() bool { return len(l.ports) == 0 }

// Met reports whether the sockets of a task are those expected. What listens on loopback only
// is not, since no other task reaches it, and neither is what takes IPv6 only where the task has
// no such address.
func (l Listeners) Met(sockets []Socket) bool {
	listens := func(p Port) bool {
		return slices.ContainsFunc(sockets, func(s Socket) bool {
			return s.Protocol == p.Protocol && s.Addr.Port() == p.Number && !s.Addr.Addr().Unmap().IsLoopback() && (l.six || !s.Only6)
		})
	}
	if l.all {
		return !slices.ContainsFunc(l.ports, func(p Port) bool { return !listens(p) })
	}
	return l.None() || slices.ContainsFunc(l.ports, listens)
}
