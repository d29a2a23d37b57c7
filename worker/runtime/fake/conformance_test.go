package fake_test

import (
	"fmt"
	"testing"
	"testing/synctest"

	"github.com/skep-dev/skep/worker/runtime/conformance"
	"github.com/skep-dev/skep/worker/runtime/fake"
)

func TestConformance(t *testing.T) {
	p := conformance.Programs{
		Image:   "busybox:latest",
		Forever: []string{"sleep", "1000"},
		Deaf:    []string{"ignore"},
		Exit:    func(code int) []string { return []string{fmt.Sprintf("exit %d", code)} },
		Print: func(out, err string) []string {
			return []string{fmt.Sprintf("print %s; error %s; exit 0", out, err)}
		},
		Missing: []string{"fail", "no such file"},
	}
	for _, c := range conformance.Cases() {
		t.Run(c.Name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c.Run(t, fake.New(fake.Config{Images: []fake.Image{{Ref: "busybox:latest"}}}), p)
			})
		})
	}
}
