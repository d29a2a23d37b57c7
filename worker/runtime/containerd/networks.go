package containerd

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/network"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

func builtinNetwork(name string) bool {
	switch name {
	case "", "default", "bridge", "host", "none":
		return true
	}
	return false
}

func bridged(mode container.NetworkMode) bool {
	return mode == "" || mode == "default" || mode == "bridge"
}

// wantedNetworks returns the networks besides the local one that a new container is to be
// on, in the order of their names, and whether it is on the local one against its mode.
// The agent's containers come with the addresses that the swarm gave them; others ask.
func wantedNetworks(mode container.NetworkMode, n *network.NetworkingConfig) (out []runtime.OverlayRequest, onBridge bool, err error) {
	endpoints := map[string]*network.EndpointSettings{}
	if n != nil {
		maps.Copy(endpoints, n.EndpointsConfig)
	}
	if own := string(mode); !builtinNetwork(own) && !mode.IsContainer() && endpoints[own] == nil && !namesTask(endpoints, own) {
		endpoints[own] = nil
	}
	for _, name := range slices.Sorted(maps.Keys(endpoints)) {
		ep := endpoints[name]
		if builtinNetwork(name) {
			if err := onlyDefaults(name, ep); err != nil {
				return nil, false, err
			}
			onBridge = onBridge || bridged(container.NetworkMode(name)) && !bridged(mode)
			continue
		}
		o, err := wantedNetwork(name, ep)
		if err != nil {
			return nil, false, err
		}
		out = append(out, o)
	}
	if (len(out) > 0 || onBridge) && (mode.IsHost() || mode.IsNone() || mode.IsContainer()) {
		name := "bridge"
		if len(out) > 0 {
			name = out[0].Name
		}
		return nil, false, model.Errorf(model.Invalid, "network mode %q cannot be combined with network %s", mode, name)
	}
	return out, onBridge, nil
}

// namesTask reports whether a mode is the id of a network among those of a task.
func namesTask(endpoints map[string]*network.EndpointSettings, mode string) bool {
	for _, ep := range endpoints {
		if ep != nil && ep.NetworkID == mode {
			return true
		}
	}
	return false
}

// onlyDefaults refuses what predefined networks cannot do.
func onlyDefaults(name string, ep *network.EndpointSettings) error {
	switch {
	case ep == nil:
		return nil
	case ep.IPAMConfig != nil && (ep.IPAMConfig.IPv4Address.IsValid() || ep.IPAMConfig.IPv6Address.IsValid()):
		return model.Errorf(model.Invalid, "invalid config for network %s: invalid endpoint settings: user specified IP address is supported on user defined networks only", name)
	case len(ep.Aliases) > 0:
		return model.Errorf(model.Invalid, "invalid config for network %s: invalid endpoint settings: network-scoped aliases are only supported for user-defined networks", name)
	}
	return unserved(name, ep)
}

func wantedNetwork(name string, ep *network.EndpointSettings) (runtime.OverlayRequest, error) {
	o := runtime.OverlayRequest{Name: name}
	if ep == nil {
		return o, nil
	}
	o.NetworkID, o.Aliases = ep.NetworkID, ep.Aliases
	var four, six netip.Addr
	if ep.IPAMConfig != nil {
		four, six = ep.IPAMConfig.IPv4Address, ep.IPAMConfig.IPv6Address
	}
	if ep.NetworkID != "" && ep.IPPrefixLen != 0 { // the swarm gave it
		if o.Address = netip.PrefixFrom(four, ep.IPPrefixLen); !o.Address.IsValid() {
			return o, model.Errorf(model.Invalid, "network %s: prefix length %d of address %s", name, ep.IPPrefixLen, four)
		}
		if six.IsValid() {
			o.Address6 = netip.PrefixFrom(six, ep.GlobalIPv6PrefixLen)
		}
		return o, nil
	}
	for _, a := range []netip.Addr{four, six} {
		if a.IsValid() {
			o.Wanted = append(o.Wanted, a)
		}
	}
	return o, unserved(name, ep)
}

// unserved refuses what no endpoint of a container can have.
func unserved(name string, ep *network.EndpointSettings) error {
	switch {
	case len(ep.MacAddress) > 0:
		return model.Errorf(model.Unimplemented, "network %s: choosing a MAC address is not implemented by skep", name)
	case len(ep.Links) > 0:
		return model.Errorf(model.Unimplemented, "network %s: links are not implemented by skep", name)
	case len(ep.DriverOpts) > 0:
		return model.Errorf(model.Unimplemented, "network %s: driver options of endpoints are not implemented by skep", name)
	case ep.GwPriority != 0:
		return model.Errorf(model.Unimplemented, "network %s: gateway priorities are not implemented by skep", name)
	}
	return nil
}

// onBridge reports whether a container is on the local network for its own sake. A task is
// there only to have a way out.
func onBridge(s *saved) bool {
	task := slices.ContainsFunc(s.Overlays, func(o runtime.OverlayRequest) bool { return o.Address.IsValid() })
	return s.OnBridge || bridged(s.Host.NetworkMode) && !s.OffBridge && !task
}

// overlayAt returns the place of a network among a container's: by what it was called when
// the container was connected, or by what it turned out to be. -1 when it is not there.
func overlayAt(s *saved, named string) int {
	is := func(o runtime.OverlayRequest) bool { return o.Name == named || o.NetworkID == named }
	if i := slices.IndexFunc(s.Overlays, is); i >= 0 {
		return i
	}
	if i := slices.IndexFunc(s.Sandbox.Attached, is); i < len(s.Overlays) {
		return i
	}
	return -1
}

