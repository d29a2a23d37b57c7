package e2e

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/skep-dev/skep/e2e/testimage"
)

const (
	lockedText = `Swarm is encrypted and needs to be unlocked before it can be used. Please use "docker swarm unlock" to unlock it.`
	wrongKey   = "SWMKEY-1-AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"
)

// objectNames are names that the audit log holds, which is about them.
func objectNames() []string { return []string{"canary-service", "canary-network", "canary-name"} }

// canaries are what a locked manager's disk must not show.
func canaries() []string {
	return []string{
		"canary-name",
		"canary-secret", "canary-config", "canary-label", "canary-container-label", "canary-env", "canary-service", "canary-network",
		"BEGIN PRIVATE KEY", "BEGIN EC PRIVATE KEY", "SWMTKN-1-", "SWMKEY-1-",
	}
}

// TestLock takes three managers through the life of a locked swarm: locked while it runs,
// unlocked after a restart, keys rotated while one of them is down, and opened again.
func TestLock(t *testing.T) {
	s := newSwarm(t, 3, 0)
	m := s.byRole("manager")
	s.loadImages(t)
	s.makeCanaries(t, m[0])
	oldKeys := s.keyFiles(t)

	if out := s.docker(t, m[0], "info", "--format", "{{.Swarm.Cluster.Spec.EncryptionConfig.AutoLockManagers}}"); out != "false" {
		t.Errorf("autolock is %s at first", out)
	}
	out := s.docker(t, m[1], "swarm", "update", "--autolock=true")
	first := unlockKeyIn(out)
	if first == "" || !strings.Contains(out, "docker swarm unlock") {
		t.Fatalf("swarm update --autolock: %q", out)
	}
	for _, n := range m {
		if got := s.docker(t, n, "swarm", "unlock-key", "-q"); got != first {
			t.Errorf("unlock key on %s is %q, want %q", n, got, first)
		}
		s.wantSealed(t, n, true)
	}
	s.wantRefused(t, m[0], "swarm is not locked", "swarm", "unlock")
	// What lay readable before is replaced: the keys of the logs, private keys.
	for _, n := range m {
		s.wantNothingReadable(t, n, append(canaries(), oldKeys...))
	}

	t.Run("Restart", func(t *testing.T) { testRestartLocked(t, s, m, first) })
	second := ""
	t.Run("RotateWhileDown", func(t *testing.T) { second = testRotateWhileDown(t, s, m, first) })
	if second == "" {
		return
	}
	t.Run("Peers", func(t *testing.T) { testPeers(t, s, m, second) })
	t.Run("Shares", func(t *testing.T) { testShares(t, s, m[1], m[0]) })
	t.Run("NewManagers", func(t *testing.T) { testLockedMembership(t, s, m, second) })
	t.Run("Off", func(t *testing.T) {
		s.docker(t, m[2], "swarm", "update", "--autolock=false")
		for _, n := range m {
			s.wantSealed(t, n, false)
		}
		s.wantRefused(t, m[0], "no unlock key is set", "swarm", "unlock-key")
		s.dev(t, "kill", m[0])
		s.dev(t, "start", m[0])
		s.wantState(t, m[0], "active")
	})
}

// testRestartLocked restarts a manager, which waits for the key, and for the right one.
func testRestartLocked(t *testing.T, s *swarm, m []string, key string) {
	n := m[1]
	before := s.docker(t, n, "ps", "-q", "--no-trunc")
	s.dev(t, "kill", n)
	s.wantNothingReadable(t, n, canaries())
	s.dev(t, "start", n)
	s.wantState(t, n, "locked")
	s.wantNothingReadable(t, n, canaries())
	if out := s.docker(t, n, "info", "--format", "{{.Swarm.NodeID}}{{.Swarm.ControlAvailable}}"); out != "false" {
		t.Errorf("a locked node says %q of itself", out)
	}
	if out := s.docker(t, n, "info"); !strings.Contains(out, "Swarm: locked") {
		t.Errorf("docker info on a locked node: %s", out)
	}
	for _, command := range [][]string{
		{"node", "ls"},
		{"service", "ls"},
		{"secret", "ls"},
		{"swarm", "ca"},
		{"swarm", "update", "--autolock=false"},
		{"swarm", "unlock-key"},
		{"swarm", "join-token", "worker"},
		{"stack", "ls"},
		{"service", "create", testimage.V1},
	} {
		s.wantRefused(t, n, lockedText, command...)
	}
	s.wantRefused(t, n, "Swarm is encrypted and locked. Please unlock it first or use `--force` to ignore this message.", "swarm", "leave")
	if err := s.unlock(t, n, wrongKey); err == nil || !strings.Contains(err.Error(), "swarm could not be unlocked: invalid key provided") {
		t.Errorf("unlocking by a wrong key: %v", err)
	}
	if err := s.unlock(t, n, "SWMKEY-1-x"); err == nil || !strings.Contains(err.Error(), "invalid key string") {
		t.Errorf("unlocking by no key: %v", err)
	}
	s.wantState(t, n, "locked")
	if err := s.unlock(t, n, key); err != nil {
		t.Fatal(err)
	}
	s.wantState(t, n, "active")
	s.wantManagers(t, 3, m)
	if after := s.docker(t, n, "ps", "-q", "--no-trunc"); before == "" || !strings.Contains(after, before) {
		t.Errorf("containers %q were %q before the lock", after, before)
	}
}

