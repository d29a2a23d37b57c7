package keystore

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/skep-dev/skep/core/pki"
)

var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func identity(t *testing.T, root *pki.Root) Identity {
	t.Helper()
	key, err := pki.NewKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.NewCSR(rand.Reader, key)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := root.Issue(rand.Reader, now, csr, pki.Leaf{NodeID: "n1", ClusterID: "c1", OU: pki.ManagerRole, Expiry: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	return Identity{RootPEM: root.CertPEM, ChainPEM: chain, Key: key}
}

func authority(t *testing.T) *pki.Root {
	t.Helper()
	root, err := pki.NewRoot(rand.Reader, now)
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func mustOpen(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func wantIdentity(t *testing.T, dir string, want Identity) *Store {
	t.Helper()
	s := mustOpen(t, dir)
	got, err := s.Load(nil)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.RootPEM, want.RootPEM) || !bytes.Equal(got.ChainPEM, want.ChainPEM) ||
		!want.Key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(got.Key.Public()) {
		t.Error("another identity was loaded than was saved")
	}
	return s
}

func TestSaveAndLoad(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "certificates")
	s := mustOpen(t, dir)
	if _, err := s.Load(nil); !errors.Is(err, ErrNone) {
		t.Errorf("load from an empty directory: %v", err)
	}
	root := authority(t)
	first := identity(t, root)
	if err := s.Save(first); err != nil {
		t.Fatal(err)
	}
	wantIdentity(t, dir, first)
	second := identity(t, root)
	if err := s.Save(second); err != nil {
		t.Fatal(err)
	}
	wantIdentity(t, dir, second)
	if info, err := os.Stat(filepath.Join(dir, keyFile)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the key file is %v, %v", info.Mode(), err)
	}
	if err := s.Clear(); err != nil {
		t.Fatal(err)
	}
	if _, err := mustOpen(t, dir).Load(nil); !errors.Is(err, ErrNone) {
		t.Errorf("load after clearing: %v", err)
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("clearing left %v", left)
	}
}

// A crash may come after each file that Save writes.
func TestCrashDuringSave(t *testing.T) {
	root := authority(t)
	old, next := identity(t, root), identity(t, root)
	files := func(id Identity) map[string][]byte {
		dir := t.TempDir()
		if err := mustOpen(t, dir).Save(id); err != nil {
			t.Fatal(err)
		}
		out := map[string][]byte{}
		for _, name := range []string{keyFile, certFile} {
			data, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			out[name] = data
		}
		return out
	}
	nextFiles := files(next)
	for _, c := range []struct {
		name  string
		write map[string]string // target, which of next's files
		want  Identity
	}{
		{"before anything", nil, old},
		{"after the certificate", map[string]string{pendingCert: certFile}, old},
		{"after the key", map[string]string{pendingCert: certFile, keyFile: keyFile}, next},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := mustOpen(t, dir).Save(old); err != nil {
				t.Fatal(err)
			}
			for target, source := range c.write {
				if err := os.WriteFile(filepath.Join(dir, target), nextFiles[source], 0o600); err != nil {
					t.Fatal(err)
				}
			}
			wantIdentity(t, dir, c.want)
			s := wantIdentity(t, dir, c.want) // and again, after it was put right
			last := identity(t, root)
			if err := s.Save(last); err != nil {
				t.Fatal(err)
			}
			wantIdentity(t, dir, last)
		})
	}
}

func TestForeignKeyIsRefused(t *testing.T) {
	root := authority(t)
	dir, other := t.TempDir(), t.TempDir()
	if err := errors.Join(mustOpen(t, dir).Save(identity(t, root)), mustOpen(t, other).Save(identity(t, root))); err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(filepath.Join(other, keyFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, keyFile), key, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := mustOpen(t, dir).Load(nil); err == nil {
		t.Error("a key without its certificate was accepted")
	}
}

func TestLockedKeyFile(t *testing.T) {
	dir := t.TempDir()
	id := identity(t, authority(t))
	if err := mustOpen(t, dir).Save(id); err != nil {
		t.Fatal(err)
	}
	kek := bytes.Repeat([]byte{7}, 32)
	data, err := pki.EncodeKeyFile(rand.Reader, pki.KeyFile{Key: id.Key, Headers: map[string]string{kekVersionHeader: "42"}}, kek)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, keyFile), data, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, wrong := range [][]byte{nil, bytes.Repeat([]byte{8}, 32)} {
		if _, err := mustOpen(t, dir).Load(wrong); !errors.Is(err, pki.ErrLocked) {
			t.Errorf("load with key %x: %v", wrong, err)
		}
	}
	s := mustOpen(t, dir)
	if _, err := s.Load(kek); err != nil {
		t.Fatal(err)
	}
	dek, _, err := s.DEKs()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(dir, keyFile))
	if err != nil {
		t.Fatal(err)
	}
	if file, err := pki.DecodeKeyFile(raw, kek); err != nil || file.Headers[kekVersionHeader] != "42" {
		t.Errorf("the version of the lock was lost: %v, %v", file.Headers, err)
	}
	again := mustOpen(t, dir)
	if _, err := again.Load(kek); err != nil {
		t.Fatal(err)
	}
	if got, _, err := again.DEKs(); err != nil || !bytes.Equal(got, dek) {
		t.Errorf("the data key of a locked file: %x, %v, want %x", got, err, dek)
	}
}

