package disk

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"go.etcd.io/raft/v3/raftpb"
)

// Peeked is what can be seen of a Log without changing it.
type Peeked struct {
	Metadata  []byte
	HardState *raftpb.HardState
	// Last is the index of the last entry.
	Last uint64
	// Snapshot is the newest one that is not damaged, nil without one. Its data is empty
	// where no key opens it.
	Snapshot     *raftpb.Snapshot
	SnapshotTime time.Time
	// Entries are those after Snapshot, empty where no key opens them.
	Entries []*raftpb.Entry
	// Sealed says that no key opens what is there.
	Sealed bool
}

// Peek reads the Log in dir, which may be in use, as far as the keys open it. It changes
// nothing: not even a torn end is cut off.
func Peek(dir string, log *slog.Logger, keys ...[]byte) (*Peeked, error) {
	p := new(Peeked)
	if err := p.readSnapshot(filepath.Join(dir, snapDir), keys); err != nil {
		return nil, err
	}
	at := &walpb.Snapshot{Index: new(p.Snapshot.GetMetadata().GetIndex()), Term: new(p.Snapshot.GetMetadata().GetTerm())}
	w, err := wal.OpenForRead(zapLogger(log), filepath.Join(dir, walDir), at)
	if err != nil {
		return nil, fmt.Errorf("open raft log: %w", err)
	}
	defer w.Close() //nolint:errcheck // only read
	if p.Metadata, p.HardState, p.Entries, err = w.ReadAll(); err != nil {
		return nil, fmt.Errorf("read raft log: %w", err)
	}
	p.Last = p.Snapshot.GetMetadata().GetIndex()
	if n := len(p.Entries); n > 0 {
		p.Last = p.Entries[n-1].GetIndex()
	}
	if err := openEntries(p.Entries, keys); err != nil {
		p.Entries, p.Sealed = nil, true
	}
	return p, nil
}

// readSnapshot finds the newest snapshot that is not damaged.
func (p *Peeked) readSnapshot(dir string, keys [][]byte) error {
	names, err := snapshotNames(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		path := filepath.Join(dir, name)
		raw, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("read snapshot: %w", err)
		}
		s, err := parseSnapshot(raw)
		if err != nil {
			continue
		}
		if s.Data, err = Open(s.GetData(), keys...); err != nil {
			s.Data, p.Sealed = nil, true
		}
		if info, err := os.Stat(path); err == nil {
			p.SnapshotTime = info.ModTime()
		}
		p.Snapshot = s
		return nil
	}
	return nil
}
