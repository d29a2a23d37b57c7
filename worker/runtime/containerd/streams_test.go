package containerd_test

import (
	"bytes"
	"context"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/container"

	"github.com/skep-dev/skep/worker/runtime"
)

// safeBuffer collects output that several goroutines write.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// await waits until the output contains text.
func (s *safeBuffer) await(t *testing.T, text string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !strings.Contains(s.String(), text); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%q does not appear in %q", text, s)
		}
	}
}

func TestStreams(t *testing.T) {
	b := newBench(t, nil).withBusybox(t)
	ctx := context.Background()

	t.Run("attach before start", func(t *testing.T) {
		id := b.create(t, &container.Config{Cmd: []string{"sh", "-c", "echo out; echo err >&2"}}, nil)
		var out, errs safeBuffer
		done := make(chan error, 1)
		events, _ := b.Events(t.Context())
		go func() { done <- b.Attach(ctx, id, runtime.Stdio{Stdout: &out, Stderr: &errs}) }()
		for m := range events {
			if m.Action == "attach" {
				break
			}
		}
		if err := b.Start(ctx, id); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil || out.String() != "out\n" || errs.String() != "err\n" {
			t.Errorf("%q, %q, %v", out.String(), errs.String(), err)
		}
	})
	t.Run("standard input", func(t *testing.T) {
		id := b.run(t, &container.Config{Cmd: []string{"cat"}, OpenStdin: true, StdinOnce: true}, nil)
		var out safeBuffer
		if err := b.Attach(ctx, id, runtime.Stdio{Stdin: strings.NewReader("to and fro\n"), Stdout: &out}); err != nil {
			t.Fatal(err)
		}
		if code := b.wait(t, id); code != 0 || out.String() != "to and fro\n" {
			t.Errorf("exit code %d, output %q", code, out.String())
		}
	})
	t.Run("terminal", func(t *testing.T) {
		id := b.run(t, &container.Config{Cmd: []string{"sh"}, OpenStdin: true, Tty: true}, nil)
		r, w := io.Pipe()
		var out safeBuffer
		done := make(chan error, 1)
		go func() { done <- b.Attach(ctx, id, runtime.Stdio{Stdin: r, Stdout: &out}) }()
		if _, err := io.WriteString(w, "echo $((40+2))\n"); err != nil {
			t.Fatal(err)
		}
		out.await(t, "42\r\n")
		if err := b.Resize(ctx, id, 91, 37); err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(w, "stty size\n")
		out.await(t, "37 91")
		_, _ = io.WriteString(w, "exit 5\n")
		if err := <-done; err != nil {
			t.Error(err)
		}
		if code := b.wait(t, id); code != 5 {
			t.Errorf("exit code %d", code)
		}
	})
	t.Run("detach", func(t *testing.T) {
		id := b.run(t, &container.Config{Cmd: []string{"sleep", "100"}}, nil)
		short, cancel := context.WithCancel(ctx)
		done := make(chan error, 1)
		go func() { done <- b.Attach(short, id, runtime.Stdio{Stdout: io.Discard}) }()
		cancel()
		<-done
		if c, err := b.Inspect(ctx, id); err != nil || !c.State.Running {
			t.Errorf("%+v, %v", c.State, err)
		}
	})
	t.Run("leaving a terminal does not end its input", func(t *testing.T) {
		id := b.run(t, &container.Config{Cmd: []string{"sh"}, OpenStdin: true, StdinOnce: true, Tty: true}, nil)
		short, cancel := context.WithCancel(ctx)
		r, w := io.Pipe()
		var out safeBuffer
		done := make(chan error, 1)
		go func() { done <- b.Attach(short, id, runtime.Stdio{Stdin: r, Stdout: &out}) }()
		_, _ = io.WriteString(w, "echo $((6*7))\n")
		out.await(t, "42\r\n")
		cancel() // what detach keys do
		_ = w.Close()
		<-done
		var again safeBuffer
		if err := b.Attach(ctx, id, runtime.Stdio{Stdin: strings.NewReader("echo $((6*8))\nexit 4\n"), Stdout: &again}); err != nil {
			t.Error(err)
		}
		if code := b.wait(t, id); code != 4 || !strings.Contains(again.String(), "48\r\n") {
			t.Errorf("exit code %d, output %q", code, again.String())
		}
	})
	t.Run("failed start", func(t *testing.T) {
		id := b.create(t, &container.Config{Cmd: []string{"/nope"}}, &container.HostConfig{AutoRemove: true})
		removed, err := b.Wait(ctx, id, container.WaitConditionRemoved)
		if err != nil {
			t.Fatal(err)
		}
		events, _ := b.Events(t.Context())
		done := make(chan error, 1)
		go func() { done <- b.Attach(ctx, id, runtime.Stdio{Stdout: io.Discard}) }()
		for m := range events {
			if m.Action == "attach" {
				break
			}
		}
		if err := b.Start(ctx, id); err == nil {
			t.Error("started")
		}
		if err := <-done; err != nil { // and is not waited for in vain
			t.Error(err)
		}
		if r := <-removed; r.ExitCode != 127 {
			t.Errorf("%+v", r)
		}
	})
	t.Run("logs", func(t *testing.T) {
		id := b.run(t, &container.Config{Cmd: []string{"sh", "-c", "echo 1; echo 2 >&2; sleep 0.1; echo 3; sleep 0.1; echo 4; exec sleep 0.1"}}, nil)
		var followed string
		err := b.Logs(ctx, id, runtime.LogOptions{Stdout: true, Stderr: true, Follow: true, Tail: -1}, func(l runtime.LogLine) error {
			followed += string(l.Data)
			return nil
		})
		if err != nil || strings.Count(followed, "\n") != 4 || !strings.HasSuffix(followed, "4\n") {
			t.Errorf("%q, %v", followed, err)
		}
		var last string
		err = b.Logs(ctx, id, runtime.LogOptions{Stdout: true, Tail: 2}, func(l runtime.LogLine) error { last += string(l.Data); return nil })
		if err != nil || last != "3\n4\n" {
			t.Errorf("tail %q, %v", last, err)
		}
	})
	t.Run("long lines are split and rotated", func(t *testing.T) {
		id := b.run(t, &container.Config{Cmd: []string{"sh", "-c", "head -c 200000 /dev/zero | tr '\\0' x; echo; seq 1 5000"}},
			&container.HostConfig{LogConfig: container.LogConfig{Type: "json-file", Config: map[string]string{"max-size": "100k", "max-file": "2"}}})
		b.wait(t, id)
		var partial, whole int
		lastLine := ""
		err := b.Logs(ctx, id, runtime.LogOptions{Stdout: true, Tail: -1}, func(l runtime.LogLine) error {
			if l.Partial {
				partial++
			} else {
				whole++
				lastLine = string(l.Data)
			}
			return nil
		})
		if err != nil || whole == 0 || whole > 3500 || lastLine != "5000\n" {
			t.Errorf("%d partial, %d whole lines, last %q, %v", partial, whole, lastLine, err)
		}
	})
	t.Run("no log", func(t *testing.T) {
		id := b.run(t, &container.Config{Cmd: []string{"echo", "x"}}, &container.HostConfig{LogConfig: container.LogConfig{Type: "none"}})
		b.wait(t, id)
		err := b.Logs(ctx, id, runtime.LogOptions{Stdout: true}, nil)
		if err == nil || !strings.Contains(err.Error(), "does not support reading") {
			t.Errorf("error %v", err)
		}
	})
}

