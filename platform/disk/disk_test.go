package disk

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/testing/protocmp"
)

func key() []byte {
	k := make([]byte, KeySize)
	for i := range k {
		k[i] = byte(i)
	}
	return k
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// The records are SwarmKit's, made with the key 00 01 02 … 1f.
func TestOpenSwarmKitRecords(t *testing.T) {
	tests := []struct{ name, record, want string }{
		{"none", "120b68656c6c6f20737761726d", "hello swarm"},
		{"none, empty", "", ""},
		{"secretbox", "0801121be181e0a17f7415cac34050cab67111708af74ece1b9693256d44211a18387310af657c355f55614aa540159" +
			"2cf3b35cd3300aa72a5", "hello swarm"},
		{"fernet", "08021264674141414141427241344e3444576e727a656f5137397470575a6d447a6d3365597152366d38514d305845546e4a" +
			"334932306d575a3647537a3959314251586d49356439374e3753435965686f663269335472304b6c4463666455494d51323374673d3d", "hello swarm"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			record, err := hex.DecodeString(tt.record)
			if err != nil {
				t.Fatal(err)
			}
			got, err := Open(record, nil, bytes.Repeat([]byte{9}, KeySize), key())
			if err != nil || string(got) != tt.want {
				t.Errorf("got %q, %v; want %q", got, err, tt.want)
			}
			if strings.HasPrefix(tt.name, "none") {
				return
			}
			if _, err := Open(record, bytes.Repeat([]byte{9}, KeySize)); !errors.Is(err, ErrDecrypt) {
				t.Errorf("with a wrong key: %v", err)
			}
			for i := range record {
				altered := slices.Clone(record)
				altered[i] ^= 0x04
				if got, err := Open(altered, key()); err == nil && string(got) == tt.want && i > 3 {
					t.Errorf("opened although byte %d was altered", i)
				}
			}
		})
	}
}

func TestSealRoundTrip(t *testing.T) {
	for _, plain := range []string{"", "x", strings.Repeat("long", 1000)} {
		record, err := Seal(key(), []byte(plain))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := Open(record, key()); err != nil || string(got) != plain {
			t.Errorf("got %q, %v; want %q", got, err, plain)
		}
	}
	if _, err := Seal(nil, nil); err == nil {
		t.Error("sealed without a key")
	}
}

