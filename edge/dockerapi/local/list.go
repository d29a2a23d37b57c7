package local

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	units "github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
)

// localID makes the id of a local network: 64 hex digits.
func localID(daemon, name string) string {
	sum := sha256.Sum256([]byte(daemon + "/" + name))
	return hex.EncodeToString(sum[:])
}

func (a *API) listContainers(w http.ResponseWriter, r *http.Request) error {
	f, err := httpapi.RequestFilters(r, "id", "name", "label", "status", "exited", "ancestor", "before", "since", "health",
		"volume", "network", "publish", "expose", "is-task", "isolation", "label!")
	if err != nil {
		return err
	}
	limit := 0
	if text := r.URL.Query().Get("limit"); text != "" {
		if limit, err = strconv.Atoi(text); err != nil {
			return model.Errorf(model.Invalid, "invalid value for \"limit\": %v", err)
		}
	}
	inspected, err := a.engine.List(r.Context())
	if err != nil {
		return err
	}
	all := httpapi.Bool(r, "all") || limit > 0 || f.Has("status") || f.Has("exited")
	keep, err := newSelector(f, inspected)
	if err != nil {
		return err
	}
	out := []container.Summary{}
	for _, c := range inspected {
		if (!all && !c.State.Running) || !keep(c) {
			continue
		}
		out = append(out, a.summary(r, c))
		if limit > 0 && len(out) == limit {
			break
		}
	}
	return httpapi.WriteJSON(w, http.StatusOK, out)
}

// newSelector returns the predicate of a list's filters.
func newSelector(f httpapi.Filters, all []*container.InspectResponse) (func(*container.InspectResponse) bool, error) {
	isTask, err := f.Bool("is-task", false)
	if err != nil {
		return nil, err
	}
	for _, s := range f["status"] {
		if !slices.Contains([]string{"created", "restarting", "running", "removing", "paused", "exited", "dead"}, s) {
			return nil, model.Errorf(model.Invalid, "invalid filter 'status=%s'", s)
		}
	}
	var bounds [2]time.Time
	for i, key := range []string{"before", "since"} {
		for _, want := range f[key] {
			n := slices.IndexFunc(all, func(c *container.InspectResponse) bool {
				return c.ID == want || strings.HasPrefix(c.ID, want) || strings.TrimPrefix(c.Name, "/") == want
			})
			if n < 0 {
				return nil, model.Errorf(model.NotFound, "No such container: %s", want)
			}
			bounds[i] = created(all[n])
		}
	}
	return func(c *container.InspectResponse) bool {
		name := strings.TrimPrefix(c.Name, "/")
		_, task := c.Config.Labels[model.TaskLabel]
		switch {
		case !f.Match("id", c.ID),
			!f.Match("name", name) && !f.Match("name", c.Name),
			!f.Labels("label", c.Config.Labels),
			f.Has("label!") && f.Labels("label!", c.Config.Labels),
			!f.Exact("status", string(c.State.Status)),
			f.Has("exited") && (c.State.Status != container.StateExited || !f.Exact("exited", strconv.Itoa(c.State.ExitCode))),
			!f.Exact("health", healthOf(c)),
			f.Has("is-task") && task != isTask,
			f.Has("ancestor") && !ancestor(f["ancestor"], c),
			f.Has("volume") && !mounted(f["volume"], c),
			f.Has("network") && !attached(f["network"], c),
			(f.Has("publish") || f.Has("expose")) && !exposes(f, c),
			!bounds[0].IsZero() && !created(c).Before(bounds[0]),
			!bounds[1].IsZero() && !created(c).After(bounds[1]):
			return false
		}
		return true
	}, nil
}

func created(c *container.InspectResponse) time.Time {
	t, err := time.Parse(time.RFC3339Nano, c.Created)
	if err != nil {
		return time.Time{}
	}
	return t
}

func healthOf(c *container.InspectResponse) string {
	if c.State.Health == nil || c.State.Health.Status == "" {
		return string(container.NoHealthcheck)
	}
	return string(c.State.Health.Status)
}

func ancestor(wants []string, c *container.InspectResponse) bool {
	return slices.ContainsFunc(wants, func(want string) bool {
		return c.Config.Image == want || c.Config.Image == want+":latest" || c.Image == want || strings.HasPrefix(strings.TrimPrefix(c.Image, "sha256:"), want)
	})
}

func mounted(wants []string, c *container.InspectResponse) bool {
	return slices.ContainsFunc(c.Mounts, func(m container.MountPoint) bool {
		return slices.Contains(wants, m.Name) || slices.Contains(wants, m.Destination)
	})
}

