package shim

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/url"
	"strconv"
)

// Scheme is the scheme of output URIs that the shim handles itself.
const Scheme = "skep"

// Spec is what a task's output URI tells the shim.
type Spec struct {
	// LogPath is the log file; empty keeps no log.
	LogPath  string
	MaxSize  int64
	MaxFiles int
	// ExitPath is the file that gets the exit status.
	ExitPath string
	// Socket is where the group's stream server listens.
	Socket string
	// Stdin gives the task a standard input that attached clients write to.
	Stdin bool
	// StdinOnce closes it when the first such client ends.
	StdinOnce bool
	// Key opens the specification that containerd was given; empty when that is not sealed.
	Key []byte
	// LogAttrs is written beside every line of the log.
	LogAttrs map[string]string
}

// String encodes a Spec as a URI.
func (s Spec) String() string {
	q := url.Values{}
	q.Set("exit", s.ExitPath)
	q.Set("socket", s.Socket)
	q.Set("size", strconv.FormatInt(s.MaxSize, 10))
	q.Set("files", strconv.Itoa(s.MaxFiles))
	if s.Stdin {
		q.Set("stdin", "1")
	}
	if s.StdinOnce {
		q.Set("once", "1")
	}
	if len(s.Key) > 0 {
		q.Set("key", base64.RawURLEncoding.EncodeToString(s.Key))
	}
	attrs := url.Values{}
	for key, value := range s.LogAttrs {
		attrs.Set(key, value)
	}
	if len(attrs) > 0 {
		q.Set("attrs", attrs.Encode())
	}
	u := url.URL{Scheme: Scheme, Path: s.LogPath, RawQuery: q.Encode()}
	return u.String()
}

// ParseSpec decodes a URI; it reports false for URIs of another scheme.
func ParseSpec(uri string) (Spec, bool, error) {
	u, err := url.Parse(uri)
	if err != nil || u.Scheme != Scheme {
		return Spec{}, false, nil //nolint:nilerr // a plain path is another's business
	}
	q := u.Query()
	s := Spec{
		LogPath: u.Path, ExitPath: q.Get("exit"), Socket: q.Get("socket"),
		Stdin: q.Get("stdin") == "1", StdinOnce: q.Get("once") == "1",
	}
	if key := q.Get("key"); key != "" {
		if s.Key, err = base64.RawURLEncoding.DecodeString(key); err != nil {
			return Spec{}, true, errors.New("read key of the specification: it is not base64")
		}
	}
	if s.MaxSize, err = strconv.ParseInt(q.Get("size"), 10, 64); err != nil {
		return Spec{}, true, fmt.Errorf("read log size: %w", err)
	}
	if s.MaxFiles, err = strconv.Atoi(q.Get("files")); err != nil {
		return Spec{}, true, fmt.Errorf("read log files: %w", err)
	}
	attrs, err := url.ParseQuery(q.Get("attrs"))
	if err != nil {
		return Spec{}, true, fmt.Errorf("read log attributes: %w", err)
	}
	for key := range attrs {
		if s.LogAttrs == nil {
			s.LogAttrs = map[string]string{}
		}
		s.LogAttrs[key] = attrs.Get(key)
	}
	return s, true, nil
}
