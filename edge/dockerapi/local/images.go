package local

import (
	"net/http"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/image"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
	"github.com/skep-dev/skep/worker/runtime"
)

func (a *API) listImages(w http.ResponseWriter, r *http.Request) error {
	f, err := httpapi.RequestFilters(r, "dangling", "label", "label!", "before", "since", "until", "reference")
	if err != nil {
		return err
	}
	dangling, err := f.Bool("dangling", false)
	if err != nil {
		return err
	}
	all, err := a.engine.ListImages(r.Context())
	if err != nil {
		return err
	}
	bound := func(key string) (int64, error) {
		if len(f[key]) > 0 {
			i, err := a.engine.InspectImage(r.Context(), f[key][0])
			if err != nil {
				return 0, err
			}
			t, err := time.Parse(time.RFC3339Nano, i.Created)
			if err != nil {
				return 0, nil //nolint:nilerr // an image without a date bounds nothing
			}
			return t.Unix(), nil
		}
		return 0, nil
	}
	before, err := bound("before")
	if err != nil {
		return err
	}
	since, err := bound("since")
	if err != nil {
		return err
	}
	users := a.imageUsers(r)
	out := []image.Summary{}
	for _, i := range all {
		named := len(i.RepoTags) > 0
		switch {
		case f.Has("dangling") && named == dangling,
			!f.Labels("label", i.Labels),
			f.Has("label!") && f.Labels("label!", i.Labels),
			before != 0 && i.Created >= before,
			since != 0 && i.Created <= since,
			f.Has("reference") && !slices.ContainsFunc(i.RepoTags, func(tag string) bool { return referenceMatches(f["reference"], tag) }):
			continue
		}
		i.SharedSize, i.Containers = -1, users[i.ID]
		if i.RepoTags == nil {
			i.RepoTags = []string{}
		}
		if i.RepoDigests == nil {
			i.RepoDigests = []string{}
		}
		if httpapi.RequestVersion(r).Before(43) && len(i.RepoTags) == 0 {
			i.RepoTags, i.RepoDigests = []string{"<none>:<none>"}, []string{"<none>@<none>"}
		}
		out = append(out, i)
	}
	return httpapi.WriteJSON(w, http.StatusOK, out)
}

// imageUsers counts the containers of each image.
func (a *API) imageUsers(r *http.Request) map[string]int64 {
	users := map[string]int64{}
	all, err := a.engine.List(r.Context())
	if err != nil {
		return users
	}
	for _, c := range all {
		users[c.Image]++
	}
	return users
}

// referenceMatches reports whether a tag matches one of the shell patterns, with or
// without the tag part.
func referenceMatches(patterns []string, tag string) bool {
	repo := tag
	if i := strings.LastIndexByte(tag, ':'); i > strings.LastIndexByte(tag, '/') {
		repo = tag[:i]
	}
	return slices.ContainsFunc(patterns, func(p string) bool {
		for _, name := range []string{tag, repo, path.Base(tag), path.Base(repo)} {
			if ok, err := path.Match(p, name); err == nil && ok {
				return true
			}
		}
		return false
	})
}

func (a *API) inspectImage(w http.ResponseWriter, r *http.Request) error {
	i, err := a.engine.InspectImage(r.Context(), r.PathValue("name"))
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusOK, i)
}

func (a *API) imageHistory(w http.ResponseWriter, r *http.Request) error {
	h, err := a.engine.History(r.Context(), r.PathValue("name"))
	if err != nil {
		return err
	}
	if h == nil {
		h = []image.HistoryResponseItem{}
	}
	return httpapi.WriteJSON(w, http.StatusOK, h)
}

func (a *API) tagImage(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	target := q.Get("repo")
	if target == "" {
		return model.Errorf(model.Invalid, "invalid reference format: repository name must not be empty")
	}
	if tag := q.Get("tag"); tag != "" {
		target += ":" + tag
	}
	if err := a.engine.Tag(r.Context(), r.PathValue("name"), target); err != nil {
		return err
	}
	return httpapi.Empty(w, http.StatusCreated)
}

func (a *API) removeImage(w http.ResponseWriter, r *http.Request) error {
	removed, err := a.engine.RemoveImage(r.Context(), r.PathValue("name"), httpapi.Bool(r, "force"))
	if err != nil {
		return err
	}
	if removed == nil {
		removed = []image.DeleteResponse{}
	}
	return httpapi.WriteJSON(w, http.StatusOK, removed)
}

// pruneOptions reads the filters that all prunes share.
func pruneOptions(r *http.Request, more ...string) (runtime.PruneOptions, httpapi.Filters, error) {
	f, err := httpapi.RequestFilters(r, append([]string{"until", "label", "label!"}, more...)...)
	if err != nil {
		return runtime.PruneOptions{}, nil, err
	}
	opts := runtime.PruneOptions{Labels: f["label"], NotLabels: f["label!"]}
	for _, text := range f["until"] {
		if opts.Until, err = httpapi.Until(text, time.Now()); err != nil {
			return opts, nil, err
		}
	}
	return opts, f, nil
}

func (a *API) pruneImages(w http.ResponseWriter, r *http.Request) error {
	opts, f, err := pruneOptions(r, "dangling")
	if err != nil {
		return err
	}
	dangling, err := f.Bool("dangling", true)
	if err != nil {
		return err
	}
	opts.All = !dangling
	deleted, reclaimed, err := a.engine.PruneImages(r.Context(), opts)
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusOK, image.PruneReport{ImagesDeleted: deleted, SpaceReclaimed: reclaimed})
}

func (a *API) pruneContainers(w http.ResponseWriter, r *http.Request) error {
	opts, f, err := pruneOptions(r)
	if err != nil {
		return err
	}
	all, err := a.engine.List(r.Context())
	if err != nil {
		return err
	}
	report := container.PruneReport{ContainersDeleted: []string{}}
	for _, c := range all {
		_, task := c.Config.Labels[model.TaskLabel]
		switch {
		case c.State.Running, c.State.Paused, task,
			!f.Labels("label", c.Config.Labels),
			f.Has("label!") && f.Labels("label!", c.Config.Labels),
			!opts.Until.IsZero() && !created(c).Before(opts.Until):
			continue
		}
		if c.SizeRw != nil {
			report.SpaceReclaimed += uint64(max(*c.SizeRw, 0))
		}
		if err := a.engine.Remove(r.Context(), c.ID, false, false); err != nil {
			if model.KindOf(err) == model.NotFound {
				continue
			}
			return err
		}
		report.ContainersDeleted = append(report.ContainersDeleted, c.ID)
	}
	return httpapi.WriteJSON(w, http.StatusOK, report)
}
