package cli

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/skep-dev/skep/platform/unlock"
)

// Where a daemon keeps things unless it is told otherwise.
const (
	DefaultDataRoot = "/var/lib/skep"
	DefaultExecRoot = "/run/skep"
	DefaultHost     = "unix:///run/skep/skep.sock"
	// DefaultCgroupParent is the cgroup above those of all containers.
	DefaultCgroupParent = "/skep"
)

// maxExecRoot leaves room for containerd's directory of shim sockets, whose path may
// have 42 characters.
const maxExecRoot = 42 - len("/c/s")

// Daemon is the configuration of one daemon, as its flags say it.
type Daemon struct {
	// DataRoot keeps what must survive a reboot, ExecRoot what need not.
	DataRoot, ExecRoot string
	// Hosts are where the API listens: unix://PATH or tcp://HOST:PORT.
	Hosts []string
	// TLSCert, TLSKey and TLSCACert protect tcp hosts, which need all three: clients must
	// show a certificate signed by the CA.
	TLSCert, TLSKey, TLSCACert string
	// TLS serves tcp hosts with TLS, TLSVerify demands a certificate of their clients. Both
	// flags are on unless a person says otherwise.
	TLS, TLSVerify bool
	// Roles give roles to the certificates of clients: cn=NAME:ROLE, ou=NAME:ROLE or *:ROLE.
	Roles []string
	// Containerd is the socket of a containerd to use; empty starts one of our own.
	Containerd string
	// Runtime is runc, crun or empty for the better one that works.
	Runtime string
	// AdvertiseAddr and ListenAddr are the defaults of swarm init and join.
	AdvertiseAddr, ListenAddr string
	// Labels are engine labels, each key=value.
	Labels []string
	// MetricsAddr serves /metrics in clear; empty serves none.
	MetricsAddr string
	// LogLevel is debug, info, warn or error; LogFormat is text or json.
	LogLevel, LogFormat string
	// StopTasks stops the tasks when the daemon stops.
	StopTasks bool
	// UnlockProvider is asked for the unlock key when a manager starts locked; empty asks nobody.
	UnlockProvider string
	// BridgeIP is the address and prefix of the local bridge; empty chooses one.
	BridgeIP string
	// CgroupParent is the cgroup above those of the containers.
	CgroupParent string
	// Insecure are registries that may lack TLS or a valid certificate: hosts and networks.
	Insecure []string
}

// flags declares the daemon's flags on fs.
func (d *Daemon) flags(fs *pflag.FlagSet) {
	fs.StringVar(&d.DataRoot, "data-root", DefaultDataRoot, "directory for what must survive a reboot: images, volumes, swarm state")
	fs.StringVar(&d.ExecRoot, "exec-root", DefaultExecRoot, "directory for what need not: sockets, pid files, mounts")
	fs.StringVar(&d.Containerd, "containerd", "", "socket of a containerd to use (default: start the bundled one)")
	fs.StringVar(&d.Runtime, "runtime", "", "OCI runtime: runc or crun (default: crun if it works here, else runc)")
	fs.StringVar(&d.AdvertiseAddr, "advertise-addr", "", "address or interface that other nodes reach this one at, for swarm init and join (default: that of the default route)")
	fs.StringVar(&d.ListenAddr, "listen-addr", "0.0.0.0:2377", "address that the swarm port listens on, for swarm init and join")
	fs.StringArrayVar(&d.Labels, "label", nil, "engine label key=value, for constraints on engine.labels.key (repeatable)")
	fs.StringVar(&d.MetricsAddr, "metrics-addr", "", "address that serves /metrics for Prometheus, without encryption (default: none)")
	fs.StringVar(&d.LogLevel, "log-level", "info", "debug, info, warn or error")
	fs.StringVar(&d.LogFormat, "log-format", "text", "text or json")
	fs.BoolVar(&d.StopTasks, "stop-tasks", false, "stop the tasks when the daemon stops (default: they keep running)")
	fs.StringVar(&d.UnlockProvider, "unlock-provider", "", "program exec:/PATH or socket unix:/PATH to ask for the unlock key when this manager starts locked (default: none)")
	fs.StringVar(&d.BridgeIP, "bip", "", "address of the containers' local bridge, e.g. 172.30.0.1/16 (default: a free private one)")
	fs.StringVar(&d.CgroupParent, "cgroup-parent", DefaultCgroupParent, "cgroup above those of the containers")
	fs.StringArrayVar(&d.Insecure, "insecure-registry", nil, "registry HOST[:PORT] or network CIDR that may lack TLS or a valid certificate (repeatable; loopback always may)")
}

// hostFlags declares the flags of a daemon's API.
func (d *Daemon) hostFlags(fs *pflag.FlagSet) {
	fs.StringArrayVarP(&d.Hosts, "host", "H", []string{DefaultHost}, "where the API listens: unix://PATH or tcp://HOST:PORT (repeatable)")
	fs.StringVar(&d.TLSCert, "tlscert", "", "certificate of tcp hosts")
	fs.StringVar(&d.TLSKey, "tlskey", "", "private key of tcp hosts")
	fs.StringVar(&d.TLSCACert, "tlscacert", "", "CA whose certificates clients of tcp hosts must show")
	fs.BoolVar(&d.TLS, "tls", true, "serve tcp hosts with TLS")
	fs.BoolVar(&d.TLSVerify, "tlsverify", true, "demand a certificate of the clients of tcp hosts; without, whoever reaches one is root on this machine")
	fs.StringArrayVar(&d.Roles, "api-role", nil, "role of client certificates: cn=NAME:ROLE, ou=NAME:ROLE or *:ROLE, with ROLE admin, operator, viewer or none (repeatable)")
}

