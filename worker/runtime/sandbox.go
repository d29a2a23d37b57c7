package runtime

import (
	"context"
	"net/netip"

	"github.com/moby/moby/api/types/network"
)

// Network gives containers their network. The runtime calls it; worker/dataplane
// implements it. All methods are idempotent and may be called from any goroutine.
type Network interface {
	// Attach makes the network namespace of a container and connects it, or finds
	// what a former process made and mends it. A container that is connected is made to have
	// the networks of the request and no others. Conflict when a host port is taken:
	// "port is already allocated".
	Attach(ctx context.Context, req SandboxRequest) (Sandbox, error)
	// Detach disconnects a container and frees its addresses and ports. Unknown ids are no error.
	Detach(ctx context.Context, containerID string) error
	// Retain frees everything that belongs to containers not listed; called once after a restart.
	Retain(ctx context.Context, containerIDs []string) error
}

// SandboxRequest says what network a container wants.
type SandboxRequest struct {
	ContainerID string
	Name        string
	// Former is the name that a container that is connected had until now; empty if it keeps its.
	Former   string
	Hostname string
	// Mode is Docker's network mode: "bridge" (or empty, "default"), "host", "none".
	Mode string
	// Ports are published on the host; a zero HostPort asks for an ephemeral one.
	Ports []PortBinding
	// Overlays are the swarm's networks that the container is attached to, besides Mode
	// "bridge", which then only gives a way out.
	Overlays []OverlayRequest
	// Local says that, with Overlays, the container is on the local network for its own sake
	// too: also where none of Overlays leads outside.
	Local bool
	// DNS are servers to ask instead of the host's; only with Overlays.
	DNS []netip.Addr
}

// OverlayRequest attaches a container to a network of the swarm.
type OverlayRequest struct {
	// NetworkID is empty as long as only Name, as somebody typed it, is known.
	NetworkID string
	// Name of the network, under which it appears in inspect.
	Name string
	// Address that the swarm gave the container, with the subnet's prefix length. Zero for a
	// container that is no task of a service and has to ask for one.
	Address netip.Prefix
	// Address6 is its IPv6 address there; zero without one.
	Address6 netip.Prefix
	// Aliases are further names of the container in this network.
	Aliases []string
	// Wanted are the addresses to ask for where Address is zero; none leaves the choice.
	Wanted []netip.Addr `json:",omitempty"`
}

// PortBinding is one published port.
type PortBinding struct {
	// Protocol is "tcp", "udp" or "sctp".
	Protocol      string
	ContainerPort uint16
	// HostIP is unspecified for all addresses of the host.
	HostIP   netip.Addr
	HostPort uint16
}

// Sandbox is a container's network as it was made.
type Sandbox struct {
	// NetNS is the path of the pinned network namespace; empty for mode "host".
	NetNS string
	// Endpoint holds address, gateway and MAC; nil for modes "host" and "none".
	Endpoint *network.EndpointSettings
	// NetworkName is the name under which Endpoint appears in inspect, "bridge".
	NetworkName string
	// Overlays holds the endpoints of SandboxRequest.Overlays, by network name.
	Overlays map[string]*network.EndpointSettings
	// Attached are SandboxRequest.Overlays with the addresses that the container has.
	Attached []OverlayRequest `json:",omitempty"`
	// Ports are the request's with every HostPort filled in.
	Ports []PortBinding
	// Nameservers, Search and Options are the host's resolver settings as they can be
	// used inside the sandbox.
	Nameservers, Search, Options []string
}
