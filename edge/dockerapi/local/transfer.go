package local

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
	"github.com/skep-dev/skep/worker/runtime"
)

// progressLine is one line of a transfer as clients show it.
type progressLine struct {
	Stream   string          `json:"stream,omitempty"`
	Status   string          `json:"status,omitempty"`
	Progress *progressDetail `json:"progressDetail,omitempty"`
	ID       string          `json:"id,omitempty"`
	Aux      any             `json:"aux,omitempty"`
	Detail   *errorDetail    `json:"errorDetail,omitempty"`
	Error    string          `json:"error,omitempty"`
}

type progressDetail struct {
	Current int64 `json:"current,omitempty"`
	Total   int64 `json:"total,omitempty"`
}

type errorDetail struct {
	Message string `json:"message"`
}

// progressStream answers with lines of progress. The answer begins with the first line, so
// that an error before it is an ordinary one.
type progressStream struct {
	w http.ResponseWriter

	mu  sync.Mutex
	out io.Writer
}

func (s *progressStream) line(l progressLine) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.out == nil {
		s.out = httpapi.Begin(s.w, "application/json")
	}
	_ = writeLine(s.out, l)
}

func (s *progressStream) progress(p runtime.Progress) {
	l := progressLine{ID: p.ID, Status: p.Status, Aux: p.Aux}
	if p.ID != "" || p.Aux != nil {
		l.Progress = &progressDetail{Current: p.Current, Total: p.Total}
	}
	s.line(l)
}

// end finishes the answer.
func (s *progressStream) end(err error) error {
	s.mu.Lock()
	begun := s.out != nil
	s.mu.Unlock()
	if err == nil || !begun {
		if !begun && err == nil {
			httpapi.Begin(s.w, "application/json")
		}
		return err
	}
	s.line(progressLine{Detail: &errorDetail{Message: err.Error()}, Error: err.Error()})
	return nil
}

func (a *API) pullImage(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	if q.Get("fromSrc") != "" {
		return model.Errorf(model.Unimplemented, "importing a file system as an image is not implemented by skep")
	}
	ref, tag := q.Get("fromImage"), q.Get("tag")
	switch {
	case ref == "":
		return model.Errorf(model.Invalid, "invalid reference format: repository name must not be empty")
	case strings.HasPrefix(tag, "sha256:"):
		ref += "@" + tag
	case tag != "":
		ref += ":" + tag
	}
	s := &progressStream{w: w}
	return s.end(a.engine.Pull(r.Context(), ref, q.Get("platform"), httpapi.RegistryAuth(r), s.progress))
}

func (a *API) pushImage(w http.ResponseWriter, r *http.Request) error {
	ref := r.PathValue("name")
	if tag := r.URL.Query().Get("tag"); tag != "" {
		ref += ":" + tag
	}
	s := &progressStream{w: w}
	return s.end(a.engine.Push(r.Context(), ref, httpapi.RegistryAuth(r), s.progress))
}

func (a *API) loadImages(w http.ResponseWriter, r *http.Request) error {
	refs, err := a.engine.Load(r.Context(), r.Body)
	if err != nil {
		return err
	}
	s := &progressStream{w: w}
	for _, ref := range refs {
		text := "Loaded image: " + ref + "\n"
		if strings.HasPrefix(ref, "sha256:") {
			text = "Loaded image ID: " + ref + "\n"
		}
		s.line(progressLine{Stream: text})
	}
	return s.end(nil)
}

func (a *API) saveImages(w http.ResponseWriter, r *http.Request) error {
	refs := r.URL.Query()["names"]
	if name := r.PathValue("name"); name != "" {
		refs = []string{name}
	}
	if len(refs) == 0 {
		return model.Errorf(model.Invalid, "no image was named")
	}
	for _, ref := range refs {
		if _, err := a.engine.InspectImage(r.Context(), ref); err != nil {
			return err
		}
	}
	out := httpapi.Begin(w, "application/x-tar")
	if err := a.engine.Save(r.Context(), refs, out); err != nil {
		return fmt.Errorf("save %s: %w", strings.Join(refs, ", "), err)
	}
	return nil
}
