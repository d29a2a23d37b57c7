// Package golden tells the stories of deciders: scripts that a test runs, with what came of
// them, in a form that is read in review.
//
// A script is text. A line that begins with ">" is a command; what came of it follows,
// indented, and is what the test compares. All other lines are for readers.
//
// It has no state; a story belongs to the goroutine of its test.
package golden

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// update has tests rewrite what came of the commands.
var update = flag.Bool("update", false, "rewrite what came of the commands in testdata") //nolint:gochecknoglobals // flags are registered when a process begins

const indent = "  "

// Teller executes the command in a line of a script, counted from 1, and returns what came
// of it.
type Teller func(line int, words []string) []string

// Stories runs every script testdata/*.txt as a test of its own. begin makes what executes
// the commands of one script.
func Stories(t *testing.T, begin func(*testing.T) Teller) {
	t.Helper()
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no stories: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := Tell(string(text), begin(t))
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o600); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(strings.Split(string(text), "\n"), strings.Split(got, "\n")); diff != "" {
				t.Errorf("%s (-script +outcome; go test -update rewrites it):\n%s", file, diff)
			}
		})
	}
}

// Tell runs a script and returns it with what comes of its commands now.
func Tell(text string, run Teller) string {
	var out []string
	for i, line := range strings.Split(text, "\n") {
		if strings.HasPrefix(line, indent) {
			continue
		}
		out = append(out, line)
		if command, ok := strings.CutPrefix(line, ">"); ok {
			for _, answer := range run(i+1, strings.Fields(command)) {
				out = append(out, indent+answer)
			}
		}
	}
	return strings.Join(out, "\n")
}
