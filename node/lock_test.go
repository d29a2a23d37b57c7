package node

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/skep-dev/skep/core/model"
)

func TestLock(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	release, err := Lock(at("data"), at("exec"))
	if err != nil {
		t.Fatal(err)
	}
	for name, second := range map[string]struct{ data, exec, want string }{
		"both":      {at("data"), at("exec"), "--data-root"},
		"data root": {at("data"), at("other"), "--data-root"},
		"exec root": {at("more"), at("exec"), "--exec-root"},
	} {
		_, err := Lock(second.data, second.exec)
		if model.KindOf(err) != model.Conflict || !strings.Contains(err.Error(), second.want) {
			t.Errorf("%s in use: %v, want a conflict that names %s", name, err, second.want)
		}
	}
	// What was refused holds nothing.
	other, err := Lock(at("more"), at("other"))
	if err != nil {
		t.Fatal(err)
	}
	other()
	release()
	one, err := Lock(at("data"), at("data"))
	if err != nil {
		t.Fatalf("one directory for both: %v", err)
	}
	one()
}
