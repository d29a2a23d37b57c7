package node

import (
	"fmt"
	"log/slog"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// What nodes tell that are no managers any more: each may lie, and none hides what others tell.
func TestSuggest(t *testing.T) {
	const self, a, b = "10.0.0.7:2377", "10.0.0.1:2377", "10.0.0.2:2377"
	r := openRemotes(t.TempDir(), slog.New(slog.DiscardHandler))
	r.replace(peers(a, b))
	suggest := func(teller string, want bool, addrs ...string) {
		t.Helper()
		if news := r.suggest(teller, addrs, self); news != want {
			t.Errorf("%s tells of %q: news %v, want %v", teller, addrs, news, want)
		}
	}
	told := func(want map[string][]string) {
		t.Helper()
		if diff := cmp.Diff(want, r.told); diff != "" {
			t.Error(diff)
		}
	}
	suggest(a, false)
	suggest(a, false, "", "host:2377", "10.0.0.3", "10.0.0.3:0", "10.0.0.3:x", "10.0.0.3:99999", "0.0.0.0:2377", "[::]:2377", "224.0.0.1:2377", ":2377")
	suggest(a, false, a, b, self) // known with their node ids
	suggest("10.0.0.3:2377", false, "10.0.0.8:2377")
	if r.toldOthers() {
		t.Errorf("there are others: %v", r.told)
	}
	var lies []string
	for i := range 64 {
		lies = append(lies, fmt.Sprintf("10.1.0.%d:2377", i))
	}
	suggest(a, true, lies...)
	suggest(b, true, "10.0.0.8:2377", "10.0.0.8:2377", "[2001:db8::1]:2377")
	suggest(b, false, "10.0.0.8:2377", lies[0], "[2001:db8::1]:2377")
	told(map[string][]string{a: lies[:maxTold], b: {"10.0.0.8:2377", lies[0], "[2001:db8::1]:2377"}})
	suggest(a, true, lies[maxTold:]...) // in place of the first ones
	told(map[string][]string{a: lies[maxTold : 2*maxTold], b: {"10.0.0.8:2377", lies[0], "[2001:db8::1]:2377"}})
	suggest(a, false)
	told(map[string][]string{b: {"10.0.0.8:2377", lies[0], "[2001:db8::1]:2377"}})
	if diff := cmp.Diff([]remote{{"id of " + a, a}, {"id of " + b, b}}, r.list()); diff != "" {
		t.Error(diff)
	}

	// Whoever fails is not tried less than what others tell, nor the other way around.
	suggest(a, true, lies...)
	for k := range r.weights {
		r.weights[k] = observedFailure
	}
	tried := map[string]int{}
	for range 4000 {
		k, ok := r.pick(b)
		if !ok {
			t.Fatal("nobody to try")
		}
		tried[k.Addr]++
	}
	if tried["10.0.0.8:2377"] < 50 || tried[a] < 50 || tried[b] > 0 || len(tried) != 1+maxTold+2 {
		t.Errorf("tried: %v", tried)
	}
	r.replace(peers("10.0.0.8:2377"))
	told(map[string][]string{})
}
