package node

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/platform/audit"
)

// localPeer names the process at the other end of a unix socket, as it was when it
// connected; nothing for other connections.
func localPeer(c net.Conn) string {
	conn, ok := c.(*net.UnixConn)
	if !ok {
		return ""
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return "unknown"
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil || err != nil {
		return "unknown"
	}
	who := fmt.Sprintf("uid=%d gid=%d pid=%d", cred.Uid, cred.Gid, cred.Pid)
	if comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", cred.Pid)); err == nil && cred.Pid > 0 {
		who += " (" + strings.TrimSpace(string(comm)) + ")"
	}
	return who
}

// startAudit opens the daemon's audit log and writes it until the returned function is
// called, which comes after the last request has ended.
func startAudit(ctx context.Context, cfg *Config) (stop func(), err error) {
	cfg.audit, err = audit.Open(audit.Config{Dir: filepath.Join(cfg.DataRoot, "audit"), Log: cfg.Log, Registerer: cfg.Registry})
	if err != nil {
		return nil, err
	}
	// What is written elsewhere proves later that the end of the log was not cut off.
	cfg.Log.Info("audit log goes on", slog.String("head", cfg.audit.Head().String()))
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan error, 1)
	go func() { done <- cfg.audit.Run(ctx) }()
	cfg.audit.Add(audit.Record{Who: "daemon", What: "start of the daemon", Object: cfg.Version, Outcome: audit.Done})
	return func() {
		cfg.audit.Add(audit.Record{Who: "daemon", What: "end of the daemon", Outcome: audit.Done})
		cancel()
		if err := <-done; err != nil {
			cfg.Log.Error("audit log not closed", slog.Any("error", err))
		}
	}, nil
}
