package dataplane

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"google.golang.org/protobuf/proto"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/netplan"
)

// journal keeps what the node knows of networks beside the namespaces, in memory that a
// reboot clears as it clears those. It is a list of updates, each after its length in
// four bytes, so that one change costs one small write.
type journal struct {
	path string
	// appended counts updates since the file was written whole.
	appended int
	size     int
}

func newJournal(dir string) *journal { return &journal{path: filepath.Join(dir, ".state")} }

// load merges what a former process left. A torn last record is as if it had not come.
func (j *journal) load(merge func(*skepv1.NetworkUpdate)) error {
	data, err := os.ReadFile(j.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read network state: %w", err)
	}
	for len(data) >= 4 {
		n := binary.BigEndian.Uint32(data)
		if uint64(n) > uint64(len(data)-4) {
			break
		}
		u := new(skepv1.NetworkUpdate)
		if proto.Unmarshal(data[4:4+n], u) == nil {
			merge(u)
		}
		data = data[4+n:]
	}
	return nil
}

// add writes an update, or from time to time everything instead.
func (j *journal) add(u *skepv1.NetworkUpdate, s *netplan.State) error {
	if j.appended >= 256 && j.appended*64 > j.size || j.size == 0 {
		return j.rewrite(s)
	}
	f, err := os.OpenFile(j.path, os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return errors.Join(fmt.Errorf("write network state: %w", err), j.rewrite(s))
	}
	record, err := encodeRecord(u)
	if err == nil {
		_, err = f.Write(record)
	}
	j.appended++
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write network state: %w", err)
	}
	return nil
}

func encodeRecord(u *skepv1.NetworkUpdate) ([]byte, error) {
	body, err := proto.Marshal(netplan.WithoutKeys(u))
	if err != nil {
		return nil, fmt.Errorf("encode network state: %w", err)
	}
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...), nil
}

// rewrite replaces the file by one record of everything.
func (j *journal) rewrite(s *netplan.State) error {
	record, err := encodeRecord(s.Snapshot())
	if err != nil {
		return err
	}
	next := j.path + ".new"
	if err := os.WriteFile(next, record, 0o600); err != nil {
		return fmt.Errorf("write network state: %w", err)
	}
	if err := os.Rename(next, j.path); err != nil {
		return fmt.Errorf("write network state: %w", err)
	}
	j.appended, j.size = 0, len(record)
	return nil
}

func (j *journal) remove() error {
	if err := os.Remove(j.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove network state: %w", err)
	}
	j.size, j.appended = 0, 0
	return nil
}