func FuzzOpen(f *testing.F) {
	record, err := Seal(key(), []byte("hello"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(record)
	f.Add([]byte{8, 2, 18, 4, 'g', 'A', 'A', '='})
	f.Fuzz(func(t *testing.T, record []byte) {
		_, _ = Open(record, key())
	})
}

func FuzzSnapshotFile(f *testing.F) {
	dir := f.TempDir()
	writeLog(f, dir, key(), 1, 3)
	raw, err := os.ReadFile(filepath.Join(dir, snapDir, "0000000000000001-0000000000000002.snap"))
	if err == nil {
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		s, err := parseSnapshot(raw)
		if err == nil && s.GetMetadata().GetIndex() == 0 {
			t.Error("snapshot without index")
		}
	})
}

func entry(i uint64, text string) *raftpb.Entry {
	return &raftpb.Entry{
		Type: raftpb.EntryNormal.Enum(), Term: new(uint64(1)), Index: new(i), Data: []byte(text),
	}
}

func hardState(commit uint64) *raftpb.HardState {
	return &raftpb.HardState{Term: new(uint64(1)), Vote: new(uint64(7)), Commit: new(commit)}
}

func snapshotAt(i uint64, text string) *raftpb.Snapshot {
	return &raftpb.Snapshot{Data: []byte(text), Metadata: &raftpb.SnapshotMetadata{
		ConfState: &raftpb.ConfState{Voters: []uint64{7}, AutoLeave: new(false)}, Index: new(i), Term: new(uint64(1)),
	}}
}

// writeLog makes a log of entries first to last with a snapshot one before the last.
func writeLog(t testing.TB, dir string, k []byte, first, last uint64) {
	t.Helper()
	l, err := Create(dir, []byte("about me"), k, quiet())
	if err != nil {
		t.Fatal(err)
	}
	appendLog(t, l, first, last)
	saveSnapshot(t, l, last-1)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

func appendLog(t testing.TB, l *Log, first, last uint64) {
	t.Helper()
	for i := first; i <= last; i++ {
		if err := l.Save(hardState(i), []*raftpb.Entry{entry(i, fmt.Sprint("canary entry ", i))}); err != nil {
			t.Fatal(err)
		}
	}
}

func saveSnapshot(t testing.TB, l *Log, i uint64) {
	t.Helper()
	s := snapshotAt(i, fmt.Sprint("canary state ", i))
	if err := l.MarkSnapshot(s.GetMetadata()); err != nil {
		t.Fatal(err)
	}
	if err := l.SaveSnapshotFile(s); err != nil {
		t.Fatal(err)
	}
}

func load(t testing.TB, dir string, keys ...[]byte) (*Log, *Loaded) {
	t.Helper()
	l, loaded, err := Load(dir, quiet(), keys...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l, loaded
}

func TestLogRoundTrip(t *testing.T) {
	dir := t.TempDir()
	if Exists(dir) {
		t.Error("an empty directory holds a log")
	}
	writeLog(t, dir, key(), 1, 5)
	if !Exists(dir) {
		t.Error("there is no log")
	}
	_, got := load(t, dir, key())
	want := &Loaded{
		Metadata:  []byte("about me"),
		Snapshot:  snapshotAt(4, "canary state 4"),
		HardState: hardState(5),
		Entries:   []*raftpb.Entry{entry(5, "canary entry 5")},
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if err := RemoveAll(dir); err != nil || Exists(dir) {
		t.Errorf("after removal: %v, exists %v", err, Exists(dir))
	}
}

func TestNothingInClear(t *testing.T) {
	dir := t.TempDir()
	writeLog(t, dir, key(), 1, 5)
	files := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		files++
		raw, err := os.ReadFile(path)
		if bytes.Contains(raw, []byte("canary")) {
			t.Errorf("%s holds plain text", path)
		}
		info, statErr := d.Info()
		if statErr == nil && info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		return errors.Join(err, statErr)
	})
	if err != nil || files < 2 {
		t.Errorf("looked at %d files: %v", files, err)
	}
}

func TestWrongKey(t *testing.T) {
	dir := t.TempDir()
	writeLog(t, dir, key(), 1, 5)
	if _, _, err := Load(dir, quiet(), bytes.Repeat([]byte{1}, KeySize)); !errors.Is(err, ErrDecrypt) {
		t.Errorf("got %v, want %v", err, ErrDecrypt)
	}
	load(t, dir, key()) // nothing was put aside
}

// A crash in the middle of a write leaves a torn record: it was never acknowledged, so it
// is cut off.
func TestTornEnd(t *testing.T) {
	dir := t.TempDir()
	l, err := Create(dir, []byte("about me"), key(), quiet())
	if err != nil {
		t.Fatal(err)
	}
	appendLog(t, l, 1, 5)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, walDir, "0000000000000000-0000000000000000.wal")
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	end := len(bytes.TrimRight(raw, "\x00"))
	if err := os.Truncate(path, int64(end-20)); err != nil {
		t.Fatal(err)
	}
	l, got := load(t, dir, key())
	if n := len(got.Entries); n < 4 {
		t.Errorf("%d entries are left", n)
	}
	next := uint64(len(got.Entries)) + 1
	appendLog(t, l, next, next)
	if _, err := os.Stat(path + ".broken"); err != nil {
		t.Errorf("no copy of what was cut: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, got := load(t, dir, key()); uint64(len(got.Entries)) != next {
		t.Errorf("%d entries after going on, want %d", len(got.Entries), next)
	}
}

func TestDamagedSnapshotFallsBack(t *testing.T) {
	dir := t.TempDir()
	l, err := Create(dir, nil, key(), quiet())
	if err != nil {
		t.Fatal(err)
	}
	appendLog(t, l, 1, 9)
	saveSnapshot(t, l, 3)
	saveSnapshot(t, l, 6)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, snapDir, "0000000000000001-0000000000000006.snap")
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	raw[len(raw)/2] ^= 1
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	_, got := load(t, dir, key())
	if got.Snapshot.GetMetadata().GetIndex() != 3 || len(got.Entries) != 6 {
		t.Errorf("snapshot at %d and %d entries, want 3 and 6", got.Snapshot.GetMetadata().GetIndex(), len(got.Entries))
	}
	if _, err := os.Stat(path + ".broken"); err != nil {
		t.Errorf("the damaged file was not put aside: %v", err)
	}
}

// A snapshot that was marked but whose file was not written before a crash does no harm.
func TestMarkWithoutFile(t *testing.T) {
	dir := t.TempDir()
	l, err := Create(dir, nil, key(), quiet())
	if err != nil {
		t.Fatal(err)
	}
	appendLog(t, l, 1, 9)
	if err := l.MarkSnapshot(snapshotAt(6, "").GetMetadata()); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, got := load(t, dir, key()); got.Snapshot != nil || len(got.Entries) != 9 {
		t.Errorf("snapshot %v and %d entries, want none and 9", got.Snapshot, len(got.Entries))
	}
}

func TestRotatedKey(t *testing.T) {
	dir, newKey := t.TempDir(), bytes.Repeat([]byte{3}, KeySize)
	writeLog(t, dir, key(), 1, 5)
	l, _ := load(t, dir, newKey, key())
	appendLog(t, l, 6, 8)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Load(dir, quiet(), newKey); !errors.Is(err, ErrDecrypt) {
		t.Errorf("half way with the new key only: %v", err)
	}
	l, got := load(t, dir, newKey, key())
	if len(got.Entries) != 4 {
		t.Errorf("%d entries, want 4", len(got.Entries))
	}
	saveSnapshot(t, l, 7)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, got := load(t, dir, newKey); len(got.Entries) != 1 {
		t.Errorf("%d entries after the rotation, want 1", len(got.Entries))
	}
}

func TestPurge(t *testing.T) {
	dir := t.TempDir()
	l, err := Create(dir, nil, key(), quiet())
	if err != nil {
		t.Fatal(err)
	}
	big := strings.Repeat("x", 1<<20)
	for i := uint64(1); i <= 140; i++ { // three files of 64 MB
		if err := l.Save(hardState(i), []*raftpb.Entry{entry(i, big)}); err != nil {
			t.Fatal(err)
		}
	}
	for _, i := range []uint64{10, 20, 130} {
		saveSnapshot(t, l, i)
	}
	count := func(name, suffix string) int {
		files, err := filepath.Glob(filepath.Join(dir, name, "*"+suffix))
		if err != nil {
			t.Fatal(err)
		}
		return len(files)
	}
	if err := l.Purge(1); err != nil {
		t.Fatal(err)
	}
	if s, w := count(snapDir, ".snap"), count(walDir, ".wal"); s != 2 || w != 3 {
		t.Errorf("keeping one old: %d snapshots and %d files, want 2 and 3", s, w)
	}
	if err := l.Purge(0); err != nil {
		t.Fatal(err)
	}
	if s, w := count(snapDir, ".snap"), count(walDir, ".wal"); s != 1 || w != 1 {
		t.Errorf("keeping none: %d snapshots and %d files, want 1 and 1", s, w)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, got := load(t, dir, key()); len(got.Entries) != 10 {
		t.Errorf("%d entries, want 10", len(got.Entries))
	}
}

func TestWriteFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	for _, text := range []string{"one", "two"} {
		if err := WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != text {
			t.Errorf("got %q, %v; want %q", got, err, text)
		}
	}
	if err := WriteFile(filepath.Join(path, "x"), nil, 0o600); err == nil {
		t.Error("wrote below a file")
	}
	if files, err := os.ReadDir(filepath.Dir(path)); err != nil || len(files) != 1 {
		t.Errorf("files left: %v, %v", files, err)
	}
}

func BenchmarkSave(b *testing.B) {
	l, err := Create(b.TempDir(), nil, key(), quiet())
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	data := strings.Repeat("x", 1000)
	i := uint64(0)
	for b.Loop() {
		i++
		if err := l.Save(hardState(i), []*raftpb.Entry{entry(i, data)}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSeal(b *testing.B) {
	data := bytes.Repeat([]byte("x"), 1000)
	for b.Loop() {
		if _, err := Seal(key(), data); err != nil {
			b.Fatal(err)
		}
	}
}
