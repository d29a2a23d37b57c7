package jsonlog_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/skep-dev/skep/worker/runtime/jsonlog"
)

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"log":"x\n","stream":"stdout","time":"2026-01-02T03:04:05.6Z"}`))
	f.Add([]byte(`{"log":"\u0000","stream":"stderr","time":"2026-01-02T03:04:05Z"}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		e, err := jsonlog.Parse(line)
		if err != nil || e.Time.Year() < 0 || e.Time.Year() > 9999 {
			return
		}
		again, err := jsonlog.Parse(jsonlog.Append(nil, e))
		if err != nil || !bytes.Equal(again.Data, e.Data) || again.Stderr != e.Stderr || !again.Time.Equal(e.Time) {
			t.Fatalf("%q -> %+v -> %+v, %v", line, e, again, err)
		}
	})
}

func FuzzAppend(f *testing.F) {
	f.Add([]byte("hello\n"), true)
	f.Add([]byte("\xff\"\\\x01é"), false)
	f.Fuzz(func(t *testing.T, data []byte, stderr bool) {
		line := jsonlog.Append(nil, jsonlog.Entry{Time: time.Unix(1, 2), Stderr: stderr, Data: data})
		if !json.Valid(line) || bytes.Count(line, []byte("\n")) != 1 {
			t.Fatalf("%q encoded as %q", data, line)
		}
		e, err := jsonlog.Parse(line)
		if err != nil || utf8.Valid(data) && !bytes.Equal(e.Data, data) {
			t.Fatalf("%q came back as %q, %v", data, e.Data, err)
		}
	})
}

func TestSplitterKeepsBytes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.SampledFrom([]int{8, 40000}).Draw(t, "size")
		chunks := rapid.SliceOf(rapid.SliceOfN(rapid.SampledFrom([]byte("ab\n")), 0, size)).Draw(t, "chunks")
		var s jsonlog.Splitter
		var got []byte
		var pending []jsonlog.Entry // of one chunk: they are used when the chunk was taken, not before
		add := func(e jsonlog.Entry) { pending = append(pending, e) }
		use := func(e jsonlog.Entry) {
			if len(e.Data) == 0 || len(e.Data) > jsonlog.MaxLine || bytes.Contains(e.Data[:len(e.Data)-1], []byte("\n")) {
				t.Fatalf("entry of %d bytes: %.40q", len(e.Data), e.Data)
			}
			got = append(got, e.Data...)
		}
		for _, c := range append(chunks, nil) {
			s.Push(c, time.Unix(0, 0), add)
			if c == nil {
				s.Flush(time.Unix(0, 0), add)
			}
			for _, e := range pending {
				use(e)
			}
			pending = pending[:0]
		}
		if want := bytes.Join(chunks, nil); !bytes.Equal(got, want) {
			t.Fatalf("%d bytes of %d", len(got), len(want))
		}
	})
}

func write(t *testing.T, w *jsonlog.Writer, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		if err := w.Write(jsonlog.Entry{Time: time.Unix(int64(i), 0), Data: fmt.Appendf(nil, "line %d\n", i)}); err != nil {
			t.Fatal(err)
		}
	}
}

func lines(t *testing.T, path string, opts jsonlog.Options) string {
	t.Helper()
	var b strings.Builder
	err := jsonlog.Read(t.Context(), path, opts, func(e jsonlog.Entry) error { b.Write(e.Data); return nil })
	if err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(strings.TrimSpace(b.String()), "\n", " ")
}

func TestReadSelects(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	w, err := jsonlog.Open(jsonlog.Config{Path: path, MaxSize: 210, MaxFiles: 3})
	if err != nil {
		t.Fatal(err)
	}
	write(t, w, 0, 8) // 67 bytes a line: three files
	for _, c := range []struct {
		name string
		opts jsonlog.Options
		want string
	}{
		{"all", jsonlog.Options{Tail: -1}, "line 0 line 1 line 2 line 3 line 4 line 5 line 6 line 7"},
		{"tail across files", jsonlog.Options{Tail: 4}, "line 4 line 5 line 6 line 7"},
		{"tail 0", jsonlog.Options{Tail: 0}, ""},
		{"since", jsonlog.Options{Tail: -1, Since: time.Unix(6, 0)}, "line 6 line 7"},
		{"until", jsonlog.Options{Tail: -1, Until: time.Unix(1, 0)}, "line 0 line 1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if d := cmp.Diff(c.want, lines(t, path, c.opts)); d != "" {
				t.Error(d)
			}
		})
	}
	write(t, w, 8, 11)
	if got := lines(t, path, jsonlog.Options{Tail: -1}); strings.Contains(got, "line 0") || !strings.HasSuffix(got, "line 10") {
		t.Errorf("oldest file was not dropped: %s", got)
	}
}

