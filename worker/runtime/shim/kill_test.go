package shim_test

import (
	"context"
	"os/exec"
	"syscall"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/skep-dev/skep/worker/runtime/shim"
)

// inner is containerd's task service as far as Kill needs it: one process is made, and
// what is left to it is counted.
type inner struct {
	taskapi.TTRPCTaskService

	pid   int
	kills int
}

func (i *inner) Create(context.Context, *taskapi.CreateTaskRequest) (*taskapi.CreateTaskResponse, error) {
	return &taskapi.CreateTaskResponse{Pid: uint32(i.pid)}, nil
}

func (i *inner) Kill(context.Context, *taskapi.KillRequest) (*emptypb.Empty, error) {
	i.kills++
	return &emptypb.Empty{}, nil
}

func TestKillReachesTheMainProcessOnly(t *testing.T) {
	child := exec.CommandContext(t.Context(), "sleep", "1000")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	i := &inner{pid: child.Process.Pid}
	tasks := shim.NewTasks(t.Context(), i)
	spec := shim.Spec{MaxSize: -1, MaxFiles: 1, Socket: t.TempDir() + "/s"}
	if _, err := tasks.Create(t.Context(), &taskapi.CreateTaskRequest{ID: "a", Bundle: t.TempDir(), Stdout: spec.String()}); err != nil {
		t.Fatal(err)
	}
	if _, err := tasks.Kill(t.Context(), &taskapi.KillRequest{ID: "a", Signal: uint32(syscall.SIGTERM)}); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait() // that it was killed is the error
	if s, ok := child.ProcessState.Sys().(syscall.WaitStatus); !ok || s.Signal() != syscall.SIGTERM {
		t.Errorf("ended by %v", child.ProcessState)
	}
	_, err := tasks.Kill(t.Context(), &taskapi.KillRequest{ID: "a", Signal: uint32(syscall.SIGTERM)})
	if !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("signal to an ended process: %v", err)
	}
	if i.kills != 0 {
		t.Errorf("%d signals took the way through the runtime", i.kills)
	}
	for _, r := range []*taskapi.KillRequest{{ID: "a", All: true}, {ID: "a", ExecID: "e"}, {ID: "unknown"}} {
		if _, err := tasks.Kill(t.Context(), r); err != nil {
			t.Errorf("%v: %v", r, err)
		}
	}
	if i.kills != 3 {
		t.Errorf("%d of 3 signals were left to the runtime", i.kills)
	}
}
