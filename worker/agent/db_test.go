package agent

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
)

// someKeys are the keys of a task database, in memory.
type someKeys struct {
	keys   [][]byte
	forgot bool
}

func (k *someKeys) TaskKeys() ([][]byte, error) { return k.keys, nil }

func (k *someKeys) ForgetOldTaskKey() error {
	k.keys, k.forgot = k.keys[:1], true
	return nil
}

// The database holds nothing readable, also what was there before it had a key, and moves
// to a new key when it is opened.
func TestSealedDatabase(t *testing.T) {
	dir := t.TempDir()
	task := &api.Task{
		Id: "t1", Annotations: &api.Annotations{Name: "canary-name", Labels: map[string]string{"canary-label": "x"}},
		Status: &api.TaskStatus{State: api.TaskState_RUNNING, Message: "canary-status"},
	}
	key := func(b byte) []byte { return bytes.Repeat([]byte{b}, 32) }
	use := func(keys Keys, f func(*database)) {
		t.Helper()
		d, err := openDatabase(dir, keys)
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := d.close(); err != nil {
				t.Fatal(err)
			}
		}()
		f(d)
	}
	wantTask := func(d *database) {
		t.Helper()
		tasks, broken := d.load()
		if len(tasks) != 1 || len(broken) > 0 || !proto.Equal(tasks[0], task) {
			t.Errorf("tasks %v, broken %v", tasks, broken)
		}
	}
	use(&someKeys{keys: [][]byte{key(1)}}, func(d *database) {
		if err := d.put(task); err != nil {
			t.Fatal(err)
		}
		wantTask(d)
		task.Status.Message = "canary-status-2"
		if err := d.putStatus("t1", task.GetStatus()); err != nil {
			t.Fatal(err)
		}
		wantTask(d)
	})
	if data, err := os.ReadFile(filepath.Join(dir, "tasks.db")); err != nil || bytes.Contains(data, []byte("canary")) {
		t.Errorf("the database can be read, %v", err)
	}
	rotated := &someKeys{keys: [][]byte{key(2), key(1)}}
	use(rotated, wantTask)
	if !rotated.forgot {
		t.Error("the old key is kept")
	}
	use(&someKeys{keys: [][]byte{key(2)}}, wantTask)
	use(&someKeys{keys: [][]byte{key(3)}}, func(d *database) {
		if tasks, broken := d.load(); len(tasks) != 0 || len(broken) != 1 {
			t.Errorf("with a wrong key: tasks %v, broken %v", tasks, broken)
		}
	})
	// What Docker Engine left in the clear is read and sealed.
	if err := os.Remove(filepath.Join(dir, "tasks.db")); err != nil {
		t.Fatal(err)
	}
	use(nil, func(d *database) {
		if err := d.put(task); err != nil {
			t.Fatal(err)
		}
	})
	use(&someKeys{keys: [][]byte{key(1)}}, wantTask)
	if data, err := os.ReadFile(filepath.Join(dir, "tasks.db")); err != nil || bytes.Contains(data, []byte("canary")) {
		t.Errorf("the database still holds what was in the clear, %v", err)
	}
	use(&someKeys{keys: [][]byte{key(1)}}, wantTask)
}
