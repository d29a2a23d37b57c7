package lifecycle

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/skep-dev/skep/api"
)

// ports reads "tcp:80 udp:53".
func ports(t *testing.T, text string) []Port {
	t.Helper()
	var out []Port
	for field := range strings.FieldsSeq(text) {
		s := socket(t, strings.Replace(field, ":", ":0.0.0.0:", 1))
		out = append(out, Port{s.Protocol, s.Addr.Port()})
	}
	return out
}

// socket reads "tcp:0.0.0.0:80", and "tcp6:[::]:80" of one that takes nothing of IPv4.
func socket(t *testing.T, text string) Socket {
	t.Helper()
	protocol, addr, _ := strings.Cut(text, ":")
	protocol, only6 := strings.CutSuffix(protocol, "6")
	number, ok := map[string]uint8{"tcp": 6, "udp": 17, "sctp": 132}[protocol]
	at, err := netip.ParseAddrPort(addr)
	if err != nil || !ok {
		t.Fatalf("%q: %v", text, err)
	}
	return Socket{Protocol: number, Addr: at, Only6: only6}
}

func TestListeners(t *testing.T) {
	for _, c := range []struct {
		name, published, exposed string
		sockets, address         string
		none, met                bool
	}{
		{name: "nothing is known", sockets: "tcp:0.0.0.0:80", none: true, met: true},
		{name: "only SCTP", published: "sctp:80", exposed: "sctp:81", none: true, met: true},
		{name: "nothing listens", published: "tcp:80"},
		{name: "it listens", published: "tcp:80", sockets: "udp:0.0.0.0:9 tcp:0.0.0.0:80", met: true},
		{name: "on one address", published: "tcp:80", sockets: "tcp:10.0.0.7:80", met: true},
		{name: "on IPv6", published: "tcp:80", sockets: "tcp:[::]:80", met: true},
		{name: "on IPv6 only", published: "tcp:80", sockets: "tcp6:[::]:80"},
		{name: "on IPv6 only, where others come by it", published: "tcp:80", address: "fd00::7/64", sockets: "tcp6:[::]:80", met: true},
		{name: "on IPv6 only, exposed", exposed: "tcp:80", sockets: "tcp6:[fd00::7]:80"},
		{name: "on IPv6 and IPv4 apart", exposed: "tcp:80", sockets: "tcp6:[::]:80 tcp:0.0.0.0:80", met: true},
		{name: "on loopback", published: "tcp:80", sockets: "tcp:127.0.0.1:80 tcp:[::1]:80 tcp:[::ffff:127.0.0.1]:80"},
		{name: "on another port", published: "tcp:80", sockets: "tcp:0.0.0.0:8080"},
		{name: "by the other protocol", published: "udp:53", sockets: "tcp:0.0.0.0:53"},
		{name: "datagrams", published: "udp:53", sockets: "udp:0.0.0.0:53", met: true},
		{name: "one of two that are published", published: "tcp:80 tcp:443", sockets: "tcp:0.0.0.0:80"},
		{name: "both", published: "tcp:80 tcp:443 sctp:9", sockets: "tcp:0.0.0.0:80 tcp:0.0.0.0:443", met: true},
		{name: "one of two that are exposed", exposed: "tcp:80 tcp:443", sockets: "tcp:0.0.0.0:443", met: true},
		{name: "none of those exposed", exposed: "tcp:80 tcp:443"},
		{name: "exposed, but another is published", published: "tcp:80", exposed: "tcp:9000", sockets: "tcp:0.0.0.0:9000"},
		{name: "published, and another is exposed", published: "tcp:80", exposed: "tcp:9000", sockets: "tcp:0.0.0.0:80", met: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			task := &api.Task{Endpoint: &api.Endpoint{Spec: new(api.EndpointSpec)}, Networks: []*api.NetworkAttachment{{Addresses: []string{"10.0.0.7/24"}}}}
			if c.address != "" {
				task.Networks[0].Addresses = append(task.Networks[0].Addresses, c.address)
			}
			for _, p := range ports(t, c.published) {
				protocol := map[uint8]api.PortConfig_Protocol{6: api.PortConfig_TCP, 17: api.PortConfig_UDP, 132: api.PortConfig_SCTP}[p.Protocol]
				task.Endpoint.Spec.Ports = append(task.Endpoint.Spec.Ports, &api.PortConfig{Protocol: protocol, TargetPort: uint32(p.Number)})
			}
			var sockets []Socket
			for field := range strings.FieldsSeq(c.sockets) {
				sockets = append(sockets, socket(t, field))
			}
			l := Expected(task, ports(t, c.exposed))
			if l.None() != c.none || l.Met(sockets) != c.met {
				t.Errorf("none %t, met %t; want %t, %t", l.None(), l.Met(sockets), c.none, c.met)
			}
			task.JobIteration = new(api.Version)
			if !Expected(task, ports(t, c.exposed)).None() {
				t.Error("a job is waited for")
			}
		})
	}
}
