package alloc

import (
	"net/netip"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

const maxPort = 65535

// attachmentsOf returns the networks that a service's spec names.
func attachmentsOf(s *api.ServiceSpec) []*api.NetworkAttachmentConfig {
	if networks := s.GetTask().GetNetworks(); len(networks) > 0 {
		return networks
	}
	return s.GetNetworks() //nolint:staticcheck // old clients put them there
}

// meshed reports whether a service publishes ports through the routing mesh.
func meshed(s *api.Service) bool {
	for _, p := range s.GetSpec().GetEndpoint().GetPorts() {
		if p.GetPublishMode() == api.PortConfig_INGRESS {
			return true
		}
	}
	return false
}

// setService notes the stored record of a service.
func (s *State) setService(id string, stored *api.Service) {
	var now []claim
	for _, p := range stored.GetEndpoint().GetPorts() {
		if pool := s.ports[p.GetProtocol()]; pool != nil && p.GetPublishedPort() != 0 {
			now = append(now, claim{pool, uint64(p.GetPublishedPort())})
		}
	}
	for _, v := range stored.GetEndpoint().GetVirtualIps() {
		if n := s.networks[v.GetNetworkId()]; n != nil {
			now = append(now, n.addresses(v.GetAddr())...)
		}
	}
	s.setClaims(owner{model.Services, id}, now)
}

// Service returns the edited copy of a service whose endpoint does not match its spec,
// or nil when there is nothing to do. The error is a *BlockedError.
func (s *State) Service(v *api.Service) (*api.Service, error) {
	spec := v.GetSpec().GetEndpoint()
	if spec == nil {
		spec = &api.EndpointSpec{}
	}
	want := &api.Endpoint{Spec: spec}
	g := &grant{State: s, owner: owner{model.Services, v.GetId()}}
	err := g.publish(v, want)
	if err == nil && spec.GetMode() == api.EndpointSpec_VIP {
		err = g.virtual(v, want)
	}
	if err != nil {
		g.undo(0)
		return nil, err
	}
	g.keep()
	if have := v.GetEndpoint(); have != nil && proto.Equal(want, have) {
		return nil, nil //nolint:nilnil // documented
	}
	v = model.Clone(v)
	v.Endpoint = model.Clone(want)
	return v, nil
}

// publish gives a service's ports in ingress mode their numbers: first those that it asks
// for, then those that it had, then any.
func (g *grant) publish(v *api.Service, want *api.Endpoint) error {
	given := make(map[claim]bool)
	for _, wanted := range want.GetSpec().GetPorts() {
		p := model.Clone(wanted)
		want.Ports = append(want.Ports, p)
		if p.GetPublishedPort() == 0 {
			continue
		}
		pool, port := g.ports[p.GetProtocol()], uint64(p.GetPublishedPort())
		switch ingress := p.GetPublishMode() == api.PortConfig_INGRESS; {
		case pool == nil:
			return blocked(Ports, "port %d: the protocol %d is not known", p.GetTargetPort(), p.GetProtocol())
		case ingress && (port > maxPort || !g.want(pool, port)):
			return blocked(Ports, "port %d/%s is published by another service: remove that publication, or publish this service on another port", port, protocolOf(p))
		case !ingress:
			g.hold(pool, port)
		}
		given[claim{pool, port}] = true
	}
	for _, p := range want.GetPorts() {
		pool := g.ports[p.GetProtocol()]
		if pool == nil || p.GetPublishedPort() != 0 || p.GetPublishMode() != api.PortConfig_INGRESS {
			continue
		}
		n, ok := g.former(v, p, pool, given)
		if !ok {
			n, ok = g.take(pool)
		}
		if !ok {
			return blocked(Ports, "all ports from %d to %d are published for %s: choose a free port with --publish published=PORT, or remove services that publish ports", firstDynamic, lastDynam, protocolOf(p))
		}
		given[claim{pool, n}] = true
		p.PublishedPort = uint32(n)
	}
	return nil
}

func protocolOf(p *api.PortConfig) string { return strings.ToLower(p.GetProtocol().String()) }

// former returns the number that a port without one of its own had until now, unless it
// was given to another of the service's ports.
func (g *grant) former(v *api.Service, p *api.PortConfig, pool *pool, given map[claim]bool) (uint64, bool) {
	for _, old := range v.GetEndpoint().GetPorts() {
		n := uint64(old.GetPublishedPort())
		if n != 0 && !given[claim{pool, n}] && old.GetName() == p.GetName() && old.GetProtocol() == p.GetProtocol() &&
			old.GetTargetPort() == p.GetTargetPort() && old.GetPublishMode() == p.GetPublishMode() && g.want(pool, n) {
			return n, true
		}
	}
	return 0, false
}

// virtual gives a service an address in each of its networks.
func (g *grant) virtual(v *api.Service, want *api.Endpoint) error {
	var networks []*network
	if meshed(v) {
		n, err := g.mesh()
		if err != nil {
			return err
		}
		networks = append(networks, n)
	}
	attached, err := g.attached(attachmentsOf(v.GetSpec()))
	if err != nil {
		return err
	}
	for _, n := range append(networks, attached...) {
		if !n.overlay() {
			continue
		}
		present := make([]string, 0, 2)
		for _, vip := range v.GetEndpoint().GetVirtualIps() {
			if vip.GetNetworkId() == n.record.GetId() {
				present = append(present, vip.GetAddr())
			}
		}
		addrs, err := g.addresses(n, present)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			want.VirtualIps = append(want.VirtualIps, &api.Endpoint_VirtualIP{NetworkId: n.record.GetId(), Addr: a})
		}
	}
	return nil
}