// testRotateWhileDown rotates the key while a manager is down: that one still opens with
// the old key, and is sealed with the new one when it has caught up.
func testRotateWhileDown(t *testing.T, s *swarm, m []string, first string) string {
	n := m[2]
	s.dev(t, "kill", n)
	second := s.docker(t, m[0], "swarm", "unlock-key", "-q", "--rotate")
	if second == first || !strings.HasPrefix(second, "SWMKEY-1-") {
		t.Fatalf("the rotated key is %q", second)
	}
	s.dev(t, "start", n)
	s.wantState(t, n, "locked")
	before := s.keyFile(t, n)
	if err := s.unlock(t, n, second); err == nil {
		t.Error("a key that this node cannot know opened it")
	}
	if err := s.unlock(t, n, first); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, n+" is sealed with the new key", func() string {
		if bytes.Equal(s.keyFile(t, n), before) {
			return "its key file is the old one"
		}
		return ""
	})
	s.dev(t, "kill", n)
	s.dev(t, "start", n)
	s.wantState(t, n, "locked")
	if err := s.unlock(t, n, first); err == nil {
		t.Error("the old key opens a node that has caught up")
	}
	if err := s.unlock(t, n, second); err != nil {
		t.Fatal(err)
	}
	s.wantState(t, n, "active")
	s.wantManagers(t, 3, m)
	return second
}

// testShares unlocks with two of three shares of the key.
func testShares(t *testing.T, s *swarm, n, other string) {
	skep := skepBinary(t)
	shares := strings.Fields(run(t, skep, "-H", "unix://"+s.node(t, other).Socket, "lock", "share", "-n", "3", "-m", "2"))
	if len(shares) != 3 {
		t.Fatalf("shares %q", shares)
	}
	s.dev(t, "kill", n)
	s.dev(t, "start", n)
	s.wantState(t, n, "locked")
	give := func(texts ...string) error {
		_, err := try(t, 30*time.Second, "sh", "-c", "printf '"+strings.Join(texts, "\\n")+"\\n' | "+skep+" -H unix://"+s.node(t, n).Socket+" unlock --provider shares")
		return err
	}
	if err := give(shares[1]); err == nil || !strings.Contains(err.Error(), "1 of the 2 shares") {
		t.Errorf("unlocking with one share: %v", err)
	}
	if err := give(shares[2], shares[0]); err != nil {
		t.Fatal(err)
	}
	s.wantState(t, n, "active")
}

// testPeers lets running managers unlock a restarted one, and no longer.
func testPeers(t *testing.T, s *swarm, m []string, key string) {
	skep, n := skepBinary(t), m[1]
	peers := func(what string) string {
		t.Helper()
		return run(t, skep, "-H", "unix://"+s.node(t, m[0]).Socket, "lock", "peers", what)
	}
	credential := filepath.Join(s.node(t, n).Dir, "data/swarm/certificates/unlock-peers")
	if out := peers("status"); !strings.HasPrefix(out, "off") {
		t.Errorf("at first: %s", out)
	}
	peers("on")
	registered := func() {
		t.Helper()
		eventually(t, 20*time.Second, "all managers are registered", func() string {
			if out := peers("status"); !strings.Contains(out, "3 managers registered") {
				return out
			}
			return ""
		})
	}
	registered()
	first, err := os.ReadFile(credential)
	if err != nil {
		t.Fatal(err)
	}
	s.dev(t, "kill", n)
	s.wantNothingReadable(t, n, append(canaries(), key))
	s.dev(t, "start", n)
	s.wantState(t, n, "active")
	s.wantManagers(t, 3, m)
	registered()
	if next, err := os.ReadFile(credential); err != nil || bytes.Equal(next, first) {
		t.Errorf("the credential stayed the same (%v)", err)
	}
	// A used credential unlocks nothing.
	s.dev(t, "kill", n)
	if err := os.WriteFile(credential, first, 0o600); err != nil {
		t.Fatal(err)
	}
	s.dev(t, "start", n)
	eventually(t, 20*time.Second, n+" says why it stays locked", func() string {
		out, err := s.tryDocker(t, 10*time.Second, n, "info", "--format", "{{.Swarm.LocalNodeState}} {{.Swarm.Error}}")
		if err != nil || !strings.HasPrefix(out, "locked ") || !strings.Contains(out, "it was used, replaced, or never registered") {
			return out + text(err)
		}
		return ""
	})
	if err := s.unlock(t, n, key); err != nil {
		t.Fatal(err)
	}
	s.wantState(t, n, "active")
	s.wantManagers(t, 3, m)
	peers("off")
	eventually(t, 20*time.Second, "the credential is deleted", func() string {
		_, err := os.Stat(credential)
		if !errors.Is(err, fs.ErrNotExist) {
			return credential + " is there" + text(err)
		}
		return ""
	})
	s.dev(t, "kill", n)
	s.dev(t, "start", n)
	s.wantState(t, n, "locked")
	if err := s.unlock(t, n, key); err != nil {
		t.Fatal(err)
	}
	s.wantState(t, n, "active")
	s.wantManagers(t, 3, m)
}

