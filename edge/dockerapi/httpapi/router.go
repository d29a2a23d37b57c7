package httpapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Handler serves one endpoint. An error becomes the answer, by the table of StatusOf,
// unless the answer has begun; then it is logged. Path parameters are r.PathValue's.
type Handler func(w http.ResponseWriter, r *http.Request) error

// Config says what a Router tells about itself.
type Config struct {
	// ServerVersion appears in the Server header: "Docker/<version> (linux)".
	ServerVersion string
	// Experimental is the Docker-Experimental header.
	Experimental bool
	// Log gets one line for each request at level Debug, failures of the daemon at Warn. It must be set.
	Log *slog.Logger
	// Registerer gets the metrics of requests; nil for none.
	Registerer prometheus.Registerer
	// Gate decides about every request to a route before its handler; its error is the
	// answer. leave, which may be nil, is called with the status of the answer. Nil lets
	// everybody in.
	Gate Gate
}

// Gate admits a request to the route method and pattern, with r's path values set.
type Gate func(r *http.Request, method, pattern string) (admitted *http.Request, leave func(status int), err error)

// Router finds the handler of a request. Fill it with Handle before it serves.
type Router struct {
	config   Config
	routes   map[string][]*route // by first literal path segment
	duration *prometheus.HistogramVec
}

type route struct {
	method, pattern string
	names           []string
	match           *regexp.Regexp
	handler         Handler
}

// NewRouter returns a Router without routes.
func NewRouter(config Config) *Router {
	r := &Router{
		config: config,
		routes: make(map[string][]*route),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "skep_api_request_duration_seconds",
			Help:    "Time to answer a request of the Docker API, streams included, by route and status.",
			Buckets: []float64{.001, .005, .02, .1, .5, 2, 10, 60},
		}, []string{"method", "route", "code"}),
	}
	if config.Registerer != nil {
		config.Registerer.MustRegister(r.duration)
	}
	return r
}

// Handle adds an endpoint. The pattern's "{id}" matches one path segment and
// "{name...}" one or more, also in the middle of a pattern. Patterns without
// parameters win over those with. GET does not include HEAD. It panics when the
// route exists, which is a fault of the program.
func (rt *Router) Handle(method, pattern string, h Handler) {
	if rt.Has(method, pattern) {
		panic(fmt.Sprintf("httpapi: route %s %s added twice", method, pattern))
	}
	first := firstSegment(pattern)
	names, match := compile(pattern)
	rt.routes[first] = append(rt.routes[first], &route{method: method, pattern: pattern, names: names, match: match, handler: h})
	slices.SortStableFunc(rt.routes[first], func(a, b *route) int { return len(a.names) - len(b.names) })
}

// Has reports whether the endpoint was added, whatever its parameters are called.
func (rt *Router) Has(method, pattern string) bool {
	_, want := compile(pattern)
	return slices.ContainsFunc(rt.routes[firstSegment(pattern)], func(r *route) bool {
		return r.method == method && r.match.String() == want.String()
	})
}

// Routes lists all routes as "METHOD /pattern", sorted.
func (rt *Router) Routes() []string {
	var list []string
	for _, routes := range rt.routes {
		for _, r := range routes {
			list = append(list, r.method+" "+r.pattern)
		}
	}
	slices.Sort(list)
	return list
}

func firstSegment(path string) string {
	segment, _, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	return segment
}

func compile(pattern string) (names []string, match *regexp.Regexp) {
	var re strings.Builder
	re.WriteString("^")
	for rest := pattern; rest != ""; {
		literal, after, found := strings.Cut(rest, "{")
		re.WriteString(regexp.QuoteMeta(literal))
		if !found {
			break
		}
		var name string
		name, rest, _ = strings.Cut(after, "}")
		if many, ok := strings.CutSuffix(name, "..."); ok {
			name = many
			re.WriteString("(.+)")
		} else {
			re.WriteString("([^/]+)")
		}
		names = append(names, name)
	}
	re.WriteString("$")
	return names, regexp.MustCompile(re.String())
}

