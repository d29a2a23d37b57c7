package containerd

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime/docker"
)

// Pause implements runtime.Pauser.
func (e *Engine) Pause(ctx context.Context, ref string) error {
	return e.setPaused(e.ns(ctx), ref, true)
}

// Unpause implements runtime.Pauser.
func (e *Engine) Unpause(ctx context.Context, ref string) error {
	return e.setPaused(e.ns(ctx), ref, false)
}

func (e *Engine) setPaused(ctx context.Context, ref string, pause bool) error {
	c, err := e.findTurn(ctx, ref)
	if err != nil {
		return err
	}
	defer c.give()
	s := e.view(c)
	switch {
	case !isRunning(s):
		return model.Errorf(model.Conflict, "container %s is not running", c.id)
	case pause && s.Status == container.StatePaused:
		return model.Errorf(model.Conflict, "container %s is already paused", c.id)
	case !pause && s.Status != container.StatePaused:
		return model.Errorf(model.Conflict, "Container %s is not paused", c.id)
	}
	status, action := container.StateRunning, events.ActionUnPause
	if pause {
		status, action = container.StatePaused, events.ActionPause
		_, err = e.client.TaskService().Pause(ctx, &tasks.PauseTaskRequest{ContainerID: c.id})
	} else {
		_, err = e.client.TaskService().Resume(ctx, &tasks.ResumeTaskRequest{ContainerID: c.id})
	}
	if err != nil {
		return fmt.Errorf("%s container: %w", action, errgrpc.ToNative(err))
	}
	err = e.change(c, func(s *saved) { s.Status = status })
	e.emit(c, action)
	return err
}

// Rename implements runtime.Pauser.
func (e *Engine) Rename(ctx context.Context, ref, name string) error {
	name = strings.TrimPrefix(name, "/")
	if err := docker.ValidateName(name); err != nil {
		return err
	}
	c, err := e.findTurn(ctx, ref)
	if err != nil {
		return err
	}
	defer c.give()
	next := e.view(c)
	old := next.Name
	if old == name {
		return model.Errorf(model.Invalid, "Renaming a container with the same name as its current name")
	}
	// Both names are its own until it is certain which one it has: others may be asked for long.
	e.mu.Lock()
	err = e.index.Reserve(c.id, name)
	e.mu.Unlock()
	if err != nil {
		return err
	}
	next.Name = name
	if len(next.Overlays) > 0 { // others find it by its name there
		err = e.rewire(ctx, c, &next)
	} else {
		err = e.change(c, func(s *saved) { s.Name = name })
	}
	e.mu.Lock()
	if err == nil {
		err = e.index.Add(c.id, name)
	} else {
		c.Name = old
		e.index.Release(c.id, name)
	}
	e.mu.Unlock()
	if err != nil {
		return err
	}
	e.emit(c, events.ActionRename, "oldName", "/"+old)
	return nil
}

// Update implements runtime.Inspector.
func (e *Engine) Update(ctx context.Context, ref string, u container.UpdateConfig) error {
	ctx = e.ns(ctx)
	c, err := e.findTurn(ctx, ref)
	if err != nil {
		return err
	}
	defer c.give()
	s := e.view(c)
	host := *s.Host
	docker.UpdateResources(&host, u)
	if u.Memory > 0 && u.MemorySwap == 0 && host.MemorySwap > 0 && host.MemorySwap < u.Memory {
		return model.Errorf(model.Invalid, "Memory limit should be smaller than already set memoryswap limit, update the memoryswap at the same time")
	}
	if u.NanoCPUs > 0 {
		host.CPUPeriod, host.CPUQuota = 0, 0
	}
	if err := container.ValidateRestartPolicy(host.RestartPolicy); err != nil {
		return model.Wrap(model.Invalid, err, "check restart policy")
	}
	if _, err := e.validateResources(&host); err != nil {
		return err
	}
	if isRunning(s) {
		r := linuxResources(&host)
		r.Devices = nil
		resources, err := typeurl.MarshalAnyToProto(r)
		if err != nil {
			return fmt.Errorf("encode limits: %w", err)
		}
		if _, err := e.client.TaskService().Update(ctx, &tasks.UpdateTaskRequest{ContainerID: c.id, Resources: resources}); err != nil {
			return fmt.Errorf("update limits of container: %w", errgrpc.ToNative(err))
		}
	}
	err = e.change(c, func(s *saved) { s.Host = &host })
	e.emit(c, events.ActionUpdate)
	return err
}

// Top implements runtime.Inspector.
func (e *Engine) Top(ctx context.Context, ref string, psArgs []string) (*container.TopResponse, error) {
	ctx = e.ns(ctx)
	c, err := e.find(ref)
	if err != nil {
		return nil, err
	}
	if !isRunning(e.view(c)) {
		return nil, model.Errorf(model.Conflict, "container %s is not running", c.id)
	}
	resp, err := e.client.TaskService().ListPids(ctx, &tasks.ListPidsRequest{ContainerID: c.id})
	if err != nil {
		return nil, fmt.Errorf("list processes of container: %w", errgrpc.ToNative(err))
	}
	pids := make([]string, len(resp.Processes))
	for i, p := range resp.Processes {
		pids[i] = strconv.Itoa(int(p.Pid))
	}
	if len(psArgs) == 0 {
		psArgs = []string{"-ef"}
	}
	for _, a := range psArgs {
		if strings.ContainsAny(a, "\n\x00") {
			return nil, model.Errorf(model.Invalid, "ps: invalid argument %q", a)
		}
	}
	out, err := exec.CommandContext(ctx, "ps", psArgs...).Output()
	if err != nil {
		text := ""
		if x, ok := errors.AsType[*exec.ExitError](err); ok {
			text = strings.TrimSpace(string(x.Stderr))
		}
		return nil, model.Errorf(model.Invalid, "error running ps: %w %s", err, text)
	}
	return parsePS(string(out), pids)
}

// parsePS keeps the rows of ps whose PID is one of pids.
func parsePS(out string, pids []string) (*container.TopResponse, error) {
	lines := strings.Split(strings.TrimSpace(out), "\n")
	titles := strings.Fields(lines[0])
	at := slices.Index(titles, "PID")
	if at < 0 {
		return nil, model.Errorf(model.Invalid, "Couldn't find PID field in ps output")
	}
	top := &container.TopResponse{Titles: titles, Processes: [][]string{}}
	for _, line := range lines[1:] {
		fields := strings.Fields(line)
		last := len(titles) - 1
		switch extra := len(fields) - len(titles); {
		case extra > 0 && at == last: // the command comes first, as in "-o args,pid"
			fields = append([]string{strings.Join(fields[:extra+1], " ")}, fields[extra+1:]...)
		case extra > 0: // the command is the rest of the line
			fields = append(fields[:last:last], strings.Join(fields[last:], " "))
		}
		if len(fields) > at && slices.Contains(pids, fields[at]) {
			top.Processes = append(top.Processes, fields)
		}
	}
	return top, nil
}
