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
	child, err := childOf(pid, "containerd")
	if err != nil {
		return err
	}
	pids := map[string]int{"daemon": pid, "containerd": child}
	before := map[string]int{}
	for name, pid := range pids {
		if before[name], err = ticks(pid); err != nil {
			return err
		}
	}
	if err := sleep(ctx, watch); err != nil {
		return err
	}
	for _, name := range []string{"daemon", "containerd"} {
		after, err := ticks(pids[name])
		if err != nil {
			return err
		}
		rss, err := residentMB(pids[name])
		if err != nil {
			return err
		}
		memory, processor := "", ""
		if name == "daemon" {
			memory, processor = "< 60", "not measurable"
		}
		b.add(row{"e. idle manager, " + name + ", resident memory", rss, "MB", "VmRSS, files mapped included", memory})
		b.add(row{"e. idle manager, " + name + ", processor", float64(after-before[name]) / watch.Seconds(), "% of a core", "over 30 s", processor})
	}
	return nil
}

// childOf returns the child of a process that runs a program.
func childOf(pid int, program string) (int, error) {
	out, err := exec.Command("ps", "-o", "pid=,comm=", "--ppid", fmt.Sprint(pid)).Output()
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) == 2 && f[1] == program {
			return strconv.Atoi(f[0])
		}
	}
	return 0, fmt.Errorf("process %d has no child %s", pid, program)
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