func TestDataKeys(t *testing.T) {
	dir := t.TempDir()
	root := authority(t)
	s := mustOpen(t, dir)
	if err := s.Save(identity(t, root)); err != nil {
		t.Fatal(err)
	}
	first, pending, err := s.DEKs()
	if err != nil || len(first) != 32 || pending != nil {
		t.Fatalf("first key %x, pending %x, %v", first, pending, err)
	}
	// A renewed certificate keeps it.
	renewed := identity(t, root)
	if err := s.Save(renewed); err != nil {
		t.Fatal(err)
	}
	s = wantIdentity(t, dir, renewed)
	if again, _, err := s.DEKs(); err != nil || !bytes.Equal(again, first) {
		t.Errorf("after a renewal the data key is %x, %v", again, err)
	}
	if p, err := s.BeginRotation(); err != nil || p != nil {
		t.Errorf("a rotation that nobody asked for: %x, %v", p, err)
	}
	s.mu.Lock()
	headers := maps.Clone(s.file.Headers)
	headers[wantedHeader] = "true"
	err = s.writeKey(headers)
	s.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	next, err := s.BeginRotation()
	if err != nil || len(next) != 32 || bytes.Equal(next, first) {
		t.Fatalf("pending key %x, %v", next, err)
	}
	// A crash during the rotation: both keys are there.
	s = wantIdentity(t, dir, renewed)
	if c, p, err := s.DEKs(); err != nil || !bytes.Equal(c, first) || !bytes.Equal(p, next) {
		t.Errorf("during the rotation: %x, %x, %v", c, p, err)
	}
	if p, err := s.BeginRotation(); err != nil || !bytes.Equal(p, next) {
		t.Errorf("the rotation goes on with %x, %v, want %x", p, err, next)
	}
	if err := s.FinishRotation(); err != nil {
		t.Fatal(err)
	}
	s = wantIdentity(t, dir, renewed)
	if c, p, err := s.DEKs(); err != nil || !bytes.Equal(c, next) || p != nil {
		t.Errorf("after the rotation: %x, %x, %v", c, p, err)
	}
	if err := s.ForgetDEKs(); err != nil {
		t.Fatal(err)
	}
	s = wantIdentity(t, dir, renewed)
	if c, _, err := s.DEKs(); err != nil || bytes.Equal(c, next) || bytes.Equal(c, first) {
		t.Errorf("a forgotten key came back: %x, %v", c, err)
	}
}

// sealedFile returns whether the key file is encrypted, and its text.
func sealedFile(t *testing.T, s *Store) (bool, string) {
	t.Helper()
	data, err := os.ReadFile(s.path(keyFile))
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Contains(data, []byte("BEGIN ENCRYPTED PRIVATE KEY")), string(data)
}

func kekOf(b byte) []byte { return bytes.Repeat([]byte{b}, pki.KEKLength) }

func TestFollow(t *testing.T) {
	one, two := kekOf(1), kekOf(2)
	for _, tt := range []struct {
		name             string
		kek              []byte
		version          uint64
		newKEK           []byte
		newVersion       uint64
		changes, rotates bool
		fails            bool
	}{
		{"lock", nil, 3, one, 4, true, true, false},
		{"rotate", one, 3, two, 4, true, false, false},
		{"unlock", one, 3, nil, 4, true, false, false},
		{"same key, newer", one, 3, one, 4, false, false, false},
		{"never locked", nil, 3, nil, 4, false, false, false},
		{"older", one, 3, two, 2, false, false, false},
		{"older, unlocked", nil, 3, one, 2, false, false, false},
		{"same version, another key", one, 3, two, 3, false, false, true},
		{"same version, same key", one, 3, one, 3, false, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := mustOpen(t, t.TempDir())
			if err := s.SaveManager(identity(t, authority(t)), tt.kek, tt.version); err != nil {
				t.Fatal(err)
			}
			dek, _, err := s.DEKs()
			if err != nil {
				t.Fatal(err)
			}
			_, before := sealedFile(t, s)
			locked, err := s.Follow(tt.newKEK, tt.newVersion)
			if (err != nil) != tt.fails || locked != tt.rotates {
				t.Fatalf("locked %t, %v", locked, err)
			}
			sealed, after := sealedFile(t, s)
			want := tt.kek
			if tt.changes {
				want = tt.newKEK
			}
			if (before != after) != tt.changes || sealed != (len(want) > 0) || s.Locks() != sealed {
				t.Errorf("the key file changed %t and is sealed %t", before != after, sealed)
			}
			select {
			case <-s.RotationWanted():
				if !tt.rotates {
					t.Error("a rotation of the data key was asked for")
				}
			default:
				if tt.rotates {
					t.Error("no rotation of the data key was asked for")
				}
			}
			// A new process opens it with the key that counts now, and with no other.
			again := mustOpen(t, s.dir)
			if len(want) > 0 {
				for _, wrong := range [][]byte{nil, kekOf(9)} {
					if _, err := again.Load(wrong); !errors.Is(err, pki.ErrLocked) {
						t.Errorf("load with a wrong key: %v", err)
					}
				}
			}
			if _, err := again.Load(want); err != nil {
				t.Fatal(err)
			}
			if got, _, err := again.DEKs(); err != nil || !bytes.Equal(got, dek) {
				t.Errorf("the data key is %x, %v; want %x", got, err, dek)
			}
			pending, err := again.BeginRotation()
			if err != nil || (pending != nil) != tt.rotates {
				t.Errorf("pending data key %x, %v", pending, err)
			}
		})
	}
}

