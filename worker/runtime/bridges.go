package runtime

import (
	"context"

	"github.com/moby/moby/api/types/network"
)

// Bridges keeps the networks of one node that people made (driver bridge). All methods may
// be called from any goroutine.
type Bridges interface {
	// CreateBridge makes a network and returns its id, 64 hex digits. Exists "network with
	// name X already exists".
	CreateBridge(ctx context.Context, req network.CreateRequest) (id string, err error)
	// RemoveBridge deletes one. Denied while containers are connected to it.
	RemoveBridge(ctx context.Context, id string) error
	// ListBridges returns all, by name, without their containers.
	ListBridges() []network.Network
	// Bridge reports whether a request means one of them.
	Bridge(o OverlayRequest) bool
}
