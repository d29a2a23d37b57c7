package containerd

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// cgroup2Env tells the test binary that it runs where only a cgroup2 hierarchy is mounted.
const cgroup2Env = "SKEP_TEST_CGROUP2"

// TestCgroup2 runs tests of this package again where /sys/fs/cgroup is a cgroup2 hierarchy.
// Limits cannot be tried there if their controllers belong to v1 on this machine.
func TestCgroup2(t *testing.T) {
	t.Parallel()
	if os.Getenv(cgroup2Env) != "" || !cgroupV1() {
		t.Skip("is on cgroup v2 already")
	}
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	const script = `umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup || exit 77; exec "$@"`
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "unshare", "-m", "--propagation", "slave", "sh", "-c", script, "sh", self,
		"-test.run=^(TestConformance|TestOnCgroup2|TestLimits)$", "-test.v", "-test.timeout=2m")
	cmd.Env = append(os.Environ(), cgroup2Env+"=1")
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState != nil && cmd.ProcessState.ExitCode() == 77 {
		t.Skipf("cannot mount a cgroup2 hierarchy here: %s", out)
	}
	text := string(out)
	if err == nil && strings.Contains(text, "--- SKIP: TestConformance") {
		t.Skipf("the conformance suite does not run here: %s", text)
	}
	if err != nil || !strings.Contains(text, "--- PASS: TestConformance") || !strings.Contains(text, "--- PASS: TestOnCgroup2") {
		t.Errorf("%v\n%s", err, text)
	}
}
