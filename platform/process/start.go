package process

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// Command is a program to start in the background.
type Command struct {
	Path string
	Args []string // without the program's own name
	Env  []string
	Dir  string
	// Log is the file that gets its output, appended and readable by its owner only.
	Log string
	// Enter, if set, runs on the thread that starts the program; the namespaces that it
	// enters are the program's, and this process keeps its own.
	Enter func() error
}

// Start starts the program in a session of its own, so that it outlives its starter and
// gets no signal of its terminal.
func Start(c Command) (Process, error) {
	log, err := os.OpenFile(c.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return Process{}, fmt.Errorf("open log: %w", err)
	}
	defer log.Close()                      //nolint:errcheck // the child holds its own copy
	cmd := exec.Command(c.Path, c.Args...) //nolint:noctx // the caller's program, which outlives every context
	cmd.Env, cmd.Dir = c.Env, c.Dir
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	done := make(chan error, 1)
	go func() {
		// The thread is not unlocked: a thread that entered other namespaces must die
		// with its goroutine rather than serve others.
		runtime.LockOSThread()
		if c.Enter != nil {
			if err := c.Enter(); err != nil {
				done <- err
				return
			}
		}
		done <- cmd.Start()
	}()
	if err := <-done; err != nil {
		return Process{}, fmt.Errorf("start %s: %w", filepath.Base(c.Path), err)
	}
	p, err := Find(cmd.Process.Pid)
	if err != nil {
		return Process{}, fmt.Errorf("start %s: %w", filepath.Base(c.Path), err)
	}
	go func() { _ = cmd.Wait() }() // reaps it should it end before this process does
	return p, nil
}

// Tail returns the last lines of a log file, at most max bytes, for error messages.
func Tail(path string, limit int64) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close() //nolint:errcheck // only read
	if info, err := f.Stat(); err == nil && info.Size() > limit {
		if _, err := f.Seek(-limit, io.SeekEnd); err != nil {
			return ""
		}
	}
	data, err := io.ReadAll(io.LimitReader(f, limit))
	if err != nil {
		return ""
	}
	return string(data)
}

// Ping asks the API at a unix socket whether it is ready.
func Ping(ctx context.Context, socket string) error {
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://skep/_ping", http.NoBody)
	if err != nil {
		return fmt.Errorf("ping: %w", err)
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("ping: %w", err)
	}
	defer resp.Body.Close() //nolint:errcheck // only the status counts
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("ping: %s", resp.Status)
	}
	return nil
}
