package dockerapi

import (
	"context"

	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/api/types/system"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
)

// Swarm is this daemon's membership in a swarm. Its methods return errors whose text
// goes to the user as it is; their kinds decide the HTTP status.
type Swarm interface {
	// Init makes a new swarm, or with ForceNewCluster a new one of this manager's
	// state, and returns this node's id. The node can be read from the swarm then,
	// with its manager status.
	Init(ctx context.Context, req swarm.InitRequest) (nodeID string, err error)
	// Join enters an existing swarm. It returns when the node is active; after 20 s it
	// returns Unavailable and goes on in the background.
	Join(ctx context.Context, req swarm.JoinRequest) error
	// Leave stops this node's tasks and forgets the swarm. Without force a manager refuses.
	Leave(ctx context.Context, force bool) error
	// Unlock gives a locked manager its key.
	Unlock(ctx context.Context, req swarm.UnlockRequest) error
	// UnlockKey returns the key, "SWMKEY-1-…", or "" when autolock is off.
	UnlockKey(ctx context.Context) (string, error)
	// Status is the local part of `docker info`'s swarm block: everything but Nodes,
	// Managers, Cluster and Warnings. It never blocks.
	Status() swarm.Info
}

// Manager reaches the swarm's managers from this one. Without a running local manager
// all methods return NotManager's error.
type Manager interface { //nolint:interfacebloat // a method for each service of the leader
	// Control executes on the leader, wherever that is. Its methods' errors carry gRPC
	// statuses. It returns an error of its own only when this node is no manager.
	Control() (api.ControlClient, error)
	// Logs subscribes on the leader.
	Logs() (api.LogsClient, error)
	// Insight asks the leader.
	Insight() (skepv1.InsightClient, error)
	// Networks asks the leader about the networks of all nodes.
	Networks() (skepv1.NetworksClient, error)
	// Tokens keeps limited join tokens, on the leader.
	Tokens() (skepv1.TokensClient, error)
	// Unlocking sets on the leader whether managers unlock each other.
	Unlocking() (skepv1.UnlockClient, error)
	// Secrets changes the values of secrets on the leader.
	Secrets() (skepv1.SecretsClient, error)
	// Follow returns a cursor over this manager's own copy of the state.
	Follow() (*replica.Cursor, error)
}

// Facts are what `docker info` and `docker version` say about the daemon.
type Facts struct {
	// ID identifies the daemon, apart from any swarm.
	ID string
	// Name is the hostname.
	Name string
	// RootDir is the data root.
	RootDir string
	// Version of Skep, the commit it was built from and when (RFC 3339).
	Version, Commit, BuildTime string
	// Labels are the daemon's, "k=v".
	Labels []string
	Debug  bool
	// InsecureRegistries are trusted without a certificate: hosts and networks.
	InsecureRegistries []string
	// GenericResources of this node.
	GenericResources []swarm.GenericResource
}

// Daemon tells the facts, which may change when the configuration is read again.
type Daemon interface{ Facts() Facts }

// Local is what this package needs of the endpoints of one node (containers, images, …),
// to compose answers about the node and the swarm. It may be nil.
type Local interface {
	// Info fills in what `docker info` says about containers, images and the machine.
	Info(ctx context.Context, info *system.Info) error
	// Components are the parts for `docker version` besides the Engine: containerd, runc, …
	Components(ctx context.Context) []system.ComponentVersion
	// Events streams what happens on this node until ctx ends. A subscriber that falls
	// too far behind gets an error.
	Events(ctx context.Context) (<-chan events.Message, <-chan error)
	// Replay returns events of this node since a time, oldest first, as far as remembered.
	Replay(sinceNano int64) []events.Message
	// Distribution asks a registry for an image's descriptor and platforms.
	Distribution(ctx context.Context, ref string, auth *registry.AuthConfig) (*registry.DistributionInspect, error)
	LocalNetworks
}

// LocalNetworks is the part of Local that is about networks.
type LocalNetworks interface {
	// Networks lists this node's own networks: bridge, host and none, with the containers on them.
	Networks(ctx context.Context) ([]network.Inspect, error)
	// Connect and Disconnect change the networks of one of this node's containers.
	Connect(ctx context.Context, container string, to network.Inspect, settings *network.EndpointSettings) error
	Disconnect(ctx context.Context, container string, from network.Inspect) error
	// CreateNetwork and RemoveNetwork make and delete networks of this node (driver bridge).
	CreateNetwork(ctx context.Context, req network.CreateRequest) (id string, err error)
	RemoveNetwork(ctx context.Context, n network.Inspect) error
}

// NotManager is the error of an endpoint that only managers answer, for a node in the
// given state. worker tells a node without manager role (or one that is still joining)
// from a manager that is not up yet.
func NotManager(state swarm.LocalNodeState, worker bool, reason string) error {
	switch {
	case state == swarm.LocalNodeStateInactive:
		return model.Errorf(model.Unavailable, `This node is not a swarm manager. Use "docker swarm init" or "docker swarm join" to connect this node to swarm and try again.`)
	case state == swarm.LocalNodeStateLocked:
		return model.Errorf(model.Unavailable, `Swarm is encrypted and needs to be unlocked before it can be used. Please use "docker swarm unlock" to unlock it.`)
	case state == swarm.LocalNodeStateError && reason != "":
		return model.Errorf(model.Unavailable, "%s", reason)
	case worker:
		return model.Errorf(model.Unavailable, "This node is not a swarm manager. Worker nodes can't be used to view or modify cluster state. Please run this command on a manager node or promote the current node to a manager.")
	default:
		return model.Errorf(model.Unavailable, "This node is not a swarm manager. Manager is being prepared or has trouble connecting to the cluster.")
	}
}
