package e2e

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/exec"
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

	// The client waits for the end and shows the way there; others work on meanwhile.
	var out string
	s.whileWriting(t, other, "steady", func() { out = s.docker(t, m, "swarm", "ca", "--rotate") })
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

// whileWriting does something while a client changes a service without end. No change may
// be refused or take long, and no node may be lost.
func (s *swarm) whileWriting(t *testing.T, m, service string, do func()) {
	t.Helper()
	stop, done := make(chan struct{}), make(chan struct{})
	turns := 0
	var wrong []string
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			turns++
			if _, err := s.tryDocker(t, 5*time.Second, m, "service", "update", "--detach", "--label-add", fmt.Sprint("turn=", turns), service); err != nil {
				wrong = append(wrong, err.Error())
			}
			nodes, err := s.tryDocker(t, 5*time.Second, m, "node", "ls", "--format", "{{.Hostname}} {{.Status}} {{.ManagerStatus}}")
			if err != nil || strings.Contains(nodes, "Down") || strings.Contains(nodes, "Unreachable") {
				wrong = append(wrong, fmt.Sprint(nodes, err))
			}
		}
	}()
	do()
	close(stop)
	<-done
	if turns < 3 || len(wrong) > 0 {
		t.Errorf("of %d changes meanwhile these went wrong: %q", turns, wrong)
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

// signer is a real cfssl server in the network of a node, with mutual TLS.
type signer struct {
	t    *testing.T
	pid  int // of a process in the network
	args []string
	cmd  *exec.Cmd
	url  string
}

// newSigner prepares a server that signs with a root and lets those in who have a
// certificate from one of the trusted roots.
func (s *swarm) newSigner(t *testing.T, node string, ca aRoot, trusted string) *signer {
	t.Helper()
	n := s.node(t, node)
	dir := t.TempDir()
	key, err := pki.NewKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	keyPEM, err := pki.EncodeKey(key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.ParseIP(n.Addr)},
	}, ca.root.Certs[0], key.Public(), ca.root.Key)
	if err != nil {
		t.Fatal(err)
	}
	const config = `{"signing": {
  "default": {"usages": ["signing", "key encipherment", "server auth", "client auth"], "expiry": "720h"},
  "profiles": {"CA": {"usages": ["cert sign", "crl sign"], "expiry": "87600h", "ca_constraint": {"is_ca": true}, "allowed_extensions": ["2.5.29.19"]}}}}`
	for name, data := range map[string][]byte{
		"config.json": []byte(config), "server.key": keyPEM, "trusted.pem": []byte(trusted),
		"server.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	g := &signer{t: t, pid: n.PID, url: "https://" + n.Addr + ":8888/api/v1/cfssl/sign"}
	g.args = []string{
		"cfssl", "serve", "-address", n.Addr, "-port", "8888", "-config", filepath.Join(dir, "config.json"), "-ca", ca.cert, "-ca-key", ca.key,
		"-tls-cert", filepath.Join(dir, "server.pem"), "-tls-key", filepath.Join(dir, "server.key"), "-mutual-tls-ca", filepath.Join(dir, "trusted.pem"),
	}
	t.Cleanup(g.stop)
	return g
}

func (g *signer) start() {
	g.t.Helper()
	g.cmd = exec.Command("nsenter", append([]string{"--net=/proc/" + fmt.Sprint(g.pid) + "/ns/net"}, g.args...)...)
	var out bytes.Buffer
	g.cmd.Stdout, g.cmd.Stderr = &out, &out
	if err := g.cmd.Start(); err != nil {
		g.t.Fatal(err)
	}
	u, err := url.Parse(g.url)
	if err != nil {
		g.t.Fatal(err)
	}
	eventually(g.t, 20*time.Second, "cfssl listens", func() string {
		host, port, _ := strings.Cut(u.Host, ":")
		return text(exec.Command("nsenter", "--net=/proc/"+fmt.Sprint(g.pid)+"/ns/net", "bash", "-c", "</dev/tcp/"+host+"/"+port).Run())
	})
}

func (g *signer) stop() {
	if g.cmd == nil {
		return
	}
	_ = g.cmd.Process.Kill()
	_ = g.cmd.Wait()
	g.cmd = nil
}