func TestFollowAcrossRotation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	w, err := jsonlog.Open(jsonlog.Config{Path: path, MaxSize: 4000, MaxFiles: 5})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	got := make(chan string)
	first := make(chan struct{})
	go func() {
		var b strings.Builder
		n := 0
		err := jsonlog.Read(t.Context(), path, jsonlog.Options{Tail: -1, Follow: done}, func(e jsonlog.Entry) error {
			if n == 0 {
				close(first)
			}
			n++
			b.Write(e.Data)
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		got <- b.String()
	}()
	write(t, w, 0, 1)
	<-first
	write(t, w, 1, 90) // one rotation
	close(done)
	var want strings.Builder
	for i := range 90 {
		fmt.Fprintf(&want, "line %d\n", i)
	}
	if d := cmp.Diff(want.String(), <-got); d != "" {
		t.Error(d)
	}
}

// TestReadDuringRotations reads again and again while the writer rotates as fast as it
// can: every reading is a piece of the log without a gap or a line twice.
func TestReadDuringRotations(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	w, err := jsonlog.Open(jsonlog.Config{Path: path, MaxSize: 700, MaxFiles: 4})
	if err != nil {
		t.Fatal(err)
	}
	end := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-end:
				return
			default:
			}
			write(t, w, i, i+1)
		}
	})
	for range 300 {
		last := -1
		err := jsonlog.Read(t.Context(), path, jsonlog.Options{Tail: -1}, func(e jsonlog.Entry) error {
			n := int(e.Time.Unix())
			if last >= 0 && n != last+1 {
				return fmt.Errorf("line %d after line %d", n, last)
			}
			last = n
			return nil
		})
		if err != nil {
			t.Error(err)
			break
		}
	}
	close(end)
	wg.Wait()
}

// TestFollowDuringRotations: a reader that follows misses nothing that is not dropped,
// however often it finds the files in the middle of a rotation.
func TestFollowDuringRotations(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	w, err := jsonlog.Open(jsonlog.Config{Path: path, MaxSize: 700, MaxFiles: 1000})
	if err != nil {
		t.Fatal(err)
	}
	const n = 1500
	end := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		write(t, w, 0, n)
		close(end)
	})
	want := 0
	err = jsonlog.Read(t.Context(), path, jsonlog.Options{Tail: -1, Follow: end}, func(e jsonlog.Entry) error {
		if got := int(e.Time.Unix()); got != want {
			return fmt.Errorf("line %d instead of %d", got, want)
		}
		want++
		return nil
	})
	if err != nil || want != n {
		t.Errorf("%d lines, %v", want, err)
	}
	wg.Wait()
}

// TestCrashInRotation: a file missing in the row hides none of the others, and writing goes on.
func TestCrashInRotation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	w, err := jsonlog.Open(jsonlog.Config{Path: path, MaxSize: 210, MaxFiles: 4})
	if err != nil {
		t.Fatal(err)
	}
	write(t, w, 0, 8)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	// What is there when the writer dies between two of its renames.
	for _, n := range []string{".2", ".1"} {
		if err := os.Rename(path+n, path+"."+string(n[1]+1)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	want := "line 0 line 1 line 2 line 3 line 4 line 5 line 6 line 7"
	if d := cmp.Diff(want, lines(t, path, jsonlog.Options{Tail: -1})); d != "" {
		t.Error(d)
	}
	if w, err = jsonlog.Open(jsonlog.Config{Path: path, MaxSize: 210, MaxFiles: 4}); err != nil {
		t.Fatal(err)
	}
	write(t, w, 8, 9)
	if d := cmp.Diff(want+" line 8", lines(t, path, jsonlog.Options{Tail: -1})); d != "" {
		t.Error(d)
	}
}

// TestDiskFull: what did not fit is gone, what comes after is whole.
func TestDiskFull(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to mount a small file system")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=8k"); err != nil {
		t.Skipf("needs a tmpfs: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	path := filepath.Join(dir, "log")
	w, err := jsonlog.Open(jsonlog.Config{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	big := bytes.Repeat([]byte("x"), 3000)
	full := false
	for range 4 {
		full = w.Write(jsonlog.Entry{Data: append(big, '\n')}) != nil || full
	}
	if !full {
		t.Fatal("the disk took everything")
	}
	if err := w.Write(jsonlog.Entry{Data: []byte("small\n")}); err != nil {
		t.Fatal(err)
	}
	want := strings.Repeat(string(big)+" ", 2) + "small"
	if d := cmp.Diff(want, lines(t, path, jsonlog.Options{Tail: -1})); d != "" {
		t.Errorf("%.200s", d)
	}
}

func BenchmarkWrite(b *testing.B) {
	w, err := jsonlog.Open(jsonlog.Config{Path: filepath.Join(b.TempDir(), "log")})
	if err != nil {
		b.Fatal(err)
	}
	e := jsonlog.Entry{Time: time.Unix(1, 2), Data: bytes.Repeat([]byte("x"), 120)}
	b.SetBytes(120)
	for b.Loop() {
		if err := w.Write(e); err != nil {
			b.Fatal(err)
		}
	}
}
