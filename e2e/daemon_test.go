package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/skep-dev/skep/e2e/testimage"
	"github.com/skep-dev/skep/platform/process"
)

// daemon is a `skep daemon` that a test starts by hand.
type daemon struct {
	dir  string // holds everything; short, for sockets lie below it
	cmd  *exec.Cmd
	done chan error
	log  string
}

func (d *daemon) socket() string { return filepath.Join(d.dir, "s") }
func (d *daemon) data() string   { return filepath.Join(d.dir, "data") }
func (d *daemon) exec() string   { return filepath.Join(d.dir, "x") }

// newDaemon returns a daemon that has not been started and is gone, with all that it
// leaves, after the test.
func newDaemon(t *testing.T) *daemon {
	t.Helper()
	skep := skepBinary(t)
	dir, err := os.MkdirTemp("/tmp", "sk") //nolint:usetesting // t.TempDir is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{dir: dir, log: filepath.Join(dir, "log")}
	t.Cleanup(func() {
		if t.Failed() {
			if data, err := os.ReadFile(d.log); err == nil {
				t.Logf("--- log of %s\n%s", dir, data[max(0, len(data)-6000):])
			}
		}
		d.stop(t, syscall.SIGUSR1)
		out, err := exec.Command(skep, "down", "--data-root", d.data(), "--exec-root", d.exec(), "--keep-data=false").CombinedOutput()
		if err != nil {
			t.Errorf("skep down: %v\n%s", err, out)
		}
		// The last of the tests takes the common parent with it.
		for _, cgroup := range []string{"/skep-e2e/" + filepath.Base(dir), "/skep-e2e"} {
			_ = process.RemoveCgroups(cgroup)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return d
}

func (d *daemon) args(more ...string) []string {
	return append([]string{
		"daemon", "--data-root", d.data(), "--exec-root", d.exec(), "-H", "unix://" + d.socket(),
		"--cgroup-parent", "/skep-e2e/" + filepath.Base(d.dir),
	}, more...)
}

// start starts the daemon and waits until it says that it is ready and answers.
func (d *daemon) start(t *testing.T, more ...string) {
	t.Helper()
	log, err := os.Create(d.log)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	d.cmd = exec.Command(skepBinary(t), d.args(more...)...)
	d.cmd.Stderr, d.cmd.SysProcAttr = log, &syscall.SysProcAttr{Setsid: true}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	d.done = make(chan error, 1)
	go func(cmd *exec.Cmd, done chan error) { done <- cmd.Wait() }(d.cmd, d.done)
	eventually(t, 30*time.Second, "the daemon is ready", func() string {
		if data, err := os.ReadFile(d.log); err != nil || !bytes.Contains(data, []byte("daemon is ready")) {
			return "it does not say so"
		}
		out, err := try(t, 5*time.Second, "curl", "-sS", "--unix-socket", d.socket(), "http://x/_ping")
		if err != nil || out != "OK" {
			return fmt.Sprint(out, err)
		}
		return ""
	})
}

// stop ends the daemon by a signal; it must end without an error.
func (d *daemon) stop(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if d.cmd == nil {
		return
	}
	if err := d.cmd.Process.Signal(sig); err != nil {
		t.Error(err)
	}
	select {
	case err := <-d.done:
		if sig != syscall.SIGKILL && err != nil {
			t.Errorf("after %s: %v", sig, err)
		}
	case <-time.After(40 * time.Second):
		t.Errorf("the daemon does not end on %s", sig)
		_ = d.cmd.Process.Kill()
		<-d.done
	}
	d.cmd = nil
}

func (d *daemon) docker(t *testing.T, args ...string) string {
	t.Helper()
	return strings.TrimSpace(run(t, "docker", append([]string{"-H", "unix://" + d.socket()}, args...)...))
}

// serve begins a swarm and a service of three tasks, and returns what pids shows of them.
func (d *daemon) serve(t *testing.T) string {
	t.Helper()
	archive := filepath.Join(t.TempDir(), "images.tar")
	if err := testimage.Write(t.Context(), archive); err != nil {
		t.Fatal(err)
	}
	d.docker(t, "load", "-i", archive)
	d.docker(t, "swarm", "init")
	d.docker(t, "service", "create", "--quiet", "--name", "web", "--replicas", "3", "--update-monitor", "100ms", testimage.V1)
	return d.wantPIDs(t, 3)
}

// wantPIDs waits for n running containers and returns their ids, processes and starts.
func (d *daemon) wantPIDs(t *testing.T, n int) string {
	t.Helper()
	var out string
	eventually(t, 40*time.Second, fmt.Sprintf("%d containers run", n), func() string {
		ids := strings.Fields(d.docker(t, "ps", "-q", "--no-trunc"))
		if len(ids) != n {
			return d.docker(t, "ps", "-a")
		}
		slices.Sort(ids)
		out = d.docker(t, append([]string{"inspect", "--format", "{{.ID}} {{.State.Pid}} {{.State.StartedAt}}"}, ids...)...)
		return ""
	})
	return out
}

func freePort(t *testing.T) string {
	t.Helper()
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// TestDaemons runs several daemons in one network namespace.
func TestDaemons(t *testing.T) {
	portA, portB := freePort(t), freePort(t)
	a, b, c := newDaemon(t), newDaemon(t), newDaemon(t)
	a.start(t, "--listen-addr", portA, "--advertise-addr", portA, "--label", "zone=a", "--runtime", "crun")
	b.start(t, "--listen-addr", portB, "--advertise-addr", portB)
	c.start(t, "--listen-addr", portB, "--advertise-addr", portB)
	if root := a.docker(t, "info", "--format", "{{.DockerRootDir}} {{.DefaultRuntime}} {{.Labels}}"); root != a.data()+" crun [zone=a]" {
		t.Errorf("docker info says %q", root)
	}
	since := fmt.Sprint(time.Now().Unix())
	ofA, ofB := a.serve(t), b.serve(t)
	past := a.docker(t, "events", "--since", since, "--until", fmt.Sprint(time.Now().Unix()+1), "--filter", "type=service", "--format", "{{.Action}}")
	if n := strings.Count(past, "create"); n != 1 {
		t.Errorf("the past holds %d creations of a service, want 1: %q", n, past)
	}
	// The port is b's.
	out, err := try(t, 30*time.Second, "docker", "-H", "unix://"+c.socket(), "swarm", "init")
	if err == nil || !strings.Contains(out, "failed to listen on remote API address: listen tcp "+portB+": bind: address already in use") {
		t.Errorf("init on a port in use: %q, %v", out, err)
	}
	if state := c.docker(t, "info", "--format", "{{.Swarm.LocalNodeState}}"); state != "inactive" {
		t.Errorf("after a refused init the node is %s", state)
	}
	// Nobody gets another's directories.
	for flag, dir := range map[string]string{"--data-root": a.data(), "--exec-root": a.exec()} {
		out, err := try(t, 30*time.Second, skepBinary(t), append(newDaemon(t).args(), flag, dir)...)
		if err == nil || !strings.Contains(out, flag) {
			t.Errorf("a second daemon with the %s of another: %q, %v", flag, out, err)
		}
	}
	for _, file := range []string{
		"docker-state.json", "state.json", "certificates/swarm-node.crt", "certificates/swarm-node.key", "certificates/swarm-root-ca.crt",
		"raft/wal-v3-encrypted", "raft/snap-v3-encrypted", "worker/tasks.db",
	} {
		if _, err := os.Stat(filepath.Join(a.data(), "swarm", file)); err != nil {
			t.Error(err)
		}
	}
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGKILL} {
		a.stop(t, sig)
		a.start(t)
		if now := a.wantPIDs(t, 3); now != ofA {
			t.Errorf("after %s and a start the containers are\n%s\nbefore\n%s", sig, now, ofA)
		}
	}
	a.stop(t, syscall.SIGTERM)
	a.start(t, "--stop-tasks")
	a.stop(t, syscall.SIGTERM)
	for line := range strings.Lines(ofA) {
		if pid := strings.Fields(line)[1]; exec.Command("kill", "-0", pid).Run() == nil {
			t.Errorf("process %s outlived --stop-tasks", pid)
		}
	}
	a.start(t)
	if now := a.wantPIDs(t, 3); now == ofA {
		t.Error("the tasks were not stopped with the daemon")
	}
	if now := b.wantPIDs(t, 3); now != ofB {
		t.Errorf("the containers of another daemon are\n%s\nbefore\n%s", now, ofB)
	}
}

// TestReload replaces the certificate of a tcp host.
func TestReload(t *testing.T) {
	d := newDaemon(t)
	addr := freePort(t)
	pki := newAuthority(t)
	pki.issue(t, "server", 1)
	pki.issue(t, "client", 2)
	tcp := []string{"-H", "tcp://" + addr, "--tlscert", pki.path("server.pem"), "--tlskey", pki.path("server.key"), "--tlscacert", pki.path("ca.pem")}
	if out, err := try(t, 20*time.Second, skepBinary(t), d.args(tcp[:2]...)...); err == nil || !strings.Contains(out, "--tlscacert") {
		t.Errorf("a tcp host without certificates: %q, %v", out, err)
	}
	d.start(t, tcp...)
	client := []string{"-H", "tcp://" + addr, "--tlsverify", "--tlscacert", pki.path("ca.pem"), "--tlscert", pki.path("client.pem"), "--tlskey", pki.path("client.key")}
	if out := run(t, "docker", append(client, "version", "--format", "{{.Server.Os}}")...); strings.TrimSpace(out) != "linux" {
		t.Errorf("docker version says %q", out)
	}
	if out, err := try(t, 20*time.Second, "curl", "-sSk", "https://"+addr+"/_ping"); err == nil {
		t.Errorf("a client without a certificate was answered: %q", out)
	}
	if n := serial(t, addr, pki); n != 1 {
		t.Fatalf("certificate %d is served", n)
	}
	pki.issue(t, "server", 3)
	since := fmt.Sprint(time.Now().Unix() - 1)
	if err := d.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "the new certificate is served", func() string {
		if n := serial(t, addr, pki); n != 3 {
			return fmt.Sprint("certificate ", n)
		}
		return ""
	})
	eventually(t, 10*time.Second, "the reload event", func() string {
		return missing(d.docker(t, "events", "--since", since, "--until", fmt.Sprint(time.Now().Unix()+1), "--filter", "event=reload", "--format", "{{.Type}} {{.Action}}"), "daemon reload")
	})
	// What cannot be read changes nothing.
	if err := os.WriteFile(pki.path("server.pem"), []byte("no certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "the fault is logged", func() string {
		data, err := os.ReadFile(d.log)
		return missing(string(data)+text(err), "configuration not read again")
	})
	if n := serial(t, addr, pki); n != 3 {
		t.Errorf("after a failed reload certificate %d is served", n)
	}
}

func missing(s, want string) string {
	if strings.Contains(s, want) {
		return ""
	}
	return fmt.Sprintf("%q is not in %q", want, s)
}

// TestForeignContainerd uses a containerd that the daemon did not start, with runc.
func TestForeignContainerd(t *testing.T) {
	d := newDaemon(t)
	dir := filepath.Join(d.dir, "c")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	config := fmt.Sprintf("version = 3\nroot = %q\nstate = %q\n[grpc]\naddress = %q\n", dir+"/root", dir+"/state", dir+"/s")
	if err := os.WriteFile(dir+"/config.toml", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	containerd := exec.Command(filepath.Join(filepath.Dir(skepBinary(t)), "containerd"), "--config", dir+"/config.toml", "--log-level", "warn")
	if err := containerd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // before the daemon's own, which it has to outlive
		d.stop(t, syscall.SIGUSR1)
		for _, shim := range shimsOf(dir + "/s") {
			_ = syscall.Kill(shim, syscall.SIGKILL)
		}
		_ = containerd.Process.Kill()
		_ = containerd.Wait()
	})
	eventually(t, 20*time.Second, "containerd listens", func() string { _, err := os.Stat(dir + "/s"); return text(err) })
	port := freePort(t)
	d.start(t, "--containerd", dir+"/s", "--runtime", "runc", "--listen-addr", port, "--advertise-addr", port)
	if out := d.docker(t, "info", "--format", "{{.DefaultRuntime}} {{.DockerRootDir}}"); out != "runc "+d.data() {
		t.Errorf("docker info says %q", out)
	}
	before := d.serve(t)
	d.stop(t, syscall.SIGTERM)
	d.start(t, "--containerd", dir+"/s", "--runtime", "runc")
	if now := d.wantPIDs(t, 3); now != before {
		t.Errorf("after a restart the containers are\n%s\nbefore\n%s", now, before)
	}
}

// shimsOf returns the processes of the shims of a containerd.
func shimsOf(socket string) []int {
	var pids []int
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		data, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil || !bytes.Contains(data, []byte("containerd-shim")) || !bytes.Contains(data, []byte(socket)) {
			continue
		}
		var pid int
		if _, err := fmt.Sscan(filepath.Base(dir), &pid); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// TestMachineRestart takes the power from a whole swarm: what lay in memory is gone, and
// the tasks start again as Docker's do.
func TestMachineRestart(t *testing.T) {
	s := newSwarm(t, 1, 1)
	s.loadImages(t)
	m, w := "m1", "w1"
	s.docker(t, m, "service", "create", "--name", "web", "--mode", "global", "--restart-delay", "1s",
		"--mount", "type=volume,source=keep,target=/keep", testimage.V1)
	before := s.wantRunning(t, m, "web", 2, 30*time.Second)
	s.docker(t, w, "run", "-d", "--name", "always", "--restart", "always", testimage.V1)
	s.docker(t, w, "run", "-d", "--name", "never", testimage.V1)
	for _, n := range []string{m, w} {
		s.dev(t, "kill", n, "--containers")
	}
	for _, n := range []string{m, w} {
		s.dev(t, "start", n)
	}
	s.refresh(t)
	s.wantReady(t, m, w)
	after := s.wantRunning(t, m, "web", 2, 60*time.Second)
	for _, old := range before {
		if slices.ContainsFunc(after, func(a task) bool { return a.ID == old.ID }) {
			t.Errorf("task %s is said to run on, but its machine was off", old.Name)
		}
	}
	all, err := s.tasks(t, m, "web")
	if err != nil {
		t.Fatal(err)
	}
	for _, old := range before {
		i := slices.IndexFunc(all, func(a task) bool { return a.ID == old.ID })
		if i < 0 || !strings.HasPrefix(all[i].CurrentState, "Failed") || !strings.Contains(all[i].Error, "non-zero exit (255)") {
			t.Errorf("task %s: want it failed with 255 in %+v", old.Name, all)
		}
	}
	eventually(t, 30*time.Second, "containers with and without a restart policy", func() string {
		out := s.docker(t, w, "ps", "-a", "--filter", "name=^/always$", "--filter", "name=^/never$", "--format", "{{.Names}} {{.State}}")
		return missing(out, "always running") + missing(out, "never exited")
	})
	if out := s.docker(t, m, "volume", "ls", "-q"); out != "keep" {
		t.Errorf("volumes: %q", out)
	}
}

// authority issues certificates for the API.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{dir: t.TempDir(), key: key}
	a.cert = &x509.Certificate{
		SerialNumber: big.NewInt(100), Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	a.write(t, "ca", a.cert, key)
	return a
}

func (a *authority) path(name string) string { return filepath.Join(a.dir, name) }

func (a *authority) issue(t *testing.T, name string, number int64, units ...string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a.write(t, name, &x509.Certificate{
		SerialNumber: big.NewInt(number), Subject: pkix.Name{CommonName: name, OrganizationalUnit: units}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, key)
}

func (a *authority) write(t *testing.T, name string, cert *x509.Certificate, key *ecdsa.PrivateKey) {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, cert, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{name + ".pem": {Type: "CERTIFICATE", Bytes: der}, name + ".key": {Type: "PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(a.path(file), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// serial returns the number of the certificate that a tcp host shows.
func serial(t *testing.T, addr string, a *authority) int64 {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(a.path("client.pem"), a.path("client.key"))
	if err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(a.path("ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	d := tls.Dialer{Config: &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: pool, MinVersion: tls.VersionTLS12}}
	conn, err := d.DialContext(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c, ok := conn.(*tls.Conn)
	if !ok {
		t.Fatalf("%T is no TLS connection", conn)
	}
	return c.ConnectionState().PeerCertificates[0].SerialNumber.Int64()
}
