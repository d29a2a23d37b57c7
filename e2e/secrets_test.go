package e2e

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/skep-dev/skep/e2e/testimage"
)

// pipe runs the docker client with something on its standard input.
func (s *swarm) pipe(t *testing.T, node, input string, args ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "input")
	if err := os.WriteFile(path, []byte(input), 0o600); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(path)
	shell := []string{"-c", `file=$1; shift; exec "$@" < "$file"`, "sh", path, "docker", "-H", "unix://" + s.node(t, node).Socket}
	return strings.TrimSpace(run(t, "sh", append(shell, args...)...))
}

// inTask runs a command in the one running task of a service.
func (s *swarm) inTask(t *testing.T, m, service string, command ...string) string {
	t.Helper()
	up := s.wantRunning(t, m, service, 1, 30*time.Second)
	id := s.docker(t, up[0].Node, "ps", "-q", "--filter", "label=com.docker.swarm.task.id="+up[0].ID)
	return s.docker(t, up[0].Node, append([]string{"exec", id}, command...)...)
}

// TestSecretsStayInMemory gives tasks secrets and configs with canaries, and looks for them
// everywhere else.
func TestSecretsStayInMemory(t *testing.T) {
	s := newSwarm(t, 1, 1)
	s.loadImages(t)
	m := "m1"
	since := fmt.Sprint(time.Now().Unix())
	const secret, config = "canary-in-the-secret-4711", "canary-in-the-config-4712"
	s.pipe(t, m, secret, "secret", "create", "--label", "kind=password", "pw", "-")
	s.pipe(t, m, config+` {{secret "p"}} {{env "WHO"}} {{.Node.Platform.OS}} {{.Task.Slot}}`, "config", "create", "--template-driver", "golang", "conf", "-")
	s.pipe(t, m, `{{config "/etc/app/conf"}}`, "secret", "create", "--template-driver", "golang", "both", "-")
	s.docker(t, m, "service", "create", "--quiet", "--name", "app", "--env", "WHO={{.Service.Name}}", "--hostname", "{{.Service.Name}}-{{.Task.Slot}}",
		"--constraint", "node.role==worker", "--secret", "source=pw,target=p,uid=7,gid=8,mode=0440", "--secret", "both",
		"--config", "source=conf,target=/etc/app/conf,mode=0400", testimage.V1)
	if out := s.inTask(t, m, "app", "sh", "-c", "cat /run/secrets/p; echo; stat -c '%u %g %a' /run/secrets/p; cat /etc/app/conf; echo; cat /run/secrets/both; echo; hostname"); out !=
		secret+"\n7 8 440\n"+config+" "+secret+" app linux 1\n"+config+` {{secret "p"}} {{env "WHO"}} {{.Node.Platform.OS}} {{.Task.Slot}}`+"\napp-1" {
		t.Errorf("the task sees\n%s", out)
	}
	if _, err := s.tryDocker(t, 20*time.Second, m, "secret", "rm", "pw"); err == nil || !strings.Contains(err.Error(), "secret 'pw' is in use by the following service: app") {
		t.Errorf("removing a secret in use: %v", err)
	}
	canaries := func(text string) [][]byte {
		return [][]byte{[]byte(text), []byte(base64.StdEncoding.EncodeToString([]byte(text))[:20]), []byte(hex.EncodeToString([]byte(text)))}
	}
	forSecret, forAll := canaries(secret), append(canaries(secret), canaries(config)...)
	seen := s.docker(t, m, "secret", "inspect", "pw", "both") + s.docker(t, m, "service", "inspect", "app") +
		s.docker(t, "w1", "inspect", s.docker(t, "w1", "ps", "-q")) + s.docker(t, m, "service", "ps", "--no-trunc", "app") +
		run(t, "curl", "-sS", "--unix-socket", s.node(t, m).Socket, "http://x/v1.47/secrets", "http://x/v1.47/services", "http://x/v1.47/tasks")
	for _, n := range s.nodes {
		seen += s.docker(t, n.Name, "events", "--since", since, "--until", fmt.Sprint(time.Now().Unix()+1), "--format", "{{json .}}")
	}
	for _, c := range forSecret {
		if bytes.Contains([]byte(seen), c) {
			t.Errorf("the API tells %s", c)
		}
	}
	for _, n := range s.nodes {
		wantNowhere(t, n.Dir, forAll)
	}
	// What ended keeps nothing, even while its container is still there to look at.
	id := s.docker(t, "w1", "ps", "-q", "--no-trunc")
	mounted := func() bool {
		mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mounts", s.node(t, "w1").PID))
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Contains(mounts, []byte("/f/"+id+" "))
	}
	if !mounted() {
		t.Error("the secrets of a running task are not on a file system of their own")
	}
	s.docker(t, "w1", "kill", id)
	eventually(t, 20*time.Second, "the memory of the secrets is gone", func() string {
		if mounted() {
			return "it is mounted"
		}
		return ""
	})
	if out := s.docker(t, "w1", "ps", "-aq", "--no-trunc"); !strings.Contains(out, id) {
		t.Errorf("the container is gone, so the test shows nothing: %s", out)
	}
	// A task that cannot be made says why, and not what is secret.
	s.pipe(t, m, secret+` {{secret "absent"}}`, "secret", "create", "--template-driver", "golang", "broken", "-")
	s.docker(t, m, "service", "create", "--detach", "--name", "sick", "--restart-condition", "none", "--secret", "broken", testimage.V1)
	eventually(t, 30*time.Second, "the fault of the template is told", func() string {
		out := s.docker(t, m, "service", "ps", "--no-trunc", "sick")
		if strings.Contains(out, secret) {
			t.Fatalf("the fault tells the secret: %s", out)
		}
		return missing(out, "expand secret broken: template, line 1: secret target absent not found")
	})
	for what, c := range map[string]struct{ input, want string }{
		"driver":   {"x", `plugin "nosuch" not found`},
		"size":     {strings.Repeat("x", 500*1024), "secret data must be larger than 0 and less than 512000 bytes"},
		"template": {"{{", "template, line 1: unclosed action"},
	} {
		args := map[string][]string{
			"driver": {"--driver", "nosuch", "x"}, "size": {"x", "-"}, "template": {"--template-driver", "golang", "x", "-"},
		}[what]
		path := filepath.Join(t.TempDir(), "input")
		if err := os.WriteFile(path, []byte(c.input), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := try(t, 20*time.Second, "sh", append([]string{"-c", `file=$1; shift; exec docker "$@" < "$file"`, "sh", path, "-H", "unix://" + s.node(t, m).Socket, "secret", "create"}, args...)...)
		if err == nil || !strings.Contains(out, c.want) {
			t.Errorf("%s: %q, %v", what, out, err)
		}
	}
	for _, n := range s.nodes {
		wantNowhere(t, n.Dir, forAll)
	}
}

// TestRotateSecret gives a secret new values and takes one back, and has a driver give the
// value of another.
func TestRotateSecret(t *testing.T) {
	s := newSwarm(t, 1, 0)
	s.loadImages(t)
	m := "m1"
	skep := func(input string, args ...string) (string, error) {
		path := filepath.Join(t.TempDir(), "input")
		if err := os.WriteFile(path, []byte(input), 0o600); err != nil {
			t.Fatal(err)
		}
		shell := []string{"-c", `file=$1; shift; exec "$@" < "$file"`, "sh", path, skepBinary(t), "-H", "unix://" + s.node(t, m).Socket, "secret"}
		return try(t, time.Minute, "sh", append(shell, args...)...)
	}
	s.pipe(t, m, "one", "secret", "create", "db", "-")
	s.docker(t, m, "service", "create", "--quiet", "--name", "app", "--secret", "db", "--update-monitor", "100ms", testimage.V1)
	want := func(value string) {
		t.Helper()
		eventually(t, 30*time.Second, "the task reads "+value, func() string {
			return missing(s.inTask(t, m, "app", "cat", "/run/secrets/db"), value)
		})
	}
	want("one")
	if out, err := skep("two", "rotate", "db"); err != nil || !strings.Contains(out, "db has value 2; the former is kept as db.1") {
		t.Errorf("rotate: %s, %v", out, err)
	}
	want("two")
	if out, err := skep("", "rollback", "db"); err != nil || !strings.Contains(out, "db has value 1; the former is kept as db.2") {
		t.Errorf("rollback: %s, %v", out, err)
	}
	want("one")
	if out := s.docker(t, m, "secret", "ls", "--format", "{{.Name}}"); out != "db\ndb.2" && out != "db.2\ndb" {
		t.Errorf("secrets: %q", out)
	}
	if out, err := skep("three", "rotate", "absent"); err == nil || !strings.Contains(out, "secret absent not found") {
		t.Errorf("rotate what is not there: %q, %v", out, err)
	}
	driver := fmt.Sprintf("skep-e2e-%d", os.Getpid())
	servePlugin(t, driver)
	s.docker(t, m, "secret", "create", "--driver", driver, "driven")
	s.docker(t, m, "service", "create", "--quiet", "--name", "other", "--secret", "driven", testimage.V1)
	if out := s.inTask(t, m, "other", "cat", "/run/secrets/driven"); out != "for other" {
		t.Errorf("the driver's secret reads %q", out)
	}
	if out, err := skep("x", "rotate", "driven"); err == nil || !strings.Contains(out, "gets its value from the driver "+driver) {
		t.Errorf("rotate what a driver gives: %q, %v", out, err)
	}
}

// servePlugin is a secret driver that tells each service its name.
func servePlugin(t *testing.T, name string) {
	t.Helper()
	path := "/run/docker/plugins/" + name + ".sock"
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	var lc net.ListenConfig
	listen, err := lc.Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/Plugin.Activate" {
			fmt.Fprint(w, `{"Implements": ["secretprovider"]}`)
			return
		}
		var req struct{ ServiceName string }
		if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
			t.Error(err)
		}
		if err := json.NewEncoder(w).Encode(map[string]any{"Value": []byte("for " + req.ServiceName), "DoNotReuse": true}); err != nil {
			t.Error(err)
		}
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(listen) }()
	t.Cleanup(func() { _ = server.Close(); <-done })
}

// wantNowhere looks for texts in all files below a directory.
func wantNowhere(t *testing.T, dir string, texts [][]byte) {
	t.Helper()
	files := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil //nolint:nilerr // files come and go on a living node
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return nil //nolint:nilerr // as above
		}
		files++
		for _, c := range texts {
			if bytes.Contains(data, c) {
				t.Errorf("%s holds %s", path, c)
			}
		}
		return nil
	})
	if err != nil || files < 10 {
		t.Errorf("looked into %d files: %v", files, err)
	}
}