// mesh returns the ingress network.
func (s *State) mesh() (*network, error) {
	n := s.networks[s.ingress]
	if n == nil {
		return nil, blocked(AnyNetwork, "there is no ingress network for ports published in ingress mode: create one with `docker network create --driver overlay --ingress ingress`, or publish with mode=host")
	}
	return n, n.wait()
}

// wait returns why a network cannot be used yet.
func (n *network) wait() error {
	switch {
	case n.ready():
		return nil
	case n.failed != nil && !n.reserved:
		return &BlockedError{On: n.record.GetId(), Text: n.failed.Text}
	default:
		return &BlockedError{On: n.record.GetId()}
	}
}

// attached returns the networks that a spec names, each once.
func (s *State) attached(configs []*api.NetworkAttachmentConfig) ([]*network, error) {
	var out []*network
	seen := make(map[*network]bool, len(configs))
	for _, c := range configs {
		n := s.find(c.GetTarget())
		if n == nil {
			return nil, blocked(AnyNetwork, "network %s not found", c.GetTarget())
		}
		if err := n.wait(); err != nil {
			return nil, err
		}
		if !seen[n] {
			seen[n] = true
			out = append(out, n)
		}
	}
	return out, nil
}

// addresses returns the claims of an address in the network.
func (n *network) addresses(cidr string) []claim {
	if p, err := netip.ParsePrefix(cidr); err == nil {
		for _, sub := range n.subnets {
			if v, ok := sub.number(p.Addr()); ok {
				return []claim{{sub.pool, v}}
			}
		}
	}
	return nil
}

// addresses gives the owner one address of each of a network's families. present are
// those that it has already, or asks for: they are kept where that is possible.
func (g *grant) addresses(n *network, present []string) ([]string, error) {
	var out []string
	before := len(g.added)
	for _, family := range []api.IPAMConfig_AddressFamily{api.IPAMConfig_IPV4, api.IPAMConfig_IPV6} {
		if !n.has(family) {
			continue
		}
		cidr := g.kept(n, family, present)
		if cidr == "" {
			cidr = g.any(n, family)
		}
		if cidr == "" {
			g.undo(before)
			return nil, n.exhausted(family)
		}
		out = append(out, cidr)
	}
	return out, nil
}

func (n *network) has(family api.IPAMConfig_AddressFamily) bool {
	for _, sub := range n.subnets {
		if sub.family() == family {
			return true
		}
	}
	return false
}

// kept returns the first of the present addresses that the owner may have.
func (g *grant) kept(n *network, family api.IPAMConfig_AddressFamily, present []string) string {
	for _, text := range present {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			continue
		}
		for _, sub := range n.subnets {
			if v, ok := sub.number(p.Addr()); ok && sub.family() == family && g.want(sub.pool, v) {
				return sub.cidr(v)
			}
		}
	}
	return ""
}

// any takes an address from the first subnet that has room.
func (g *grant) any(n *network, family api.IPAMConfig_AddressFamily) string {
	for _, sub := range n.subnets {
		if sub.family() != family {
			continue
		}
		if v, ok := g.take(sub.pool); ok {
			return sub.cidr(v)
		}
	}
	return ""
}

func (n *network) exhausted(family api.IPAMConfig_AddressFamily) error {
	var names []string
	used := 0
	for _, sub := range n.subnets {
		if sub.family() == family {
			names = append(names, sub.prefix.String())
			used += len(sub.held)
		}
	}
	return blocked(n.record.GetId(), "network %s has no free address left in %s (%d in use): stop tasks that use it, or use a network with a larger --subnet", nameOf(n.record), strings.Join(names, ", "), used)
}
