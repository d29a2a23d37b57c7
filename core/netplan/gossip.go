package netplan

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api/networkdb"
	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/netdb"
)

// The tables that Docker Engines read.
const (
	endpointTable = "endpoint_table"
	peerTable     = "overlay_peer_table"
)

// Attached is a sandbox of this node in one network.
type Attached struct {
	Network string
	Addr    netip.Addr
	// Names are further names of the container.
	Names []string
}

// Publisher turns what a State knows of this node into what Docker Engines hear. It remembers
// what it published, since Docker Engine 20.10 takes no other change of an endpoint than that
// it is disabled: anything else is another endpoint to it. The zero value has published nothing.
type Publisher struct {
	said map[Key]*said
}

// said is what was published of an endpoint.
type said struct {
	disabled bool
	again    int // how often it was enabled again
}

// Rows returns what to publish of this node's sandboxes, by the networks that it is in for
// Docker Engines; nil while there are none.
func (p *Publisher) Rows(s *State, attached []Attached) map[string][]netdb.Row {
	if !s.node.GetGossip() {
		p.said = nil
		return nil
	}
	rows, now := map[string][]netdb.Row{}, map[Key]*said{}
	add := func(network string, e *endpoint, names []string) {
		if !e.v4.IsValid() {
			return
		}
		rows[network] = append(rows[network], s.peerRow(e))
		if e.GetName() == "" {
			return // the node's own, which has no names
		}
		was := p.said[e.key]
		switch {
		case was == nil && !e.GetRoutable():
			return
		case was == nil:
			was = new(said)
		case was.disabled && e.GetRoutable():
			was.again++
		}
		was.disabled = !e.GetRoutable()
		now[e.key] = was
		rows[network] = append(rows[network], s.endpointRow(e, names, was))
	}
	for _, a := range attached {
		if !s.gossiped(a.Network) || s.members[a.Network] == nil {
			continue
		}
		for _, e := range s.members[a.Network].byAddr[a.Addr].inOrder() {
			if e.GetNodeId() == s.node.GetId() {
				add(a.Network, e, a.Names)
			}
		}
	}
	if id := s.Ingress().GetId(); s.gossiped(id) {
		if e := s.endpoint(Key{id, s.node.GetId()}); e != nil {
			add(id, e, nil)
		}
	}
	p.said = now
	for id := range rows {
		slices.SortFunc(rows[id], func(a, b netdb.Row) int { return strings.Compare(a.Table+a.Key, b.Table+b.Key) })
	}
	return rows
}

// gossiped reports whether Docker Engines can be in a network: it is neither encrypted nor of
// IPv6.
func (s *State) gossiped(network string) bool {
	n := s.networks[network]
	return n != nil && !n.GetEncrypted() && !slices.ContainsFunc(n.GetSubnets(), func(sub *skepv1.OverlaySubnet) bool {
		return strings.Contains(sub.GetSubnet(), ":")
	})
}

func (s *State) peerRow(e *endpoint) netdb.Row {
	m := MAC(e.v4)
	value := marshal(&networkdb.PeerRecord{
		EndpointIp: ipv4Prefix(e), EndpointMac: fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5]),
		TunnelEndpointIp: s.node.GetDataAddr(),
	})
	return netdb.Row{Table: peerTable, Key: endpointID(e, value), Value: value}
}

// endpointRow is what an endpoint is called, and which service it belongs to.
func (s *State) endpointRow(e *endpoint, names []string, state *said) netdb.Row {
	if e.GetServiceId() != "" { // the aliases are the service's, which may have an address of its own
		names = slices.DeleteFunc(slices.Clone(names), func(n string) bool { return slices.Contains(e.GetAliases(), n) })
	}
	r := &networkdb.EndpointRecord{
		Name: e.GetName(), ServiceId: e.GetServiceId(), EndpointIp: e.v4.String(), Aliases: e.GetAliases(), TaskAliases: names,
	}
	if v := s.services[e.GetServiceId()]; v != nil {
		r.ServiceName = v.GetName()
		for _, a := range vips(v, e.key.Network) {
			if a.Is4() && r.GetVirtualIp() == "" {
				r.VirtualIp = a.String()
			}
		}
		if s.networks[e.key.Network].GetIngress() {
			r.IngressPorts = ingressPorts(v)
		}
	}
	key := endpointID(e, marshal(r), []byte{byte(state.again)})
	r.ServiceDisabled = state.disabled
	return netdb.Row{Table: endpointTable, Key: key, Value: marshal(r)}
}

func ingressPorts(v *skepv1.BalancedService) []*networkdb.PortConfig {
	var out []*networkdb.PortConfig
	for _, p := range v.GetPorts() {
		port := &networkdb.PortConfig{TargetPort: p.GetTarget(), PublishedPort: p.GetPublished()}
		switch p.GetProtocol() {
		case 17:
			port.Protocol = networkdb.PortConfig_UDP
		case 132:
			port.Protocol = networkdb.PortConfig_SCTP
		}
		out = append(out, port)
	}
	return out
}

// endpointID names an endpoint to Docker Engines, which have 64 hex digits for it: another
// for everything else that is said of it.
func endpointID(e *endpoint, said ...[]byte) string {
	h := sha256.New()
	h.Write([]byte(e.key.Network + " " + e.key.Task + " "))
	for _, part := range said {
		h.Write(part)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// ipv4Prefix is the endpoint's IPv4 address with its prefix length.
func ipv4Prefix(e *endpoint) string {
	for _, text := range e.GetAddresses() {
		if prefixAddr(text) == e.v4 && strings.Contains(text, "/") {
			return text
		}
	}
	return netip.PrefixFrom(e.v4, 24).String()
}

func marshal(m proto.Message) []byte {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(fmt.Sprintf("encode %T: %v", m, err)) // not valid UTF-8: the managers check names
	}
	return data
}
