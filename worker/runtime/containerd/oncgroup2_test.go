package containerd_test

import (
	"os"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/container"

	"github.com/skep-dev/skep/worker/runtime"
)

// TestOnCgroup2 is run by TestCgroup2.
func TestOnCgroup2(t *testing.T) {
	if os.Getenv("SKEP_TEST_CGROUP2") == "" {
		t.Skip("TestCgroup2 runs it")
	}
	b := newBench(t, nil).withBusybox(t)
	if info, err := b.Info(t.Context()); err != nil || info.CgroupVersion != "2" || strings.Contains(strings.Join(info.Warnings, ""), "cgroup") {
		t.Errorf("%+v, %v", info, err)
	}
	id := b.run(t, &container.Config{Cmd: []string{"sh", "-c", "cat /proc/self/cgroup; touch /sys/fs/cgroup/x 2>/dev/null || echo refused; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo done; exec sleep 1000"}}, nil)
	until(t, "the script is through", func() bool { return strings.HasSuffix(b.logs(t, id), "done\n") })
	if got := b.logs(t, id); !strings.HasSuffix(got, "0::/\nrefused\ndone\n") {
		t.Errorf("in its own cgroup namespace: %q", got)
	}
	st, err := b.Stats(t.Context(), id)
	if err != nil || st.CPUStats.CPUUsage.TotalUsage < 1000 || st.CPUStats.SystemUsage == 0 || st.MemoryStats.Limit == 0 {
		t.Errorf("%+v, %v", st, err)
	}
	b.restart(t)
	if s := b.state(t, id); !s.Running {
		t.Errorf("%+v", s)
	}
	// A device that is not allowed: on v2 a program in the kernel says so.
	if out := b.output(t, "busybox mknod /tmp/k c 1 11 && { head -c1 /tmp/k 2>/dev/null || echo refused; }", container.Config{}, container.HostConfig{}); out != "refused" {
		t.Errorf("device: %q", out)
	}
	_, warnings, err := b.Create(t.Context(), createWith(container.Resources{MemorySwappiness: new(int64(5))}))
	if err != nil || !strings.Contains(strings.Join(warnings, ""), "swappiness discarded") {
		t.Errorf("%q, %v", warnings, err)
	}
}

func createWith(r container.Resources) runtime.CreateOptions {
	return runtime.CreateOptions{Config: &container.Config{Image: "busybox"}, HostConfig: &container.HostConfig{Resources: r}}
}
