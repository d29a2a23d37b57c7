package alloc

import (
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// network is a network of the swarm as it is stored.
type network struct {
	record *api.Network
	// reserved is set while the record was edited and not yet stored: nothing may
	// depend on it.
	reserved bool
	subnets  []*subnet
	vnis     []uint64
	// failed is why it could not be allocated.
	failed *BlockedError
}

// subnet is one of a network's subnets with its addresses.
type subnet struct {
	prefix netip.Prefix
	*pool
}

// Local reports whether a network driver works on each node by itself.
func Local(driver string) bool {
	switch driver {
	case "bridge", "host", "none", "null", "ipvlan", "macvlan":
		return true
	}
	return false
}

// Predefined returns the edited copy of a network that every node has.
func Predefined(n *api.Network) *api.Network {
	n = model.Clone(n)
	n.DriverState = &api.Driver{Name: n.GetSpec().GetDriverConfig().GetName()}
	n.Ipam = &api.IPAMOptions{Driver: &api.Driver{}} // Docker Engines need it to be there
	return n
}

// allocated reports whether a network has what it needs.
func allocated(n *api.Network) bool {
	return n.GetDriverState() != nil && n.GetIpam().GetDriver() != nil
}

// overlay reports whether tasks get addresses in a network.
func (n *network) overlay() bool { return !Local(n.record.GetDriverState().GetName()) }

func (n *network) ready() bool { return !n.reserved && allocated(n.record) }

func nameOf(n *api.Network) string { return n.GetSpec().GetAnnotations().GetName() }

// find returns a network by id or else by name.
func (s *State) find(idOrName string) *network {
	if n := s.networks[idOrName]; n != nil {
		return n
	}
	return s.networks[s.byName[strings.ToLower(idOrName)]]
}

// setNetwork notes the stored record of a network.
func (s *State) setNetwork(id string, stored *api.Network) {
	before := s.networks[id]
	if before != nil {
		delete(s.byName, strings.ToLower(nameOf(before.record)))
		s.releaseNetwork(before)
	}
	if stored == nil {
		delete(s.networks, id)
		if s.ingress == id {
			s.ingress = ""
		}
		return
	}
	n := &network{record: stored}
	if before != nil {
		n.failed = before.failed
	}
	s.networks[id], s.byName[strings.ToLower(nameOf(stored))] = n, id
	if model.Ingress(stored) {
		s.ingress = id
	}
	if allocated(stored) {
		n.failed = nil
		s.holdNetwork(n, before)
	}
}

// holdNetwork takes what an allocated network has. Subnets that stay keep their pools.
func (s *State) holdNetwork(n, before *network) {
	if !n.overlay() {
		return
	}
	n.vnis = vnisOf(n.record)
	for _, v := range n.vnis {
		s.vnis.hold(v)
	}
	n.subnets = subnetsOf(n.record)
	for _, sub := range n.subnets {
		s.subnets.add(sub.prefix, 1)
		s.holdSubnet(sub.prefix)
		if before == nil {
			continue
		}
		for _, old := range before.subnets {
			if old.prefix == sub.prefix {
				sub.pool = old.pool
			}
		}
	}
}

// releaseNetwork gives back what a network has.
func (s *State) releaseNetwork(n *network) {
	for _, sub := range n.subnets {
		s.subnets.add(sub.prefix, -1)
		s.dropSubnet(sub.prefix)
	}
	for _, v := range n.vnis {
		if s.vnis.drop(v) {
			s.released[VNIs] = true
		}
	}
}

// subnetsOf makes the pools of a network's subnets, without its gateways and reserved
// addresses.
func subnetsOf(n *api.Network) []*subnet {
	var out []*subnet
	for _, c := range n.GetIpam().GetConfigs() {
		p, err := netip.ParsePrefix(c.GetSubnet())
		if err != nil {
			continue
		}
		out = append(out, newSubnet(n.GetId(), p.Masked(), c))
	}
	return out
}

func newSubnet(key string, p netip.Prefix, c *api.IPAMConfig) *subnet {
	lo, hi := uint64(0), last(p)
	if hi > 1 { // else there is neither a network nor a broadcast address
		lo = 1
		if p.Addr().Is4() {
			hi--
		}
	}
	if r, err := netip.ParsePrefix(c.GetRange()); err == nil && p.Contains(r.Addr()) {
		if from, ok := minus(r.Masked().Addr(), p.Addr()); ok {
			lo, hi = max(lo, from), min(hi, from+last(r))
		}
	}
	sub := &subnet{prefix: p, pool: newPool(key, lo, hi)}
	for _, text := range append(slices.Sorted(maps.Values(c.GetReserved())), c.GetGateway()) {
		if a, err := netip.ParseAddr(text); err == nil {
			if v, ok := sub.number(a); ok && sub.held[v] == 0 {
				sub.hold(v)
			}
		}
	}
	return sub
}

// number returns the number of an address in the subnet.
func (s *subnet) number(a netip.Addr) (uint64, bool) {
	if !s.prefix.Contains(a) {
		return 0, false
	}
	return minus(a, s.prefix.Addr())
}

// host reports whether a number is neither the network's own nor its broadcast address.
func (s *subnet) host(v uint64) bool {
	most := last(s.prefix)
	return most < 2 || v > 0 && (v < most || s.prefix.Addr().Is6())
}

// cidr returns an address of the subnet as it is stored.
func (s *subnet) cidr(v uint64) string {
	return netip.PrefixFrom(plus(s.prefix.Addr(), v), s.prefix.Bits()).String()
}

func (s *subnet) family() api.IPAMConfig_AddressFamily {
	if s.prefix.Addr().Is4() {
		return api.IPAMConfig_IPV4
	}
	return api.IPAMConfig_IPV6
}

// Network returns the edited copy of a network that lacks its subnets, gateways or
// identifiers, or nil when there is nothing to do. The error is a *BlockedError.
func (s *State) Network(n *api.Network) (*api.Network, error) {
	if allocated(n) {
		return nil, nil //nolint:nilnil // documented
	}
	if driver := n.GetSpec().GetDriverConfig().GetName(); Local(driver) {
		return Predefined(n), nil
	}
	edited, err := s.network(n)
	if err != nil {
		if known := s.networks[n.GetId()]; known != nil {
			known.failed = err
		}
		return nil, err
	}
	s.setNetwork(n.GetId(), edited)
	s.networks[n.GetId()].reserved = true
	return edited, nil
}

func (s *State) network(n *api.Network) (*api.Network, *BlockedError) {
	n = model.Clone(n)
	spec := n.GetSpec()
	n.DriverState = &api.Driver{Name: spec.GetDriverConfig().GetName(), Options: maps.Clone(spec.GetDriverConfig().GetOptions())}
	if n.DriverState.Name == "" {
		n.DriverState.Name = "overlay"
	}
	ipam := n.GetIpam()
	if len(ipam.GetConfigs()) == 0 {
		ipam = model.Clone(spec.GetIpam())
	}
	if ipam == nil {
		ipam = new(api.IPAMOptions)
	}
	if ipam.Driver == nil {
		ipam.Driver = new(api.Driver)
	}
	if ipam.Driver.Name == "" {
		ipam.Driver.Name = "default"
	}
	n.Ipam = ipam
	if err := s.networkSubnets(n); err != nil {
		return nil, err
	}
	if err := s.networkVNIs(n); err != nil {
		return nil, err
	}
	if model.Encrypted(n) {
		if err := s.networkEncryption(n); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// networkEncryption says how a network is encrypted, unless its creator did: by ESP where
// every node of Skep's that is not lost can do so, else by WireGuard. It stays so.
func (s *State) networkEncryption(n *api.Network) *BlockedError {
	options := n.GetDriverState().GetOptions()
	how := options[model.EncryptionOption]
	if how == "" {
		how = model.ESP
		some := false
		for _, node := range s.present {
			if model.Foreign(node.GetDescription()) {
				continue
			}
			if some = true; !model.CanEncrypt(node, model.ESP) {
				how = model.WireGuard
			}
		}
		if !some {
			how = model.WireGuard
		}
	}
	options[model.EncryptionOption] = how
	if how == model.ESP {
		options[model.EncryptionPortOption] = strconv.Itoa(model.ESPPort)
		return nil
	}
	taken := map[uint16]string{model.ESPPort: "networks encrypted by ESP"}
	for id, other := range s.networks {
		if _, port := model.Encryption(other.record); id != n.GetId() && port != 0 {
			taken[port] = "network " + nameOf(other.record)
		}
	}
	if text := options[model.EncryptionPortOption]; text != "" {
		_, port := model.Encryption(n)
		if by := taken[port]; by != "" || port == 0 {
			return blocked(AnyNetwork, "network %s: UDP port %s is used by %s: remove that network, or create this one with another %s", nameOf(n), text, by, model.EncryptionPortOption)
		}
		return nil
	}
	for port := uint16(model.FirstWireGuardPort); port != 0; port++ {
		if taken[port] == "" {
			options[model.EncryptionPortOption] = strconv.Itoa(int(port))
			return nil
		}
	}
	return blocked(AnyNetwork, "network %s: no UDP port is left of %d to 65535: remove encrypted networks that are not used", nameOf(n), model.FirstWireGuardPort)
}

// networkSubnets completes the subnets of a network that is being allocated.
func (s *State) networkSubnets(n *api.Network) *BlockedError {
	ipam, v6 := n.GetIpam(), n.GetSpec().GetIpv6Enabled()
	var have4, have6 bool
	configs := make([]*api.IPAMConfig, 0, len(ipam.GetConfigs())+1)
	var taken []netip.Prefix
	for _, c := range ipam.GetConfigs() {
		c = model.Clone(c)
		p, err := netip.ParsePrefix(c.GetSubnet())
		switch {
		case c.GetSubnet() == "": // only a gateway or range of the subnet to be chosen
			continue
		case err != nil:
			return blocked(AnyNetwork, "network %s: subnet %q is not a prefix: remove the network and create it with --subnet ADDRESS/LENGTH", nameOf(n), c.GetSubnet())
		case p.Addr().Is6() && !v6:
			continue
		case s.subnets.overlaps(p) || slices.ContainsFunc(taken, p.Overlaps):
			return blocked(Subnets, "network %s: subnet %s overlaps the subnet of another network: remove that network, or create this one with another --subnet", nameOf(n), p)
		}
		have4, have6 = have4 || p.Addr().Is4(), have6 || p.Addr().Is6()
		taken = append(taken, p)
		c.Subnet = p.Masked().String()
		configs = append(configs, c)
	}
	if !have4 {
		p, ok := s.freeSubnet(s.auto)
		if !ok {
			return blocked(Subnets, "network %s: the swarm's address pools (%s) have no free subnet left: remove networks that are not used, or create this one with --subnet", nameOf(n), s.poolNames())
		}
		configs = append([]*api.IPAMConfig{{Subnet: p.String()}}, configs...)
	}
	if v6 && !have6 {
		p, ok := s.freeSubnet([]*subnetPool{s.ula})
		if !ok {
			return blocked(Subnets, "network %s: %s has no free IPv6 subnet left: create the network with an IPv6 --subnet", nameOf(n), s.ula.prefix)
		}
		configs = append(configs, &api.IPAMConfig{Subnet: p.String()})
	}
	for _, c := range configs {
		p := netip.MustParsePrefix(c.GetSubnet())
		sub := newSubnet(n.GetId(), p, c)
		c.Family = sub.family()
		if c.GetGateway() != "" {
			continue
		}
		v, ok := sub.take(nil)
		if !ok {
			return blocked(AnyNetwork, "network %s: subnet %s has no address for a gateway: remove the network and create it with a larger --subnet", nameOf(n), p)
		}
		c.Gateway = plus(p.Addr(), v).String()
	}
	ipam.Configs = configs
	return nil
}

// freeSubnet finds a subnet in the default pools. It is only held once the network is.
func (s *State) freeSubnet(from []*subnetPool) (netip.Prefix, bool) {
	for _, a := range from {
		v, ok := a.take(func(v uint64) bool { return !s.subnets.overlaps(nth(a.prefix, a.size, v)) })
		if ok {
			a.back(v)
			return nth(a.prefix, a.size, v), true
		}
	}
	return netip.Prefix{}, false
}

func (s *State) poolNames() string {
	names := make([]string, 0, len(s.auto))
	for _, a := range s.auto {
		names = append(names, fmt.Sprintf("%s in /%d", a.prefix, a.size))
	}
	return strings.Join(names, ", ")
}

// networkVNIs gives each IPv4 subnet of a network an identifier.
func (s *State) networkVNIs(n *api.Network) *BlockedError {
	var list []string
	wanted := parseVNIs(n.GetDriverState().GetOptions()[vniOption])
	for _, v := range wanted {
		if s.vnis.held[v] > 0 {
			return blocked(VNIs, "network %s: the VXLAN network identifier %d is in use by another network: remove that network, or create this one with another %s", nameOf(n), v, vniOption)
		}
	}
	var taken []uint64
	defer func() {
		for _, v := range slices.Backward(taken) { // held again with the network
			s.vnis.back(v)
		}
	}()
	for _, c := range n.GetIpam().GetConfigs() {
		if c.GetFamily() != api.IPAMConfig_IPV4 {
			continue
		}
		var v uint64
		if len(wanted) > 0 {
			v, wanted = wanted[0], wanted[1:]
		} else {
			var ok bool
			if v, ok = s.vnis.take(nil); !ok {
				return blocked(VNIs, "network %s: no VXLAN network identifier is left of %d to %d: remove networks that are not used", nameOf(n), firstVNI, lastVNI)
			}
			taken = append(taken, v)
		}
		list = append(list, strconv.FormatUint(v, 10))
	}
	if n.GetDriverState().GetOptions() == nil {
		n.DriverState.Options = make(map[string]string)
	}
	n.DriverState.Options[vniOption] = strings.Join(list, ",")
	return nil
}

// Conflict says why a network cannot be added to others, given as they are stored; nil
// when it can. The error is of the kind that its caller's caller should see.
func Conflict(spec *api.NetworkSpec, others iter.Seq[*api.Network]) error {
	var mine []netip.Prefix
	for _, c := range spec.GetIpam().GetConfigs() {
		if p, err := netip.ParsePrefix(c.GetSubnet()); err == nil && (p.Addr().Is4() || spec.GetIpv6Enabled()) {
			mine = append(mine, p)
		}
	}
	wanted := parseVNIs(spec.GetDriverConfig().GetOptions()[vniOption])
	for n := range others {
		ipam := n.GetIpam()
		if len(ipam.GetConfigs()) == 0 {
			ipam = n.GetSpec().GetIpam()
		}
		for _, c := range ipam.GetConfigs() {
			p, err := netip.ParsePrefix(c.GetSubnet())
			if err != nil {
				continue
			}
			for _, m := range mine {
				if m.Overlaps(p) {
					return model.Errorf(model.Invalid, "invalid pool request: Pool overlaps with other one on this address space: subnet %s overlaps %s of network %s (%s)", m, p, nameOf(n), n.GetId())
				}
			}
		}
		for _, v := range wanted {
			if slices.Contains(vnisOf(n), v) {
				return model.Errorf(model.Invalid, "VXLAN network identifier %d is already in use by network %s (%s)", v, nameOf(n), n.GetId())
			}
		}
	}
	return nil
}
