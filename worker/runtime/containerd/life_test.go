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
	id := b.run(t, &container.Config{Cmd: []string{"sh", "-c", "trap 'exit 7' TERM; echo hello; echo oops >&2; while :; do sleep 0.05; done"}}, nil)
	c, err := b.Inspect(context.Background(), id)
	if err != nil || !c.State.Running || c.State.Pid == 0 {
		t.Fatalf("%+v, %v", c.State, err)
	}
	// The two streams are two pipes: which line was first is not known.
	until(t, "it has printed", func() bool {
		got := b.logs(t, id)
		return got == "hello\noops\n" || got == "oops\nhello\n"
	})
	start := time.Now()
	if err := b.Stop(context.Background(), id, "", nil); err != nil {
		t.Fatal(err)
	}
	if code := b.wait(t, id); code != 7 {
		t.Errorf("exit code %d", code)
	}
	t.Logf("stopped in %v", time.Since(start))
	if err := b.Remove(context.Background(), id, false, true); err != nil {
		t.Fatal(err)
	}
}
