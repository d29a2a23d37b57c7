package containerd

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"go.etcd.io/bbolt"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/runtime/docker"
)

var errNotModified = runtime.ErrNotModified

// saved is what is kept of a container on disk.
type saved struct {
	ID       string
	Name     string
	Created  time.Time
	ImageID  string
	Config   *container.Config
	Host     *container.HostConfig
	Mounts   []mountPoint
	Anon     []string // names of anonymous volumes
	HasFiles bool
	HasNet   bool // the network knows the container
	// Overlays are the networks that the container is on besides the local one.
	Overlays []runtime.OverlayRequest
	// OnBridge and OffBridge are set when it was connected to the local network, or
	// disconnected from it, against its network mode.
	OnBridge, OffBridge bool

	Status     container.ContainerState
	Pid        int
	ExitCode   int
	Error      string
	OOMKilled  bool
	Started    time.Time
	Finished   time.Time
	Restarts   int
	ManualStop bool
	Group      string // the shim that serves the running task
	BootID     string // of the machine when it was started
	Sandbox    runtime.Sandbox
	Health     *container.Health

	// Sealed is the rest of the record of a task's container, on disk and while locked.
	Sealed []byte `json:",omitempty"`
	locked bool   // no key has opened Sealed yet
}

// record is one container. Engine.mu guards everything but id and turn.
type record struct {
	id   string
	turn chan struct{} // holds one token; who has it may step the container
	saved

	rootfs   []rootMount // how to mount the snapshot
	starting bool
	removing bool
	ready    chan struct{} // closed when the starting task's streams can be attached
	exited   chan struct{} // closed when the current run ends
	waiters  runtime.Waiters
	attaches int // attach calls that want to be connected before the start
	execs    map[string]*execRecord
	timer    *time.Timer        // a pending restart
	watching context.CancelFunc // ends health checks
}

func newRecord(s saved) *record {
	c := &record{id: s.ID, turn: make(chan struct{}, 1), saved: s, ready: make(chan struct{})}
	c.turn <- struct{}{}
	return c
}

// take waits for the container's turn.
func (c *record) take(ctx context.Context) error {
	select {
	case <-c.turn:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *record) give() { c.turn <- struct{}{} }

func (c *record) running() bool {
	return c.Status == container.StateRunning || c.Status == container.StatePaused
}

// find returns the container that ref means.
func (e *Engine) find(ref string) (*record, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.findLocked(ref)
}

func (e *Engine) findLocked(ref string) (*record, error) {
	id, err := e.index.Resolve(ref)
	if err != nil {
		return nil, err
	}
	c := e.containers[id]
	if c == nil { // reserved, not created yet
		return nil, model.Errorf(model.NotFound, "No such container: %s", ref)
	}
	return c, nil
}

// findTurn finds a container and takes its turn; the caller gives it back.
func (e *Engine) findTurn(ctx context.Context, ref string) (*record, error) {
	c, err := e.find(ref)
	if err != nil {
		return nil, err
	}
	if err := c.take(ctx); err != nil {
		return nil, err
	}
	e.mu.Lock()
	gone := e.containers[c.id] != c
	e.mu.Unlock()
	if gone {
		c.give()
		return nil, model.Errorf(model.NotFound, "No such container: %s", ref)
	}
	return c, nil
}

// view returns a copy of a container's record.
func (e *Engine) view(c *record) saved {
	e.mu.Lock()
	defer e.mu.Unlock()
	return c.saved
}

// change edits a container's record and writes it to disk.
func (e *Engine) change(c *record, edit func(*saved)) error {
	e.mu.Lock()
	edit(&c.saved)
	s := c.saved
	e.mu.Unlock()
	return e.save(s)
}

func (e *Engine) emit(c *record, action events.Action, extra ...string) {
	s := e.view(c)
	e.bus.Publish(docker.ContainerEvent(action, s.ID, s.Name, s.Config, extra...))
}

const (
	containerBucket = "containers"
	volumeBucket    = "volumes"
)

func openDB(path string) (*bbolt.DB, error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: 10 * time.Second, NoFreelistSync: true, FreelistType: bbolt.FreelistMapType})
	if err != nil {
		return nil, fmt.Errorf("open container database %s (does another daemon use it?): %w", path, err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		for _, b := range []string{containerBucket, volumeBucket} {
			if _, err := tx.CreateBucketIfNotExists([]byte(b)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		_ = db.Close() // the first error counts
		return nil, fmt.Errorf("prepare container database: %w", err)
	}
	db.MaxBatchDelay = 500 * time.Microsecond
	return db, nil
}

func (e *Engine) save(s saved) error {
	s, err := e.onDisk(s)
	if err != nil {
		return err
	}
	return e.put(containerBucket, s.ID, s)
}

func (e *Engine) put(bucket, key string, value any) error {
	b, err := json.Marshal(value)
	if err != nil {
		return fmt.Errorf("encode %s record: %w", bucket, err)
	}
	err = e.db.Batch(func(tx *bbolt.Tx) error { return tx.Bucket([]byte(bucket)).Put([]byte(key), b) })
	if err != nil {
		return fmt.Errorf("save %s record: %w", bucket, err)
	}
	return nil
}

func (e *Engine) forget(bucket, key string) error {
	err := e.db.Batch(func(tx *bbolt.Tx) error { return tx.Bucket([]byte(bucket)).Delete([]byte(key)) })
	if err != nil {
		return fmt.Errorf("delete %s record: %w", bucket, err)
	}
	return nil
}

// load reads every record from disk.
func (e *Engine) load() error {
	err := e.db.View(func(tx *bbolt.Tx) error {
		err := tx.Bucket([]byte(volumeBucket)).ForEach(func(k, b []byte) error {
			v := &volumeRecord{}
			if err := json.Unmarshal(b, v); err != nil {
				return fmt.Errorf("volume %s: %w", k, err)
			}
			e.volumes[string(k)] = v
			return nil
		})
		if err != nil {
			return err
		}
		return tx.Bucket([]byte(containerBucket)).ForEach(func(k, b []byte) error {
			var s saved
			if err := json.Unmarshal(b, &s); err != nil {
				return fmt.Errorf("container %s: %w", k, err)
			}
			if len(s.Sealed) > 0 {
				s.lock()
			}
			if err := e.index.Add(s.ID, s.Name); err != nil { // a container more or less is no reason not to start
				e.log.Warn("container is called by its id, since another one has its name", slog.String("container_id", s.ID), slog.Any("error", err))
				s.Name = s.ID
				if err := e.index.Add(s.ID, s.Name); err != nil {
					return err
				}
			}
			c := newRecord(s)
			if c.running() {
				c.exited = make(chan struct{})
			}
			e.containers[s.ID] = c
			return nil
		})
	})
	if err != nil {
		return fmt.Errorf("read container database: %w", err)
	}
	return nil
}

// all returns every container, newest first.
func (e *Engine) all() []*record {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := make([]*record, 0, len(e.containers))
	for _, c := range e.containers {
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b *record) int {
		if n := b.Created.Compare(a.Created); n != 0 {
			return n
		}
		return strings.Compare(a.id, b.id)
	})
	return out
}