func (rt *Router) find(method, path string) (*route, []string) {
	for _, r := range rt.routes[firstSegment(path)] {
		if r.method != method {
			continue
		}
		if m := r.match.FindStringSubmatch(path); m != nil {
			return r, m[1:]
		}
	}
	return nil, nil
}

// ServeHTTP answers one request.
func (rt *Router) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	begin := time.Now()
	if r.Method == http.MethodOptions {
		w.WriteHeader(http.StatusOK)
		return
	}
	version, path, versioned := splitVersion(r.URL.Path)
	found, values := rt.find(r.Method, path)
	if found == nil {
		writeError(w, r, http.StatusNotFound, "page not found")
		return
	}
	h := w.Header()
	h.Set("Api-Version", MaxVersion)
	h.Set("Docker-Experimental", fmt.Sprint(rt.config.Experimental))
	h.Set("Ostype", "linux")
	h.Set("Server", "Docker/"+rt.config.ServerVersion+" (linux)")
	out := &response{ResponseWriter: w}
	leave, err := rt.serve(out, r, found, values, version, versioned)
	status := rt.finish(out, r, version, err)
	if leave != nil {
		leave(status)
	}
	rt.duration.WithLabelValues(found.method, found.pattern, fmt.Sprint(status)).Observe(time.Since(begin).Seconds())
	rt.log(r, status, time.Since(begin), err)
}

func (rt *Router) serve(w http.ResponseWriter, r *http.Request, found *route, values []string, version string, versioned bool) (leave func(int), err error) {
	v := ParseVersion(MaxVersion)
	if versioned {
		if err := checkVersion(version); err != nil {
			return nil, err
		}
		v = ParseVersion(version)
	}
	r = r.WithContext(context.WithValue(r.Context(), versionKey{}, v))
	for i, name := range found.names {
		r.SetPathValue(name, values[i])
	}
	if rt.config.Gate != nil {
		if r, leave, err = rt.config.Gate(r, found.method, found.pattern); err != nil {
			return leave, err
		}
	}
	return leave, found.handler(w, r)
}

// finish writes err unless the answer has begun, and returns the status for the log.
func (rt *Router) finish(w *response, r *http.Request, version string, err error) int {
	switch {
	case err == nil && w.status == 0 && !w.hijacked:
		w.WriteHeader(http.StatusOK)
		return http.StatusOK
	case err == nil || w.status != 0 || w.hijacked:
		return max(w.status, http.StatusOK)
	case errors.Is(err, context.Canceled) && r.Context().Err() != nil:
		return 499 // the client went away; nobody reads an answer
	}
	status := StatusOf(err)
	if status == http.StatusNotModified {
		w.WriteHeader(status)
		return status
	}
	if version != "" && ParseVersion(version).Before(24) {
		http.Error(w, err.Error(), status)
		return status
	}
	writeError(w, r, status, err.Error())
	return status
}

func (rt *Router) log(r *http.Request, status int, took time.Duration, err error) {
	level := slog.LevelDebug
	if status >= http.StatusInternalServerError && status != http.StatusNotImplemented {
		level = slog.LevelWarn
	}
	attrs := []slog.Attr{
		slog.String("method", r.Method), slog.String("path", r.URL.Path),
		slog.Int("status", status), slog.Duration("took", took),
	}
	if err != nil {
		attrs = append(attrs, slog.String("error", err.Error()))
	}
	rt.config.Log.LogAttrs(r.Context(), level, "api request", attrs...)
}

// NotImplemented is the Handler of an endpoint that Docker has and Skep has not.
func NotImplemented(w http.ResponseWriter, r *http.Request) error {
	_, path, _ := splitVersion(r.URL.Path)
	return Errorf(http.StatusNotImplemented, "%s %s is not implemented by skep", r.Method, path)
}
