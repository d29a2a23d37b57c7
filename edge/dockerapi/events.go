package dockerapi

import (
	"cmp"
	"context"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/moby/moby/api/types"
	"github.com/moby/moby/api/types/events"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
)

// becomeManagerEvery is how often an open stream looks whether this node has become a
// manager, whose swarm events it then carries too.
const becomeManagerEvery = 2 * time.Second

func (a *API) events(w http.ResponseWriter, r *http.Request) error {
	f, err := httpapi.RequestFilters(r, "type", "event", "scope", "daemon", "container", "plugin", "volume", "network", "node",
		"service", "secret", "config", "image", "label")
	if err != nil {
		return err
	}
	since, until, err := eventWindow(r)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(r.Context()) // ends this node's stream
	defer cancel()
	if !until.IsZero() {
		ctx, cancel = context.WithDeadline(ctx, until)
		defer cancel()
	}
	// What happens once the client has the headers must reach it: subscribe first.
	sources := a.subscribe(ctx, since)
	return a.newEventStream(w, r, f).run(ctx, a, sources, until)
}

// eventSources are the places where one stream's events come from.
type eventSources struct {
	local  <-chan events.Message
	failed <-chan error
	past   []events.Message // of this node
	swarm  follower
	before []events.Message // of the swarm; what swarm tells may be among them
}

func (a *API) subscribe(ctx context.Context, since time.Time) eventSources {
	sources := eventSources{swarm: a.follow()}
	if a.local != nil {
		sources.local, sources.failed = a.local.Events(ctx)
		if !since.IsZero() {
			sources.past = a.local.Replay(since.UnixNano())
		}
	}
	if !since.IsZero() {
		sources.before = a.past.since(since)
	}
	return sources
}

// eventWindow reads since and until; absent means zero.
func eventWindow(r *http.Request) (since, until time.Time, err error) {
	q := r.URL.Query()
	if since, err = httpapi.Time(q.Get("since")); err != nil {
		return since, until, model.Errorf(model.Invalid, "invalid value for \"since\": %v", err)
	}
	if until, err = httpapi.Time(q.Get("until")); err != nil {
		return since, until, model.Errorf(model.Invalid, "invalid value for \"until\": %v", err)
	}
	if !since.IsZero() && !until.IsZero() && until.Before(since) {
		return since, until, model.Errorf(model.Invalid, "`since` time (%s) cannot be after `until` time (%s)", q.Get("since"), q.Get("until"))
	}
	return since, until, nil
}

// eventStream writes one client's events. It belongs to the request's goroutine.
type eventStream struct {
	out     func([]byte) error
	filters httpapi.Filters
	facts   Facts
	version httpapi.Version
	record  bool // each line begins with an ASCII record separator
}

func (a *API) newEventStream(w http.ResponseWriter, r *http.Request, f httpapi.Filters) *eventStream {
	kind := eventType(r)
	out := httpapi.Begin(w, kind)
	return &eventStream{
		out:     func(b []byte) error { _, err := out.Write(b); return err },
		filters: f, facts: a.daemon.Facts(), version: httpapi.RequestVersion(r), record: kind == types.MediaTypeJSONSequence,
	}
}

// run sends what this node and the swarm tell until ctx ends.
func (s *eventStream) run(ctx context.Context, a *API, from eventSources, until time.Time) error {
	both := slices.Concat(from.past, from.before)
	slices.SortStableFunc(both, func(a, b events.Message) int { return cmp.Compare(a.TimeNano, b.TimeNano) })
	if err := s.replay(both, until); err != nil {
		return nil // the client has gone
	}
	look := time.NewTicker(becomeManagerEvery)
	defer look.Stop()
	for {
		var err error
		select {
		case <-ctx.Done():
			return nil
		case m, ok := <-from.local:
			if !ok {
				from.local = nil
				continue
			}
			if n := len(from.past); n > 0 && m.TimeNano <= from.past[n-1].TimeNano {
				continue // it was among the past ones
			}
			err = s.send(m)
		case err := <-from.failed:
			return err
		case <-from.swarm.changed():
			err = s.sendAll(slices.DeleteFunc(from.swarm.take(time.Now()), func(m events.Message) bool {
				return slices.ContainsFunc(from.before, func(sent events.Message) bool { return sameEvent(m, sent) })
			}))
		case <-look.C:
			if !from.swarm.live() {
				from.swarm = a.follow()
			}
		}
		if err != nil {
			return nil // the client has gone
		}
	}
}

func (s *eventStream) replay(list []events.Message, until time.Time) error {
	for _, m := range list {
		if !until.IsZero() && m.TimeNano > until.UnixNano() {
			continue
		}
		if err := s.send(m); err != nil {
			return err
		}
	}
	return nil
}

func (s *eventStream) sendAll(list []events.Message) error {
	for _, m := range list {
		if err := s.send(m); err != nil {
			return err
		}
	}
	return nil
}

// legacyEvent is an event with the members that clients before 1.52 look for.
type legacyEvent struct {
	Status string `json:"status,omitempty"`
	ID     string `json:"id,omitempty"`
	From   string `json:"from,omitempty"`
	events.Message
}

func (s *eventStream) send(m events.Message) error {
	if !eventMatches(s.filters, m, s.facts) {
		return nil
	}
	if m.Type == events.ImageEventType && m.Action == events.ActionCreate && s.version.Before(46) {
		return nil
	}
	var v any = m
	if s.version.Before(52) && (m.Type == events.ContainerEventType || m.Type == events.ImageEventType) {
		legacy := legacyEvent{Status: string(m.Action), ID: m.Actor.ID, Message: m}
		if m.Type == events.ContainerEventType {
			legacy.From = m.Actor.Attributes["image"]
		}
		v = legacy
	}
	line, err := httpapi.Encode(v)
	if err != nil {
		return err
	}
	if s.record {
		line = slices.Insert(line, 0, 0x1E)
	}
	return s.out(line)
}

// eventType chooses the content type: the accepted one of the highest quality, or the
// version's own.
func eventType(r *http.Request) string {
	best, quality := "", 0.0
	for _, entry := range acceptEntries(r) {
		if slices.Contains([]string{types.MediaTypeJSONLines, types.MediaTypeNDJSON, types.MediaTypeJSONSequence}, entry.kind) && entry.quality > quality {
			best, quality = entry.kind, entry.quality
		}
	}
	switch {
	case best != "":
		return best
	case httpapi.RequestVersion(r).Before(52):
		return types.MediaTypeJSON
	default:
		return types.MediaTypeJSONLines
	}
}

type acceptEntry struct {
	kind    string
	quality float64
}

func acceptEntries(r *http.Request) []acceptEntry {
	var list []acceptEntry
	for _, header := range r.Header.Values("Accept") {
		for _, part := range splitComma(header) {
			kind, parameters := mediaType(part)
			entry := acceptEntry{kind: kind, quality: 1}
			if q, ok := parameters["q"]; ok {
				v, err := strconv.ParseFloat(q, 64)
				if err != nil {
					continue
				}
				entry.quality = v
			}
			list = append(list, entry)
		}
	}
	return list
}
