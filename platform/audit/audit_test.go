package audit

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// open opens a log and runs it until the returned function is called.
func open(t *testing.T, dir string, limit int64) (*Log, func()) {
	t.Helper()
	l, err := Open(Config{Dir: dir, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if limit > 0 {
		l.w.limit = limit
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	return l, func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func verify(t *testing.T, dir, want string, expect *Head) Report {
	t.Helper()
	report, err := Verify(dir, expect)
	if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
		t.Errorf("verify: %v, want %q", err, want)
	}
	return report
}

func TestChainOverRestarts(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	for restart := range 3 {
		l, stop := open(t, dir, 0)
		var group sync.WaitGroup
		for i := range 10 {
			group.Go(func() {
				l.Add(Record{Who: "uid=0", What: "POST /x", Object: fmt.Sprint(restart, i), Outcome: Done, Status: 200})
			})
		}
		group.Wait()
		stop()
		l.Add(Record{What: "after the end", Outcome: Done}) // returns at once
	}
	report := verify(t, dir, "", nil)
	if report.Records != 30 || report.Files != 1 || report.First.Seq != 1 || report.Last.Seq != 30 {
		t.Errorf("%+v", report)
	}
	verify(t, dir, "", &report.Last)
	got, err := Read(dir, 4)
	if err != nil || len(got) != 4 || got[3].Seq != 30 || got[0].Seq != 27 || got[0].Who != "uid=0" || time.Since(got[0].Time) > time.Minute {
		t.Errorf("%+v, %v", got, err)
	}
	if again, err := ParseHead(report.Last.String()); err != nil || again != report.Last {
		t.Errorf("%v, %v", again, err)
	}
}

func TestRotationIsBounded(t *testing.T) {
	dir := t.TempDir()
	l, stop := open(t, dir, 2000)
	for i := range 200 {
		l.Add(Record{Who: "w", What: "POST /x", Object: fmt.Sprint(i), Outcome: Done})
	}
	stop()
	report := verify(t, dir, "", nil)
	if report.Files != filesKept || report.Last.Seq != 200 || report.First.Seq == 1 {
		t.Errorf("%+v", report)
	}
	got, err := Read(dir, 1000)
	if err != nil || len(got) != report.Records || got[len(got)-1].Object != "199" {
		t.Errorf("%d records, %v", len(got), err)
	}
	verify(t, dir, "older than this log", &Head{Seq: 1})
	files, err := list(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(files[3]); err != nil {
		t.Fatal(err)
	}
	verify(t, dir, "what was between them is missing", nil)
}

func TestTampering(t *testing.T) {
	dir := t.TempDir()
	l, stop := open(t, dir, 0)
	for i := range 5 {
		l.Add(Record{Who: "mallory", What: "DELETE /x", Object: fmt.Sprint(i), Outcome: Done})
	}
	stop()
	path := fileOf(dir, 1)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	last := verify(t, dir, "", nil).Last
	lines := bytes.SplitAfter(good, []byte("\n"))
	// A forger who makes hashes fit still breaks the chain.
	r, _, err := parse(bytes.TrimSuffix(lines[2], []byte("\n")))
	if err != nil {
		t.Fatal(err)
	}
	r.Who = "alice"
	forged, _, err := line(r)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		data []byte
		want string
	}{
		"changed":   {bytes.Replace(good, []byte("mallory"), []byte("m.llory"), 1), "line 1: its hash does not fit"},
		"forged":    {bytes.Join([][]byte{lines[0], lines[1], forged, lines[3], lines[4]}, nil), "line 4: it does not follow record 3"},
		"removed":   {bytes.Join([][]byte{lines[0], lines[2], lines[3], lines[4]}, nil), "line 2: record 3 follows record 1"},
		"beginning": {bytes.Join(lines[1:], nil), "begins with record 2, which is not in its name"},
		"torn":      {good[:len(good)-3], "line 5: its end is missing"},
		"garbage":   {append([]byte("x\n"), good...), "line 1: it is no record"},
		"cut off":   {bytes.Join(lines[:4], nil), "is not in this log"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(path, c.data, 0o600); err != nil {
				t.Fatal(err)
			}
			verify(t, dir, c.want, &last)
		})
	}
	// What a crash tore is cut off, and the chain goes on.
	if err := os.WriteFile(path, good[:len(good)-3], 0o600); err != nil {
		t.Fatal(err)
	}
	l, stop = open(t, dir, 0)
	l.Add(Record{Who: "w", What: "POST /x", Outcome: Done})
	stop()
	if report := verify(t, dir, "", nil); report.Records != 5 {
		t.Errorf("%+v", report)
	}
	// What was changed stays to be seen.
	if err := os.WriteFile(path, bytes.Replace(good, []byte("mallory"), []byte("m.llory"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	l, stop = open(t, dir, 0)
	l.Add(Record{Who: "w", What: "POST /x", Outcome: Done})
	stop()
	verify(t, dir, "line 1: its hash does not fit", nil)
	if got, err := Read(dir, 1); err != nil || len(got) != 1 || got[0].Seq != 6 {
		t.Errorf("%+v, %v", got, err)
	}
}

// TestRefusalsAreLimited: strangers cannot push out what matters.
func TestRefusalsAreLimited(t *testing.T) {
	dir := t.TempDir()
	l, stop := open(t, dir, 0)
	now := time.Now()
	for range refusalBurst + 500 {
		l.Add(Record{Time: now, Who: "stranger", What: "/x", Outcome: Refused})
	}
	l.Add(Record{Time: now, Who: "admin", What: "/x", Outcome: Done})
	l.Add(Record{Time: now.Add(time.Second), Who: "stranger", What: "/x", Outcome: Refused})
	stop()
	report := verify(t, dir, "", nil)
	if report.Records != refusalBurst+2 || report.Skipped != 500 {
		t.Errorf("%+v", report)
	}
}

func TestLongTexts(t *testing.T) {
	dir := t.TempDir()
	l, stop := open(t, dir, 0)
	l.Add(Record{Who: strings.Repeat("ü", 5000), Object: strings.Repeat("\x00", 5000) + "\n", What: "x", Outcome: Done})
	stop()
	verify(t, dir, "", nil)
	got, err := Read(dir, 1)
	if err != nil || len(got) != 1 || len(got[0].Who) > maxText+3 {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestUnwritable(t *testing.T) {
	dir := t.TempDir()
	l, stop := open(t, dir, 0)
	l.Add(Record{Who: "w", What: "1", Outcome: Done})
	stop()
	l, stop = open(t, dir, 1) // every record needs a new file
	if err := os.Mkdir(fileOf(dir, 2), 0o700); err != nil {
		t.Fatal(err)
	}
	l.Add(Record{Who: "w", What: "lost", Outcome: Done})
	if err := os.Remove(fileOf(dir, 2)); err != nil {
		t.Fatal(err)
	}
	l.Add(Record{Who: "w", What: "2", Outcome: Done})
	stop()
	if report := verify(t, dir, "", nil); report.Records != 2 || report.Skipped != 1 {
		t.Errorf("%+v", report)
	}
}

func FuzzParse(f *testing.F) {
	good, _, err := line(Record{Seq: 1, Who: "w", What: "x", Outcome: Done})
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range [][]byte{good, good[:len(good)-1], nil, []byte("0 {}"), bytes.Repeat([]byte("a"), 100)} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		r, head, err := parse(text)
		if err == nil && r.Seq != head.Seq {
			t.Errorf("%+v is at %v", r, head)
		}
		_, _ = ParseHead(string(text))
	})
}
