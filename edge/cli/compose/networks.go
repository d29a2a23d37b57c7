package compose

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/swarm"
)

// Network is a network to make, or an external one that must be there.
type Network struct {
	Spec     network.CreateRequest
	External bool
}

// predefined reports whether every node has a network of this name.
func predefined(name string) bool { return slices.Contains([]string{"bridge", "host", "none"}, name) }

// networks returns the networks that services use.
func (s *Stack) networks(p *types.Project) ([]Network, error) {
	used := map[string]bool{}
	for _, c := range p.Services {
		for _, key := range networkKeys(c) {
			used[key] = true
		}
	}
	var out []Network
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(used)) {
		config := p.Networks[key]
		if bool(config.External) && predefined(s.networkName(p, key)) {
			continue
		}
		one, err := s.network(p, key, config)
		out = append(out, one)
		errs = append(errs, err)
	}
	return out, errors.Join(errs...)
}

// networkKeys returns the networks of a service; one that names none is in the default one.
func networkKeys(c types.ServiceConfig) []string {
	if len(c.Networks) == 0 {
		return []string{"default"}
	}
	return slices.Sorted(maps.Keys(c.Networks))
}

func (s *Stack) networkName(p *types.Project, key string) string {
	if name := p.Networks[key].Name; name != "" {
		return name
	}
	return s.scoped(key)
}

func (s *Stack) network(p *types.Project, key string, c types.NetworkConfig) (Network, error) {
	out := Network{External: bool(c.External), Spec: network.CreateRequest{Name: s.networkName(p, key)}}
	if out.External {
		return out, nil
	}
	out.Spec = network.CreateRequest{
		Name: out.Spec.Name, Driver: cmp.Or(c.Driver, "overlay"), Options: c.DriverOpts, Labels: s.labels(c.Labels),
		Attachable: c.Attachable, Internal: c.Internal, EnableIPv4: c.EnableIPv4, EnableIPv6: c.EnableIPv6,
	}
	if c.Ipam.Driver == "" && len(c.Ipam.Config) == 0 {
		return out, nil
	}
	out.Spec.IPAM = &network.IPAM{Driver: c.Ipam.Driver}
	var errs []error
	for i, pool := range c.Ipam.Config {
		if pool == nil {
			continue
		}
		at := fmt.Sprintf("networks.%s.ipam.config[%d]", key, i)
		config := network.IPAMConfig{
			Subnet: parsed(&errs, at+".subnet", pool.Subnet, netip.ParsePrefix), IPRange: parsed(&errs, at+".ip_range", pool.IPRange, netip.ParsePrefix),
			Gateway: parsed(&errs, at+".gateway", pool.Gateway, netip.ParseAddr),
		}
		for _, name := range slices.Sorted(maps.Keys(pool.AuxiliaryAddresses)) {
			if config.AuxAddress == nil {
				config.AuxAddress = map[string]netip.Addr{}
			}
			config.AuxAddress[name] = parsed(&errs, at+".aux_addresses."+name, pool.AuxiliaryAddresses[name], netip.ParseAddr)
		}
		out.Spec.IPAM.Config = append(out.Spec.IPAM.Config, config)
	}
	return out, errors.Join(errs...)
}

// parsed reads an address or prefix that may be missing.
func parsed[T any](errs *[]error, at, text string, parse func(string) (T, error)) (none T) {
	if text == "" {
		return none
	}
	v, err := parse(text)
	if err != nil {
		*errs = append(*errs, fmt.Errorf("%s: %q is not an address: %w", at, text, err))
	}
	return v
}

// attachments returns the networks that a service's tasks are in, under the service's
// name and its aliases.
func (s *Stack) attachments(p *types.Project, c types.ServiceConfig) []swarm.NetworkAttachmentConfig {
	var out []swarm.NetworkAttachmentConfig
	for _, key := range networkKeys(c) {
		a := swarm.NetworkAttachmentConfig{Target: s.networkName(p, key)}
		if config := c.Networks[key]; config != nil {
			a.Aliases, a.DriverOpts = slices.Clone(config.Aliases), mapping(types.Mapping(config.DriverOpts))
		}
		if !predefined(a.Target) {
			a.Aliases = append(a.Aliases, c.Name)
		}
		out = append(out, a)
	}
	slices.SortFunc(out, func(a, b swarm.NetworkAttachmentConfig) int { return cmp.Compare(a.Target, b.Target) })
	return out
}
