package disk

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"

	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"go.etcd.io/raft/v3/raftpb"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
)

// The directories of a Log.
const (
	walDir  = "wal-v3-encrypted"
	snapDir = "snap-v3-encrypted"
)

// Log is the durable part of a raft member: a write-ahead log and snapshots, sealed.
type Log struct {
	dir string
	wal *wal.WAL
	log *slog.Logger
	key atomic.Pointer[[]byte] // what is written is sealed with it
}

// Loaded is what a Log held when it was opened.
type Loaded struct {
	Metadata  []byte
	Snapshot  *raftpb.Snapshot // nil without one
	HardState *raftpb.HardState
	Entries   []*raftpb.Entry // those after Snapshot
}

// Exists reports whether dir holds a Log.
func Exists(dir string) bool { return wal.Exist(filepath.Join(dir, walDir)) }

// RemoveAll deletes the Log in dir. There need not be one.
func RemoveAll(dir string) error {
	for _, name := range []string{walDir, walDir + ".tmp", snapDir} {
		if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("remove raft state: %w", err)
		}
	}
	return nil
}

// Create makes a new Log in dir, which is made when missing. Metadata is kept in clear.
func Create(dir string, metadata, key []byte, log *slog.Logger) (*Log, error) {
	if _, err := pad(key); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(dir, snapDir), 0o700); err != nil {
		return nil, fmt.Errorf("create raft log: %w", err)
	}
	w, err := wal.Create(zapLogger(log), filepath.Join(dir, walDir), metadata)
	if err != nil {
		return nil, fmt.Errorf("create raft log: %w", err)
	}
	l := &Log{dir: dir, wal: w, log: log}
	l.SetKey(key)
	return l, nil
}

// Load opens the Log in dir and reads what is needed to continue: the newest snapshot
// that can be read and everything after it. A torn end of the log, as a crash leaves it, is
// cut off once. keys are tried in order; the first is written with. ErrDecrypt when
// none fits.
func Load(dir string, log *slog.Logger, keys ...[]byte) (*Log, *Loaded, error) {
	if len(keys) == 0 {
		return nil, nil, fmt.Errorf("load raft log: %w", ErrDecrypt)
	}
	snap, err := newestSnapshot(dir, log, keys)
	if err != nil {
		return nil, nil, err
	}
	w, out, err := readWAL(dir, snap, log)
	if err != nil {
		return nil, nil, err
	}
	out.Snapshot = snap
	if err := openEntries(out.Entries, keys); err != nil {
		return nil, nil, errors.Join(err, w.Close())
	}
	l := &Log{dir: dir, wal: w, log: log}
	l.SetKey(keys[0])
	return l, out, nil
}

func readWAL(dir string, snap *raftpb.Snapshot, log *slog.Logger) (*wal.WAL, *Loaded, error) {
	zl := zapLogger(log)
	path := filepath.Join(dir, walDir)
	at := &walpb.Snapshot{
		Index: new(snap.GetMetadata().GetIndex()),
		Term:  new(snap.GetMetadata().GetTerm()),
	}
	for repaired := false; ; repaired = true {
		w, err := wal.Open(zl, path, at)
		if err != nil {
			return nil, nil, fmt.Errorf("open raft log: %w", err)
		}
		out := new(Loaded)
		out.Metadata, out.HardState, out.Entries, err = w.ReadAll()
		if err == nil {
			return w, out, nil
		}
		if closeErr := w.Close(); closeErr != nil {
			log.Warn("close raft log", slog.Any("error", closeErr))
		}
		if repaired || !errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, nil, fmt.Errorf("read raft log: %w", err)
		}
		log.Warn("raft log has a torn end, cutting it off", slog.String("dir", path))
		if !wal.Repair(zl, path) {
			return nil, nil, fmt.Errorf("repair raft log %s: %w", path, err)
		}
	}
}

func openEntries(entries []*raftpb.Entry, keys [][]byte) error {
	for _, e := range entries {
		plain, err := Open(e.GetData(), keys...)
		if err != nil {
			return fmt.Errorf("read raft log: entry %d: %w", e.GetIndex(), err)
		}
		e.Data = plain
	}
	return nil
}

// SetKey makes key the one that later records are sealed with.
func (l *Log) SetKey(key []byte) { l.key.Store(&key) }

// Save appends entries and state and returns when they are durable, if they must be.
func (l *Log) Save(state *raftpb.HardState, entries []*raftpb.Entry) error {
	sealed, err := seal(*l.key.Load(), entries)
	if err != nil {
		return err
	}
	if err := l.wal.Save(state, sealed); err != nil {
		return fmt.Errorf("write raft log: %w", err)
	}
	return nil
}

// sealShare is how many entries are worth a goroutine of their own.
const sealShare = 4

// seal returns the entries with their data sealed. Many are sealed by all processors: the
// write to disk waits for it.
func seal(key []byte, entries []*raftpb.Entry) ([]*raftpb.Entry, error) {
	sealed := make([]*raftpb.Entry, len(entries))
	some := func(from, to int) error {
		for i, e := range entries[from:to] {
			data, err := Seal(key, e.GetData())
			if err != nil {
				return err
			}
			sealed[from+i] = &raftpb.Entry{Type: e.Type, Term: e.Term, Index: e.Index, Data: data}
		}
		return nil
	}
	share := max(sealShare, (len(entries)+runtime.GOMAXPROCS(0)-1)/runtime.GOMAXPROCS(0))
	if len(entries) <= share {
		return sealed, some(0, len(entries))
	}
	var group errgroup.Group
	for from := 0; from < len(entries); from += share {
		group.Go(func() error { return some(from, min(from+share, len(entries))) })
	}
	return sealed, group.Wait()
}

// MarkSnapshot notes in the log that a snapshot with this metadata is about to be saved.
// It must come before SaveSnapshotFile, so that the newest file always has its mark.
func (l *Log) MarkSnapshot(meta *raftpb.SnapshotMetadata) error {
	err := l.wal.SaveSnapshot(&walpb.Snapshot{
		Index:     meta.Index,
		Term:      meta.Term,
		ConfState: meta.GetConfState(),
	})
	if err != nil {
		return fmt.Errorf("mark snapshot in raft log: %w", err)
	}
	return nil
}

// Close closes the log. What was saved stays.
func (l *Log) Close() error {
	if err := l.wal.Close(); err != nil {
		return fmt.Errorf("close raft log: %w", err)
	}
	return nil
}

func cloneSnapshot(s *raftpb.Snapshot, data []byte) *raftpb.Snapshot {
	return &raftpb.Snapshot{Data: data, Metadata: proto.CloneOf(s.GetMetadata())}
}
