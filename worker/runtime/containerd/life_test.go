package containerd_test

import (
	"context"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
)

func TestLife(t *testing.T) {
	b := newBench(t, nil).withBusybox(t)
	info, err := b.Info(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", info)
	id := b.run(t, &container.Config{Cmd: []string{"sh", "-c", "echo hello; echo oops >&2; trap 'exit 7' TERM; while :; do sleep 0.05; done"}}, nil)
	c, err := b.Inspect(context.Background(), id)
	if err != nil || !c.State.Running || c.State.Pid == 0 {
		t.Fatalf("%+v, %v", c.State, err)
	}
	start := time.Now()
	if err := b.Stop(context.Background(), id, "", nil); err != nil {
		t.Fatal(err)
	}
	if code := b.wait(t, id); code != 7 {
		t.Errorf("exit code %d", code)
	}
	t.Logf("stopped in %v", time.Since(start))
	// The two streams are two pipes: which line was first is not known.
	if got := b.logs(t, id); got != "hello\noops\n" && got != "oops\nhello\n" {
		t.Errorf("log %q", got)
	}
	if err := b.Remove(context.Background(), id, false, true); err != nil {
		t.Fatal(err)
	}
}
