package local

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"

	"github.com/moby/moby/api/types/container"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
	"github.com/skep-dev/skep/worker/runtime"
)

// pathHeader carries the description of a path.
const pathHeader = "X-Docker-Container-Path-Stat"

// archives returns the engine's ability to copy, if it has it.
func (a *API) archives() (runtime.Archives, error) {
	if archives, ok := a.engine.(runtime.Archives); ok {
		return archives, nil
	}
	return nil, model.Errorf(model.Unimplemented, "copying files is not implemented by this runtime of skep")
}

// archivePath returns the request's path.
func archivePath(r *http.Request) (string, error) {
	p := r.URL.Query().Get("path")
	if p == "" {
		return "", model.Errorf(model.Invalid, "missing parameter in query string: path")
	}
	return p, nil
}

func setPathHeader(w http.ResponseWriter, st *container.PathStat) error {
	b, err := json.Marshal(st)
	if err != nil {
		return fmt.Errorf("encode path: %w", err)
	}
	w.Header().Set(pathHeader, base64.StdEncoding.EncodeToString(b))
	return nil
}

func (a *API) statArchive(w http.ResponseWriter, r *http.Request) error {
	archives, err := a.archives()
	if err != nil {
		return err
	}
	p, err := archivePath(r)
	if err != nil {
		return err
	}
	st, err := archives.StatPath(r.Context(), target(r), p)
	if err != nil {
		return err
	}
	if err := setPathHeader(w, st); err != nil {
		return err
	}
	return httpapi.Empty(w, http.StatusOK)
}

func (a *API) getArchive(w http.ResponseWriter, r *http.Request) error {
	archives, err := a.archives()
	if err != nil {
		return err
	}
	p, err := archivePath(r)
	if err != nil {
		return err
	}
	return archives.CopyFrom(r.Context(), target(r), p, func(st *container.PathStat) io.Writer {
		if err := setPathHeader(w, st); err != nil {
			a.log.Error("path was not described", slog.Any("error", err))
		}
		return httpapi.Begin(w, "application/x-tar")
	})
}

func (a *API) putArchive(w http.ResponseWriter, r *http.Request) error {
	archives, err := a.archives()
	if err != nil {
		return err
	}
	p, err := archivePath(r)
	if err != nil {
		return err
	}
	opts := runtime.CopyOptions{KeepKind: httpapi.Bool(r, "noOverwriteDirNonDir"), OwnByUser: httpapi.Bool(r, "copyUIDGID")}
	if err := archives.CopyTo(r.Context(), target(r), p, r.Body, opts); err != nil {
		return err
	}
	return httpapi.Empty(w, http.StatusOK)
}

func (a *API) exportContainer(w http.ResponseWriter, r *http.Request) error {
	archives, err := a.archives()
	if err != nil {
		return err
	}
	c, err := a.engine.Inspect(r.Context(), target(r))
	if err != nil {
		return err
	}
	return archives.Export(r.Context(), c.ID, httpapi.Begin(w, "application/x-tar"))
}

func (a *API) containerChanges(w http.ResponseWriter, r *http.Request) error {
	archives, err := a.archives()
	if err != nil {
		return err
	}
	changes, err := archives.Changes(r.Context(), target(r))
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusOK, changes)
}
