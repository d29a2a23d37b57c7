package e2e

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io/fs"
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
