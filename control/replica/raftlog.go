package replica

import (
	"fmt"
	"log/slog"
)

// raftLogger passes what the raft library says on to slog; its information is our debug.
type raftLogger struct{ log *slog.Logger }

func (l raftLogger) say(level slog.Level, text string) {
	l.log.Log(nil, level, "raft", slog.String("event", text)) //nolint:staticcheck // the library has no context
}

func (l raftLogger) Debug(v ...any)            { l.say(slog.LevelDebug, fmt.Sprint(v...)) }
func (l raftLogger) Debugf(f string, v ...any) { l.say(slog.LevelDebug, fmt.Sprintf(f, v...)) }
func (l raftLogger) Info(v ...any)             { l.say(slog.LevelDebug, fmt.Sprint(v...)) }
func (l raftLogger) Infof(f string, v ...any)  { l.say(slog.LevelDebug, fmt.Sprintf(f, v...)) }

func (l raftLogger) Warning(v ...any)            { l.say(slog.LevelWarn, fmt.Sprint(v...)) }
func (l raftLogger) Warningf(f string, v ...any) { l.say(slog.LevelWarn, fmt.Sprintf(f, v...)) }
func (l raftLogger) Error(v ...any)              { l.say(slog.LevelError, fmt.Sprint(v...)) }
func (l raftLogger) Errorf(f string, v ...any)   { l.say(slog.LevelError, fmt.Sprintf(f, v...)) }

// Fatal and Panic mean a broken invariant of raft.

func (l raftLogger) Fatal(v ...any)            { panic("raft: " + fmt.Sprint(v...)) }
func (l raftLogger) Fatalf(f string, v ...any) { panic("raft: " + fmt.Sprintf(f, v...)) }
func (l raftLogger) Panic(v ...any)            { panic("raft: " + fmt.Sprint(v...)) }
func (l raftLogger) Panicf(f string, v ...any) { panic("raft: " + fmt.Sprintf(f, v...)) }
