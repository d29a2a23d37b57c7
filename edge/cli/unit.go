package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

const unitDir = "/etc/systemd/system"

// systemdRuns reports whether systemd is the machine's init.
func systemdRuns() bool {
	info, err := os.Stat("/run/systemd/system")
	return err == nil && info.IsDir()
}

// unitText returns the systemd unit of a node. Only the daemon is in the unit's hands:
// containerd, shims and containers outlive its restarts.
func unitText(executable string, args []string) string {
	quoted := make([]string, 0, len(args)+1)
	for _, arg := range append([]string{executable}, args...) {
		quoted = append(quoted, unitQuote(arg))
	}
	return `[Unit]
Description=Skep swarm node
Wants=network-online.target
After=network-online.target

[Service]
Type=exec
ExecStart=` + strings.Join(quoted, " ") + `
ExecReload=/bin/kill -HUP $MAINPID
KillMode=process
Restart=on-failure
RestartSec=1
TimeoutStopSec=60
Delegate=yes
OOMScoreAdjust=-500
LimitNOFILE=1048576
LimitNPROC=infinity
LimitCORE=infinity
TasksMax=infinity

[Install]
WantedBy=multi-user.target
`
}

// unitQuote quotes one argument as systemd reads it.
func unitQuote(s string) string {
	s = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`, "%", "%%", "$", "$$").Replace(s)
	if strings.ContainsAny(s, " \t'\"\\;") || s == "" {
		return `"` + s + `"`
	}
	return s
}

func systemctl(ctx context.Context, args ...string) error {
	out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

func unitPath(unit string) string { return filepath.Join(unitDir, unit+".service") }

func (a *app) startUnit(ctx context.Context, want installed) error {
	if strings.ContainsAny(want.Unit, "/ ") || want.Unit == "" {
		return fmt.Errorf("%q is not the name of a systemd unit", want.Unit)
	}
	if err := os.WriteFile(unitPath(want.Unit), []byte(unitText(a.Executable, want.Args)), 0o644); err != nil { //nolint:gosec // units are public
		return fmt.Errorf("write systemd unit: %w", err)
	}
	if err := systemctl(ctx, "daemon-reload"); err != nil {
		return err
	}
	if err := systemctl(ctx, "enable", "--now", want.Unit); err != nil {
		return hint(err, "look with: journalctl -u "+want.Unit)
	}
	err := a.awaitPing(ctx, want, func() bool { return systemctl(ctx, "is-failed", "--quiet", want.Unit) != nil })
	if err != nil {
		return hint(err, "look with: journalctl -u "+want.Unit)
	}
	return nil
}

// stopUnit ends the unit's daemon with its tasks and removes the unit.
func stopUnit(ctx context.Context, unit string) error {
	if !exists(unitPath(unit)) {
		return nil
	}
	// The daemon stops its tasks and ends; a daemon that is not running needs no signal.
	if systemctl(ctx, "is-active", "--quiet", unit) == nil {
		if err := systemctl(ctx, "kill", "--kill-who=main", "--signal=SIGUSR1", unit); err != nil {
			return err
		}
		if err := awaitInactive(ctx, unit); err != nil {
			return err
		}
	}
	if err := systemctl(ctx, "disable", "--now", unit); err != nil {
		return err
	}
	if err := os.Remove(unitPath(unit)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove systemd unit: %w", err)
	}
	return systemctl(ctx, "daemon-reload")
}