// testLockedMembership demotes a manager, whose key file opens then, and promotes it, which
// seals it at once.
func testLockedMembership(t *testing.T, s *swarm, m []string, key string) {
	n := m[2]
	s.docker(t, m[0], "node", "demote", n)
	s.wantWorker(t, n)
	s.wantSealed(t, n, false)
	s.dev(t, "kill", n)
	s.dev(t, "start", n)
	s.wantState(t, n, "active") // workers are not locked
	s.docker(t, m[0], "node", "promote", n)
	s.wantManagers(t, 3, m)
	s.wantSealed(t, n, true)
	s.dev(t, "kill", n)
	s.dev(t, "start", n)
	s.wantState(t, n, "locked")
	if err := s.unlock(t, n, key); err != nil {
		t.Fatal(err)
	}
	s.wantState(t, n, "active")
	s.wantManagers(t, 3, m)
}

// makeCanaries fills the swarm with what must not be readable, and runs it on every node.
func (s *swarm) makeCanaries(t *testing.T, m string) {
	t.Helper()
	for kind, value := range map[string]string{"secret": "canary-secret", "config": "canary-config"} {
		file := filepath.Join(t.TempDir(), kind)
		if err := os.WriteFile(file, []byte(value), 0o600); err != nil {
			t.Fatal(err)
		}
		s.docker(t, m, kind, "create", "--label", "canary-label=yes", "canary-name-"+kind, file)
	}
	s.docker(t, m, "network", "create", "-d", "overlay", "canary-network")
	s.docker(t, m, "service", "create", "--name", "canary-service", "--mode", "global", "--label", "canary-label=yes", "--network", "canary-network",
		"--container-label", "canary-container-label=yes", "--env", "E=canary-env", "--secret", "canary-name-secret", "--config", "canary-name-config",
		testimage.V1)
	s.wantRunning(t, m, "canary-service", len(s.nodes), 30*time.Second)
}

// unlock gives a node its key as a person does.
func (s *swarm) unlock(t *testing.T, node, key string) error {
	t.Helper()
	_, err := try(t, 30*time.Second, "sh", "-c", "echo "+key+" | docker -H unix://"+s.node(t, node).Socket+" swarm unlock")
	return err
}

func (s *swarm) wantState(t *testing.T, node, want string) {
	t.Helper()
	eventually(t, 30*time.Second, node+" is "+want, func() string {
		out, err := s.tryDocker(t, 10*time.Second, node, "info", "--format", "{{.Swarm.LocalNodeState}} {{.Swarm.Error}}")
		if err != nil || !strings.HasPrefix(out, want+" ") {
			return out + text(err)
		}
		return ""
	})
}

func (s *swarm) keyFile(t *testing.T, node string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(s.node(t, node).Dir, "data/swarm/certificates/swarm-node.key"))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// wantSealed waits until a node's key file is sealed, or open.
func (s *swarm) wantSealed(t *testing.T, node string, want bool) {
	t.Helper()
	eventually(t, 20*time.Second, "the key file follows", func() string {
		key := string(s.keyFile(t, node))
		if strings.Contains(key, "BEGIN ENCRYPTED PRIVATE KEY") != want || strings.Contains(key, "BEGIN PRIVATE KEY") == want {
			return key
		}
		return ""
	})
}

// keyFiles returns a line of each node's private key and its data keys, as they are on the
// disk in the clear.
func (s *swarm) keyFiles(t *testing.T) []string {
	t.Helper()
	var lines []string
	for _, n := range s.nodes {
		for line := range strings.Lines(string(s.keyFile(t, n.Name))) {
			line = strings.TrimSpace(line)
			if _, key, ok := strings.Cut(line, "raft-dek: "); ok {
				lines = append(lines, key)
			} else if len(line) == 64 && !strings.Contains(line, ": ") {
				lines = append(lines, line)
			}
		}
	}
	if len(lines) < 2*len(s.nodes) {
		t.Fatalf("key files hold %q", lines)
	}
	return lines
}

