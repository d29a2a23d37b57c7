package process

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func start(t *testing.T, script string) (Process, string) {
	t.Helper()
	dir := t.TempDir()
	log := filepath.Join(dir, "log")
	p, err := Start(Command{Path: "/bin/sh", Args: []string{"-c", script}, Env: os.Environ(), Log: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Kill(context.Background()) })
	return p, log
}

func TestStartAndStop(t *testing.T) {
	p, log := start(t, "echo up; exec sleep 60")
	if !p.Alive() {
		t.Fatal("not alive after start")
	}
	for deadline := time.Now().Add(5 * time.Second); Tail(log, 100) != "up\n"; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("log holds %q", Tail(log, 100))
		}
	}
	file := filepath.Join(t.TempDir(), "pid")
	if err := p.WritePIDFile(file); err != nil {
		t.Fatal(err)
	}
	if got, err := ReadPIDFile(file); err != nil || got != p {
		t.Fatalf("pid file holds %v, %v; want %v", got, err, p)
	}
	if err := p.Stop(t.Context(), 5*time.Second); err != nil {
		t.Fatal(err)
	}
	if p.Alive() {
		t.Error("alive after stop")
	}
	if _, err := ReadPIDFile(file); !errors.Is(err, ErrNotRunning) {
		t.Errorf("pid file of an ended process: %v", err)
	}
	if err := p.Stop(t.Context(), time.Second); err != nil {
		t.Errorf("second stop: %v", err)
	}
}

func TestReusedPIDIsNotSignalled(t *testing.T) {
	p, _ := start(t, "exec sleep 60")
	other := Process{PID: p.PID, Ticks: p.Ticks + 1}
	if other.Alive() {
		t.Error("a process of another start counts as alive")
	}
	if err := other.Signal(unix.SIGKILL); !errors.Is(err, ErrNotRunning) {
		t.Errorf("signal: %v", err)
	}
	if !p.Alive() {
		t.Error("the wrong process was killed")
	}
}

func TestKillAllTakesDescendants(t *testing.T) {
	p, _ := start(t, "sleep 61 & sleep 62 & wait")
	want := func(e Entry) bool { return e.PID == p.PID }
	deadline := time.Now().Add(5 * time.Second)
	var all []Process
	for len(all) < 3 && time.Now().Before(deadline) {
		var err error
		if all, err = Select(want); err != nil {
			t.Fatal(err)
		}
	}
	if len(all) != 3 || !slices.Contains(all, p) {
		t.Fatalf("found %v, want the shell and two children", all)
	}
	if err := KillAll(t.Context(), func(e Entry) bool { return slices.Contains(all, e.Process) }); err != nil {
		t.Fatal(err)
	}
	for _, one := range all {
		if one.Alive() {
			t.Errorf("process %d is alive", one.PID)
		}
	}
}

func FuzzParsePIDFile(f *testing.F) {
	f.Add("12\n345\n")
	f.Add("12")
	f.Add("-1\n2")
	f.Add("")
	f.Fuzz(func(t *testing.T, text string) {
		if p, err := ParsePIDFile(text); err == nil && p.PID <= 0 {
			t.Errorf("%q gives pid %d", text, p.PID)
		}
	})
}
