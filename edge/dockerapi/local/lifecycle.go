package local

import (
	"errors"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
	"github.com/skep-dev/skep/worker/runtime"
)

func (a *API) inspectContainer(w http.ResponseWriter, r *http.Request) error {
	c, err := a.engine.Inspect(r.Context(), target(r))
	if err != nil {
		return err
	}
	if httpapi.RequestVersion(r).Before(52) && c.NetworkSettings != nil {
		return httpapi.WriteJSON(w, http.StatusOK, legacyInspect{InspectResponse: c, NetworkSettings: legacyNetwork(c.NetworkSettings)})
	}
	return httpapi.WriteJSON(w, http.StatusOK, c)
}

// legacyInspect is a container as clients before API 1.52 expect it: with the addresses on
// the local bridge beside those of each network.
type legacyInspect struct {
	*container.InspectResponse
	NetworkSettings legacyNetworkSettings
}

type legacyNetworkSettings struct {
	*container.NetworkSettings
	Bridge, EndpointID, Gateway, IPAddress, IPv6Gateway, GlobalIPv6Address, MacAddress string
	IPPrefixLen, GlobalIPv6PrefixLen                                                   int
	HairpinMode                                                                        bool
}

func legacyNetwork(n *container.NetworkSettings) legacyNetworkSettings {
	out := legacyNetworkSettings{NetworkSettings: n}
	ep := n.Networks["bridge"]
	if ep == nil {
		return out
	}
	text := func(a netip.Addr) string {
		if !a.IsValid() {
			return ""
		}
		return a.String()
	}
	out.EndpointID, out.MacAddress, out.IPPrefixLen, out.GlobalIPv6PrefixLen = ep.EndpointID, ep.MacAddress.String(), ep.IPPrefixLen, ep.GlobalIPv6PrefixLen
	out.Gateway, out.IPAddress = text(ep.Gateway), text(ep.IPAddress)
	out.IPv6Gateway, out.GlobalIPv6Address = text(ep.IPv6Gateway), text(ep.GlobalIPv6Address)
	return out
}

func (a *API) createContainer(w http.ResponseWriter, r *http.Request) error {
	var req container.CreateRequest
	if err := httpapi.ReadJSON(w, r, &req); err != nil {
		return err
	}
	if req.Config == nil || req.Image == "" {
		return model.Errorf(model.Invalid, "config cannot be empty in order to create a container")
	}
	if req.HostConfig == nil {
		req.HostConfig = new(container.HostConfig)
	}
	id, warnings, err := a.engine.Create(r.Context(), runtime.CreateOptions{
		Name: r.URL.Query().Get("name"), Config: req.Config, HostConfig: req.HostConfig, Networking: req.NetworkingConfig,
	})
	if err != nil {
		return err
	}
	if warnings == nil {
		warnings = []string{}
	}
	return httpapi.WriteJSON(w, http.StatusCreated, container.CreateResponse{ID: id, Warnings: warnings})
}

// done answers 204, or 304 when nothing had to be done.
func done(w http.ResponseWriter, err error) error {
	if errors.Is(err, runtime.ErrNotModified) {
		return httpapi.Empty(w, http.StatusNotModified)
	}
	if err != nil {
		return err
	}
	return httpapi.Empty(w, http.StatusNoContent)
}

func (a *API) startContainer(w http.ResponseWriter, r *http.Request) error {
	if r.ContentLength > 7 {
		return model.Errorf(model.Invalid, "starting container with non-empty request body was deprecated since API v1.22 and removed in v1.24")
	}
	return done(w, a.engine.Start(r.Context(), target(r)))
}

// grace reads the query's t.
func grace(r *http.Request) (*time.Duration, error) {
	text := r.URL.Query().Get("t")
	if text == "" {
		return nil, nil //nolint:nilnil // nil is the container's own
	}
	seconds, err := strconv.Atoi(text)
	if err != nil {
		return nil, model.Errorf(model.Invalid, "invalid value for \"t\": %v", err)
	}
	d := time.Duration(seconds) * time.Second
	return &d, nil
}