func TestExec(t *testing.T) {
	b := newBench(t, nil).withBusybox(t)
	ctx := context.Background()
	id := b.run(t, &container.Config{Cmd: []string{"sleep", "1000"}, Env: []string{"A=1"}}, nil)
	run := func(t *testing.T, req container.ExecCreateRequest, stdin io.Reader) (string, string, *container.ExecInspectResponse, error) {
		t.Helper()
		x, err := b.ExecCreate(ctx, id, &req)
		if err != nil {
			t.Fatal(err)
		}
		var out, errs safeBuffer
		err = b.ExecStart(ctx, x, runtime.Stdio{Stdin: stdin, Stdout: &out, Stderr: &errs})
		i, ierr := b.ExecInspect(ctx, x)
		if ierr != nil || i.Running || i.ExitCode == nil {
			t.Fatalf("inspect after the end: %+v, %v", i, ierr)
		}
		return out.String(), errs.String(), i, err
	}
	t.Run("output and exit code", func(t *testing.T) {
		out, errs, i, err := run(t, container.ExecCreateRequest{Cmd: []string{"sh", "-c", "echo $A $B; echo e >&2; pwd; id -u; exit 9"}, Env: []string{"B=2"}, User: "bee", WorkingDir: "/data"}, nil)
		if d := cmp.Diff("1 2\n/data\n1234\n", out); d != "" || errs != "e\n" || *i.ExitCode != 9 || err != nil {
			t.Errorf("%s %q %d %v", d, errs, *i.ExitCode, err)
		}
	})
	t.Run("standard input", func(t *testing.T) {
		out, _, i, err := run(t, container.ExecCreateRequest{Cmd: []string{"wc", "-c"}}, strings.NewReader(strings.Repeat("x", 100_000)))
		if strings.TrimSpace(out) != "100000" || *i.ExitCode != 0 || err != nil {
			t.Errorf("%q %d %v", out, *i.ExitCode, err)
		}
	})
	t.Run("terminal", func(t *testing.T) {
		out, _, i, err := run(t, container.ExecCreateRequest{Cmd: []string{"stty", "size"}, Tty: true, ConsoleSize: &[2]uint{33, 77}}, nil)
		if strings.TrimSpace(out) == "" || *i.ExitCode != 0 || err != nil {
			t.Errorf("%q %d %v", out, *i.ExitCode, err)
		}
	})
	t.Run("unknown program", func(t *testing.T) {
		_, _, i, err := run(t, container.ExecCreateRequest{Cmd: []string{"/nope"}}, nil)
		if *i.ExitCode != 127 || err == nil {
			t.Errorf("%d %v", *i.ExitCode, err)
		}
	})
	t.Run("detached", func(t *testing.T) {
		x, err := b.ExecCreate(ctx, id, &container.ExecCreateRequest{Cmd: []string{"sh", "-c", "echo x && touch /tmp/done"}})
		if err != nil {
			t.Fatal(err)
		}
		if err := b.ExecStart(ctx, x, runtime.Stdio{}); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			i, err := b.ExecInspect(ctx, x)
			if err != nil || time.Now().After(deadline) {
				t.Fatalf("%+v, %v", i, err)
			}
			if !i.Running && i.ExitCode != nil {
				if *i.ExitCode != 0 {
					t.Errorf("exit code %d", *i.ExitCode)
				}
				break
			}
		}
	})
	t.Run("conflicts", func(t *testing.T) {
		if err := b.Pause(ctx, id); err != nil {
			t.Fatal(err)
		}
		_, err := b.ExecCreate(ctx, id, &container.ExecCreateRequest{Cmd: []string{"true"}})
		if err == nil || !strings.Contains(err.Error(), "is paused, unpause the container before exec") {
			t.Errorf("error %v", err)
		}
		if err := b.Unpause(ctx, id); err != nil {
			t.Fatal(err)
		}
	})
	top, err := b.Top(ctx, id, nil)
	if err != nil || len(top.Processes) != 1 || !strings.Contains(strings.Join(top.Processes[0], " "), "sleep 1000") {
		t.Errorf("%+v, %v", top, err)
	}
	st, err := b.Stats(ctx, id)
	if err != nil || st.PidsStats.Current != 1 || st.MemoryStats.Usage == 0 || st.CPUStats.CPUUsage.TotalUsage == 0 || st.CPUStats.SystemUsage == 0 {
		t.Errorf("%+v, %v", st, err)
	}
	if err := b.Update(ctx, id, container.UpdateConfig{Resources: container.Resources{Memory: 50 << 20, MemorySwap: -1}}); err != nil {
		t.Error(err)
	}
	if st, err := b.Stats(ctx, id); err != nil || st.MemoryStats.Limit != 50<<20 {
		t.Errorf("%+v, %v", st.MemoryStats, err)
	}
}
