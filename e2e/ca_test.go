package e2e

import (
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/e2e/testimage"
)

// TestCA replaces the root certificate of a swarm under a running service: with all nodes
// up, with one off, with one that never comes back, and by a root that was brought.
func TestCA(t *testing.T) {
	s := newSwarm(t, 3, 2)
	s.loadImages(t)
	m, other := "m1", "m2"
	s.docker(t, m, "service", "create", "--detach", "--name", "steady", "--replicas", "10", testimage.V1)
	before := s.wantRunning(t, m, "steady", 10, 60*time.Second)
	oldTokens, oldRoot, oldIssuers := s.joinTokens(t, m), s.docker(t, m, "swarm", "ca"), s.issuers(t, m)

	// The client waits for the end and shows the way there.
	out := s.docker(t, m, "swarm", "ca", "--rotate")
	newRoot := s.docker(t, m, "swarm", "ca")
	if !strings.Contains(out, newRoot) || !strings.Contains(out, "desired root digest: sha256:") || newRoot == oldRoot {
		t.Errorf("rotation says %q, the root is\n%s", out, newRoot)
	}
	s.wantIssuers(t, other, oldIssuers)
	for role, token := range s.joinTokens(t, m) {
		if token == oldTokens[role] {
			t.Errorf("the token of a %s did not change", role)
		}
	}

	// A node that is off is named, holds the rotation up, and ends it when it returns.
	oldIssuers = s.issuers(t, m)
	s.dev(t, "kill", "w2")
	s.docker(t, m, "swarm", "ca", "--rotate", "--detach", "--quiet")
	s.wantWaiting(t, m, "w2")
	if out := s.docker(t, m, "info", "--format", "{{.Swarm.Cluster.RootRotationInProgress}}"); out != "true" {
		t.Errorf("the rotation is under way without w2: %s", out)
	}
	s.dev(t, "start", "w2")
	s.wantRotated(t, m)
	s.wantIssuers(t, other, oldIssuers)

	// One that does not return is removed, and is then out for good.
	s.dev(t, "kill", "w2")
	s.docker(t, m, "swarm", "ca", "--rotate", "--detach")
	s.wantWaiting(t, m, "w2")
	s.docker(t, m, "node", "rm", "--force", "w2")
	s.wantRotated(t, m)
	s.dev(t, "start", "w2")
	s.docker(t, "w2", "swarm", "leave", "--force")
	addr := s.node(t, m).Addr + ":2377"
	s.wantRefused(t, "w2", "remote CA does not match fingerprint", "swarm", "join", "--token", oldTokens["worker"], addr)
	s.docker(t, "w2", "swarm", "join", "--token", s.joinTokens(t, m)["worker"], addr)

	// A root that was brought, and certificates that live as long as asked.
	brought, stranger := s.newRoot(t), s.newRoot(t)
	s.wantRefused(t, m, "the CA key does not belong to the CA certificate", "swarm", "ca", "--rotate", "--ca-cert", brought.cert, "--ca-key", stranger.key)
	s.docker(t, m, "swarm", "ca", "--rotate", "--ca-cert", brought.cert, "--ca-key", brought.key, "--cert-expiry", "48h", "--quiet")
	if shown := s.docker(t, m, "swarm", "ca"); shown != strings.TrimSpace(string(brought.root.CertPEM)) {
		t.Errorf("the root is not the one that was brought:\n%s", shown)
	}
	leaf := s.certificate(t, other)
	if err := leaf.CheckSignatureFrom(brought.root.Certs[0]); err != nil || time.Until(leaf.NotAfter) > 48*time.Hour {
		t.Errorf("the certificate of %s ends %v: %v", other, leaf.NotAfter, err)
	}

	// No task was restarted for any of this, but those of the node that was off.
	up, err := s.running(t, other, "steady")
	if err != nil {
		t.Fatal(err)
	}
	for _, one := range before {
		if one.Node != "w2" && !slices.ContainsFunc(up, func(u task) bool { return u.ID == one.ID }) {
			t.Errorf("task %s on %s did not survive", one.Name, one.Node)
		}
	}
}