func attached(wants []string, c *container.InspectResponse) bool {
	if c.NetworkSettings == nil {
		return false
	}
	for name, e := range c.NetworkSettings.Networks {
		if slices.Contains(wants, name) || (e != nil && slices.Contains(wants, e.NetworkID)) {
			return true
		}
	}
	return false
}

func exposes(f httpapi.Filters, c *container.InspectResponse) bool {
	for p := range c.Config.ExposedPorts {
		if f.Exact("expose", p.Port()) && f.Has("expose") || f.Has("expose") && f.Exact("expose", p.String()) {
			return true
		}
	}
	for p := range c.HostConfig.PortBindings {
		if f.Has("publish") && (f.Exact("publish", p.Port()) || f.Exact("publish", p.String())) {
			return true
		}
	}
	return false
}

// summary is one line of `docker ps`.
func (a *API) summary(r *http.Request, c *container.InspectResponse) container.Summary {
	s := container.Summary{
		ID: c.ID, Names: []string{c.Name}, Image: c.Config.Image, ImageID: c.Image,
		Command: strings.TrimSpace(c.Path + " " + strings.Join(c.Args, " ")),
		Created: created(c).Unix(), Ports: ports(c), Labels: c.Config.Labels,
		State: c.State.Status, Status: status(c, time.Now()), Mounts: c.Mounts,
	}
	if s.Labels == nil {
		s.Labels = map[string]string{}
	}
	s.HostConfig.NetworkMode = string(c.HostConfig.NetworkMode)
	if c.NetworkSettings != nil {
		s.NetworkSettings = &container.NetworkSettingsSummary{Networks: c.NetworkSettings.Networks}
	}
	if !httpapi.RequestVersion(r).Before(52) && c.State.Health != nil {
		s.Health = &container.HealthSummary{Status: c.State.Health.Status, FailingStreak: c.State.Health.FailingStreak}
	}
	if httpapi.Bool(r, "size") {
		if c.SizeRw != nil {
			s.SizeRw = *c.SizeRw
		}
		if c.SizeRootFs != nil {
			s.SizeRootFs = *c.SizeRootFs
		}
	}
	return s
}

func ports(c *container.InspectResponse) []container.PortSummary {
	out := []container.PortSummary{}
	if c.NetworkSettings == nil {
		return out
	}
	for port, bindings := range c.NetworkSettings.Ports {
		if len(bindings) == 0 {
			out = append(out, container.PortSummary{PrivatePort: port.Num(), Type: string(port.Proto())})
		}
		for _, b := range bindings {
			n, err := strconv.ParseUint(b.HostPort, 10, 16)
			if err != nil {
				continue
			}
			out = append(out, container.PortSummary{IP: b.HostIP, PrivatePort: port.Num(), PublicPort: uint16(n), Type: string(port.Proto())})
		}
	}
	slices.SortFunc(out, func(a, b container.PortSummary) int {
		return int(a.PrivatePort)*100000 + int(a.PublicPort) - int(b.PrivatePort)*100000 - int(b.PublicPort)
	})
	return out
}

// status is the sentence that `docker ps` shows.
func status(c *container.InspectResponse, now time.Time) string {
	since := func(text string) string {
		t, err := time.Parse(time.RFC3339Nano, text)
		if err != nil || t.IsZero() {
			return "Less than a second"
		}
		return units.HumanDuration(now.Sub(t))
	}
	switch c.State.Status {
	case container.StateRunning:
		text := "Up " + since(c.State.StartedAt)
		if c.State.Health != nil {
			switch c.State.Health.Status {
			case container.Starting:
				text += " (health: starting)"
			case container.Healthy, container.Unhealthy:
				text += " (" + string(c.State.Health.Status) + ")"
			case container.NoHealthcheck:
			}
		}
		return text
	case container.StatePaused:
		return "Up " + since(c.State.StartedAt) + " (Paused)"
	case container.StateRestarting:
		return fmt.Sprintf("Restarting (%d) %s ago", c.State.ExitCode, since(c.State.FinishedAt))
	case container.StateExited:
		return fmt.Sprintf("Exited (%d) %s ago", c.State.ExitCode, since(c.State.FinishedAt))
	case container.StateCreated:
		return "Created"
	case container.StateRemoving:
		return "Removal In Progress"
	case container.StateDead:
		return "Dead"
	default:
		return string(c.State.Status)
	}
}
