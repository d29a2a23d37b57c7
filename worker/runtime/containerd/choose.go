package containerd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime/shim"
)

// ociVersion is the newest specification version that every supported runtime accepts:
// crun 1.8 refuses newer ones.
const ociVersion = "1.1.0"

// ociRuntime is the program that makes containers.
type ociRuntime struct {
	name    string // crun or runc
	path    string
	version string
	// enter is set when it must run without the cgroup2 hierarchy beside v1.
	enter    bool
	warnings []string
}

// chooseRuntime returns the first runtime that can run a container here.
func chooseRuntime(ctx context.Context, cfg Config) (ociRuntime, error) {
	candidates := []string{"crun", "runc"}
	if cfg.Runtime != "" {
		candidates = []string{cfg.Runtime}
	}
	var warnings []string
	for _, name := range candidates {
		path, err := exec.LookPath(name)
		if err != nil {
			warnings = append(warnings, fmt.Sprintf("OCI runtime %s is not installed", name))
			continue
		}
		r := ociRuntime{name: name, path: path, version: runtimeVersion(ctx, path), enter: name == "crun" && hybrid()}
		if r.enter && cfg.Address != "" {
			warnings = append(warnings, "OCI runtime crun does not work with the cgroup2 hierarchy mounted beside v1 in a containerd that is not Skep's own")
			continue
		}
		if err := tryRuntime(ctx, cfg, r); err != nil {
			warnings = append(warnings, fmt.Sprintf("OCI runtime %s does not work on this machine: %v", name, err))
			continue
		}
		r.warnings = warnings
		return r, nil
	}
	return ociRuntime{}, model.Errorf(model.Unavailable, "no OCI runtime works on this machine: %s", strings.Join(warnings, "; "))
}

// hybrid reports whether a cgroup2 hierarchy is mounted beside cgroup v1.
func hybrid() bool {
	var root, unified unix.Statfs_t
	if unix.Statfs("/sys/fs/cgroup", &root) != nil || root.Type == unix.CGROUP2_SUPER_MAGIC {
		return false
	}
	return unix.Statfs("/sys/fs/cgroup/unified", &unified) == nil && unified.Type == unix.CGROUP2_SUPER_MAGIC
}

func runtimeVersion(ctx context.Context, path string) string {
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return ""
	}
	first, _, _ := strings.Cut(string(out), "\n")
	words := strings.Fields(first)
	if len(words) == 0 {
		return ""
	}
	return words[len(words)-1]
}

// tryRuntime runs a container that does nothing and wants it to end well.
func tryRuntime(ctx context.Context, cfg Config, r ociRuntime) (err error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	dir, err := os.MkdirTemp(cfg.State, "try")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	rootfs := filepath.Join(dir, "rootfs")
	for _, d := range []string{"proc", "dev", "bin"} {
		if err := os.MkdirAll(filepath.Join(rootfs, d), 0o755); err != nil {
			return err
		}
	}
	program, err := os.ReadFile(filepath.Join(cfg.BinDir, initBinary))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(rootfs, "bin/init"), program, 0o755); err != nil { //nolint:gosec // a program
		return err
	}
	id := "try-" + filepath.Base(dir)
	s := &specs.Spec{
		Version: ociVersion,
		Process: &specs.Process{Args: []string{"/bin/init"}, Cwd: "/", NoNewPrivileges: true},
		Root:    &specs.Root{Path: "rootfs"},
		Mounts:  []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}},
		Linux: &specs.Linux{
			CgroupsPath: cfg.CgroupParent + "/" + id,
			// On cgroup v2 this is a program for the kernel, which not every runtime can load everywhere.
			Resources: &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Access: "rwm"}}},
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace},
				{Type: specs.MountNamespace},
				{Type: specs.IPCNamespace},
				{Type: specs.UTSNamespace},
				{Type: specs.NetworkNamespace},
			},
		},
	}
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), b, 0o600); err != nil {
		return err
	}
	root := filepath.Join(dir, "root")
	argv := r.command(cfg, "--root", root, "run", "--bundle", dir, id)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Run(); err != nil {
		del := r.command(cfg, "--root", root, "delete", "--force", id)
		_ = exec.CommandContext(ctx, del[0], del[1:]...).Run() // usually there is nothing to delete
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(output.String()))
	}
	return nil
}

// command returns the command line that runs the runtime in the mounts it needs.
func (r ociRuntime) command(cfg Config, args ...string) []string {
	return r.wrap(cfg, append([]string{r.path}, args...))
}

// wrap prefixes argv so that it runs in the mounts the runtime needs.
func (r ociRuntime) wrap(cfg Config, argv []string) []string {
	if !r.enter {
		return argv
	}
	return append([]string{shimPath(cfg), shim.EnterCommand}, argv...)
}

const (
	shimBinary       = "containerd-shim-skep-v1"
	containerdBinary = "containerd"
	initBinary       = "skep-init"
)

func shimPath(cfg Config) string { return filepath.Join(cfg.BinDir, shimBinary) }
