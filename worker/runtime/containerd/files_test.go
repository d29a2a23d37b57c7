package containerd_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/worker/runtime"
)

// TestSecretsEndWithTheirUser: the files of a container are there, in memory, until it ends,
// or until it ends for good when a policy restarts it.
func TestSecretsEndWithTheirUser(t *testing.T) {
	b := newBench(t, nil).withBusybox(t)
	ctx := context.Background()
	secret := runtime.File{Path: "key", Mode: 0o400, Data: []byte("key\n")}
	cfg := &container.Config{Cmd: []string{"sh", "-c", "exec sleep 1000"}, StopSignal: "SIGKILL"}
	id := b.run(t, cfg, nil, secret)
	dir := filepath.Join(b.cfg.Root, "run", "f", id)
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Type != unix.TMPFS_MAGIC && st.Type != unix.RAMFS_MAGIC {
		t.Errorf("%s is not in memory: %v", dir, err)
	}
	if err := b.Stop(ctx, id, "", nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("after the end %s is there: %v", dir, err)
	}
	again := b.run(t, &container.Config{Cmd: []string{"sh", "-c", "cat /run/secrets/key; exec sleep 1000"}}, &container.HostConfig{RestartPolicy: container.RestartPolicy{Name: "always"}}, secret)
	until(t, "it has read its secret", func() bool { return b.logs(t, again) == "key\n" })
	pid := b.state(t, again).Pid
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "it has restarted with its secret", func() bool {
		s := b.state(t, again)
		return s.Running && s.Pid != pid && b.logs(t, again) == strings.Repeat("key\n", 2)
	})
}
