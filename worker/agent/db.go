package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/platform/disk"
)

// The buckets and keys of tasks.db, as SwarmKit lays it out: v1/tasks/<id>/{data,status,assigned}.
const (
	keyVersion  = "v1"
	keyTasks    = "tasks"
	keyData     = "data"
	keyStatus   = "status"
	keyAssigned = "assigned"
)

// Keys seal the records of the task database, which hold what services hold: names,
// labels, environment. They are kept by others.
type Keys interface {
	// TaskKeys returns the key to seal with and behind it others that records may be sealed
	// with.
	TaskKeys() ([][]byte, error)
	// ForgetOldTaskKey says that all records are sealed with the first of the keys.
	ForgetOldTaskKey() error
}

// database is what a node knows of its tasks across restarts.
type database struct {
	db   *bbolt.DB
	keys Keys // nil leaves the records in the clear
}

// seal returns a record as it is written.
func (d *database) seal(record []byte) ([]byte, error) {
	if d.keys == nil {
		return record, nil
	}
	keys, err := d.keys.TaskKeys()
	if err != nil {
		return nil, err
	}
	return disk.Seal(keys[0], record)
}

// open returns a record that was read. One in the clear was written by Docker Engine or an
// older Skep. fresh says that it is sealed with the key to seal with.
func (d *database) open(record []byte) (plain []byte, fresh bool, err error) {
	if d.keys == nil {
		return record, true, nil
	}
	if !sealed(record) {
		return record, false, nil
	}
	keys, err := d.keys.TaskKeys()
	if err != nil {
		return nil, false, err
	}
	if plain, err = disk.Open(record, keys[0]); err == nil || len(keys) == 1 {
		return plain, true, err
	}
	plain, err = disk.Open(record, keys[1:]...)
	return plain, false, err
}

// sealed reports whether a record is a sealed one: those begin with their algorithm and a
// ciphertext, where a task has its id and a status its time or state.
func sealed(record []byte) bool {
	var r api.MaybeEncryptedRecord
	return proto.Unmarshal(record, &r) == nil && len(r.ProtoReflect().GetUnknown()) == 0 &&
		r.GetAlgorithm() == api.MaybeEncryptedRecord_SECRETBOX_SALSA20_POLY1305 && len(r.GetNonce()) == 24
}

// stale reports whether any record is in the clear or sealed with an old key. What cannot
// be opened does not count; load reports it.
func (d *database) stale() (found bool, err error) {
	err = d.db.View(func(tx *bbolt.Tx) error {
		return tasksOf(tx).ForEachBucket(func(id []byte) error {
			for _, key := range []string{keyData, keyStatus} {
				_, fresh, err := d.open(tasksOf(tx).Bucket(id).Get([]byte(key)))
				found = found || err == nil && !fresh
			}
			return nil
		})
	})
	return found, err
}

// reseal replaces a database that holds stale records by one that is sealed throughout. A
// new file, for the pages that an old one gave up would keep what was written to them.
func (d *database) reseal(path string) error {
	stale, err := d.stale()
	if err != nil {
		return fmt.Errorf("seal task database: %w", err)
	}
	if !stale {
		return nil
	}
	next := path + ".new"
	if err := errors.Join(os.RemoveAll(next), d.copyTo(next)); err != nil {
		return fmt.Errorf("seal task database: %w", err)
	}
	if err := errors.Join(d.db.Close(), disk.Replace(next, path)); err != nil {
		return fmt.Errorf("seal task database: %w", err)
	}
	d.db, err = openFile(path)
	return err
}

// copyTo writes the tasks, sealed, to a new database.
func (d *database) copyTo(path string) error {
	to, err := openFile(path)
	if err != nil {
		return err
	}
	err = d.db.View(func(from *bbolt.Tx) error {
		return to.Update(func(tx *bbolt.Tx) error {
			return tasksOf(from).ForEachBucket(func(id []byte) error {
				b, err := tasksOf(tx).CreateBucket(id)
				if err != nil {
					return err
				}
				return tasksOf(from).Bucket(id).ForEach(func(key, record []byte) error {
					if k := string(key); k == keyData || k == keyStatus {
						plain, _, err := d.open(record)
						if err != nil {
							return b.Put(key, record) // load reports it
						}
						if record, err = d.seal(plain); err != nil {
							return err
						}
					}
					return b.Put(key, record)
				})
			})
		})
	})
	return errors.Join(err, to.Close())
}

