// Package local serves the part of the Docker Engine API that concerns one node:
// containers, exec, images, volumes, disk usage and local events, over a runtime.Engine.
//
// It keeps no state but the last local events, which one goroutine, Run, gathers.
// Everything else is asked of the engine at each request. The router and the endpoints of
// the swarm are the parent package's and httpapi's.
package local

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/moby/moby/api/types/events"

	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
	"github.com/skep-dev/skep/worker/runtime"
)

const (
	// remembered is how many events can be replayed.
	remembered = 256
	// subscriberQueue bounds what a subscriber may lag behind; then its stream ends.
	subscriberQueue = 4096
)

// Config says what an API speaks for. All fields but Bridges are required.
type Config struct {
	Engine runtime.Engine
	// Bridges keeps the networks of this node alone; nil refuses them.
	Bridges runtime.Bridges
	Log     *slog.Logger
	// DaemonID and DaemonName appear in the daemon's own events.
	DaemonID, DaemonName string
}

// API serves one node's endpoints.
type API struct {
	engine runtime.Engine
	log    *slog.Logger
	cfg    Config

	mu     sync.Mutex
	recent []events.Message
	subs   map[*subscriber]struct{}
}

type subscriber struct {
	messages chan events.Message
	errs     chan error
}

// New returns an API; register its routes and run it.
func New(cfg Config) *API {
	return &API{engine: cfg.Engine, log: cfg.Log, cfg: cfg, subs: map[*subscriber]struct{}{}}
}

// Register adds the routes to a router.
func (a *API) Register(r *httpapi.Router) {
	for _, route := range []struct {
		method, pattern string
		handler         httpapi.Handler
	}{
		{"GET", "/containers/json", a.listContainers},
		{"POST", "/containers/create", a.createContainer},
		{"POST", "/containers/prune", a.pruneContainers},
		{"GET", "/containers/{name...}/archive", a.getArchive},
		{"HEAD", "/containers/{name...}/archive", a.statArchive},
		{"PUT", "/containers/{name...}/archive", a.putArchive},
		{"GET", "/containers/{name...}/changes", a.containerChanges},
		{"GET", "/containers/{name...}/export", a.exportContainer},
		{"GET", "/containers/{name...}/json", a.inspectContainer},
		{"GET", "/containers/{name...}/logs", a.containerLogs},
		{"GET", "/containers/{name...}/stats", a.containerStats},
		{"GET", "/containers/{name...}/top", a.containerTop},
		{"POST", "/containers/{name...}/attach", a.attachContainer},
		{"POST", "/containers/{name...}/exec", a.createExec},
		{"POST", "/containers/{name...}/kill", a.killContainer},
		{"POST", "/containers/{name...}/pause", a.pauseContainer},
		{"POST", "/containers/{name...}/unpause", a.unpauseContainer},
		{"POST", "/containers/{name...}/rename", a.renameContainer},
		{"POST", "/containers/{name...}/resize", a.resizeContainer},
		{"POST", "/containers/{name...}/restart", a.restartContainer},
		{"POST", "/containers/{name...}/start", a.startContainer},
		{"POST", "/containers/{name...}/stop", a.stopContainer},
		{"POST", "/containers/{name...}/update", a.updateContainer},
		{"POST", "/containers/{name...}/wait", a.waitContainer},
		{"DELETE", "/containers/{name...}", a.removeContainer},
		{"GET", "/exec/{id}/json", a.inspectExec},
		{"POST", "/exec/{id}/start", a.startExec},
		{"POST", "/exec/{id}/resize", a.resizeExec},
		{"GET", "/images/json", a.listImages},
		{"GET", "/images/get", a.saveImages},
		{"GET", "/images/{name...}/get", a.saveImages},
		{"GET", "/images/{name...}/history", a.imageHistory},
		{"GET", "/images/{name...}/json", a.inspectImage},
		{"POST", "/images/create", a.pullImage},
		{"POST", "/images/load", a.loadImages},
		{"POST", "/images/prune", a.pruneImages},
		{"POST", "/images/{name...}/push", a.pushImage},
		{"POST", "/images/{name...}/tag", a.tagImage},
		{"DELETE", "/images/{name...}", a.removeImage},
		{"GET", "/volumes", a.listVolumes},
		{"GET", "/volumes/{name...}", a.inspectVolume},
		{"POST", "/volumes/create", a.createVolume},
		{"POST", "/volumes/prune", a.pruneVolumes},
		{"DELETE", "/volumes/{name...}", a.removeVolume},
		{"GET", "/system/df", a.diskUsage},
	} {
		r.Handle(route.method, route.pattern, route.handler)
	}
}

// Run gathers local events until ctx ends.
func (a *API) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		messages, errs := a.engine.Events(ctx)
		if err := a.gather(ctx, messages, errs); err != nil && ctx.Err() == nil {
			a.log.Warn("local events interrupted", slog.Any("error", err))
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		}
	}
	return nil
}

func (a *API) gather(ctx context.Context, messages <-chan events.Message, errs <-chan error) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-errs:
			return err
		case m, ok := <-messages:
			if !ok {
				return nil
			}
			a.emit(m)
		}
	}
}

func (a *API) emit(m events.Message) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.recent) >= remembered {
		a.recent = append(a.recent[:0:0], a.recent[len(a.recent)-remembered+1:]...)
	}
	a.recent = append(a.recent, m)
	for s := range a.subs {
		select {
		case s.messages <- m:
		default:
			s.errs <- fmt.Errorf("more than %d events behind", subscriberQueue)
			delete(a.subs, s)
		}
	}
}

// Reloaded emits the event that the daemon has read its configuration again.
func (a *API) Reloaded() {
	now := time.Now()
	a.emit(events.Message{
		Type: events.DaemonEventType, Action: events.ActionReload, Scope: "local",
		Actor: events.Actor{ID: a.cfg.DaemonID, Attributes: map[string]string{"name": a.cfg.DaemonName}},
		Time:  now.Unix(), TimeNano: now.UnixNano(),
	})
}

// Events streams what happens on this node until ctx ends.
func (a *API) Events(ctx context.Context) (<-chan events.Message, <-chan error) {
	s := &subscriber{messages: make(chan events.Message, subscriberQueue), errs: make(chan error, 1)}
	a.mu.Lock()
	a.subs[s] = struct{}{}
	a.mu.Unlock()
	context.AfterFunc(ctx, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.subs, s)
	})
	return s.messages, s.errs
}

// Replay returns the events since a time, oldest first, as far as remembered.
func (a *API) Replay(sinceNano int64) []events.Message {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []events.Message
	for _, m := range a.recent {
		if m.TimeNano >= sinceNano {
			out = append(out, m)
		}
	}
	return out
}

// target returns the object that a request is about.
func target(r *http.Request) string { return r.PathValue("name") }

// writeLine sends one JSON object of a stream.
func writeLine(w interface{ Write([]byte) (int, error) }, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(append(data, '\r', '\n'))
	return err
}