func (a *API) stopContainer(w http.ResponseWriter, r *http.Request) error {
	t, err := grace(r)
	if err != nil {
		return err
	}
	return done(w, a.engine.Stop(r.Context(), target(r), r.URL.Query().Get("signal"), t))
}

func (a *API) restartContainer(w http.ResponseWriter, r *http.Request) error {
	t, err := grace(r)
	if err != nil {
		return err
	}
	err = a.engine.Stop(r.Context(), target(r), r.URL.Query().Get("signal"), t)
	if err != nil && !errors.Is(err, runtime.ErrNotModified) {
		return err
	}
	return done(w, a.engine.Start(r.Context(), target(r)))
}

func (a *API) killContainer(w http.ResponseWriter, r *http.Request) error {
	signal := r.URL.Query().Get("signal")
	if signal == "" {
		signal = "KILL"
	}
	return done(w, a.engine.Kill(r.Context(), target(r), signal))
}

func (a *API) pauseContainer(w http.ResponseWriter, r *http.Request) error {
	return done(w, a.engine.Pause(r.Context(), target(r)))
}

func (a *API) unpauseContainer(w http.ResponseWriter, r *http.Request) error {
	return done(w, a.engine.Unpause(r.Context(), target(r)))
}

func (a *API) renameContainer(w http.ResponseWriter, r *http.Request) error {
	return done(w, a.engine.Rename(r.Context(), target(r), r.URL.Query().Get("name")))
}

func (a *API) updateContainer(w http.ResponseWriter, r *http.Request) error {
	var update container.UpdateConfig
	if err := httpapi.ReadJSON(w, r, &update); err != nil {
		return err
	}
	if err := a.engine.Update(r.Context(), target(r), update); err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusOK, container.UpdateResponse{})
}

func (a *API) removeContainer(w http.ResponseWriter, r *http.Request) error {
	if httpapi.Bool(r, "link") {
		return model.Errorf(model.Unimplemented, "links are not implemented by skep")
	}
	return done(w, a.engine.Remove(r.Context(), target(r), httpapi.Bool(r, "force"), httpapi.Bool(r, "v")))
}

func (a *API) waitContainer(w http.ResponseWriter, r *http.Request) error {
	condition := container.WaitConditionNotRunning
	switch c := container.WaitCondition(r.URL.Query().Get("condition")); c {
	case "", container.WaitConditionNotRunning:
	case container.WaitConditionNextExit, container.WaitConditionRemoved:
		condition = c
	default:
		return model.Errorf(model.Invalid, "invalid condition: %q", c)
	}
	result, err := a.engine.Wait(r.Context(), target(r), condition)
	if err != nil {
		return err
	}
	// Clients wait for the headers before they start the container.
	out := httpapi.Begin(w, "application/json")
	select {
	case <-r.Context().Done():
		return nil
	case got := <-result:
		answer := container.WaitResponse{StatusCode: int64(got.ExitCode)}
		if got.Err != nil && got.ExitCode == 0 { // who started a container in vain has been told why
			answer.Error = &container.WaitExitError{Message: got.Err.Error()}
		}
		data, err := httpapi.Encode(answer)
		if err == nil {
			_, err = out.Write(data)
		}
		return err
	}
}

func (a *API) containerTop(w http.ResponseWriter, r *http.Request) error {
	args := strings.Fields(r.URL.Query().Get("ps_args"))
	top, err := a.engine.Top(r.Context(), target(r), args)
	if err != nil {
		return err
	}
	return httpapi.WriteJSON(w, http.StatusOK, top)
}

func size(r *http.Request) (width, height uint32, err error) {
	for key, into := range map[string]*uint32{"w": &width, "h": &height} {
		n, err := strconv.ParseUint(r.URL.Query().Get(key), 10, 32)
		if err != nil {
			return 0, 0, model.Errorf(model.Invalid, "invalid value for %q: %v", key, err)
		}
		*into = uint32(n)
	}
	return width, height, nil
}

func (a *API) resizeContainer(w http.ResponseWriter, r *http.Request) error {
	width, height, err := size(r)
	if err != nil {
		return err
	}
	if err := a.engine.Resize(r.Context(), target(r), width, height); err != nil {
		return err
	}
	return httpapi.Empty(w, http.StatusOK)
}