// TestExternalCA hands a swarm's root to a real cfssl server and takes it back.
func TestExternalCA(t *testing.T) {
	s := newSwarm(t, 1, 2)
	if _, err := exec.LookPath("cfssl"); err != nil {
		t.Fatal("install Debian's golang-cfssl: tools/deps.sh cfssl:golang-cfssl")
	}
	const m = "m1"
	ca := s.newRoot(t)
	signer := s.newSigner(t, m, ca, s.docker(t, m, "swarm", "ca")+"\n"+string(ca.root.CertPEM))
	external := "protocol=cfssl,url=" + signer.url + ",cacert=" + ca.cert
	rotate := []string{"swarm", "ca", "--rotate", "--ca-cert", ca.cert, "--external-ca", external, "--quiet"}
	s.wantRefused(t, m, "no external CA can be reached", rotate...)
	s.wantRefused(t, m, "must begin with https://", "swarm", "update", "--external-ca", "protocol=cfssl,url=http://10.0.0.1/")
	signer.start()
	s.docker(t, m, rotate...)
	for _, node := range []string{m, "w1", "w2"} {
		leaf := s.certificate(t, node)
		if err := leaf.CheckSignatureFrom(ca.root.Certs[0]); err != nil || time.Until(leaf.NotAfter) > 721*time.Hour {
			t.Errorf("the certificate of %s ends %v: %v", node, leaf.NotAfter, err)
		}
	}
	// Without the server nobody gets a certificate, and all others go on.
	signer.stop()
	s.docker(t, m, "node", "promote", "w1")
	eventually(t, 20*time.Second, "skep status or the log says why w1 is no manager", func() string {
		data, err := os.ReadFile(filepath.Join(s.node(t, m).Dir, "daemon.log"))
		if err != nil || !strings.Contains(string(data), "certificates not signed, trying again") {
			return fmt.Sprint("the log does not: ", err)
		}
		return ""
	})
	signer.start()
	s.wantManagers(t, 2, []string{m, "w1"})
	// Back to a root of the swarm's own, which the server signs for the time of the change.
	s.docker(t, m, "swarm", "ca", "--rotate", "--quiet")
	signer.stop()
	s.docker(t, m, "node", "demote", "w1")
	s.wantWorker(t, "w1")
}

// TestLimitedTokens admits nodes by tokens that end by themselves, with the plain docker
// client, and lets nobody in after that.
func TestLimitedTokens(t *testing.T) {
	s := newSwarm(t, 1, 2)
	const m = "m1"
	addr := s.node(t, m).Addr + ":2377"
	skep := func(args ...string) string {
		return run(t, skepBinary(t), append([]string{"-H", "unix://" + s.node(t, m).Socket}, args...)...)
	}
	create := func(args ...string) (token, id string) {
		var made struct {
			Token string `json:"token"`
			Info  struct {
				ID string `json:"id"`
			} `json:"info"`
		}
		if err := json.Unmarshal([]byte(skep(append([]string{"--json", "token", "create"}, args...)...)), &made); err != nil {
			t.Fatal(err)
		}
		return made.Token, made.Info.ID
	}
	for _, w := range []string{"w1", "w2"} {
		s.docker(t, w, "swarm", "leave")
	}
	once, id := create("--role", "manager", "--ttl", "1h", "--uses", "1", "--label", "site=lab")
	s.docker(t, "w1", "swarm", "join", "--token", once, addr)
	s.wantManagers(t, 2, []string{m, "w1"})
	s.wantRefused(t, "w2", "it has been used up", "swarm", "join", "--token", once, addr)
	if out := skep("token", "ls"); !strings.Contains(out, id[:12]) || !strings.Contains(out, "1/1") || !strings.Contains(out, "site=lab") || strings.Contains(out, once) {
		t.Errorf("token ls: %s", out)
	}
	brief, id := create("--ttl", "1s", "--uses", "0")
	eventually(t, 20*time.Second, "the token expires", func() string {
		if out := skep("token", "ls"); !strings.Contains(out, "void: it expired") {
			return out
		}
		return ""
	})
	s.wantRefused(t, "w2", "it expired", "swarm", "join", "--token", brief, addr)
	skep("token", "rm", id)
	s.wantRefused(t, "w2", "A valid join token is necessary to join this cluster", "swarm", "join", "--token", brief, addr)
	many, _ := create("--uses", "0")
	s.docker(t, "w2", "swarm", "join", "--token", many, addr)
	if state := s.docker(t, "w2", "info", "--format", "{{.Swarm.LocalNodeState}} {{.Swarm.ControlAvailable}}"); state != "active false" {
		t.Errorf("w2 is %s", state)
	}
}
