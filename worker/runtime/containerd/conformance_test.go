package containerd_test

import (
	"fmt"
	"testing"

	"github.com/skep-dev/skep/worker/runtime/conformance"
)

func TestConformance(t *testing.T) {
	b := newBench(t, nil).withBusybox(t)
	sh := func(format string, args ...any) []string { return []string{"sh", "-c", fmt.Sprintf(format, args...)} }
	p := conformance.Programs{
		Image:   "busybox:latest",
		Forever: sh("trap 'exit 0' TERM; while :; do sleep 0.05; done"),
		Deaf:    sh("trap '' TERM; while :; do sleep 0.05; done"),
		Exit:    func(code int) []string { return sh("exit %d", code) },
		Print:   func(out, err string) []string { return sh("echo %s; echo %s >&2", out, err) },
		Missing: []string{"/nowhere"},
	}
	for _, c := range conformance.Cases() {
		t.Run(c.Name, func(t *testing.T) { c.Run(t, b, p) })
	}
}
