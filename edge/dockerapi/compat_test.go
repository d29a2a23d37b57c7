package dockerapi

import (
	"log/slog"
	"os"
	"regexp"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/skep-dev/skep/edge/dockerapi/local"
)

// factsOnly is a daemon of which only its routes are of interest.
type factsOnly struct{ Daemon }

func (factsOnly) Facts() Facts { return Facts{} }

// TestCompatTable holds docs/compat.md against the routes: nothing is served that the
// table does not tell, and nothing told that is not there.
func TestCompatTable(t *testing.T) {
	doc, err := os.ReadFile("../../docs/compat.md")
	if err != nil {
		t.Fatal(err)
	}
	var told []string
	for _, row := range regexp.MustCompile("(?m)^\\| ([A-Z]+) \\| `([^`]+)` \\| (served|501) \\|").FindAllStringSubmatch(string(doc), -1) {
		told = append(told, row[1]+" "+row[2]+" "+row[3])
	}
	slices.Sort(told)
	a := New(Config{Daemon: factsOnly{}, Log: slog.New(slog.DiscardHandler)})
	a.Register(local.New(local.Config{}).Register)
	served := a.router.Routes()
	a.Handler()
	all := a.router.Routes()
	for i, route := range all {
		if slices.Contains(served, route) {
			all[i] += " served"
		} else {
			all[i] += " 501"
		}
	}
	slices.Sort(all)
	if diff := cmp.Diff(all, told); diff != "" {
		t.Errorf("routes that are and that are told (-are +told):\n%s", diff)
	}
}
