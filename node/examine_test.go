package node

import (
	"bytes"
	"crypto/rand"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/backup"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/keystore"
)

// aDisk makes the data root of a manager that was restored at index 70 from a state of two
// managers, locked if kek is not empty, and returns the node's id.
func aDisk(t *testing.T, root string, kek []byte) string {
	t.Helper()
	ca, err := pki.NewRoot(rand.Reader, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	id, boot, err := found(t.Context(), &api.ClusterSpec{}, ca)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := keystore.Open(filepath.Join(root, "swarm", "certificates"))
	if err != nil {
		t.Fatal(err)
	}
	saved := savedState{AdvertiseAddr: "10.0.0.9:2377"}
	if err := errors.Join(keys.SaveManager(id, kek, 7), saved.save(filepath.Join(root, "swarm"))); err != nil {
		t.Fatal(err)
	}
	certs, err := pki.ParseCerts(id.ChainPEM)
	if err != nil {
		t.Fatal(err)
	}
	state := &api.Snapshot{
		Membership: &api.ClusterSnapshot{Members: []*api.RaftMember{{RaftId: 1, NodeId: "m1"}, {RaftId: 2, NodeId: "m2"}}, Removed: []uint64{3}},
		Store: &api.StoreSnapshot{
			Clusters: []*api.Cluster{{Id: boot.ClusterID}},
			Nodes:    []*api.Node{{Id: certs[0].Subject.CommonName, Description: &api.NodeDescription{Hostname: "here"}}, {Id: "w"}},
			Secrets:  []*api.Secret{{Id: "s"}},
		},
	}
	backup.Adapt(state, false, time.Now())
	log := slog.New(slog.DiscardHandler)
	if err := replica.Restore(filepath.Join(root, "swarm", "raft"), keys, certs[0].Subject.CommonName, saved.AdvertiseAddr, state, 70, log); err != nil {
		t.Fatal(err)
	}
	return certs[0].Subject.CommonName
}

func TestExamine(t *testing.T) {
	root, kek := t.TempDir(), bytes.Repeat([]byte{5}, pki.KEKLength)
	if f, err := Examine(root, ""); err != nil || f.InSwarm || len(f.Damage) > 0 || f.Running {
		t.Errorf("an empty directory: %+v, %v", f, err)
	}
	if _, err := Examine(filepath.Join(root, "none"), ""); err == nil {
		t.Error("a missing directory was examined")
	}
	nodeID := aDisk(t, root, kek)
	before := listing(t, root)
	f, err := Examine(root, "")
	if err != nil || !f.InSwarm || !f.Manager || f.NodeID != nodeID || f.Addr != "10.0.0.9:2377" || !f.Locked || f.Opened || f.KEKVersion != 7 || len(f.Damage) > 0 {
		t.Fatalf("locked: %+v, %v", f, err)
	}
	if l := f.Log; l == nil || l.SnapshotIndex != 70 || l.Commit != 70 || l.Last != 70 || l.Term != 1 || l.Voters != 1 || len(l.Members) > 0 || l.Objects != nil {
		t.Errorf("a locked log: %+v", l)
	}
	f, err = Examine(root, pki.EncodeUnlockKey(kek))
	if err != nil || !f.Opened || len(f.Damage) > 0 {
		t.Fatalf("opened: %+v, %v", f, err)
	}
	if l := f.Log; len(l.Members) != 1 || l.Members[0].NodeID != nodeID || l.Members[0].Hostname != "here" || l.Objects["node"] != 2 || l.Objects["secret"] != 1 {
		t.Errorf("an opened log: %+v", l)
	}
	rand.Read(kek)
	if _, err := Examine(root, pki.EncodeUnlockKey(kek)); !errors.Is(err, pki.ErrLocked) {
		t.Errorf("a wrong key: %v", err)
	}
	if _, err := Examine(root, "SWMKEY"); err == nil {
		t.Error("no key was taken for one")
	}
	if after := listing(t, root); after != before {
		t.Errorf("looking changed\n%s to\n%s", before, after)
	}

	release, err := Lock(root, root)
	if err != nil {
		t.Fatal(err)
	}
	if f, err := Examine(root, ""); err != nil || !f.Running {
		t.Errorf("in use: %+v, %v", f, err)
	}
	release()
	if f, err := Examine(root, ""); err != nil || f.Running {
		t.Errorf("not in use any more: %+v, %v", f, err)
	}
}

// What is damaged is said, and does not hide the rest.
func TestExamineDamage(t *testing.T) {
	for name, tt := range map[string]struct {
		path, content, want string
	}{
		"state":       {"swarm/docker-state.json", "{", "read swarm state"},
		"key":         {"swarm/certificates/swarm-node.key", "x", "not a PEM key"},
		"certificate": {"swarm/certificates/swarm-node.crt", "x", "read the node's certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			aDisk(t, root, nil)
			if err := os.WriteFile(filepath.Join(root, tt.path), []byte(tt.content), 0o600); err != nil {
				t.Fatal(err)
			}
			f, err := Examine(root, "")
			if err != nil || !strings.Contains(strings.Join(f.Damage, "\n"), tt.want) {
				t.Errorf("%+v, %v; want damage %q", f, err, tt.want)
			}
		})
	}
	root := t.TempDir()
	aDisk(t, root, nil)
	if err := os.Remove(filepath.Join(root, "swarm/certificates/swarm-node.crt")); err != nil {
		t.Fatal(err)
	}
	if f, err := Examine(root, ""); err != nil || f.InSwarm || len(f.Damage) != 1 {
		t.Errorf("without a certificate: %+v, %v", f, err)
	}
}

// listing names the files below a directory, with sizes and times.
func listing(t *testing.T, root string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.Walk(root, func(path string, info os.FileInfo, err error) error {
		if err == nil && !info.IsDir() {
			b.WriteString(path + " " + info.Mode().String() + " " + info.ModTime().String() + "\n")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}