// Connect implements runtime.Connector.
func (e *Engine) Connect(ctx context.Context, ref string, to runtime.OverlayRequest) error {
	c, err := e.findTurn(ctx, ref)
	if err != nil {
		return err
	}
	defer c.give()
	s := e.view(c)
	if err := e.changeable(&s, to.Name); err != nil {
		return err
	}
	local := to.Name == "bridge"
	if local && onBridge(&s) || overlayAt(&s, to.Name) >= 0 || to.NetworkID != "" && overlayAt(&s, to.NetworkID) >= 0 {
		if len(to.NetworkID) == model.IDLength {
			return model.Errorf(model.Exists, "%s is already attached to network %s", s.Name, to.Name)
		}
		return model.Errorf(model.Denied, "endpoint with name %s already exists in network %s", s.Name, to.Name)
	}
	if local {
		s.OnBridge, s.OffBridge = true, false
	} else {
		s.Overlays = append(slices.Clip(s.Overlays), to)
	}
	if err := e.rewire(ctx, c, &s); err != nil {
		return err
	}
	e.networkEvent(&s, events.ActionConnect, to.Name)
	return nil
}

// Disconnect implements runtime.Connector.
func (e *Engine) Disconnect(ctx context.Context, ref, named string) error {
	c, err := e.findTurn(ctx, ref)
	if err != nil {
		return err
	}
	defer c.give()
	s := e.view(c)
	if err := e.changeable(&s, named); err != nil {
		return err
	}
	i := overlayAt(&s, named)
	switch {
	case i >= 0:
		if i < len(s.Sandbox.Attached) {
			s.Sandbox.Attached = slices.Delete(slices.Clone(s.Sandbox.Attached), i, i+1)
		}
		named = s.Overlays[i].Name
		s.Overlays = slices.Delete(slices.Clone(s.Overlays), i, i+1)
		if len(s.Overlays) == 0 && !bridged(s.Host.NetworkMode) && !s.OnBridge {
			s.OffBridge = true
		}
	case named == "bridge" && onBridge(&s):
		s.OnBridge, s.OffBridge = false, true
	default:
		return model.Errorf(model.Denied, "container %s is not connected to network %s", s.ID, named)
	}
	if err := e.rewire(ctx, c, &s); err != nil {
		return err
	}
	e.networkEvent(&s, events.ActionDisconnect, named)
	return nil
}

// changeable refuses containers whose networks cannot change.
func (e *Engine) changeable(s *saved, name string) error {
	switch {
	case e.cfg.Network == nil:
		return model.Errorf(model.NotFound, "network %s not found", name)
	case s.Status == container.StateDead || s.Status == container.StateRemoving:
		return model.Errorf(model.Conflict, "container %s is marked for removal and cannot be connected or disconnected to the network", s.ID)
	case s.Host.NetworkMode.IsHost():
		return model.Errorf(model.Invalid, "container cannot be disconnected from host network or connected to host network")
	case s.Host.NetworkMode.IsContainer():
		return model.Errorf(model.Invalid, "container sharing network namespace with another container or host cannot be connected to any other network")
	case s.Host.NetworkMode.IsNone():
		return model.Errorf(model.Invalid, "container cannot be connected to multiple networks with one of the networks in private (none) mode")
	}
	return nil
}

// rewire makes next the container's networks and its name; the caller has its turn.
func (e *Engine) rewire(ctx context.Context, c *record, next *saved) error {
	if !isRunning(*next) || !next.HasNet {
		return e.rewired(c, next)
	}
	req, err := sandboxRequest(next)
	if err != nil {
		return err
	}
	if len(req.Ports) > 0 && len(next.Sandbox.Ports) > 0 {
		req.Ports = next.Sandbox.Ports
	}
	if was := e.view(c).Name; was != next.Name {
		req.Former = was
	}
	if next.Sandbox, err = e.cfg.Network.Attach(ctx, req); err != nil {
		return err
	}
	if err = e.writeNetFiles(next); err == nil {
		err = e.rewired(c, next)
	}
	return e.unname(ctx, req, err)
}

// rewired notes what rewire made.
func (e *Engine) rewired(c *record, next *saved) error {
	return e.change(c, func(to *saved) {
		to.Overlays, to.OnBridge, to.OffBridge, to.Sandbox, to.Name = next.Overlays, next.OnBridge, next.OffBridge, next.Sandbox, next.Name
	})
}

// unname gives a container whose renaming failed, if err says so, its former name in its networks
// again: others would look for it by one that it has not.
func (e *Engine) unname(ctx context.Context, req runtime.SandboxRequest, err error) error {
	if err == nil || req.Former == "" {
		return err
	}
	req.Name, req.Former = req.Former, req.Name
	_, again := e.cfg.Network.Attach(context.WithoutCancel(ctx), req)
	return errors.Join(err, again)
}

// networkEvent tells of a change of a container's networks.
func (e *Engine) networkEvent(s *saved, action events.Action, name string) {
	id, kind := "", "bridge"
	if i := overlayAt(s, name); i >= 0 && i < len(s.Sandbox.Attached) {
		id, kind = s.Sandbox.Attached[i].NetworkID, "overlay"
	}
	e.bus.Publish(events.Message{Type: events.NetworkEventType, Action: action, Actor: events.Actor{
		ID: id, Attributes: map[string]string{"container": s.ID, "name": name, "type": kind},
	}})
}

// places returns what a container asks the network for: what it has already, then what it
// was connected to since.
func places(s *saved) []runtime.OverlayRequest {
	out := slices.Clone(s.Overlays)
	copy(out, s.Sandbox.Attached)
	return out
}
