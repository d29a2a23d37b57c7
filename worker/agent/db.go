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
)

// The buckets and keys of tasks.db, as SwarmKit lays it out: v1/tasks/<id>/{data,status,assigned}.
const (
	keyVersion  = "v1"
	keyTasks    = "tasks"
	keyData     = "data"
	keyStatus   = "status"
	keyAssigned = "assigned"
)

// database is what a node knows of its tasks across restarts.
type database struct{ db *bbolt.DB }

// openDatabase opens dir/tasks.db and makes it if it is missing.
func openDatabase(dir string) (*database, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open task database: %w", err)
	}
	db, err := bbolt.Open(filepath.Join(dir, "tasks.db"), 0o600, &bbolt.Options{Timeout: 5 * time.Second})
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
	return &database{db: db}, nil
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
			if err := errors.Join(proto.Unmarshal(b.Get([]byte(keyData)), task), proto.Unmarshal(b.Get([]byte(keyStatus)), status)); err != nil {
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