// aRoot is a root certificate that somebody made elsewhere.
type aRoot struct {
	root      *pki.Root
	cert, key string // files
}

func (s *swarm) newRoot(t *testing.T) aRoot {
	t.Helper()
	root, err := pki.NewRoot(rand.Reader, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	r := aRoot{root: root, cert: filepath.Join(dir, "ca.pem"), key: filepath.Join(dir, "ca.key")}
	if err := errors.Join(os.WriteFile(r.cert, root.CertPEM, 0o600), os.WriteFile(r.key, root.KeyPEM, 0o600)); err != nil {
		t.Fatal(err)
	}
	return r
}

// certificate returns a node's certificate as it lies on its disk.
func (s *swarm) certificate(t *testing.T, node string) *x509.Certificate {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(s.node(t, node).Dir, "data", "swarm", "certificates", "swarm-node.crt"))
	if err != nil {
		t.Fatal(err)
	}
	chain, err := pki.ParseCerts(data)
	if err != nil {
		t.Fatal(err)
	}
	return chain[0]
}

func (s *swarm) joinTokens(t *testing.T, m string) map[string]string {
	t.Helper()
	return map[string]string{
		"worker":  s.docker(t, m, "swarm", "join-token", "-q", "worker"),
		"manager": s.docker(t, m, "swarm", "join-token", "-q", "manager"),
	}
}

// issuers returns the public key of the issuer of every node's certificate, by host name.
func (s *swarm) issuers(t *testing.T, m string) map[string]string {
	t.Helper()
	ids := strings.Fields(s.docker(t, m, "node", "ls", "-q"))
	out := s.docker(t, m, append([]string{"node", "inspect"}, ids...)...)
	var nodes []struct {
		Description struct {
			Hostname string
			TLSInfo  struct{ CertIssuerPublicKey string }
		}
	}
	if err := json.Unmarshal([]byte(out), &nodes); err != nil {
		t.Fatal(err)
	}
	issuers := map[string]string{}
	for _, n := range nodes {
		issuers[n.Description.Hostname] = n.Description.TLSInfo.CertIssuerPublicKey
	}
	return issuers
}

// wantIssuers checks that all nodes have an issuer in common that none had before.
func (s *swarm) wantIssuers(t *testing.T, m string, before map[string]string) {
	t.Helper()
	now := s.issuers(t, m)
	if len(now) != len(before) || len(slices.Compact(slices.Sorted(maps.Values(now)))) != 1 {
		t.Errorf("the issuers are %v", now)
	}
	for host, issuer := range now {
		if issuer == before[host] {
			t.Errorf("the certificate of %s is from the old root", host)
		}
	}
}

// wantWaiting waits until a rotation waits for exactly one node, and skep status says so.
func (s *swarm) wantWaiting(t *testing.T, m, node string) {
	t.Helper()
	eventually(t, 30*time.Second, "only "+node+" needs rotation", func() string {
		out := s.docker(t, m, "node", "ls", "--format", "{{.Hostname}} {{.TLSStatus}}")
		if strings.Count(out, "Needs Rotation") != 1 || !strings.Contains(out, node+" Needs Rotation") {
			return out
		}
		return ""
	})
	eventually(t, 10*time.Second, "skep status says so", func() string {
		out, err := try(t, 10*time.Second, skepBinary(t), "status", "-H", "unix://"+s.node(t, m).Socket)
		if !strings.Contains(out, "root certificate is being replaced") || !strings.Contains(out, node) {
			return fmt.Sprint(out, err)
		}
		return ""
	})
}

// wantRotated waits for the end of a rotation.
func (s *swarm) wantRotated(t *testing.T, m string) {
	t.Helper()
	eventually(t, 30*time.Second, "the rotation ends", func() string {
		if s.docker(t, m, "info", "--format", "{{.Swarm.Cluster.RootRotationInProgress}}") != "false" {
			return s.docker(t, m, "node", "ls", "--format", "{{.Hostname}} {{.TLSStatus}}")
		}
		return ""
	})
}
