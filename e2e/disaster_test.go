package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/skep-dev/skep/core/rescue"
	"github.com/skep-dev/skep/e2e/testimage"
)

// TestDisasters loses the quorum of a locked swarm, goes on with what one manager has, and
// then with what a backup has.
func TestDisasters(t *testing.T) {
	s := newSwarm(t, 3, 1)
	m, w := s.byRole("manager"), s.byRole("worker")[0]
	s.loadImages(t)
	s.docker(t, m[0], "service", "create", "--name", "web", "--replicas", "2", "--constraint", "node.role==worker", testimage.V1)
	key := unlockKeyIn(s.docker(t, m[0], "swarm", "update", "--autolock=true"))
	s.wantRunning(t, m[0], "web", 2, 30*time.Second)
	for _, n := range m {
		s.wantSealed(t, n, true)
	}
	for _, n := range m {
		s.dev(t, "kill", n)
	}
	survivor := m[2]
	t.Run("Recover", func(t *testing.T) { testRecover(t, s, survivor, key) })
	t.Run("ForceNewCluster", func(t *testing.T) { testForceNewCluster(t, s, m, w, key) })
	t.Run("Backup", func(t *testing.T) { testBackup(t, s, m, w, key) })
}

// recover asks about a node's data root.
func (s *swarm) recover(t *testing.T, node, key string) rescue.Facts {
	t.Helper()
	args := []string{"recover", "--json", filepath.Join(s.node(t, node).Dir, "data")}
	if key != "" {
		file := filepath.Join(t.TempDir(), "key")
		if err := os.WriteFile(file, []byte(key+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--unlock-key", file)
	}
	var f rescue.Facts
	if err := json.Unmarshal([]byte(run(t, skepBinary(t), args...)), &f); err != nil {
		t.Fatal(err)
	}
	return f
}

// testRecover looks at the disk of a locked manager that does not run.
func testRecover(t *testing.T, s *swarm, n, key string) {
	before := s.keyFile(t, n)
	f := s.recover(t, n, "")
	if f.Running || !f.InSwarm || !f.Manager || !f.Locked || f.Opened || f.Log == nil || f.Log.Commit == 0 || len(f.Log.Members) > 0 || len(f.Damage) > 0 {
		t.Errorf("a locked manager's disk: %+v, log %+v", f, f.Log)
	}
	f = s.recover(t, n, key)
	if !f.Opened || f.Log == nil || len(f.Log.Members) != 3 || len(f.Damage) > 0 {
		t.Errorf("a locked manager's disk with its key: %+v, log %+v", f, f.Log)
	}
	if out, err := try(t, 10*time.Second, skepBinary(t), "recover", "--unlock-key", "/dev/null", filepath.Join(s.node(t, n).Dir, "data")); err == nil {
		t.Errorf("recover with an empty key: %s", out)
	}
	text := run(t, skepBinary(t), "recover", filepath.Join(s.node(t, n).Dir, "data"))
	for _, want := range []string{"not running", "docker swarm unlock", "--force-new-cluster --advertise-addr " + s.node(t, n).Addr} {
		if !strings.Contains(text, want) {
			t.Errorf("skep recover does not say %q:\n%s", want, text)
		}
	}
	if string(s.keyFile(t, n)) != string(before) {
		t.Error("looking changed the key file")
	}
}

// testForceNewCluster goes on with one locked manager of three.
func testForceNewCluster(t *testing.T, s *swarm, m []string, w, key string) {
	n := m[2]
	s.dev(t, "start", n)
	s.wantState(t, n, "locked")
	s.wantRefused(t, n, lockedText, "swarm", "init", "--force-new-cluster")
	if err := s.unlock(t, n, key); err != nil {
		t.Fatal(err)
	}
	s.wantRefused(t, n, "The swarm does not have a leader", "service", "ls")
	addr := s.node(t, n).Addr
	out := s.docker(t, n, "swarm", "init", "--force-new-cluster", "--advertise-addr", addr)
	if !strings.Contains(out, "is now a manager") || !strings.Contains(out, addr+":2377") {
		t.Errorf("swarm init --force-new-cluster: %s", out)
	}
	if got := s.docker(t, n, "swarm", "unlock-key", "-q"); got != key {
		t.Errorf("the unlock key became %q", got)
	}
	s.docker(t, n, "service", "update", "--detach", "--env-add", "AFTER=force", "web")
	s.wantReady(t, n, w)
	s.wantRunning(t, n, "web", 2, 40*time.Second)
	// The lost ones are removed, and come back as new nodes.
	for _, lost := range m[:2] {
		s.wantRefused(t, n, "can't find manager in raft memberlist", "node", "demote", lost)
		s.docker(t, n, "node", "rm", "--force", lost)
	}
	for _, lost := range m[:2] {
		s.dev(t, "start", lost)
		s.wantState(t, lost, "locked")
		s.docker(t, lost, "swarm", "leave", "--force")
	}
	s.docker(t, m[0], "swarm", "join", "--token", s.docker(t, n, "swarm", "join-token", "-q", "manager"), addr+":2377")
	s.wantSealed(t, m[0], true)
	s.docker(t, m[0], "service", "inspect", "web")
}

// testBackup saves the swarm, loses both managers for good, and restores it on a machine
// that has the address of one of them.
func testBackup(t *testing.T, s *swarm, m []string, w, key string) {
	skep, dir := skepBinary(t), t.TempDir()
	host := func(n string) string { return "unix://" + s.node(t, n).Socket }
	identity, file := filepath.Join(dir, "key"), filepath.Join(dir, "swarm.backup")
	recipient := strings.TrimSpace(run(t, skep, "backup", "keygen", "-o", identity))
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, []byte("canary-secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.docker(t, m[2], "secret", "create", "password", secret)
	// Through a follower, which holds what the leader has acknowledged.
	run(t, skep, "-H", host(m[0]), "backup", "create", "-r", recipient, "-o", file)
	if data, err := os.ReadFile(file); err != nil || len(data) == 0 || strings.Contains(string(data), "canary") || strings.Contains(string(data), "SWMTKN") {
		t.Errorf("the backup can be read, or not: %v", err)
	}
	s.docker(t, m[2], "service", "create", "--detach", "--name", "later", testimage.V1)
	for _, n := range []string{m[0], m[2]} {
		s.docker(t, n, "swarm", "leave", "--force")
	}
	other := filepath.Join(dir, "other")
	run(t, skep, "backup", "keygen", "-o", other)
	if out, err := try(t, 20*time.Second, skep, "-H", host(m[2]), "backup", "restore", "-i", other, file); err == nil || !strings.Contains(err.Error(), "is encrypted to another key") {
		t.Errorf("restore with another key: %q, %v", out, err)
	}
	out := run(t, skep, "-H", host(m[2]), "backup", "restore", "-i", identity, "--advertise-addr", s.node(t, m[2]).Addr, file)
	if !strings.Contains(out, "its only manager") {
		t.Errorf("skep backup restore: %s", out)
	}
	if out, err := try(t, 20*time.Second, skep, "-H", host(m[2]), "backup", "restore", "-i", identity, file); err == nil || !strings.Contains(err.Error(), "already part of a swarm") {
		t.Errorf("restore on a member: %q, %v", out, err)
	}
	s.wantSealed(t, m[2], true)
	if got := s.docker(t, m[2], "swarm", "unlock-key", "-q"); got != key {
		t.Errorf("the unlock key of the restored swarm is %q", got)
	}
	s.wantReady(t, m[2], w)
	s.wantRunning(t, m[2], "web", 2, 40*time.Second)
	s.wantRefused(t, m[2], "no such service: later", "service", "inspect", "later")
	// The secret's value came along.
	s.docker(t, m[2], "service", "update", "--secret-add", "password", "--detach", "web")
	eventually(t, 40*time.Second, "a task has the secret", func() string {
		for id := range strings.FieldsSeq(s.docker(t, w, "ps", "-q", "--filter", "label=com.docker.swarm.service.name=web")) {
			if out, err := s.tryDocker(t, 10*time.Second, w, "exec", id, "cat", "/run/secrets/password"); err == nil && out == "canary-secret" {
				return ""
			}
		}
		return "none yet"
	})
	// It survives a restart like any other.
	s.dev(t, "kill", m[2])
	s.dev(t, "start", m[2])
	s.wantState(t, m[2], "locked")
	if err := s.unlock(t, m[2], key); err != nil {
		t.Fatal(err)
	}
	s.wantState(t, m[2], "active")
	s.docker(t, m[0], "swarm", "join", "--token", s.docker(t, m[2], "swarm", "join-token", "-q", "manager"), s.node(t, m[2]).Addr+":2377")
	s.wantManagers(t, 2, []string{m[0], m[2]})
}
