package fake

import (
	"context"
	"slices"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

// mode is the network that a container is created on.
func (c *record) mode() string {
	if m := string(c.host.NetworkMode); m != "" && m != "default" {
		return m
	}
	return "bridge"
}

// Connect implements runtime.Connector.
func (e *Engine) Connect(_ context.Context, ref string, to runtime.OverlayRequest) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	own := to.Name == c.mode()
	if own && !c.apart || c.network(to.Name) >= 0 {
		return model.Errorf(model.Denied, "endpoint with name %s already exists in network %s", e.index.Name(c.id), to.Name)
	}
	if own {
		c.apart = false
		return nil
	}
	c.networks = append(c.networks, to)
	return nil
}

// Disconnect implements runtime.Connector.
func (e *Engine) Disconnect(_ context.Context, ref, named string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	switch i := c.network(named); {
	case i >= 0:
		c.networks = slices.Delete(c.networks, i, i+1)
	case named == c.mode() && !c.apart:
		c.apart = true
	default:
		return model.Errorf(model.Denied, "container %s is not connected to network %s", c.id, named)
	}
	return nil
}

func (c *record) network(named string) int {
	return slices.IndexFunc(c.networks, func(o runtime.OverlayRequest) bool { return o.Name == named || o.NetworkID == named })
}
