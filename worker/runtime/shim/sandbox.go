package shim

import (
	"context"
	"os"
	"runtime"
	"sync"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// sandbox is the sandbox service: a sandbox is nothing but this process.
type sandbox struct {
	tasks *Tasks
	stop  shutdown.Service

	mu      sync.Mutex
	created time.Time
	ended   chan struct{} // closed by StopSandbox
	stopped bool
}

func newSandbox(tasks *Tasks, stop shutdown.Service) *sandbox {
	return &sandbox{tasks: tasks, stop: stop, ended: make(chan struct{})}
}

// RegisterTTRPC registers the service with the shim's server.
func (s *sandbox) RegisterTTRPC(server *ttrpc.Server) error {
	sandboxapi.RegisterTTRPCSandboxService(server, s)
	return nil
}

func (s *sandbox) CreateSandbox(context.Context, *sandboxapi.CreateSandboxRequest) (*sandboxapi.CreateSandboxResponse, error) {
	s.tasks.grouped.Store(true)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.created = time.Now()
	return &sandboxapi.CreateSandboxResponse{}, nil
}

func (s *sandbox) StartSandbox(context.Context, *sandboxapi.StartSandboxRequest) (*sandboxapi.StartSandboxResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &sandboxapi.StartSandboxResponse{Pid: uint32(os.Getpid()), CreatedAt: timestamppb.New(s.created)}, nil
}

func (s *sandbox) Platform(context.Context, *sandboxapi.PlatformRequest) (*sandboxapi.PlatformResponse, error) {
	return &sandboxapi.PlatformResponse{Platform: &types.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH}}, nil
}

func (s *sandbox) StopSandbox(context.Context, *sandboxapi.StopSandboxRequest) (*sandboxapi.StopSandboxResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.stopped {
		s.stopped = true
		close(s.ended)
	}
	return &sandboxapi.StopSandboxResponse{}, nil
}

func (s *sandbox) WaitSandbox(ctx context.Context, _ *sandboxapi.WaitSandboxRequest) (*sandboxapi.WaitSandboxResponse, error) {
	select {
	case <-s.ended:
		return &sandboxapi.WaitSandboxResponse{ExitedAt: timestamppb.Now()}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (s *sandbox) SandboxStatus(_ context.Context, r *sandboxapi.SandboxStatusRequest) (*sandboxapi.SandboxStatusResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	state := "SANDBOX_READY"
	if s.stopped {
		state = "SANDBOX_NOTREADY"
	}
	return &sandboxapi.SandboxStatusResponse{
		SandboxID: r.SandboxID, Pid: uint32(os.Getpid()), State: state, CreatedAt: timestamppb.New(s.created),
	}, nil
}

func (s *sandbox) PingSandbox(context.Context, *sandboxapi.PingRequest) (*sandboxapi.PingResponse, error) {
	return &sandboxapi.PingResponse{}, nil
}

func (s *sandbox) ShutdownSandbox(context.Context, *sandboxapi.ShutdownSandboxRequest) (*sandboxapi.ShutdownSandboxResponse, error) {
	s.stop.Shutdown()
	return &sandboxapi.ShutdownSandboxResponse{}, nil
}

func (s *sandbox) SandboxMetrics(context.Context, *sandboxapi.SandboxMetricsRequest) (*sandboxapi.SandboxMetricsResponse, error) {
	return &sandboxapi.SandboxMetricsResponse{}, nil
}
