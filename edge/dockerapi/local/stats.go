package local

import (
	"net/http"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
)

// statsEvery is the interval of a stream of samples.
const statsEvery = time.Second

func (a *API) containerStats(w http.ResponseWriter, r *http.Request) error {
	c, err := a.engine.Inspect(r.Context(), target(r))
	if err != nil {
		return err
	}
	stream := r.URL.Query().Get("stream") == "" || httpapi.Bool(r, "stream")
	oneShot := httpapi.Bool(r, "one-shot")
	if stream && oneShot {
		return model.Errorf(model.Invalid, "cannot have stream=true and one-shot=true")
	}
	var last *container.StatsResponse
	sample := func() (*container.StatsResponse, error) {
		s, err := a.engine.Stats(r.Context(), c.ID)
		if model.KindOf(err) == model.Conflict { // not running
			s, err = new(container.StatsResponse), nil
		}
		if err != nil {
			return nil, err
		}
		s.ID, s.Name, s.OSType = c.ID, strings.TrimSpace(c.Name), "linux"
		if last != nil {
			s.PreRead, s.PreCPUStats = last.Read, last.CPUStats
		}
		last = s
		return s, nil
	}
	first, err := sample()
	if err != nil {
		return err
	}
	if oneShot {
		return httpapi.WriteJSON(w, http.StatusOK, first)
	}
	out := httpapi.Begin(w, "application/json")
	if stream {
		if err := writeLine(out, first); err != nil {
			return nil
		}
	}
	tick := time.NewTicker(statsEvery)
	defer tick.Stop()
	for {
		select {
		case <-r.Context().Done():
			return nil
		case <-tick.C:
		}
		s, err := sample()
		if err != nil {
			return nil
		}
		if err := writeLine(out, s); err != nil || !stream {
			return nil
		}
	}
}
