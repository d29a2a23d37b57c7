package local

import (
	"context"
	"io"
	"net/http"
	"strconv"

	"github.com/moby/moby/api/types/container"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
	"github.com/skep-dev/skep/worker/runtime"
)

const timestampLayout = "2006-01-02T15:04:05.000000000Z07:00"

func (a *API) containerLogs(w http.ResponseWriter, r *http.Request) error {
	opts := runtime.LogOptions{
		Stdout: httpapi.Bool(r, "stdout"), Stderr: httpapi.Bool(r, "stderr"), Follow: httpapi.Bool(r, "follow"), Tail: -1,
	}
	if !opts.Stdout && !opts.Stderr {
		return model.Errorf(model.Invalid, "Bad parameters: you must choose at least one stream")
	}
	q := r.URL.Query()
	var err error
	if opts.Since, err = httpapi.Time(q.Get("since")); err != nil {
		return model.Errorf(model.Invalid, "invalid value for \"since\": %v", err)
	}
	if opts.Until, err = httpapi.Time(q.Get("until")); err != nil {
		return model.Errorf(model.Invalid, "invalid value for \"until\": %v", err)
	}
	if tail := q.Get("tail"); tail != "" && tail != "all" {
		if n, err := strconv.Atoi(tail); err == nil && n >= 0 {
			opts.Tail = n
		}
	}
	c, err := a.engine.Inspect(r.Context(), target(r))
	if err != nil {
		return err
	}
	tty := c.Config.Tty
	out := httpapi.Begin(w, httpapi.StreamType(r, tty))
	stdout, stderr := out, out
	if !tty {
		stdout, stderr = httpapi.Frames(out, httpapi.Stdout), httpapi.Frames(out, httpapi.Stderr)
	}
	timestamps, details := httpapi.Bool(r, "timestamps"), httpapi.Bool(r, "details")
	continued := map[bool]bool{}
	err = a.engine.Logs(r.Context(), c.ID, opts, func(line runtime.LogLine) error {
		to := stdout
		if line.Stderr {
			to = stderr
		}
		var b []byte
		if !continued[line.Stderr] {
			if timestamps {
				b = append(line.Time.UTC().AppendFormat(b, timestampLayout), ' ')
			}
			if details {
				b = append(append(b, httpapi.Attributes(line.Attrs)...), ' ')
			}
		}
		continued[line.Stderr] = line.Partial
		_, err := to.Write(append(b, line.Data...))
		return err
	})
	if err != nil && r.Context().Err() == nil {
		to := out
		if !tty {
			to = httpapi.Frames(out, httpapi.System)
		}
		_, err = io.WriteString(to, "Error grabbing logs: "+err.Error()+"\n")
	}
	if r.Context().Err() != nil {
		return nil //nolint:nilerr // the client has gone
	}
	return err
}

func (a *API) attachContainer(w http.ResponseWriter, r *http.Request) error {
	c, err := a.engine.Inspect(r.Context(), target(r))
	if err != nil {
		return err
	}
	keys, err := parseDetachKeys(r.URL.Query().Get("detachKeys"))
	if err != nil {
		return err
	}
	if c.State.Paused {
		return model.Errorf(model.Conflict, "container %s is paused, unpause the container before attach", target(r))
	}
	conn, err := httpapi.Hijack(w, r, httpapi.StreamType(r, c.Config.Tty))
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // the stream is over
	stdio := a.stdio(conn, c.Config.Tty, keys, httpapi.Bool(r, "stdin"), httpapi.Bool(r, "stdout"), httpapi.Bool(r, "stderr"))
	stdio.Logs = httpapi.Bool(r, "logs")
	if !httpapi.Bool(r, "stream") {
		stdio.Stdin = nil
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.Context()))
	defer cancel()
	stdio.detached = cancel
	if err := a.engine.Attach(ctx, c.ID, stdio.Stdio); err != nil && ctx.Err() == nil {
		lastWords(conn, c.Config.Tty, err)
	}
	return nil
}

