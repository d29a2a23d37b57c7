package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// idle measures the memory and processor time of a daemon that is a swarm of one and
// runs nothing: the daemon itself and, apart, its containerd.
func (b *bench) idle(ctx context.Context) error {
	e, err := b.startEngine(ctx, "skep")
	if err != nil {
		return err
	}
	defer func() {
		if err := e.stop(); err != nil {
			fmt.Println("stop:", err)
		}
	}()
	const settle, watch = 10 * time.Second, 30 * time.Second
	if err := sleep(ctx, settle); err != nil {
		return err
	}
	pid, err := daemonPID(e)
	if err != nil {
		return err
	}
	before, err := ticks(pid)
	if err != nil {
		return err
	}
	if err := sleep(ctx, watch); err != nil {
		return err
	}
	after, err := ticks(pid)
	if err != nil {
		return err
	}
	rss, err := residentMB(pid)
	if err != nil {
		return err
	}
	b.add(row{"e. idle manager, resident memory", rss, "MB", "VmRSS of skep daemon", "< 60"})
	b.add(row{"e. idle manager, processor", float64(after-before) / watch.Seconds(), "% of a core", "over 30 s", "not measurable"})
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// daemonPID returns the process that nsenter became.
func daemonPID(e *engine) (int, error) {
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", e.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	if filepath.Base(exe) == "skep" {
		return e.cmd.Process.Pid, nil
	}
	out, err := exec.Command("ps", "-o", "pid=", "--ppid", fmt.Sprint(e.cmd.Process.Pid)).Output()
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(out)))
}

// ticks returns the processor time of a process in hundredths of a second.
func ticks(pid int) (int, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	user, err := strconv.Atoi(fields[11])
	if err != nil {
		return 0, err
	}
	system, err := strconv.Atoi(fields[12])
	return user + system, err
}

func residentMB(pid int) (float64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return kb / 1024, err
		}
	}
	return 0, fmt.Errorf("no VmRSS for process %d", pid)
}
