package replica

import (
	"context"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api"
)

// The names that a manager's health service knows.
const (
	// HealthRaft is the service of the TCP server. It must serve before Run is called, for
	// the leader calls back during a join.
	HealthRaft = "Raft"
	// HealthControl is the service of the local socket.
	HealthControl = "ControlAPI"
)

// Health is a Health service. Its zero value knows only the empty name, which always
// serves.
type Health struct {
	api.UnimplementedHealthServer

	mu     sync.Mutex
	status map[string]api.HealthCheckResponse_ServingStatus // nil until the first Set
}

// Set says whether a service serves.
func (h *Health) Set(service string, serving bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.status == nil {
		h.status = make(map[string]api.HealthCheckResponse_ServingStatus)
	}
	h.status[service] = api.HealthCheckResponse_NOT_SERVING
	if serving {
		h.status[service] = api.HealthCheckResponse_SERVING
	}
}

// Check implements api.HealthServer.
func (h *Health) Check(_ context.Context, req *api.HealthCheckRequest) (*api.HealthCheckResponse, error) {
	if req.GetService() == "" {
		return &api.HealthCheckResponse{Status: api.HealthCheckResponse_SERVING}, nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	s, ok := h.status[req.GetService()]
	if !ok {
		return nil, status.Error(codes.NotFound, "unknown service")
	}
	return &api.HealthCheckResponse{Status: s}, nil
}