// A swarm that is locked, unlocked and locked again while the data key still rotates gets
// another rotation after that one.
func TestLockDuringRotation(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	if err := s.SaveManager(identity(t, authority(t)), nil, 0); err != nil {
		t.Fatal(err)
	}
	first, _, err := s.DEKs()
	if err != nil {
		t.Fatal(err)
	}
	follow := func(kek []byte, version uint64) {
		t.Helper()
		if _, err := s.Follow(kek, version); err != nil {
			t.Fatal(err)
		}
	}
	follow(kekOf(1), 1)
	<-s.RotationWanted()
	pending, err := s.BeginRotation()
	if err != nil || pending == nil {
		t.Fatal(pending, err)
	}
	follow(nil, 2)
	follow(kekOf(2), 3)
	<-s.RotationWanted()
	if again, err := s.BeginRotation(); err != nil || !bytes.Equal(again, pending) {
		t.Fatalf("the pending key changed: %v", err)
	}
	if err := s.FinishRotation(); err != nil {
		t.Fatal(err)
	}
	<-s.RotationWanted()
	last, err := s.BeginRotation()
	if err != nil || last == nil || bytes.Equal(last, pending) || bytes.Equal(last, first) {
		t.Fatalf("no second rotation: %x, %v", last, err)
	}
}

func TestTaskKeys(t *testing.T) {
	s := mustOpen(t, t.TempDir())
	root := authority(t)
	if _, err := s.TaskKeys(); !errors.Is(err, ErrNone) {
		t.Errorf("task key without an identity: %v", err)
	}
	if err := s.SaveWorker(identity(t, root)); err != nil {
		t.Fatal(err)
	}
	keys := func(n int) [][]byte {
		t.Helper()
		got, err := s.TaskKeys()
		if err != nil || len(got) != n {
			t.Fatalf("%d task keys, %v; want %d", len(got), err, n)
		}
		return got
	}
	open := keys(1)[0]
	// Promoted into a locked swarm: what lay in the clear seals nothing new.
	if err := s.SaveManager(identity(t, root), kekOf(1), 7); err != nil {
		t.Fatal(err)
	}
	both := keys(2)
	if bytes.Equal(both[0], open) || !bytes.Equal(both[1], open) {
		t.Error("locking did not replace the task key")
	}
	// Locked again before anything was sealed anew: all keys are kept.
	for version, kek := range [][]byte{nil, kekOf(3)} {
		if _, err := s.Follow(kek, uint64(8+version)); err != nil {
			t.Fatal(err)
		}
	}
	all := keys(3)
	if !bytes.Equal(all[1], both[0]) || !bytes.Equal(all[2], both[1]) || bytes.Equal(all[0], all[1]) {
		t.Error("locking twice lost a task key")
	}
	both = all
	if err := s.ForgetOldTaskKey(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(keys(1)[0], both[0]) {
		t.Error("the new task key went with the old one")
	}
	if err := s.Save(identity(t, root)); err != nil { // a renewal
		t.Fatal(err)
	}
	if sealed, _ := sealedFile(t, s); !sealed {
		t.Error("a renewal opened the key file")
	}
	// Demoted: in the clear, and changes of the swarm's key are not for it.
	if err := s.SaveWorker(identity(t, root)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Follow(kekOf(2), 19); err != nil {
		t.Fatal(err)
	}
	if sealed, _ := sealedFile(t, s); sealed {
		t.Error("a worker's key file is sealed")
	}
	if !bytes.Equal(keys(1)[0], both[0]) {
		t.Error("demotion lost the task key")
	}
}
