// Package fake is a container runtime in memory, for tests and simulators. It keeps
// Docker's rules (states, errors, events, exit codes, health, logs) but runs nothing:
// a container follows the script that its command or image spells (see Script). It does
// no I/O, starts no goroutine of its own (its clocks are [time.AfterFunc]) and therefore
// lives in testing/synctest bubbles, thousands of containers at a time. One mutex guards
// all state; methods may be called from any goroutine. What only a kernel can do
// (networks beyond port conflicts, file systems, limits) it leaves out.
package fake

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"sync"
	"time"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/events"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
	"github.com/skep-dev/skep/worker/runtime/docker"
)

// Config says how a fake machine is made. The zero value is a machine of four CPUs and
// 8 GiB without images, whose registry has every image.
type Config struct {
	// Images are present from the start.
	Images []Image
	// Registry lists what can be pulled; nil means that every reference can be.
	Registry []Image
	// PullTime, StartTime and StopTime are how long a pull, a start and an obeyed stop
	// signal take; zero is at once.
	PullTime, StartTime, StopTime time.Duration
	// Random makes ids and names; nil is crypto/rand.
	Random io.Reader
	// NCPU and MemTotal are the size of the machine; zero is 4 CPUs, 8 GiB.
	NCPU     int
	MemTotal int64
}

// Image describes one image.
type Image struct {
	// Ref is any reference, "web:1" or "registry.example/web@sha256:…".
	Ref string
	// Script is what its containers do if their command does not say; see Script.
	Script string
	// Size in bytes; zero is 1 MiB.
	Size int64
	// Config is the image's own configuration.
	Config dockerspec.DockerOCIImageConfig
}

// Engine is a fake container runtime.
type Engine struct {
	cfg Config
	bus docker.Bus

	mu         sync.Mutex
	index      *docker.Index
	containers map[string]*record // by full id
	execs      map[string]*execRecord
	images     map[string]*imageRecord  // by id
	registry   map[string]*imageRecord  // by canonical name:tag and name@digest; nil means everything
	pullErrors map[string]error         // by canonical reference
	volumes    map[string]*volumeRecord // by name
	ports      map[portKey]string       // published ports -> container id
	nextPort   uint16
	nextPID    int
	sequence   uint64
}

var _ runtime.Engine = (*Engine)(nil)

// New makes a fake runtime.
func New(cfg Config) *Engine {
	if cfg.Random == nil {
		cfg.Random = rand.Reader
	}
	if cfg.NCPU == 0 {
		cfg.NCPU = 4
	}
	if cfg.MemTotal == 0 {
		cfg.MemTotal = 8 << 30
	}
	e := &Engine{
		cfg:        cfg,
		index:      docker.NewIndex(),
		containers: map[string]*record{},
		execs:      map[string]*execRecord{},
		images:     map[string]*imageRecord{},
		pullErrors: map[string]error{},
		volumes:    map[string]*volumeRecord{},
		ports:      map[portKey]string{},
		nextPort:   32768,
		nextPID:    1000,
	}
	for _, img := range cfg.Images {
		e.AddImage(img)
	}
	if cfg.Registry != nil {
		e.registry = map[string]*imageRecord{}
		for _, img := range cfg.Registry {
			r := newImage(img)
			for _, name := range append(r.tags, r.digests...) {
				e.registry[canonical(name)] = r
			}
		}
	}
	return e
}

// AddImage makes an image present, as if it had been loaded.
func (e *Engine) AddImage(img Image) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.addImage(newImage(img), "")
}

// SetPullError makes every pull of ref fail with err; nil ends that.
func (e *Engine) SetPullError(ref string, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err == nil {
		delete(e.pullErrors, canonical(ref))
		return
	}
	e.pullErrors[canonical(ref)] = err
}

// Exit ends a running container's process with code, as if it had done so itself.
func (e *Engine) Exit(id string, code int) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, err := e.find(id)
	if err != nil {
		return err
	}
	if !c.running() {
		return notRunning(c)
	}
	e.exit(c, c.epoch, code)
	return nil
}

// SetHealth makes a running container's next probes succeed or fail.
func (e *Engine) SetHealth(id string, healthy bool) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, err := e.find(id)
	if err != nil {
		return err
	}
	c.probeFails = !healthy
	return nil
}

// Print writes a line (with newline) to a container's log and attached streams.
func (e *Engine) Print(id, line string, stderr bool) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, err := e.find(id)
	if err != nil {
		return err
	}
	c.print(line+"\n", stderr)
	return nil
}

// Reboot ends every container as a power cut of the machine would: no exit code is
// recorded by the process itself, containers show as exited with code 255.
func (e *Engine) Reboot() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, c := range e.containers {
		if c.running() {
			e.exit(c, c.epoch, 255)
		}
	}
}

// Events implements runtime.Inspector.
func (e *Engine) Events(ctx context.Context) (<-chan events.Message, <-chan error) {
	return e.bus.Subscribe(ctx)
}

// Info implements runtime.Engine.
func (e *Engine) Info(context.Context) (runtime.Info, error) {
	return runtime.Info{
		ContainerdVersion: "fake",
		RuntimeName:       "runc",
		RuntimeVersion:    "fake",
		StorageDriver:     "overlayfs",
		CgroupVersion:     "2",
		CgroupDriver:      "cgroupfs",
		NCPU:              e.cfg.NCPU,
		MemTotal:          e.cfg.MemTotal,
		Architecture:      "x86_64",
		KernelVersion:     "6.0.0-fake",
		OperatingSystem:   "Skep fake",
	}, nil
}

// Run implements runtime.Engine; it only waits for ctx to end.
func (e *Engine) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

// sleep waits for d or until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func digest(text string) string {
	sum := sha256.Sum256([]byte(text))
	return "sha256:" + hex.EncodeToString(sum[:])
}

func notRunning(c *record) error {
	return model.Errorf(model.Conflict, "container %s is not running", c.id)
}
