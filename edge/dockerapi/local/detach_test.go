package local

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

func TestDetachReader(t *testing.T) {
	tests := map[string]struct {
		keys, input, want string
		detached          bool
	}{
		"nothing":          {"", "hello", "hello", false},
		"default keys":     {"", "ab\x10\x11cd", "ab", true},
		"half of the keys": {"", "ab\x10cd", "ab\x10cd", false},
		"half, then whole": {"", "\x10\x10\x11", "\x10", true},
		"at the end":       {"", "ab\x10", "ab\x10", false},
		"own keys":         {"ctrl-a,d", "x\x01dy", "x", true},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			keys, err := parseDetachKeys(test.keys)
			if err != nil {
				t.Fatal(err)
			}
			detached := false
			r := &detachReader{r: iotest.OneByteReader(strings.NewReader(test.input)), keys: keys, detach: func() { detached = true }}
			got, err := io.ReadAll(r)
			if err != nil || string(got) != test.want || detached != test.detached {
				t.Errorf("got %q, detached %t, %v; want %q, %t", got, detached, err, test.want, test.detached)
			}
		})
	}
}

func FuzzParseDetachKeys(f *testing.F) {
	for _, seed := range []string{"", "ctrl-p,ctrl-q", "a", "ctrl-@,ctrl-_", "ctrl-", "ab", ","} {
		f.Add(seed, "input\x10\x11")
	}
	f.Fuzz(func(t *testing.T, text, input string) {
		keys, err := parseDetachKeys(text)
		if err != nil {
			return
		}
		detached := false
		r := &detachReader{r: strings.NewReader(input), keys: keys, detach: func() { detached = true }}
		got, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if at := bytes.Index([]byte(input), keys); (at >= 0) != detached {
			t.Errorf("keys %q in %q at %d, detached %t", keys, input, at, detached)
		}
		if !detached && string(got) != input {
			t.Errorf("passed on %q of %q", got, input)
		}
	})
}
