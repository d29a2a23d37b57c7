// Package process starts, finds and ends background processes of this machine: daemons
// with a pid file and a log file, and the trees below them.
//
// It owns no state: a Process is a name for a running program that stays right when
// its pid is used again. Everything may be called from any goroutine. Who may end what
// is the caller's decision.
package process

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNotRunning means that the process has ended, or that its pid belongs to another by now.
var ErrNotRunning = errors.New("process is not running")

// Process names one running program. The zero value names none.
type Process struct {
	PID int
	// Ticks is the start of the process in clock ticks after boot; with the pid it is
	// unique on a machine until the next boot.
	Ticks uint64
}

// Find returns the process that has the pid now, or ErrNotRunning.
func Find(pid int) (Process, error) {
	s, err := readStat(pid)
	if err != nil {
		return Process{}, err
	}
	return Process{PID: pid, Ticks: s.ticks}, nil
}

// Alive reports whether the process runs. One that ended and awaits its parent does not.
func (p Process) Alive() bool {
	if p.PID <= 0 {
		return false
	}
	s, err := readStat(p.PID)
	return err == nil && s.ticks == p.Ticks && s.state != 'Z' && s.state != 'X'
}

// Signal sends sig to exactly this process; ErrNotRunning if it ended.
func (p Process) Signal(sig unix.Signal) error {
	if p.PID <= 0 {
		return ErrNotRunning
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return ErrNotRunning
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", p.PID, err)
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was written
	// The descriptor pins the pid, so what is read now is what gets the signal.
	if !p.Alive() {
		return ErrNotRunning
	}
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); errors.Is(err, unix.ESRCH) {
		return ErrNotRunning
	} else if err != nil {
		return fmt.Errorf("signal process %d: %w", p.PID, err)
	}
	return nil
}

// Wait returns nil when the process has ended, or ctx's error. It costs nothing while it
// waits.
func (p Process) Wait(ctx context.Context) error {
	if !p.Alive() {
		return nil
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err == nil {
		err = unix.SetNonblock(fd, true) // so that the runtime polls it
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", p.PID, err)
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	defer f.Close() //nolint:errcheck // nothing was written
	defer context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })()
	conn, err := f.SyscallConn()
	if err == nil {
		// The descriptor can be read when its process has ended.
		err = conn.Read(func(uintptr) bool { return !p.Alive() })
	}
	if err != nil {
		return fmt.Errorf("wait for process %d: %w", p.PID, cmp.Or(ctx.Err(), err))
	}
	return nil
}

// Stop asks the process to end with SIGTERM and kills it after grace. It returns nil
// when the process is gone.
func (p Process) Stop(ctx context.Context, grace time.Duration) error {
	if err := p.Signal(unix.SIGTERM); errors.Is(err, ErrNotRunning) {
		return nil
	} else if err != nil {
		return err
	}
	soft, cancel := context.WithTimeout(ctx, grace)
	err := p.Wait(soft)
	cancel()
	if err == nil || ctx.Err() != nil {
		return err
	}
	return p.Kill(ctx)
}

// Kill ends the process with SIGKILL and waits until it is gone.
func (p Process) Kill(ctx context.Context) error {
	if err := p.Signal(unix.SIGKILL); errors.Is(err, ErrNotRunning) {
		return nil
	} else if err != nil {
		return err
	}
	return p.Wait(ctx)
}

// ReadPIDFile returns the process that a pid file names. A missing file and a process
// that ended both are ErrNotRunning.
func ReadPIDFile(path string) (Process, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return Process{}, ErrNotRunning
	}
	if err != nil {
		return Process{}, fmt.Errorf("read pid file: %w", err)
	}
	p, err := ParsePIDFile(string(data))
	if err != nil {
		return Process{}, fmt.Errorf("read pid file %s: %w", path, err)
	}
	if !p.Alive() {
		return Process{}, ErrNotRunning
	}
	return p, nil
}

// ParsePIDFile reads a pid file: the pid on the first line, its start on the second.
func ParsePIDFile(text string) (Process, error) {
	first, second, _ := strings.Cut(strings.TrimSpace(text), "\n")
	pid, err := strconv.Atoi(first)
	if err != nil || pid <= 0 {
		return Process{}, fmt.Errorf("pid %q is not a positive number", first)
	}
	ticks, err := strconv.ParseUint(second, 10, 64)
	if err != nil {
		return Process{}, fmt.Errorf("start %q is not a number", second)
	}
	return Process{PID: pid, Ticks: ticks}, nil
}

