package golden

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestTell(t *testing.T) {
	const script = `A story.
> say a b
  stale
> nothing
  stale

The end.
>say c
`
	const want = `A story.
> say a b
  2: a
  2: b
> nothing

The end.
>say c
  8: c
`
	got := Tell(script, func(line int, words []string) []string {
		var out []string
		for _, w := range words[1:] {
			out = append(out, fmt.Sprintf("%d: %s", line, w))
		}
		return out
	})
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestStories(t *testing.T) {
	Stories(t, func(*testing.T) Teller {
		sum := 0
		return func(_ int, words []string) []string {
			sum += len(words) - 1
			return []string{fmt.Sprintf("%d words so far", sum)}
		}
	})
}