// lastWords tells an error to a client whose connection is a stream by now.
func lastWords(conn *httpapi.Conn, tty bool, err error) {
	var to io.Writer = conn
	if !tty {
		to = httpapi.Frames(conn, httpapi.Stderr)
	}
	_, _ = io.WriteString(to, err.Error()+"\r\n") // the client may have gone
}

// hijacked is the streams of a connection that was taken over.
type hijacked struct {
	runtime.Stdio
	detached func()
}

// stdio connects a connection to a process. Closing keys end the attachment.
func (a *API) stdio(conn *httpapi.Conn, tty bool, keys []byte, stdin, stdout, stderr bool) *hijacked {
	h := new(hijacked)
	if stdin {
		var in io.Reader = conn
		if tty {
			in = &detachReader{r: conn, keys: keys, detach: func() {
				if h.detached != nil {
					h.detached()
				}
			}}
		}
		h.Stdin = in
	}
	if stdout {
		h.Stdout = conn
		if !tty {
			h.Stdout = httpapi.Frames(conn, httpapi.Stdout)
		}
	}
	if stderr && !tty {
		h.Stderr = httpapi.Frames(conn, httpapi.Stderr)
	}
	return h
}

func (a *API) createExec(w http.ResponseWriter, r *http.Request) error {
	var req container.ExecCreateRequest
	if err := httpapi.ReadJSON(w, r, &req); err != nil {
		return err
	}
	if len(req.Cmd) == 0 {
		return model.Errorf(model.Invalid, "No exec command specified")
	}
	if _, err := parseDetachKeys(req.DetachKeys); err != nil {
		return err
	}
	id, err := a.engine.ExecCreate(r.Context(), target(r), &req)
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusCreated, container.ExecCreateResponse{ID: id})
}

func (a *API) startExec(w http.ResponseWriter, r *http.Request) error {
	var req container.ExecStartRequest
	if err := httpapi.ReadOptionalJSON(w, r, &req); err != nil {
		return err
	}
	id := r.PathValue("id")
	exec, err := a.engine.ExecInspect(r.Context(), id)
	if err != nil {
		return err
	}
	if req.Detach {
		if err := a.engine.ExecStart(r.Context(), id, runtime.Stdio{}); err != nil {
			return err
		}
		return httpapi.Empty(w, http.StatusOK)
	}
	if exec.Running {
		return model.Errorf(model.Conflict, "exec command %s is already running", id)
	}
	keys, err := parseDetachKeys(string(exec.DetachKeys))
	if err != nil {
		return err
	}
	tty := exec.ProcessConfig != nil && exec.ProcessConfig.Tty
	conn, err := httpapi.Hijack(w, r, httpapi.StreamType(r, tty))
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // the stream is over
	stdio := a.stdio(conn, tty, keys, exec.OpenStdin, exec.OpenStdout || tty, exec.OpenStderr)
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.Context()))
	defer cancel()
	stdio.detached = cancel
	if stdio.Stdin == nil && stdio.Stdout == nil && stdio.Stderr == nil {
		stdio.Stdout = io.Discard // not detached, so wait for the end
	}
	if err := a.engine.ExecStart(ctx, id, stdio.Stdio); err != nil && ctx.Err() == nil {
		lastWords(conn, tty, err)
	}
	return nil
}

func (a *API) inspectExec(w http.ResponseWriter, r *http.Request) error {
	exec, err := a.engine.ExecInspect(r.Context(), r.PathValue("id"))
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusOK, exec)
}

func (a *API) resizeExec(w http.ResponseWriter, r *http.Request) error {
	width, height, err := size(r)
	if err != nil {
		return err
	}
	if err := a.engine.ExecResize(r.Context(), r.PathValue("id"), width, height); err != nil {
		return err
	}
	return httpapi.Empty(w, http.StatusOK)
}
