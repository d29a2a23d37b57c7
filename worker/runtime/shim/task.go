package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

// drainTime is how long a deleted task's output may take to arrive.
const drainTime = 2 * time.Second

// Tasks is the task service. It may be called from any goroutine.
type Tasks struct {
	taskapi.TTRPCTaskService

	ctx       context.Context //nolint:containedctx // the shim's life, for the exit watchers
	grouped   atomic.Bool     // a sandbox: the shim stays when its last task goes
	listening sync.Once

	mu      sync.Mutex
	streams map[string]*stream // by task id
	// mains are the main processes by task id, held so that no signal reaches another
	// process that got the number of one that is gone.
	mains map[string]*os.Process
}

// NewTasks wraps containerd's task service for one shim that lives as long as ctx.
func NewTasks(ctx context.Context, inner taskapi.TTRPCTaskService) *Tasks {
	return &Tasks{TTRPCTaskService: inner, ctx: ctx, streams: map[string]*stream{}, mains: map[string]*os.Process{}}
}

// RegisterTTRPC registers the service with the shim's server.
func (t *Tasks) RegisterTTRPC(server *ttrpc.Server) error {
	taskapi.RegisterTTRPCTaskService(server, t)
	return nil
}

func (t *Tasks) stream(id string) *stream {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.streams[id]
}

// Create creates a task and connects its streams.
func (t *Tasks) Create(ctx context.Context, r *taskapi.CreateTaskRequest) (*taskapi.CreateTaskResponse, error) {
	spec, ours, err := ParseSpec(r.Stdout)
	if err != nil {
		return nil, err
	}
	if !ours {
		return t.TTRPCTaskService.Create(ctx, r)
	}
	if len(spec.Key) > 0 {
		if err := openSpec(r.Bundle, spec.Key); err != nil {
			return nil, err
		}
	}
	t.listening.Do(func() { err = listen(spec.Socket, t.stream) })
	if err != nil { // tasks work without; attach will say that it does not
		log.G(ctx).WithError(err).Error("serve streams")
	}
	s, stdin, stdout, stderr, err := newStream(spec, r.Bundle, r.Terminal, func() {
		// A task that is gone has let go already.
		_, _ = t.CloseIO(t.ctx, &taskapi.CloseIORequest{ID: r.ID, Stdin: true})
	})
	if err != nil {
		return nil, err
	}
	r.Stdin, r.Stdout, r.Stderr = stdin, stdout, stderr
	t.mu.Lock()
	t.streams[r.ID] = s
	t.mu.Unlock()
	resp, err := t.TTRPCTaskService.Create(ctx, r)
	if err != nil {
		t.drop(r.ID, 0)
		return nil, err
	}
	if main, err := os.FindProcess(int(resp.Pid)); err == nil { // else containerd's way of signalling remains
		t.mu.Lock()
		t.mains[r.ID] = main
		t.mu.Unlock()
	}
	return resp, nil
}

// drop forgets a task and closes its streams.
func (t *Tasks) drop(id string, patience time.Duration) {
	t.mu.Lock()
	s := t.streams[id]
	if main := t.mains[id]; main != nil {
		_ = main.Release() // never fails
	}
	delete(t.streams, id)
	delete(t.mains, id)
	t.mu.Unlock()
	if s != nil {
		s.finish(patience)
	}
}

// Start starts a task's main process, whose exit is then recorded, or an exec's.
func (t *Tasks) Start(ctx context.Context, r *taskapi.StartRequest) (*taskapi.StartResponse, error) {
	resp, err := t.TTRPCTaskService.Start(ctx, r)
	if err != nil || r.ExecID != "" {
		return resp, err
	}
	if s := t.stream(r.ID); s != nil && s.spec.ExitPath != "" {
		go t.record(r.ID, s.spec.ExitPath)
	}
	return resp, nil
}

func (t *Tasks) record(id, path string) {
	w, err := t.Wait(t.ctx, &taskapi.WaitRequest{ID: id})
	if err != nil {
		return // deleted before it ended, or the shim ends
	}
	if err := WriteExit(path, Exit{Code: w.ExitStatus, At: w.ExitedAt.AsTime()}); err != nil {
		log.L.WithError(err).WithField("id", id).Error("record exit status")
	}
}

// Delete deletes a task after its output has been written.
func (t *Tasks) Delete(ctx context.Context, r *taskapi.DeleteRequest) (*taskapi.DeleteResponse, error) {
	resp, err := t.TTRPCTaskService.Delete(ctx, r)
	if err == nil && r.ExecID == "" {
		t.drop(r.ID, drainTime)
	}
	return resp, err
}

// Kill signals a task's main process itself. The runtime's kill would be a program more to
// run for each task, and containerd's service keeps the task locked meanwhile, which
// holds up the exits of all others.
func (t *Tasks) Kill(ctx context.Context, r *taskapi.KillRequest) (*emptypb.Empty, error) {
	if r.All || r.ExecID != "" {
		return t.TTRPCTaskService.Kill(ctx, r)
	}
	t.mu.Lock()
	main := t.mains[r.ID]
	if main == nil {
		t.mu.Unlock()
		return t.TTRPCTaskService.Kill(ctx, r)
	}
	err := main.Signal(syscall.Signal(r.Signal))
	t.mu.Unlock()
	if errors.Is(err, os.ErrProcessDone) {
		err = fmt.Errorf("process already finished: %w", errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &emptypb.Empty{}, nil
}

// Pids lists a task's processes. A restarted containerd takes a task without any for
// leaked and forgets its exit status; so a stopped one answers its former main process.
func (t *Tasks) Pids(ctx context.Context, r *taskapi.PidsRequest) (*taskapi.PidsResponse, error) {
	resp, err := t.TTRPCTaskService.Pids(ctx, r)
	if err == nil && len(resp.Processes) > 0 {
		return resp, nil
	}
	t.mu.Lock()
	pid := 0
	if main := t.mains[r.ID]; main != nil {
		pid = main.Pid
	}
	t.mu.Unlock()
	if pid == 0 {
		return resp, err
	}
	state, serr := t.State(ctx, &taskapi.StateRequest{ID: r.ID})
	if serr != nil || state.Status != tasktypes.Status_STOPPED {
		return resp, err
	}
	return &taskapi.PidsResponse{Processes: []*tasktypes.ProcessInfo{{Pid: uint32(pid)}}}, nil
}

// Shutdown ends an ungrouped shim that has no task left.
func (t *Tasks) Shutdown(ctx context.Context, r *taskapi.ShutdownRequest) (*emptypb.Empty, error) {
	if t.grouped.Load() {
		return &emptypb.Empty{}, nil
	}
	return t.TTRPCTaskService.Shutdown(ctx, r)
}
