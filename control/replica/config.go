package replica

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"github.com/skep-dev/skep/core/model"
)

// The defaults that SwarmKit's clusters start with, used until there is a cluster object.
const (
	defaultSnapshotInterval = 10_000
	defaultEntriesKept      = 500
)

const (
	heartbeatTick = 1
	electionTick  = 10
	// maxRequest is the largest entry, in bytes. SwarmKit's members refuse to propose more.
	maxRequest = 1_572_864
	// maxAppend bounds one append message but for an entry larger than it. The sum stays
	// below the 4 MiB that a receiver takes.
	maxAppend      = 1 << 20
	maxInflight    = 256
	maxUncommitted = 64 << 20
	// maxPending bounds the updates in flight. Further ones wait in their callers.
	maxPending = 4096
	// maxBatch bounds the updates proposed together.
	maxBatch = 256
	// inboxSize bounds the messages received and not yet looked at. Further senders wait.
	inboxSize = 1024
)

// ErrRemoved is what Run returns when the swarm has removed this member. What it kept on
// disk is of no more use and must be deleted before it joins again.
var ErrRemoved = errors.New("raft: member was removed from the cluster")

// errLostLeadership answers updates whose entry was in flight when leadership went.
var errLostLeadership = &model.Error{
	Kind: model.Unavailable,
	Text: "raft: failed to process the request: node lost leader status",
}

var errStopped = &model.Error{
	Kind: model.Unavailable,
	Text: "raft: node is stopped",
}

// Keys are the data encryption keys of this manager. They are kept by others (sealed by
// the key encryption key when the swarm locks its managers). Methods may be called from
// any goroutine.
type Keys interface {
	// DEKs returns the key that the log is sealed with and, during a rotation, the key that
	// it moves to, else nil.
	DEKs() (current, pending []byte, err error)
	// RotationWanted receives a value when a rotation was requested. It may be nil.
	RotationWanted() <-chan struct{}
	// BeginRotation returns the pending key, made durable before. It makes one when there is
	// none and a rotation was requested; nil when there is nothing to do.
	BeginRotation() (pending []byte, err error)
	// FinishRotation makes the pending key the current one, durably.
	FinishRotation() error
}

// StaticKey is a Keys that never changes.
type StaticKey []byte

// DEKs implements Keys.
func (k StaticKey) DEKs() (current, pending []byte, err error) { return k, nil, nil }

// RotationWanted implements Keys.
func (k StaticKey) RotationWanted() <-chan struct{} { return nil }

// BeginRotation implements Keys.
func (k StaticKey) BeginRotation() ([]byte, error) { return nil, nil }

// FinishRotation implements Keys.
func (k StaticKey) FinishRotation() error { return nil }

// Config says who this member is and what it works with. Every field without a stated
// default is required.
type Config struct {
	// NodeID is the id of this node in the swarm.
	NodeID string
	// Addr is where other managers reach this one, host:port.
	Addr string
	// Dir is where the raft log is kept; it is made when missing.
	Dir string
	// Keys seal the log.
	Keys Keys
	// Dial connects to another manager; it may return before the connection is up.
	Dial func(ctx context.Context, addr string) (*grpc.ClientConn, error)
	// Caller says which node makes an RPC and from which host:port or host.
	Caller func(ctx context.Context) (nodeID, addr string, err error)
	// CallerCertificate returns the certificate with which an RPC is made. Nil believes what
	// the state says about a node over what its certificate says.
	CallerCertificate func(ctx context.Context) *x509.Certificate
	// Log receives what happens.
	Log *slog.Logger
	// Registerer receives the metrics. Nil registers none.
	Registerer prometheus.Registerer
	// TickInterval is raft's unit of time: a heartbeat is 1 tick, an election 10 to 19. All
	// members of a swarm should agree. Default 100 ms; 1 s when Docker Engines are members.
	TickInterval time.Duration
	// JoinAddr is a manager of the swarm to join. Empty continues what is on disk or, without
	// that, starts a new swarm.
	JoinAddr string
	// ForceNewCluster continues what is on disk as the only member.
	ForceNewCluster bool
}
