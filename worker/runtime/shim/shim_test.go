package shim_test

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/skep-dev/skep/worker/runtime/shim"
)

func FuzzParseSpec(f *testing.F) {
	f.Add("skep:///var/log/x?size=1&files=2&exit=%2Fe&socket=%2Fs&stdin=1&once=1")
	f.Add("file:///dev/null")
	f.Fuzz(func(t *testing.T, uri string) {
		s, ours, err := shim.ParseSpec(uri)
		if !ours || err != nil {
			return
		}
		if again, ours, err := shim.ParseSpec(s.String()); !ours || err != nil || again.ExitPath != s.ExitPath || again.MaxSize != s.MaxSize {
			t.Errorf("%q -> %+v -> %+v, %v", uri, s, again, err)
		}
	})
}

func TestSpecRoundTrip(t *testing.T) {
	for _, want := range []shim.Spec{
		{LogPath: "/a b/c?d#e.log", MaxSize: 10, MaxFiles: 3, ExitPath: "/x&y", Socket: "/s", Stdin: true, StdinOnce: true},
		{MaxSize: -1, MaxFiles: 1, ExitPath: "/x"},
		{LogPath: "/l", MaxSize: 1, MaxFiles: 1, LogAttrs: map[string]string{"a b": "c&d=e", "": "", "k": "é\n"}},
	} {
		got, ours, err := shim.ParseSpec(want.String())
		if d := cmp.Diff(want, got); d != "" || !ours || err != nil {
			t.Errorf("%s, %v", d, err)
		}
	}
}

func TestExitFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "exit.json")
	if _, err := shim.ReadExit(path); err == nil {
		t.Error("no file: no error")
	}
	want := shim.Exit{Code: 42, At: time.Unix(5, 6).UTC()}
	if err := shim.WriteExit(path, want); err != nil {
		t.Fatal(err)
	}
	if got, err := shim.ReadExit(path); err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
}
