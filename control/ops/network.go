package ops

import (
	"context"
	"strconv"
	"strings"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/alloc"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// predefinedLabel marks the swarm's copies of the networks that every node has.
const predefinedLabel = "com.docker.swarm.predefined"

func isPredefined(n *api.Network) bool {
	return n.GetSpec().GetAnnotations().GetLabels()[predefinedLabel] == "true"
}

func ingressNetwork(s *store.Snapshot) *api.Network {
	for n := range s.Networks() {
		if model.Ingress(n) {
			return n
		}
	}
	return nil
}

// GetNetwork returns a network by id or name.
func (o *Ops) GetNetwork(ctx context.Context, req *api.GetNetworkRequest) (*api.GetNetworkResponse, error) {
	state, err := o.state.Read(ctx)
	if err != nil {
		return nil, fail(err)
	}
	n, err := findNetwork(state, req.GetNetworkId(), req.GetName())
	if err != nil {
		return nil, fail(err)
	}
	return &api.GetNetworkResponse{Network: n}, nil
}

func findNetwork(s *store.Snapshot, id, name string) (*api.Network, error) {
	if id == "" {
		if err := needID(name); err != nil {
			return nil, err
		}
		id = s.IDByName(model.Networks, name)
	}
	n := s.Network(id)
	if n == nil {
		return nil, notFound("network", id+name)
	}
	return n, nil
}

// ListNetworks returns the networks that match the filters.
func (o *Ops) ListNetworks(ctx context.Context, req *api.ListNetworksRequest) (*api.ListNetworksResponse, error) {
	f := req.GetFilters()
	resp := new(api.ListNetworksResponse)
	state, err := o.state.Read(ctx)
	if err != nil {
		return nil, fail(err)
	}
	for n := range state.Networks() {
		a := n.GetSpec().GetAnnotations()
		if matchNamed(f, n.GetId(), a.GetName(), a.GetLabels()) {
			resp.Networks = append(resp.Networks, n)
		}
	}
	return resp, nil
}

// CreateNetwork stores a network of the swarm.
func (o *Ops) CreateNetwork(ctx context.Context, req *api.CreateNetworkRequest) (*api.CreateNetworkResponse, error) {
	spec := model.Clone(req.GetSpec())
	if err := validateNetwork(spec); err != nil {
		return nil, fail(err)
	}
	id, err := o.newID()
	if err != nil {
		return nil, fail(err)
	}
	n := &api.Network{Id: id, Spec: spec}
	err = o.update(ctx, func(tx *store.Tx) error {
		if model.EncryptsAll(tx.Snapshot().Cluster().GetSpec()) {
			model.Encrypt(spec)
		}
		if other := ingressNetwork(tx.Snapshot()); other != nil && model.Ingress(n) {
			return model.Errorf(model.Exists, "ingress network (%s) is already present", other.GetId())
		}
		if tx.Snapshot().IDByName(model.Networks, spec.GetAnnotations().GetName()) != "" {
			return model.Errorf(model.Internal, "name conflicts with an existing object")
		}
		if err := alloc.Conflict(spec, tx.Snapshot().Networks()); err != nil {
			return err
		}
		return tx.Create(n)
	})
	if err != nil {
		return nil, fail(err)
	}
	return &api.CreateNetworkResponse{Network: n}, nil
}

func validateNetwork(spec *api.NetworkSpec) error {
	if spec == nil {
		return invalid("no network spec given")
	}
	if err := validName(spec.GetAnnotations()); err != nil {
		return err
	}
	if err := model.CheckMeshSource(spec.GetAnnotations().GetLabels()); err != nil {
		return err
	}
	name := spec.GetAnnotations().GetName()
	switch driver := spec.GetDriverConfig().GetName(); {
	case spec.GetIngress() && spec.GetAttachable():
		return invalid("ingress network cannot be attachable")
	case spec.GetIngress() && spec.GetInternal():
		return invalid("ingress network cannot be internal")
	case spec.GetNetwork() != "" || alloc.Local(driver):
		return model.Errorf(model.Unimplemented, "network %s: networks of the swarm that each node makes by itself (driver %q, config-from) are not implemented by skep yet: use the driver overlay", name, driver)
	case driver != "" && driver != "overlay":
		return notFoundPlugin(driver)
	}
	if driver := spec.GetIpam().GetDriver().GetName(); driver != "" && driver != "default" {
		return notFoundPlugin(driver)
	}
	if err := validateNetworkOptions(name, spec.GetDriverConfig().GetOptions()); err != nil {
		return err
	}
	if err := alloc.CheckVNIs(spec); err != nil {
		return err
	}
	return alloc.Check(spec)
}

func notFoundPlugin(name string) error {
	return model.Errorf(model.NotFound, "plugin %q not found", name)
}

const (
	mtuOption      = "com.docker.network.driver.mtu"
	minMTU, maxMTU = 68, 65535
	minPort        = 1024
)

func validateNetworkOptions(name string, options map[string]string) error {
	switch how := options[model.EncryptionOption]; how {
	case "", model.ESP, model.WireGuard:
	default:
		return invalid("network %s: %s=%s is neither %s nor %s", name, model.EncryptionOption, how, model.ESP, model.WireGuard)
	}
	if text, on := options[model.EncryptionPortOption]; on {
		if port, err := strconv.ParseUint(text, 10, 16); err != nil || port < minPort {
			return invalid("network %s: %s=%s is not a port from %d to 65535", name, model.EncryptionPortOption, text, minPort)
		}
	}
	if text, on := options[mtuOption]; on {
		if mtu, err := strconv.Atoi(text); err != nil || mtu < minMTU || mtu > maxMTU {
			return invalid("network %s: %s=%s is not a number of bytes from %d to %d", name, mtuOption, text, minMTU, maxMTU)
		}
	}
	return nil
}

// RemoveNetwork deletes a network that nothing uses.
func (o *Ops) RemoveNetwork(ctx context.Context, req *api.RemoveNetworkRequest) (*api.RemoveNetworkResponse, error) {
	err := o.update(ctx, func(tx *store.Tx) error {
		n, err := findNetwork(tx.Snapshot(), req.GetNetworkId(), req.GetName())
		if err != nil {
			return err
		}
		if err := checkNetworkUnused(tx.Snapshot(), n); err != nil {
			return err
		}
		return tx.Remove(model.Networks, n.GetId())
	})
	if err != nil {
		return nil, fail(err)
	}
	return new(api.RemoveNetworkResponse), nil
}

// checkNetworkUnused ignores tasks whose service is gone: they are shutting down, and
// `stack rm` removes the network right after the service.
func checkNetworkUnused(s *store.Snapshot, n *api.Network) error {
	if isPredefined(n) {
		return model.Errorf(model.Precondition, "network %s (%s) is a swarm predefined network and cannot be removed", n.GetSpec().GetAnnotations().GetName(), n.GetId())
	}
	for service := range s.Services() {
		if model.Ingress(n) && publishesIngress(service.GetSpec()) {
			return model.Errorf(model.Precondition, "ingress network cannot be removed because service %s depends on it", service.GetId())
		}
		for _, a := range networksOf(service.GetSpec()) {
			if a.GetTarget() == n.GetId() {
				return model.Errorf(model.Precondition, "network %s is in use by service %s", n.GetId(), service.GetId())
			}
		}
	}
	for t := range s.Tasks() {
		orphan := t.GetServiceId() != "" && s.Service(t.GetServiceId()) == nil
		if orphan || t.GetDesiredState() > api.TaskState_RUNNING || t.GetStatus().GetState() > api.TaskState_RUNNING {
			continue
		}
		for _, a := range t.GetNetworks() {
			if a.GetNetwork().GetId() == n.GetId() {
				return model.Errorf(model.Precondition, "network %s is in use by task %s", n.GetId(), t.GetId())
			}
		}
	}
	return nil
}

// referencedBy lists, sorted by name, the services whose specs satisfy uses.
func referencedBy(s *store.Snapshot, uses func(*api.ContainerSpec) bool) []string {
	var names []string
	for service := range s.Services() {
		if c := service.GetSpec().GetTask().GetContainer(); c != nil && uses(c) {
			names = append(names, service.GetSpec().GetAnnotations().GetName())
		}
	}
	return names
}

// inUse is the refusal to remove a secret or config that services use.
func inUse(what, name string, services []string) error {
	if len(services) == 0 {
		return nil
	}
	plural := ""
	if len(services) > 1 {
		plural = "s"
	}
	return invalid("%s '%s' is in use by the following service%s: %s", what, name, plural, strings.Join(services, ", "))
}
