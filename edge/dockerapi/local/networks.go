package local

import (
	"context"
	"net/netip"

	"github.com/moby/moby/api/types/network"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

// Connect connects a container of this node to a network.
func (a *API) Connect(ctx context.Context, container string, to network.Inspect, settings *network.EndpointSettings) error {
	o := runtime.OverlayRequest{Name: to.Name}
	switch {
	case to.Name == "bridge":
	case to.Scope == "local":
		return model.Errorf(model.Invalid, "container cannot be connected to network %s", to.Name)
	default:
		o.NetworkID = to.ID
	}
	if settings == nil {
		return a.engine.Connect(ctx, container, o)
	}
	if c := settings.IPAMConfig; c != nil {
		for _, addr := range []netip.Addr{c.IPv4Address, c.IPv6Address} {
			if addr.IsValid() {
				o.Wanted = append(o.Wanted, addr)
			}
		}
	}
	o.Aliases = settings.Aliases
	if o.Name == "bridge" && len(o.Wanted)+len(o.Aliases) > 0 {
		return model.Errorf(model.Invalid, "user specified IP addresses and aliases are supported on user defined networks only")
	}
	switch {
	case len(settings.MacAddress) > 0:
		return model.Errorf(model.Unimplemented, "choosing a MAC address is not implemented by skep")
	case len(settings.Links) > 0:
		return model.Errorf(model.Unimplemented, "links are not implemented by skep")
	case len(settings.DriverOpts) > 0:
		return model.Errorf(model.Unimplemented, "driver options of endpoints are not implemented by skep")
	case settings.GwPriority != 0:
		return model.Errorf(model.Unimplemented, "gateway priorities are not implemented by skep")
	}
	return a.engine.Connect(ctx, container, o)
}

// Disconnect takes a container of this node off a network.
func (a *API) Disconnect(ctx context.Context, container string, from network.Inspect) error {
	named := from.ID
	if named == "" || from.Scope == "local" {
		named = from.Name
	}
	return a.engine.Disconnect(ctx, container, named)
}
