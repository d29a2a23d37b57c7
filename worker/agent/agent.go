package agent

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/worker/runtime"
)

// Engine is the part of a container runtime that tasks need.
type Engine interface {
	runtime.Containers
	runtime.Inspector
	Logs(ctx context.Context, id string, opts runtime.LogOptions, write func(runtime.LogLine) error) error
	Disconnect(ctx context.Context, id, network string) error
	Puller
}

// Config is what an Agent works with. All fields are required but Keys, Networks,
// Attachments and Registerer.
type Config struct {
	NodeID   string
	Hostname string
	// Dir holds the task database.
	Dir string
	// Keys seal the task database; nil leaves it in the clear.
	Keys   Keys
	Engine Engine
	// Connect reaches a manager for one session; done gives the connection back and says
	// whether the session got anywhere.
	Connect func(ctx context.Context) (conn grpc.ClientConnInterface, done func(ok bool), err error)
	// Describe returns the node's description.
	Describe func(ctx context.Context) (*api.NodeDescription, error)
	// Networks programs the swarm's networks. Nil for a node that can run no task of them.
	Networks Networks
	// Attachments connects containers that are no tasks to networks of the swarm. Nil for a
	// node that has no such containers.
	Attachments *Attachments
	// OnSession hears every message of the session: managers, the node itself, the root.
	OnSession  func(*api.SessionMessage)
	Log        *slog.Logger
	Registerer prometheus.Registerer
}

const (
	callTimeout  = 5 * time.Second
	backoffBase  = 100 * time.Millisecond
	backoffLimit = 8 * time.Second
	// describeEvery is how often the description is compared with what was reported.
	describeEvery = 20 * time.Second
)

// Agent is one node's agent.
type Agent struct {
	cfg    Config
	worker *worker
	// described wakes the session when the description may have changed.
	described chan struct{}

	mu        sync.Mutex
	conn      grpc.ClientConnInterface // of the session of now, else nil
	connected chan struct{}            // closed when conn is set
}

// New returns an Agent that does nothing before Run.
func New(cfg Config) *Agent {
	return &Agent{cfg: cfg, described: make(chan struct{}, 1), connected: make(chan struct{})}
}

// setConn notes the connection of a session, nil at its end.
func (a *Agent) setConn(conn grpc.ClientConnInterface) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.conn = conn
	if conn != nil {
		close(a.connected)
	} else {
		a.connected = make(chan struct{})
	}
}

// DescriptionChanged tells the manager soon what changed, for example the certificate.
func (a *Agent) DescriptionChanged() {
	select {
	case a.described <- struct{}{}:
	default:
	}
}

// Run resumes the tasks of the database and keeps a session with some manager until ctx
// ends. Tasks keep running then.
func (a *Agent) Run(ctx context.Context) error {
	db, err := openDatabase(a.cfg.Dir, a.cfg.Keys)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	a.worker = newWorker(ctx, &a.cfg, db)
	a.worker.detach = a.detach
	defer func() {
		cancel()
		a.worker.wait()
		if err := db.close(); err != nil {
			a.cfg.Log.Error("close task database", slog.Any("error", err))
		}
	}()
	a.cfg.Attachments.bind(a)
	defer a.cfg.Attachments.bind(nil)
	a.worker.resume()
	session, backoff := "", time.Duration(0)
	for ctx.Err() == nil {
		if backoff > 0 {
			wait := time.NewTimer(rand.N(backoff))
			select {
			case <-ctx.Done():
				wait.Stop()
				return nil
			case <-wait.C:
			}
		}
		registered, err := a.session(ctx, &session)
		if ctx.Err() != nil {
			return nil
		}
		if registered {
			backoff = 0
		}
		backoff = min(backoffBase+2*backoff, backoffLimit)
		level := slog.LevelDebug
		if !registered {
			level = slog.LevelInfo
		}
		a.cfg.Log.Log(ctx, level, "session ended, looking for a manager", slog.Any("error", err), slog.Duration("backoff", backoff))
	}
	return nil
}

// errDescribed ends a session to open one with a new description.
var errDescribed = errors.New("the node's description changed")

// group runs functions until the first returns, then ends the others.
type group struct {
	sync.WaitGroup
	cancel context.CancelCauseFunc
}

func (g *group) run(f func() error) {
	g.Go(func() { g.cancel(f()) })
}
