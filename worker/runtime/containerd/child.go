package containerd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"text/template"
	"time"

	ctd "github.com/containerd/containerd/v2/client"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/platform/process"
)

// child is the containerd that we run. It is started in a session of its own and lives
// on when this process ends; its pid file lets the next process find it.
type child struct {
	cfg     Config
	oci     ociRuntime
	address string
	dir     string      // configuration, pid file and log
	ending  atomic.Bool // it is to end, and not to be started again
}

func newChild(cfg Config, oci ociRuntime) *child {
	return &child{cfg: cfg, oci: oci, address: filepath.Join(cfg.State, "containerd.sock"), dir: filepath.Join(cfg.Root, "containerd")}
}

const configTemplate = `version = 3
root = {{printf "%q" .Root}}
state = {{printf "%q" .State}}

disabled_plugins = [
  "io.containerd.grpc.v1.cri",
  "io.containerd.cri.v1.images",
  "io.containerd.cri.v1.runtime",
  "io.containerd.nri.v1.nri",
  "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.internal.v1.tracing",
  "io.containerd.snapshotter.v1.blockfile",
  "io.containerd.snapshotter.v1.erofs",
  "io.containerd.differ.v1.erofs",
]

[grpc]
  address = {{printf "%q" .Address}}

[ttrpc]
  address = {{printf "%q" .TTRPC}}

[plugins."io.containerd.shim.v1.manager"]
  socket_dir = {{printf "%q" .Sockets}}
`

// ensure makes sure that containerd runs and answers.
func (c *child) ensure(ctx context.Context) error {
	if c.pid() == 0 {
		if err := c.start(ctx); err != nil {
			return err
		}
	}
	return c.answer(ctx)
}

// answer waits until containerd does.
func (c *child) answer(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	for {
		client, err := ctd.New(c.address, ctd.WithTimeout(2*time.Second))
		if err == nil {
			_, err = client.Version(ctx)
			err = errors.Join(err, client.Close())
		}
		if err == nil {
			return nil
		}
		if c.pid() == 0 {
			return fmt.Errorf("containerd ended at its start, see %s", filepath.Join(c.dir, "containerd.log"))
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("wait for containerd: %w", err)
		}
	}
}

// pid returns the process id of our running containerd, 0 if there is none.
func (c *child) pid() int {
	b, err := os.ReadFile(filepath.Join(c.dir, "pid"))
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 1 {
		return 0
	}
	// The number may belong to another process by now: ours names our configuration.
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !strings.Contains(string(cmdline), c.config()) {
		return 0
	}
	return pid
}

func (c *child) config() string { return filepath.Join(c.dir, "config.toml") }

func (c *child) start(ctx context.Context) error {
	if err := os.MkdirAll(c.dir, 0o711); err != nil {
		return fmt.Errorf("start containerd: %w", err)
	}
	// What a killed containerd left.
	if err := os.Remove(c.address); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("start containerd: %w", err)
	}
	var text strings.Builder
	err := template.Must(template.New("").Parse(configTemplate)).Execute(&text, map[string]string{
		"Root":    filepath.Join(c.dir, "root"),
		"State":   filepath.Join(c.cfg.State, "c"),
		"Address": c.address,
		"TTRPC":   c.address + ".ttrpc",
		"Sockets": filepath.Join(c.cfg.State, "s"),
	})
	if err != nil {
		return fmt.Errorf("write containerd configuration: %w", err)
	}
	if err := os.WriteFile(c.config(), []byte(text.String()), 0o600); err != nil {
		return fmt.Errorf("write containerd configuration: %w", err)
	}
	if c.oci.enter {
		if err := shareMounts(); err != nil {
			return err
		}
	}
	logPath := filepath.Join(c.dir, "containerd.log")
	if info, err := os.Stat(logPath); err == nil && info.Size() > 10<<20 {
		_ = os.Rename(logPath, logPath+".1") // a longer log is the worst that happens
	}
	logFile, err := os.OpenFile(logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("open containerd log: %w", err)
	}
	defer func() { _ = logFile.Close() }() // the child has its own descriptor
	argv := c.oci.wrap(c.cfg, []string{filepath.Join(c.cfg.BinDir, containerdBinary), "--config", c.config(), "--log-level", "warn"})
	cmd := exec.CommandContext(context.WithoutCancel(ctx), argv[0], argv[1:]...) // it outlives us
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Env = append(os.Environ(), "PATH="+c.cfg.BinDir+":"+os.Getenv("PATH")) //nolint:forbidigo // containerd finds shims in PATH
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start containerd: %w", err)
	}
	go func() { _ = cmd.Wait() }() // reap it if it ends before us; supervise sees that it is gone
	pid := []byte(strconv.Itoa(cmd.Process.Pid) + "\n")
	if err := os.WriteFile(filepath.Join(c.dir, "pid"), pid, 0o600); err != nil {
		return fmt.Errorf("write containerd pid: %w", err)
	}
	return nil
}

// shareMounts makes mounts that are made from now on appear in containerd's namespace,
// which is a slave of ours. Machines with systemd have it so from the start.
func shareMounts() error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("read mounts: %w", err)
	}
	for line := range strings.SplitSeq(string(b), "\n") {
		f := strings.Fields(line)
		if len(f) > 6 && f[4] == "/" && strings.HasPrefix(f[6], "shared:") {
			return nil
		}
	}
	if err := unix.Mount("", "/", "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make mounts shared: %w", err)
	}
	return nil
}

// supervise starts containerd again whenever it ends, until ctx does. If it ends soon after
// its start it is started again later and later.
func (c *child) supervise(ctx context.Context, log *slog.Logger, started func()) error {
	delay := time.Duration(0)
	for {
		if p, err := process.Find(c.pid()); err == nil {
			begin := time.Now()
			if err := p.Wait(ctx); err != nil && ctx.Err() == nil {
				return fmt.Errorf("supervise containerd: %w", err)
			}
			delay = max(0, delay-time.Since(begin))
		}
		select {
		case <-time.After(delay):
		case <-ctx.Done():
		}
		if c.ending.Load() {
			<-ctx.Done()
		}
		if ctx.Err() != nil {
			return nil //nolint:nilerr // asked to end
		}
		started()
		log.LogAttrs(ctx, slog.LevelWarn, "containerd ended, starting it again")
		if err := c.ensure(ctx); err != nil && ctx.Err() == nil {
			log.LogAttrs(ctx, slog.LevelError, "containerd does not start", slog.Any("error", err))
		}
		delay = min(10*time.Second, 2*delay+500*time.Millisecond)
	}
}

// Shutdown ends our containerd and with it every container's supervision; containers
// must have been removed. It is for machines that leave Skep, and for tests.
func (e *Engine) Shutdown(ctx context.Context) error {
	if e.child == nil {
		return nil
	}
	e.groups.shutdown(e.ns(ctx))
	e.child.ending.Store(true)
	pid := e.child.pid()
	if pid == 0 {
		return nil
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("end containerd: %w", err)
	}
	p, err := process.Find(pid)
	if err != nil {
		return nil //nolint:nilerr // it has ended
	}
	if err := p.Wait(ctx); err != nil {
		_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended just now
		return err
	}
	return nil
}
