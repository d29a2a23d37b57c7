package docker

import (
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/model"
)

const (
	sigRTMin = 34
	sigRTMax = 64
)

// ParseSignal reads a signal by number or by name, with or without "SIG", in any case.
// An empty string is SIGKILL, Docker's default for kill.
func ParseSignal(s string) (unix.Signal, error) {
	if s == "" {
		return unix.SIGKILL, nil
	}
	if n, err := strconv.Atoi(s); err == nil {
		if n <= 0 || n > sigRTMax {
			return 0, model.Errorf(model.Invalid, "invalid signal: %s", s)
		}
		return unix.Signal(n), nil
	}
	name := "SIG" + strings.TrimPrefix(strings.ToUpper(s), "SIG")
	if n := unix.SignalNum(name); n != 0 {
		return n, nil
	}
	if rest, ok := strings.CutPrefix(name, "SIGRTMIN"); ok {
		if n, ok := realtime(sigRTMin, rest); ok {
			return n, nil
		}
	}
	if rest, ok := strings.CutPrefix(name, "SIGRTMAX"); ok {
		if n, ok := realtime(sigRTMax, rest); ok {
			return n, nil
		}
	}
	return 0, model.Errorf(model.Invalid, "invalid signal: %s", s)
}

func realtime(base int, offset string) (unix.Signal, bool) {
	if offset != "" {
		n, err := strconv.Atoi(offset)
		if err != nil || offset[0] != '+' && offset[0] != '-' {
			return 0, false
		}
		base += n
	}
	return unix.Signal(base), base >= sigRTMin && base <= sigRTMax
}