// WritePIDFile writes a pid file for ReadPIDFile.
func (p Process) WritePIDFile(path string) error {
	temp := path + ".new"
	if err := os.WriteFile(temp, fmt.Appendf(nil, "%d\n%d\n", p.PID, p.Ticks), 0o644); err != nil { //nolint:gosec // pid files are public
		return fmt.Errorf("write pid file: %w", err)
	}
	if err := os.Rename(temp, path); err != nil {
		return fmt.Errorf("write pid file: %w", err)
	}
	return nil
}

// Entry is one process of the machine, as Select shows it.
type Entry struct {
	Process
	Parent int
	Args   []string
	// Cgroups are the paths of the process in every hierarchy.
	Cgroups []string
	// NetNS is the inode of its network namespace, 0 if unknown.
	NetNS uint64
}

// Select returns the live processes that want accepts, and all their descendants.
// Its own process is never among them.
func Select(want func(Entry) bool) ([]Process, error) {
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	children := map[int][]Entry{}
	var found []Entry
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		e, err := inspect(pid)
		if err != nil {
			continue // it ended meanwhile, or is a zombie
		}
		children[e.Parent] = append(children[e.Parent], e)
		if want(e) {
			found = append(found, e)
		}
	}
	var out []Process
	seen := map[int]bool{}
	for len(found) > 0 {
		e := found[0]
		found = found[1:]
		if seen[e.PID] {
			continue
		}
		seen[e.PID] = true
		out = append(out, e.Process)
		found = append(found, children[e.PID]...)
	}
	slices.SortFunc(out, func(a, b Process) int { return a.PID - b.PID })
	return out, nil
}

// KillAll kills what Select(want) finds, again until nothing is found: a process may
// start another while it is being killed.
func KillAll(ctx context.Context, want func(Entry) bool) error {
	for {
		found, err := Select(want)
		if err != nil || len(found) == 0 {
			return err
		}
		for _, p := range found {
			if err := p.Signal(unix.SIGKILL); err != nil && !errors.Is(err, ErrNotRunning) {
				return err
			}
		}
		for _, p := range found {
			if err := p.Wait(ctx); err != nil {
				return err
			}
		}
	}
}

type stat struct {
	state  byte
	parent int
	ticks  uint64
}

// readStat reads /proc/pid/stat, whose second field may hold anything but is in parentheses.
func readStat(pid int) (stat, error) {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return stat{}, ErrNotRunning
	}
	_, rest, ok := cutLast(string(data), ") ")
	fields := strings.Fields(rest)
	if !ok || len(fields) < 20 {
		return stat{}, fmt.Errorf("read state of process %d: malformed", pid)
	}
	parent, err := strconv.Atoi(fields[1])
	if err != nil {
		return stat{}, fmt.Errorf("read state of process %d: %w", pid, err)
	}
	ticks, err := strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		return stat{}, fmt.Errorf("read state of process %d: %w", pid, err)
	}
	return stat{state: fields[0][0], parent: parent, ticks: ticks}, nil
}

func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

func inspect(pid int) (Entry, error) {
	s, err := readStat(pid)
	if err != nil {
		return Entry{}, err
	}
	if s.state == 'Z' || s.state == 'X' {
		return Entry{}, ErrNotRunning
	}
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	e := Entry{Process: Process{PID: pid, Ticks: s.ticks}, Parent: s.parent}
	if data, err := os.ReadFile(filepath.Join(dir, "cmdline")); err == nil {
		e.Args = strings.Split(strings.TrimSuffix(string(data), "\x00"), "\x00")
	}
	if data, err := os.ReadFile(filepath.Join(dir, "cgroup")); err == nil {
		for line := range strings.Lines(string(data)) {
			if parts := strings.SplitN(strings.TrimSpace(line), ":", 3); len(parts) == 3 {
				e.Cgroups = append(e.Cgroups, parts[2])
			}
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "ns/net"), &st); err == nil {
		e.NetNS = st.Ino
	}
	return e, nil
}
