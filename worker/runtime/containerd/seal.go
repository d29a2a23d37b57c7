package containerd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"

	"github.com/moby/moby/api/types/container"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/platform/disk"
	"github.com/skep-dev/skep/worker/runtime"
)

// hidden is what is sealed of the record of a task's container, since it belongs to the
// swarm, which may be locked. The rest is what it takes to look after the container, and to
// remove it, without having the key.
type hidden struct {
	Name     string
	Config   *container.Config
	Host     *container.HostConfig
	Mounts   []mountPoint             `json:",omitempty"`
	Overlays []runtime.OverlayRequest `json:",omitempty"`
	Sandbox  runtime.Sandbox
	Error    string            `json:",omitempty"`
	Health   *container.Health `json:",omitempty"`
}

// hide puts what h holds out of s and returns it.
func (s *saved) hide() hidden {
	h := hidden{Name: s.Name, Config: s.Config, Host: s.Host, Mounts: s.Mounts, Overlays: s.Overlays, Sandbox: s.Sandbox, Error: s.Error, Health: s.Health}
	s.Name, s.Config, s.Host, s.Mounts, s.Overlays, s.Sandbox, s.Error, s.Health = "", nil, nil, nil, nil, runtime.Sandbox{}, "", nil
	return h
}

// lock makes a record that was read sealed one that can be looked after without its key.
func (s *saved) lock() {
	s.locked, s.Name = true, s.ID
	s.Config = &container.Config{Image: s.ImageID, Cmd: []string{"(locked)"}, Labels: map[string]string{model.TaskLabel: ""}}
	s.Host = &container.HostConfig{NetworkMode: "none"}
}

// unlock gives a locked record what was sealed.
func (s *saved) unlock(h hidden) {
	s.locked, s.Sealed = false, nil
	s.Name, s.Config, s.Host, s.Mounts, s.Overlays, s.Sandbox = h.Name, h.Config, h.Host, h.Mounts, h.Overlays, h.Sandbox
	if s.Error == "" {
		s.Error = h.Error
	}
	if s.Health == nil {
		s.Health = h.Health
	}
}

func (s *saved) ofTask() bool {
	if s.Config == nil {
		return false
	}
	_, ok := s.Config.Labels[model.TaskLabel]
	return ok
}

// onDisk returns a record as it is written: that of a task's container sealed, as soon as
// there is a key.
func (e *Engine) onDisk(s saved) (saved, error) {
	if s.locked {
		_ = s.hide() // stands for what Sealed holds
		return s, nil
	}
	if !s.ofTask() {
		return s, nil
	}
	keys, err := e.sealKeys()
	if err != nil || len(keys) == 0 {
		return s, err
	}
	plain, err := json.Marshal(s.hide())
	if err != nil {
		return s, fmt.Errorf("seal record of container %s: %w", s.ID, err)
	}
	s.Sealed, err = disk.Seal(keys[0], plain)
	return s, err
}

// sealKeys returns the keys of records, the one to seal with first; none before Unseal.
// When the node has left its swarm, the last ones serve until its containers are removed.
func (e *Engine) sealKeys() ([][]byte, error) {
	e.mu.Lock()
	from := e.keys
	e.mu.Unlock()
	if from == nil {
		return nil, nil
	}
	keys, err := from.TaskKeys()
	e.mu.Lock()
	defer e.mu.Unlock()
	if err == nil {
		e.lastKeys = keys
	} else if len(e.lastKeys) > 0 {
		keys, err = e.lastKeys, nil
	}
	return keys, err
}

// Unseal implements runtime.Sealer.
func (e *Engine) Unseal(ctx context.Context, keys runtime.Keys) error {
	ctx = e.ns(ctx)
	e.mu.Lock()
	e.keys = keys
	e.mu.Unlock()
	all, err := e.sealKeys()
	if err != nil {
		return fmt.Errorf("open records of containers: %w", err)
	}
	var errs []error
	for _, c := range e.all() {
		if err := c.take(ctx); err != nil {
			return err
		}
		errs = append(errs, e.unseal(ctx, c, all))
		c.give()
	}
	return errors.Join(errs...)
}

// unseal opens a record and makes sure that it is sealed with the first key on disk.
// Callers have the container's turn.
func (e *Engine) unseal(ctx context.Context, c *record, keys [][]byte) error {
	s := e.view(c)
	if !s.locked {
		if s.ofTask() {
			return e.save(s)
		}
		return nil
	}
	plain, err := disk.Open(s.Sealed, keys[0])
	fresh := err == nil
	if !fresh {
		plain, err = disk.Open(s.Sealed, keys[1:]...)
	}
	var h hidden
	if err == nil {
		err = json.Unmarshal(plain, &h)
	}
	if err != nil || h.Config == nil || h.Host == nil {
		// It is of another swarm, or damaged: it stays what it is, and can be removed.
		e.log.LogAttrs(ctx, slog.LevelWarn, "record of a task's container cannot be opened", slog.String("container_id", c.id), slog.Any("error", err))
		return nil
	}
	e.mu.Lock()
	if e.index.Add(c.id, h.Name) != nil { // somebody took the name meanwhile
		h.Name = c.id
	}
	c.unlock(h)
	s = c.saved
	e.mu.Unlock()
	if isRunning(s) {
		e.rejoin(ctx, c, s)
	}
	if fresh {
		return nil
	}
	return e.save(s)
}

// errLockedContainer refuses to start what nobody here knows.
func errLockedContainer(id string) error {
	return model.Errorf(model.Unavailable, "container %s belongs to a task of a swarm that is locked: unlock it first with `docker swarm unlock`", id)
}