// wantNothingReadable waits until no file of a node's data shows any of words.
func (s *swarm) wantNothingReadable(t *testing.T, node string, words []string) {
	t.Helper()
	root := filepath.Join(s.node(t, node).Dir, "data")
	eventually(t, 20*time.Second, "nothing is readable on "+node, func() string {
		var found []string
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return nil //nolint:nilerr // gone in the meantime
			}
			if strings.Contains(path, "/io.containerd.content.v1.content/") || strings.Contains(path, "/io.containerd.snapshotter.v1.") {
				return nil // images
			}
			data, err := os.ReadFile(path)
			if err != nil {
				return nil //nolint:nilerr // gone in the meantime
			}
			audit := strings.HasPrefix(path, filepath.Join(root, "audit"))
			for _, w := range words {
				if audit && slices.Contains(objectNames(), w) {
					continue
				}
				if bytes.Contains(data, []byte(w)) {
					found = append(found, path+": "+w)
				}
			}
			return nil
		})
		if err != nil {
			return err.Error()
		}
		return strings.Join(found, "\n")
	})
}

// unlockKeyIn returns the unlock key that a command printed.
func unlockKeyIn(out string) string {
	for word := range strings.FieldsSeq(out) {
		if strings.HasPrefix(word, "SWMKEY-1-") {
			return word
		}
	}
	return ""
}

// programOf writes a program that runs a command.
func programOf(t *testing.T, dir, command string) string {
	t.Helper()
	path := filepath.Join(dir, "program")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+command+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestInitLocked begins a swarm that is locked from the start, and gives up one whose key
// is lost.
func TestInitLocked(t *testing.T) {
	d := newDaemon(t)
	d.start(t)
	address := []string{"--advertise-addr", "127.0.0.1", "--listen-addr", freePort(t)}
	out := d.docker(t, append([]string{"swarm", "init", "--autolock"}, address...)...)
	key := unlockKeyIn(out)
	if key == "" || d.docker(t, "swarm", "unlock-key", "-q") != key {
		t.Fatalf("swarm init --autolock: %s", out)
	}
	d.docker(t, "node", "update", "--label-add", "canary-node=yes", d.docker(t, "node", "ls", "-q"))
	d.stop(t, syscall.SIGTERM)
	d.start(t)
	state := func(want string) {
		t.Helper()
		if got := d.docker(t, "info", "--format", "{{.Swarm.LocalNodeState}}"); got != want {
			t.Fatalf("the node is %s, want %s", got, want)
		}
	}
	state("locked")
	d.stop(t, syscall.SIGKILL)
	d.start(t)
	state("locked")
	run(t, "sh", "-c", "echo "+key+" | docker -H unix://"+d.socket()+" swarm unlock")
	if out := d.docker(t, "node", "inspect", "self", "--format", "{{.Spec.Labels}} {{.ManagerStatus.Leader}}"); out != "map[canary-node:yes] true" {
		t.Errorf("after unlocking the node is %s", out)
	}
	// A program that keeps the key unlocks the daemon by itself; one that fails is asked again.
	d.stop(t, syscall.SIGTERM)
	given := filepath.Join(d.dir, "given")
	program := programOf(t, d.dir, `grep -q '"op":"unlock","cluster_id":".*","node_id":".*","kek_version":[0-9]' && cat `+given)
	d.start(t, "--unlock-provider", "exec:"+program)
	state("locked")
	if err := os.WriteFile(given, []byte(key+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "the provider unlocks", func() string {
		if out := d.docker(t, "info", "--format", "{{.Swarm.LocalNodeState}} {{.Swarm.ControlAvailable}}"); out != "active true" {
			return out
		}
		return ""
	})
	d.stop(t, syscall.SIGTERM)
	d.start(t)
	state("locked")
	if out, err := try(t, 10*time.Second, skepBinary(t), "-H", "unix://"+d.socket(), "unlock", "--provider", "exec:/bin/false"); err == nil {
		t.Errorf("unlocked by /bin/false: %s", out)
	}
	run(t, skepBinary(t), "-H", "unix://"+d.socket(), "unlock", "--provider", "exec:"+programOf(t, d.dir, "cat "+given))
	state("active")
	d.stop(t, syscall.SIGTERM)
	d.start(t)
	state("locked")
	d.docker(t, "swarm", "leave", "--force")
	state("inactive")
	d.docker(t, append([]string{"swarm", "init"}, address...)...)
	state("active")
	d.docker(t, "swarm", "leave", "--force")
}
