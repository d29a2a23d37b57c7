package dockerapi

import (
	"log/slog"
	"os"
	"regexp"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
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
	told := make(map[string]string)
	var list []string
	for _, row := range regexp.MustCompile("(?m)^\\| ([A-Z]+) \\| `([^`]+)` \\| (served|node|501) \\|").FindAllStringSubmatch(string(doc), -1) {
		told[row[1]+" "+row[2]] = row[3]
		list = append(list, row[1]+" "+row[2])
	}
	slices.Sort(list)
	a := New(Config{Daemon: factsOnly{}, Log: slog.New(slog.DiscardHandler)})
	own := a.router.Routes()
	a.Handler()
	if diff := cmp.Diff(a.router.Routes(), list); diff != "" {
		t.Errorf("routes that are and that are told (-are +told):\n%s", diff)
	}
	for _, route := range own {
		if told[route] == "node" {
			t.Errorf("%s is not left to the node", route)
		}
	}
}
