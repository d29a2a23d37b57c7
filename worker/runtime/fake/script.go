package fake

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Script is what a container's process does. It is written as clauses separated by
// ";", in the container's command (joined by spaces) or in its image's Script:
//
//	exit CODE [after DURATION]   ends by itself; without it the process runs until stopped
//	fail [TEXT]                  cannot be started, with the error TEXT
//	ignore                       pays no attention to any signal but KILL
//	stop in DURATION             takes so long to obey a stop signal
//	code CODE                    exits with CODE on a stop signal (143 for TERM otherwise)
//	print TEXT                   writes a line to standard output when it starts
//	error TEXT                   writes a line to standard error when it starts
//	unhealthy [after DURATION]   health checks fail, from DURATION after the start on
//	healthy after DURATION       health checks fail until then
//
// A command without any clause of this kind ("nginx -g …", "sleep 5") runs until stopped.
type Script struct {
	Exits     bool
	ExitCode  int
	ExitAfter time.Duration

	StartError string
	Ignore     bool
	StopTime   time.Duration
	StopCode   int // -1 means 128 + signal

	Output []Line

	UnhealthyAfter time.Duration // negative means never
	HealthyAfter   time.Duration
}

// Line is a line of output.
type Line struct {
	Text   string
	Stderr bool
}

// ParseScript reads a script; unknown clauses are ignored.
func ParseScript(text string) Script {
	s := Script{StopCode: -1, UnhealthyAfter: -1, StopTime: -1}
	for clause := range strings.SplitSeq(text, ";") {
		words := strings.Fields(clause)
		if len(words) == 0 {
			continue
		}
		s.clause(words)
	}
	return s
}

func (s *Script) clause(words []string) {
	rest := strings.Join(words[1:], " ")
	switch words[0] {
	case "exit":
		s.exit(words[1:])
	case "fail":
		s.StartError = rest
		if rest == "" {
			s.StartError = "OCI runtime create failed"
		}
	case "ignore":
		s.Ignore = true
	case "stop":
		if len(words) == 3 && words[1] == "in" {
			s.StopTime = duration(words[2])
		}
	case "code":
		if n, err := strconv.Atoi(rest); err == nil {
			s.StopCode = n
		}
	case "print":
		s.Output = append(s.Output, Line{Text: rest})
	case "error":
		s.Output = append(s.Output, Line{Text: rest, Stderr: true})
	case "unhealthy":
		s.UnhealthyAfter = after(words[1:])
	case "healthy":
		s.HealthyAfter = after(words[1:])
	}
}

func (s *Script) exit(words []string) {
	code := 0
	if len(words) > 0 && words[0] != "after" {
		n, err := strconv.Atoi(words[0])
		if err != nil {
			return
		}
		code, words = n, words[1:]
	}
	s.Exits, s.ExitCode, s.ExitAfter = true, code, after(words)
}

func after(words []string) time.Duration {
	if len(words) == 2 && words[0] == "after" {
		return duration(words[1])
	}
	return 0
}

func duration(s string) time.Duration {
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0
	}
	return d
}

// String prints a script so that ParseScript reads it back.
func (s Script) String() string {
	var c []string
	if s.Exits {
		c = append(c, fmt.Sprintf("exit %d after %v", s.ExitCode, s.ExitAfter))
	}
	if s.StartError != "" {
		c = append(c, "fail "+s.StartError)
	}
	if s.Ignore {
		c = append(c, "ignore")
	}
	if s.StopTime >= 0 {
		c = append(c, fmt.Sprintf("stop in %v", s.StopTime))
	}
	if s.StopCode >= 0 {
		c = append(c, fmt.Sprintf("code %d", s.StopCode))
	}
	for _, l := range s.Output {
		verb := "print "
		if l.Stderr {
			verb = "error "
		}
		c = append(c, verb+l.Text)
	}
	if s.UnhealthyAfter >= 0 {
		c = append(c, fmt.Sprintf("unhealthy after %v", s.UnhealthyAfter))
	}
	if s.HealthyAfter > 0 {
		c = append(c, fmt.Sprintf("healthy after %v", s.HealthyAfter))
	}
	return strings.Join(c, "; ")
}
