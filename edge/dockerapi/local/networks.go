package local

import (
	"context"
	"net/netip"
	"time"

	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/network"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

// Connect connects a container of this node to a network.
func (a *API) Connect(ctx context.Context, container string, to network.Inspect, settings *network.EndpointSettings) error {
	o := runtime.OverlayRequest{Name: to.Name}
	switch to.Name {
	case "bridge":
	case "host", "none":
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
	if named == "" || from.Name == "bridge" {
		named = from.Name
	}
	return a.engine.Disconnect(ctx, container, named)
}

// CreateNetwork makes a network of this node.
func (a *API) CreateNetwork(ctx context.Context, req network.CreateRequest) (string, error) {
	if a.cfg.Bridges == nil {
		return "", model.Errorf(model.Unimplemented, "network %s: networks of one node are not implemented by skep here", req.Name)
	}
	id, err := a.cfg.Bridges.CreateBridge(ctx, req)
	if err == nil {
		a.networkEvent(events.ActionCreate, id, req.Name)
	}
	return id, err
}

// RemoveNetwork deletes a network of this node.
func (a *API) RemoveNetwork(ctx context.Context, n network.Inspect) error {
	if a.cfg.Bridges == nil {
		return model.Errorf(model.NotFound, "network %s not found", n.Name)
	}
	err := a.cfg.Bridges.RemoveBridge(ctx, n.ID)
	if err == nil {
		a.networkEvent(events.ActionDestroy, n.ID, n.Name)
	}
	return err
}

func (a *API) networkEvent(action events.Action, id, name string) {
	now := time.Now()
	a.emit(events.Message{
		Type: events.NetworkEventType, Action: action, Scope: "local",
		Actor: events.Actor{ID: id, Attributes: map[string]string{"name": name, "type": "bridge"}},
		Time:  now.Unix(), TimeNano: now.UnixNano(),
	})
}
