package e2e

import (
	"bytes"
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/skep-dev/skep/e2e/testimage"
)

// TestAPIAccess serves the API to three people with certificates, and looks at what each may
// do and at what the audit log tells of it.
func TestAPIAccess(t *testing.T) {
	d := newDaemon(t)
	addr, port := freePort(t), freePort(t)
	pki := newAuthority(t)
	pki.issue(t, "server", 1)
	for i, c := range []struct{ name, ou string }{{"ann", "skep-admin"}, {"olga", "dev"}, {"vic", "skep-viewer"}, {"nemo", ""}} {
		pki.issue(t, c.name, int64(10+i), strings.Fields(c.ou)...)
	}
	d.start(t, "-H", "tcp://"+addr, "--tlscert", pki.path("server.pem"), "--tlskey", pki.path("server.key"), "--tlscacert", pki.path("ca.pem"),
		"--api-role", "ou=dev:operator", "--listen-addr", port, "--advertise-addr", port)
	archive := filepath.Join(t.TempDir(), "images.tar")
	if err := testimage.Write(t.Context(), archive); err != nil {
		t.Fatal(err)
	}
	d.docker(t, "load", "-i", archive)
	d.docker(t, "swarm", "init")
	as := func(name string, args ...string) (string, error) {
		t.Helper()
		return try(t, time.Minute, "docker", append([]string{
			"-H", "tcp://" + addr, "--tlsverify", "--tlscacert", pki.path("ca.pem"), "--tlscert", pki.path(name + ".pem"), "--tlskey", pki.path(name + ".key"),
		}, args...)...)
	}
	may := func(name string, args ...string) string {
		t.Helper()
		out, err := as(name, args...)
		if err != nil {
			t.Errorf("%s is refused %v: %s", name, args, out)
		}
		return out
	}
	mayNot := func(name, want string, args ...string) {
		t.Helper()
		if out, err := as(name, args...); err == nil || !strings.Contains(out, want) {
			t.Errorf("%s %v: %q, %v, want %q", name, args, out, err, want)
		}
	}
	secret := filepath.Join(t.TempDir(), "secret")
	const canary = "canary-of-the-audit-log-815"
	if err := os.WriteFile(secret, []byte(canary), 0o600); err != nil {
		t.Fatal(err)
	}
	may("olga", "secret", "create", "pw", secret)
	may("olga", "service", "create", "--quiet", "--name", "app", "--secret", "pw", "--env", "X="+canary, testimage.V1)
	mayNot("olga", "a service with the bind mount of / needs the role admin", "service", "create", "--detach", "--mount", "type=bind,source=/,target=/host", testimage.V1)
	mayNot("olga", "needs the role admin", "node", "update", "--availability", "drain", strings.TrimSpace(may("olga", "node", "ls", "-q")))
	mayNot("olga", "needs the role admin", "run", "-d", testimage.V1)
	if out := may("vic", "service", "ls", "--format", "{{.Name}}"); strings.TrimSpace(out) != "app" {
		t.Errorf("vic sees %q", out)
	}
	may("vic", "secret", "ls")
	may("vic", "service", "logs", "app")
	mayNot("vic", "cn=vic ou=skep-viewer has the role viewer, and POST /services/{id}/update needs the role operator", "service", "scale", "--detach", "app=2")
	mayNot("vic", "needs the role operator", "secret", "rm", "pw")
	container := strings.TrimSpace(may("vic", "ps", "-q"))
	mayNot("vic", "needs the role admin", "exec", container, "cat", "/run/secrets/pw")
	mayNot("vic", "needs the role admin", "cp", container+":/run/secrets/pw", t.TempDir())
	if out := may("vic", "swarm", "ca"); !strings.Contains(out, "BEGIN CERTIFICATE") {
		t.Errorf("the CA: %q", out)
	}
	for name, want := range map[string]bool{"vic": false, "olga": false, "ann": true} {
		out, err := as(name, "swarm", "join-token", "-q", "worker")
		if got := strings.HasPrefix(out, "SWMTKN-"); got != want {
			t.Errorf("%s sees the token: %v, %q, %v", name, got, out, err)
		}
	}
	may("ann", "exec", container, "cat", "/run/secrets/pw")
	mayNot("nemo", "has the role none", "service", "ls")

	ls := run(t, skepBinary(t), "-H", "unix://"+d.socket(), "audit", "ls")
	for _, want := range []string{
		`"cn=olga ou=dev"`, "operator", "127.0.0.1:", "POST /secrets/create", `"pw"`, "POST /services/create", `"app"`, "done",
		`"cn=nemo"`, "refused (403): needs the role viewer", "refused (403): needs the role operator", "POST /exec/{id}/start", "begun",
		"uid=0 gid=0 pid=", "(docker)", "POST /swarm/init",
	} {
		if !strings.Contains(ls, want) {
			t.Errorf("%q is not in the audit log\n%s", want, ls)
		}
	}
	verify := func(more ...string) (string, error) {
		return try(t, 20*time.Second, skepBinary(t), append([]string{"audit", "verify", "--data-root", d.data()}, more...)...)
	}
	out, err := verify()
	if err != nil || !strings.Contains(out, "whole from 1 to") {
		t.Fatalf("verify: %s, %v", out, err)
	}
	_, head, _ := strings.Cut(strings.TrimSpace(out), "head ")
	files, err := filepath.Glob(filepath.Join(d.data(), "audit", "*.log"))
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	data, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{canary, base64.StdEncoding.EncodeToString([]byte(canary))[:24]} {
		if bytes.Contains(data, []byte(text)) {
			t.Errorf("the audit log tells %s", text)
		}
	}
	// A restart goes on with the chain; a cut is seen by who knows the head.
	d.stop(t, 15)
	if out, err := verify("--expect", head); err != nil {
		t.Errorf("verify: %s, %v", out, err)
	}
	lines := bytes.SplitAfter(data, []byte("\n"))
	if err := os.WriteFile(files[0], bytes.Join(lines[:5], nil), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := verify("--expect", head); err == nil || !strings.Contains(out, "its end was cut off") {
		t.Errorf("verify a log that was cut: %s, %v", out, err)
	}
	if err := os.WriteFile(files[0], bytes.Replace(data, []byte("cn=vic"), []byte("cn=ann"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := verify(); err == nil || !strings.Contains(out, "it was changed") {
		t.Errorf("verify a log that was changed: %s, %v", out, err)
	}
	// In clear only who says so twice.
	for args, want := range map[string]string{"--tls=false": "say so with --tlsverify=false as well", "--api-role=bob": "is none of cn=NAME:ROLE"} {
		if out, err := try(t, 20*time.Second, skepBinary(t), d.args("-H", "tcp://"+addr, args, "--tlscert", pki.path("server.pem"), "--tlskey", pki.path("server.key"), "--tlscacert", pki.path("ca.pem"))...); err == nil || !strings.Contains(out, want) {
			t.Errorf("%s: %q, %v", args, out, err)
		}
	}
	d.start(t, "-H", "tcp://"+addr, "--tls=false", "--tlsverify=false")
	if out := run(t, "docker", "-H", "tcp://"+addr, "version", "--format", "{{.Server.Os}}"); strings.TrimSpace(out) != "linux" {
		t.Errorf("in clear: %q", out)
	}
	if log, err := os.ReadFile(d.log); err != nil || !strings.Contains(string(log), "whoever reaches this address is root on this machine") {
		t.Errorf("no warning of it in the log: %v", err)
	}
}
