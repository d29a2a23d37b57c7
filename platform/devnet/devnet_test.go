package devnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/platform/process"
)

// The test binary plays the daemon: it answers pings and starts a child that outlives it,
// as containerd does.
func TestMain(m *testing.M) {
	switch {
	case len(os.Args) > 1 && os.Args[1] == "daemon":
		os.Exit(fakeDaemon(os.Args[2:]))
	case len(os.Args) > 1 && os.Args[1] == "linger":
		time.Sleep(time.Hour)
	default:
		os.Exit(m.Run())
	}
}

func fakeDaemon(args []string) int {
	socket := ""
	for i, a := range args {
		if a == "--host" {
			socket = strings.TrimPrefix(args[i+1], "unix://")
		}
		if a == "--broken" {
			fmt.Println("this daemon is broken")
			return 1
		}
	}
	child := exec.Command(os.Args[0], "linger")
	child.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if err := child.Start(); err != nil {
		return 1
	}
	host, _ := os.Hostname()
	mux := http.NewServeMux()
	mux.HandleFunc("/_ping", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "OK") })
	mux.HandleFunc("/host", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, host) })
	go func() { _ = http.ListenAndServe(":2377", mux) }()
	l, err := net.Listen("unix", socket)
	if err != nil {
		return 1
	}
	go func() { _ = http.Serve(l, mux) }()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	<-ctx.Done()
	return 0
}

func needRoot(t *testing.T) Config {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to make network namespaces")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return Config{Dir: t.TempDir(), Binary: exe, Env: os.Environ()}
}

func up(t *testing.T, cfg Config, name string, managers, workers int) *Swarm {
	t.Helper()
	t.Cleanup(func() {
		if err := Down(context.Background(), cfg, name); err != nil {
			t.Errorf("down: %v", err)
		}
	})
	s, err := Up(t.Context(), cfg, name, managers, workers, func(context.Context, *Swarm) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// askSoon asks again until it works: a link needs a moment to carry after it went up.
func askSoon(t *testing.T, from, to Node) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		var got string
		if got, err = ask(from, to); err == nil && got == to.Name {
			return
		}
	}
	t.Errorf("%s does not reach %s: %v", from.Name, to.Name, err)
}

// ask makes an HTTP request from one node's network to another's address.
func ask(from, to Node) (string, error) {
	var body []byte
	done := make(chan error, 1)
	go func() {
		done <- func() error {
			runtime.LockOSThread()
			if err := enter(filepath.Join(netnsDir, from.NetNS), from.Name); err != nil {
				return err
			}
			d := net.Dialer{Timeout: time.Second}
			c, err := d.Dial("tcp4", to.Addr+":2377")
			if err != nil {
				return err
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(2 * time.Second))
			if _, err := fmt.Fprintf(c, "GET /host HTTP/1.0\r\n\r\n"); err != nil {
				return err
			}
			buf := make([]byte, 4096)
			for {
				n, err := c.Read(buf)
				body = append(body, buf[:n]...)
				if err != nil {
					return nil
				}
			}
		}()
	}()
	err := <-done
	_, text, _ := strings.Cut(string(body), "\r\n\r\n")
	return text, err
}

