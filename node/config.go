package node

import (
	"log/slog"
	"net"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/skep-dev/skep/platform/audit"
	"github.com/skep-dev/skep/platform/wire"
	"github.com/skep-dev/skep/worker/agent"
	"github.com/skep-dev/skep/worker/runtime"
)

// Config says what one daemon is and works with.
type Config struct {
	// DataRoot keeps what must survive a reboot, ExecRoot what need not. Required.
	DataRoot, ExecRoot string
	// Hosts are where the API listens: unix://PATH or tcp://HOST:PORT.
	Hosts []string
	// Listeners serve the API too, in clear: they are the caller's to guard. The daemon
	// closes them.
	Listeners []net.Listener
	// Network connects the nodes of the swarm; nil is TCP.
	Network wire.Network
	// TLSCert and TLSKey protect tcp hosts; with TLSCACert, clients must show a certificate
	// signed by it.
	TLSCert, TLSKey, TLSCACert string
	// AnyClient lets clients without a certificate use tcp hosts, and Clear serves these
	// without TLS: both make everybody who reaches one root on this machine.
	AnyClient, Clear bool
	// Roles give roles to the certificates of the API's clients: cn=NAME:ROLE, ou=NAME:ROLE
	// or *:ROLE.
	Roles []string
	// AdvertiseAddr and ListenAddr are the defaults of swarm init and join.
	AdvertiseAddr, ListenAddr string
	// Labels are engine labels, key=value.
	Labels []string
	// Abilities returns engine labels that only the managers are told: what this node can do.
	// Nil means none. AbilitiesChanged has a value when it returns others than before.
	Abilities        func() []string
	AbilitiesChanged <-chan struct{}
	// MetricsAddr serves /metrics in clear; empty serves none.
	MetricsAddr string
	// UnlockProvider is asked for the unlock key when this manager starts locked: a
	// unlock.Provider's text; empty asks nobody.
	UnlockProvider string
	// StopTasks stops all containers when the daemon stops.
	StopTasks bool
	Debug     bool
	// InsecureRegistries are the registries that the engine trusts without a certificate.
	InsecureRegistries []string
	// Hostname is this node's name; required.
	Hostname string
	// Version, Commit and BuildTime describe the program.
	Version, Commit, BuildTime string
	// Engine runs the containers. Required.
	Engine runtime.Engine
	// Networks programs the swarm's networks; nil for a node without them.
	Networks agent.Networks
	// Gossip tells Docker Engines in the swarm of this node's networks; nil for a node that
	// does not.
	Gossip Gossip
	// Attachments connects containers that are no tasks to networks of the swarm; nil for a
	// node without such containers.
	Attachments *agent.Attachments
	// Bridges keeps the networks of this node alone; nil for a node without any.
	Bridges runtime.Bridges
	// Reload receives a value when the configuration shall be read again. It may be nil.
	Reload     <-chan struct{}
	Log        *slog.Logger
	Registry   *prometheus.Registry
	Components map[string]string

	// audit is the daemon's audit log; nil in tests that have none.
	audit *audit.Log
}