// openDatabase opens dir/tasks.db and makes it if it is missing.
func openDatabase(dir string, keys Keys) (*database, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open task database: %w", err)
	}
	path := filepath.Join(dir, "tasks.db")
	db, err := openFile(path)
	if err != nil {
		return nil, err
	}
	d := &database{db: db, keys: keys}
	if keys == nil {
		return d, nil
	}
	if err := d.reseal(path); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return d, keys.ForgetOldTaskKey()
}

// openFile opens a task database and makes its buckets.
func openFile(path string) (*bbolt.DB, error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: 5 * time.Second})
	if err != nil {
		return nil, fmt.Errorf("open task database: %w", err)
	}
	db.MaxBatchDelay = time.Millisecond
	err = db.Update(func(tx *bbolt.Tx) error {
		v, err := tx.CreateBucketIfNotExists([]byte(keyVersion))
		if err != nil {
			return err
		}
		_, err = v.CreateBucketIfNotExists([]byte(keyTasks))
		return err
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open task database: %w", err), db.Close())
	}
	return db, nil
}

func (d *database) close() error { return d.db.Close() }

func tasksOf(tx *bbolt.Tx) *bbolt.Bucket {
	return tx.Bucket([]byte(keyVersion)).Bucket([]byte(keyTasks))
}

// put writes tasks and their statuses, all or none.
func (d *database) put(tasks ...*api.Task) error {
	type record struct{ id, data, status []byte }
	records := make([]record, 0, len(tasks))
	for _, task := range tasks {
		data := proto.CloneOf(task)
		data.Status = new(api.TaskStatus)
		rawTask, err := proto.Marshal(data)
		if err != nil {
			return fmt.Errorf("store task: %w", err)
		}
		rawStatus, err := proto.Marshal(task.GetStatus())
		if err != nil {
			return fmt.Errorf("store task: %w", err)
		}
		if rawTask, err = d.seal(rawTask); err != nil {
			return fmt.Errorf("store task: %w", err)
		}
		if rawStatus, err = d.seal(rawStatus); err != nil {
			return fmt.Errorf("store task: %w", err)
		}
		records = append(records, record{id: []byte(task.GetId()), data: rawTask, status: rawStatus})
	}
	return d.db.Batch(func(tx *bbolt.Tx) error {
		for _, r := range records {
			b, err := tasksOf(tx).CreateBucketIfNotExists(r.id)
			if err != nil {
				return err
			}
			if err := errors.Join(b.Put([]byte(keyData), r.data), b.Put([]byte(keyStatus), r.status), b.Put([]byte(keyAssigned), []byte{0xff})); err != nil {
				return err
			}
		}
		return nil
	})
}

// putStatus writes the status of a known task.
func (d *database) putStatus(id string, status *api.TaskStatus) error {
	raw, err := proto.Marshal(status)
	if err != nil {
		return fmt.Errorf("store task status: %w", err)
	}
	if raw, err = d.seal(raw); err != nil {
		return fmt.Errorf("store task status: %w", err)
	}
	return d.db.Batch(func(tx *bbolt.Tx) error {
		b := tasksOf(tx).Bucket([]byte(id))
		if b == nil {
			return nil // removed in the meantime
		}
		return b.Put([]byte(keyStatus), raw)
	})
}

// remove forgets a task.
func (d *database) remove(id string) error {
	return d.db.Batch(func(tx *bbolt.Tx) error {
		if err := tasksOf(tx).DeleteBucket([]byte(id)); err != nil && !errors.Is(err, bbolt.ErrBucketNotFound) { //nolint:staticcheck // the name is kept for compatibility
			return err
		}
		return nil
	})
}

// read decodes the record at key.
func (d *database) read(b *bbolt.Bucket, key string, into proto.Message) error {
	plain, _, err := d.open(b.Get([]byte(key)))
	if err != nil {
		return err
	}
	return proto.Unmarshal(plain, into)
}

// load returns the tasks that are assigned, with their last status. Records that cannot
// be read are left out and returned as errors.
func (d *database) load() (tasks []*api.Task, broken []error) {
	err := d.db.View(func(tx *bbolt.Tx) error {
		return tasksOf(tx).ForEachBucket(func(id []byte) error {
			b := tasksOf(tx).Bucket(id)
			if b.Get([]byte(keyAssigned)) == nil {
				return nil
			}
			task, status := new(api.Task), new(api.TaskStatus)
			if err := errors.Join(d.read(b, keyData, task), d.read(b, keyStatus, status)); err != nil {
				broken = append(broken, fmt.Errorf("task %s in database: %w", id, err))
				return nil
			}
			task.Status = status
			tasks = append(tasks, task)
			return nil
		})
	})
	if err != nil {
		broken = append(broken, err)
	}
	return tasks, broken
}