func TestSwarmLife(t *testing.T) {
	cfg := needRoot(t)
	name := fmt.Sprintf("t%d", os.Getpid())
	s := up(t, cfg, name, 1, 2)
	m1, w1, w2 := s.Nodes[0], s.Nodes[1], s.Nodes[2]
	if m1.Name != "m1" || m1.Role != "manager" || w2.Name != "w2" || w2.Role != "worker" || m1.State != "running" {
		t.Fatalf("nodes are %+v", s.Nodes)
	}
	for _, pair := range [][2]Node{{m1, w1}, {w2, m1}, {w1, w2}} {
		if got, err := ask(pair[0], pair[1]); err != nil || got != pair[1].Name {
			t.Errorf("%s asks %s: %q, %v", pair[0].Name, pair[1].Name, got, err)
		}
	}
	if _, err := Up(t.Context(), cfg, name, 1, 0, nil); model.KindOf(err) != model.Exists {
		t.Errorf("second up: %v", err)
	}

	t.Run("cut and heal", func(t *testing.T) {
		if err := s.Cut(w1); err != nil {
			t.Fatal(err)
		}
		if _, err := ask(m1, w1); err == nil {
			t.Error("a cut node answers")
		}
		if again, err := Open(cfg, name); err != nil || again.Nodes[1].State != "running,cut" {
			t.Errorf("state of a cut node: %v, %v", again.Nodes[1].State, err)
		}
		if err := s.Heal(w1); err != nil {
			t.Fatal(err)
		}
		askSoon(t, m1, w1)
	})
	t.Run("partition", func(t *testing.T) {
		if err := s.Partition(m1, w1); err != nil {
			t.Fatal(err)
		}
		if _, err := ask(m1, w1); err == nil {
			t.Error("parted nodes reach each other")
		}
		if _, err := ask(w2, w1); err != nil {
			t.Errorf("a third node is cut off, too: %v", err)
		}
		if err := s.Heal(m1); err != nil {
			t.Fatal(err)
		}
		askSoon(t, w1, m1)
	})
	t.Run("kill and start", func(t *testing.T) {
		before, err := process.Select(s.owns(w1))
		if err != nil || len(before) != 2 {
			t.Fatalf("node owns %v, %v; want daemon and child", before, err)
		}
		if err := s.Kill(t.Context(), "w1", false); err != nil {
			t.Fatal(err)
		}
		if left, err := process.Select(s.owns(w1)); err != nil || len(left) != 1 {
			t.Errorf("after kill the node owns %v, %v; want the child", left, err)
		}
		if err := s.Kill(t.Context(), "w1", false); model.KindOf(err) != model.Precondition {
			t.Errorf("second kill: %v", err)
		}
		if err := s.Start(t.Context(), "w1"); err != nil {
			t.Fatal(err)
		}
		if err := s.Start(t.Context(), "w1"); model.KindOf(err) != model.Exists {
			t.Errorf("second start: %v", err)
		}
	})
	t.Run("lose power", func(t *testing.T) {
		mount := filepath.Join(w2.ExecRoot(), "m")
		if err := os.Mkdir(mount, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", mount, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		if err := s.Kill(t.Context(), "w2", true); err != nil {
			t.Fatal(err)
		}
		if left, err := process.Select(s.owns(w2)); err != nil || len(left) != 0 {
			t.Errorf("left over: %v, %v", left, err)
		}
		if _, err := os.Stat(w2.ExecRoot()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("exec root is still there: %v", err)
		}
		if err := s.Start(t.Context(), "w2"); err != nil {
			t.Fatal(err)
		}
		askSoon(t, m1, w2)
	})
	for range 2 {
		if err := Down(t.Context(), cfg, name); err != nil {
			t.Fatal(err)
		}
	}
	left, err := process.Select(func(e process.Entry) bool { return len(e.Args) > 0 && e.Args[0] == cfg.Binary && e.PID != os.Getpid() })
	if err != nil || len(left) != 0 {
		t.Errorf("processes left: %v, %v", left, err)
	}
	for _, n := range append(s.Nodes, Node{NetNS: s.bridgeNS()}) {
		if _, err := os.Stat(filepath.Join(netnsDir, n.NetNS)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("namespace %s is left: %v", n.NetNS, err)
		}
	}
	if _, err := os.Stat(cfg.runDir(name)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left: %v", cfg.runDir(name), err)
	}
	if entries, err := os.ReadDir(cfg.Dir); err != nil || len(entries) != 0 {
		t.Errorf("files left: %v, %v", entries, err)
	}
}

func TestBrokenDaemon(t *testing.T) {
	cfg := needRoot(t)
	cfg.DaemonArgs = []string{"--broken"}
	name := fmt.Sprintf("b%d", os.Getpid())
	_, err := Up(t.Context(), cfg, name, 1, 0, func(context.Context, *Swarm) error { return nil })
	if err == nil || !strings.Contains(err.Error(), "this daemon is broken") {
		t.Errorf("up says %v", err)
	}
	if err := Down(t.Context(), cfg, name); err != nil {
		t.Fatal(err)
	}
}

func TestNames(t *testing.T) {
	for name, ok := range map[string]bool{
		"dev": true, "a": true, "e2e-12": true, "": false, "-a": false, "A": false, "a/b": false, "..": false, strings.Repeat("a", 25): false,
	} {
		if err := checkName(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
	if _, err := Open(Config{Dir: t.TempDir()}, "none"); model.KindOf(err) != model.NotFound {
		t.Errorf("open: %v", err)
	}
}
