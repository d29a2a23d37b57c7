package disk

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.etcd.io/etcd/server/v3/etcdserver/api/snap/snappb"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

const snapSuffix = ".snap"

// SaveSnapshotFile writes a snapshot and returns when it is durable.
func (l *Log) SaveSnapshotFile(s *raftpb.Snapshot) error {
	data, err := Seal(*l.key.Load(), s.GetData())
	if err != nil {
		return err
	}
	inner, err := proto.Marshal(cloneSnapshot(s, data))
	if err != nil {
		return fmt.Errorf("write snapshot: %w", err)
	}
	outer, err := proto.Marshal(&snappb.Snapshot{
		Crc:  new(crc32.Checksum(inner, crc32.MakeTable(crc32.Castagnoli))),
		Data: inner,
	})
	if err != nil {
		return fmt.Errorf("write snapshot: %w", err)
	}
	name := fmt.Sprintf("%016x-%016x%s", s.GetMetadata().GetTerm(), s.GetMetadata().GetIndex(), snapSuffix)
	return WriteFile(filepath.Join(l.dir, snapDir, name), outer, 0o600)
}

// Purge deletes the snapshots older than the newest 1+keepOld, and the files of the
// write-ahead log that hold nothing after the oldest snapshot kept.
func (l *Log) Purge(keepOld uint64) error {
	names, err := snapshotNames(filepath.Join(l.dir, snapDir))
	if err != nil || len(names) == 0 {
		return err
	}
	keep := min(uint64(len(names)), 1+keepOld)
	for _, name := range names[keep:] {
		if err := os.Remove(filepath.Join(l.dir, snapDir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("purge snapshots: %w", err)
		}
	}
	var term, index uint64
	if _, err := fmt.Sscanf(names[keep-1], "%016x-%016x"+snapSuffix, &term, &index); err != nil {
		return fmt.Errorf("purge raft log: snapshot name %q: %w", names[keep-1], err)
	}
	if err := l.wal.ReleaseLockTo(index); err != nil {
		return fmt.Errorf("purge raft log: %w", err)
	}
	return purgeWAL(filepath.Join(l.dir, walDir), index)
}

// DropBroken deletes the damaged files that were put aside: they are sealed with a key that
// is no longer to be trusted.
func (l *Log) DropBroken() error {
	for _, dir := range []string{walDir, snapDir} {
		files, err := filepath.Glob(filepath.Join(l.dir, dir, "*.broken"))
		if err != nil {
			return fmt.Errorf("delete damaged files: %w", err)
		}
		for _, path := range files {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("delete damaged files: %w", err)
			}
		}
	}
	return nil
}

// purgeWAL deletes the files that come before the last one whose first index is not
// after index.
func purgeWAL(dir string, index uint64) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("purge raft log: %w", err)
	}
	var old []string
	for _, e := range entries {
		var seq, first uint64
		if !strings.HasSuffix(e.Name(), ".wal") {
			continue
		}
		if _, err := fmt.Sscanf(e.Name(), "%016x-%016x.wal", &seq, &first); err != nil {
			continue
		}
		if first <= index {
			old = append(old, e.Name())
		}
	}
	for i := range len(old) - 1 {
		if err := os.Remove(filepath.Join(dir, old[i])); err != nil {
			return fmt.Errorf("purge raft log: %w", err)
		}
	}
	return nil
}

// newestSnapshot returns the newest snapshot that can be read, or nil. One that is
// damaged is renamed to .broken; one that no key opens is an error, for it is not damaged.
func newestSnapshot(dir string, log *slog.Logger, keys [][]byte) (*raftpb.Snapshot, error) {
	names, err := snapshotNames(filepath.Join(dir, snapDir))
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		path := filepath.Join(dir, snapDir, name)
		s, err := readSnapshot(path, keys)
		if err == nil {
			return s, nil
		}
		if errors.Is(err, ErrDecrypt) {
			return nil, err
		}
		log.Warn("snapshot is damaged, using an older one", slog.String("path", path), slog.Any("error", err))
		if err := os.Rename(path, path+".broken"); err != nil {
			return nil, fmt.Errorf("put snapshot aside: %w", err)
		}
	}
	return nil, nil //nolint:nilnil // no snapshot is a normal state
}

func readSnapshot(path string, keys [][]byte) (*raftpb.Snapshot, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read snapshot: %w", err)
	}
	s, err := parseSnapshot(raw)
	if err != nil {
		return nil, fmt.Errorf("read snapshot %s: %w", path, err)
	}
	if s.Data, err = Open(s.GetData(), keys...); err != nil {
		return nil, fmt.Errorf("read snapshot %s: %w", path, err)
	}
	return s, nil
}

// parseSnapshot decodes a snapshot file up to its sealed data.
func parseSnapshot(raw []byte) (*raftpb.Snapshot, error) {
	var outer snappb.Snapshot
	if err := proto.Unmarshal(raw, &outer); err != nil {
		return nil, fmt.Errorf("decode file: %w", err)
	}
	if crc32.Checksum(outer.GetData(), crc32.MakeTable(crc32.Castagnoli)) != outer.GetCrc() {
		return nil, errors.New("checksum does not match")
	}
	s := new(raftpb.Snapshot)
	if err := proto.Unmarshal(outer.GetData(), s); err != nil {
		return nil, fmt.Errorf("decode snapshot: %w", err)
	}
	if s.GetMetadata().GetIndex() == 0 {
		return nil, errors.New("snapshot without index")
	}
	return s, nil
}

// snapshotNames returns the names of the snapshot files, newest first.
func snapshotNames(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	var names []string
	for _, e := range entries {
		var term, index uint64
		if !strings.HasSuffix(e.Name(), snapSuffix) {
			continue
		}
		if _, err := fmt.Sscanf(e.Name(), "%016x-%016x"+snapSuffix, &term, &index); err == nil {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	slices.Reverse(names)
	return names, nil
}