// checkDirs refuses directories that cannot be a daemon's own.
func (d *Daemon) checkDirs() error {
	for _, dir := range []string{d.DataRoot, d.ExecRoot} {
		if !filepath.IsAbs(dir) {
			return fmt.Errorf("directory %q must be absolute", dir)
		}
		// `skep down` empties these directories, so they must be ours alone.
		if clean := filepath.Clean(dir); slices.Contains(systemDirs(), clean) {
			return fmt.Errorf("directory %q belongs to the system: name one for Skep alone, such as %s", dir, filepath.Join(clean, "skep"))
		}
	}
	if len(d.ExecRoot) > maxExecRoot {
		return fmt.Errorf("exec root %s is longer than %d characters, too long for the sockets of containerd below it", d.ExecRoot, maxExecRoot)
	}
	return nil
}

// check refuses what cannot work before anything is started.
func (d *Daemon) check() error {
	if err := d.checkDirs(); err != nil {
		return err
	}
	if !d.TLS && d.TLSVerify && len(d.Hosts) > 0 {
		return errors.New("--tls=false lets anybody call, and anybody listen: say so with --tlsverify=false as well")
	}
	for _, h := range d.Hosts {
		if err := checkHost(h); err != nil {
			return err
		}
		if strings.HasPrefix(h, "tcp://") && (d.TLS || d.TLSVerify) && (d.TLSCert == "" || d.TLSKey == "" || d.TLSCACert == "" && d.TLSVerify) {
			return fmt.Errorf("host %s would give everyone who reaches it root on this machine: give --tlscert, --tlskey and --tlscacert; or say with --tlsverify=false that clients need no certificate, and with --tls=false that there is no TLS either", h)
		}
	}
	switch d.Runtime {
	case "", "runc", "crun":
	default:
		return fmt.Errorf("runtime %q is neither runc nor crun", d.Runtime)
	}
	switch d.LogLevel {
	case "debug", "info", "warn", "error":
	default:
		return fmt.Errorf("log level %q is none of debug, info, warn, error", d.LogLevel)
	}
	switch d.LogFormat {
	case "text", "json":
	default:
		return fmt.Errorf("log format %q is neither text nor json", d.LogFormat)
	}
	for _, l := range d.Labels {
		if key, _, ok := strings.Cut(l, "="); !ok || key == "" {
			return fmt.Errorf("label %q is not key=value", l)
		}
	}
	if d.UnlockProvider != "" {
		if _, err := unlock.Parse(d.UnlockProvider); err != nil {
			return err
		}
	}
	if d.CgroupParent == "" || d.CgroupParent == "/" {
		return fmt.Errorf("cgroup parent %q must name a cgroup below the root", d.CgroupParent)
	}
	if d.Containerd != "" {
		if _, err := os.Stat(strings.TrimPrefix(d.Containerd, "unix://")); err != nil {
			return fmt.Errorf("use containerd: %w", err)
		}
	}
	return nil
}

func systemDirs() []string {
	return strings.Fields("/ /bin /boot /dev /etc /home /lib /lib64 /media /mnt /opt /proc /root /run /sbin /srv /sys /tmp /usr /usr/lib /usr/local " +
		"/var /var/cache /var/lib /var/log /var/run /var/tmp /run/user /etc/systemd")
}

// checkHost accepts unix://PATH with an absolute path and tcp://HOST:PORT.
func checkHost(host string) error {
	scheme, rest, ok := strings.Cut(host, "://")
	switch {
	case ok && scheme == "unix" && filepath.IsAbs(rest):
		if len(rest) > 107 {
			return fmt.Errorf("socket path %s is longer than the 107 characters that the kernel allows", rest)
		}
		return nil
	case ok && scheme == "tcp":
		if _, port, err := net.SplitHostPort(rest); err == nil && port != "" {
			return nil
		}
	}
	return fmt.Errorf("host %q is neither unix:///PATH nor tcp://HOST:PORT", host)
}

func (a *app) daemonCommand() *cobra.Command {
	var d Daemon
	var debug bool
	c := &cobra.Command{
		Use:   "daemon",
		Short: "Run a node in the foreground",
		Long: `Run a node in the foreground. It is ready when it logs so and its API answers /_ping.

SIGTERM and SIGINT stop the daemon; its tasks keep running, and the next daemon with the
same directories takes them over. With --stop-tasks, or on SIGUSR1, it stops its tasks
first. SIGHUP reads the certificates of tcp hosts again.

Several daemons can share a machine if each has its own directories and hosts, and its
own network namespace or swarm port.`,
		Args: args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			if debug {
				d.LogLevel = "debug"
			}
			if err := d.check(); err != nil {
				return err
			}
			return a.Daemon(c.Context(), d)
		},
	}
	d.hostFlags(c.Flags())
	d.flags(c.Flags())
	c.Flags().BoolVarP(&debug, "debug", "D", false, "same as --log-level debug, and serve profiles at /debug/pprof/")
	return c
}
