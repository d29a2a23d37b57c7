package ops

import (
	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// portKey identifies a published port.
type portKey struct {
	protocol api.PortConfig_Protocol
	port     uint32
}

// validateEndpoint checks the ports of one spec.
func validateEndpoint(e *api.EndpointSpec) error {
	published := make(map[portKey]bool)
	for _, p := range e.GetPorts() {
		ingress := p.GetPublishMode() == api.PortConfig_INGRESS
		if ingress && e.GetMode() == api.EndpointSpec_DNSRR {
			return invalid("EndpointSpec: port published with ingress mode can't be used with dnsrr mode")
		}
		if p.GetTargetPort() > 65535 || p.GetPublishedPort() > 65535 {
			return invalid("EndpointSpec: port %d:%d is not within 0-65535", p.GetPublishedPort(), p.GetTargetPort())
		}
		key := portKey{p.GetProtocol(), p.GetPublishedPort()}
		if key.port != 0 && published[key] {
			return invalid("EndpointSpec: duplicate published ports provided")
		}
		published[key] = true
	}
	return nil
}

// checkPorts refuses ports that another service's ingress ports, or for ingress ports
// any other service, already use.
func checkPorts(s *store.Snapshot, e *api.EndpointSpec, id string) error {
	wanted := make(map[portKey]api.PortConfig_PublishMode)
	for _, p := range e.GetPorts() {
		if p.GetPublishedPort() != 0 {
			wanted[portKey{p.GetProtocol(), p.GetPublishedPort()}] = p.GetPublishMode()
		}
	}
	if len(wanted) == 0 {
		return nil
	}
	for other := range s.Services() {
		if other.GetId() == id {
			continue
		}
		for _, ports := range [][]*api.PortConfig{other.GetSpec().GetEndpoint().GetPorts(), other.GetEndpoint().GetPorts()} {
			for _, p := range ports {
				if err := portConflict(wanted, p, other); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func portConflict(wanted map[portKey]api.PortConfig_PublishMode, p *api.PortConfig, other *api.Service) error {
	mode, clash := wanted[portKey{p.GetProtocol(), p.GetPublishedPort()}]
	const host = api.PortConfig_HOST
	if !clash || p.GetPublishedPort() == 0 || (mode == host && p.GetPublishMode() == host) {
		return nil
	}
	as := "an ingress port"
	if p.GetPublishMode() == host {
		as = "a host-published port"
	}
	return invalid("port '%d' is already in use by service '%s' (%s) as %s",
		p.GetPublishedPort(), other.GetSpec().GetAnnotations().GetName(), other.GetId(), as)
}

// checkService checks a valid spec against the rest of the state.
func checkService(s *store.Snapshot, spec *api.ServiceSpec, id string) error {
	if err := checkNetworks(s, spec); err != nil {
		return err
	}
	if err := checkPorts(s, spec.GetEndpoint(), id); err != nil {
		return err
	}
	c := spec.GetTask().GetContainer()
	if err := checkSecrets(s, c.GetSecrets()); err != nil {
		return err
	}
	return checkConfigs(s, c.GetConfigs())
}

// networksOf returns the networks that a service's tasks attach to.
func networksOf(spec *api.ServiceSpec) []*api.NetworkAttachmentConfig {
	if networks := spec.GetTask().GetNetworks(); len(networks) > 0 {
		return networks
	}
	return spec.GetNetworks() //nolint:staticcheck // old clients still send the deprecated list
}

func checkNetworks(s *store.Snapshot, spec *api.ServiceSpec) error {
	ingress := publishesIngress(spec)
	for _, a := range networksOf(spec) {
		n := s.Network(a.GetTarget())
		if n == nil {
			return notFound("network", a.GetTarget())
		}
		name := n.GetSpec().GetAnnotations().GetName()
		switch host := isPredefined(n) && n.GetSpec().GetDriverConfig().GetName() == "host"; {
		case model.Ingress(n):
			return invalid("Service cannot be explicitly attached to the ingress network %q", name)
		case host && len(networksOf(spec)) > 1:
			return invalid("a service on the host network has the network of its node and cannot be attached to others")
		case host && ingress:
			return invalid("EndpointSpec: a service on the host network cannot publish ports with ingress mode: it listens on its nodes itself")
		}
	}
	if ingress && ingressNetwork(s) == nil {
		return model.Errorf(model.Precondition, "service needs ingress network, but no ingress network is present")
	}
	return nil
}

func publishesIngress(spec *api.ServiceSpec) bool {
	for _, p := range spec.GetEndpoint().GetPorts() {
		if p.GetPublishMode() == api.PortConfig_INGRESS {
			return true
		}
	}
	return false
}
