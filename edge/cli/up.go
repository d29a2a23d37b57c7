package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/platform/process"
)

// installed is what `skep up` leaves in DataRoot/up.json for `skep down`.
type installed struct {
	DataRoot     string   `json:"data_root"`
	ExecRoot     string   `json:"exec_root"`
	Host         string   `json:"host"`
	CgroupParent string   `json:"cgroup_parent"`
	Unit         string   `json:"unit,omitempty"` // the systemd unit; empty for a background process
	Args         []string `json:"args"`
}

func recordFile(dataRoot string) string             { return filepath.Join(dataRoot, "up.json") }
func (i installed) pidFile() string                 { return filepath.Join(i.ExecRoot, "skep.pid") }
func (i installed) logFile() string                 { return filepath.Join(i.DataRoot, "skep.log") }
func (i installed) socket() string                  { return strings.TrimPrefix(i.Host, "unix://") }
func (i installed) equal(o installed) bool          { return i.Unit == o.Unit && slices.Equal(i.Args, o.Args) }
func (i installed) client() (*client.Client, error) { return dial(endpoint{host: i.Host}) }

type upOptions struct {
	daemon  Daemon
	join    string
	noSwarm bool
	encrypt bool
	unit    string
	timeout time.Duration
}

func (a *app) upCommand() *cobra.Command {
	var o upOptions
	c := &cobra.Command{
		Use:   "up [--join TOKEN ADDR…]",
		Short: "Start a node on this machine and make it part of a swarm",
		Long: `Start a node on this machine, as a systemd unit where systemd runs, else as a background
process; wait until it is ready; begin a swarm, or join one with --join; and make the docker
context "skep" for it. A node that is up already is left as it is.`,
		Example: `  skep up
  skep up --advertise-addr 10.0.0.5
  skep up --join SWMTKN-1-… 10.0.0.5`,
		Args: func(c *cobra.Command, given []string) error {
			switch {
			case o.join != "" && len(given) == 0:
				return errors.New("--join needs the address of a manager: skep up --join TOKEN ADDR")
			case o.encrypt && (o.join != "" || o.noSwarm):
				return errors.New("--encrypt-all is for a new swarm: a node that joins does as its swarm does")
			case o.join == "" && len(given) > 0:
				return fmt.Errorf("wrong number of arguments: usage: %s", c.UseLine())
			}
			return nil
		},
		RunE: func(c *cobra.Command, given []string) error {
			if err := needRoot("a node"); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(c.Context(), o.timeout)
			defer cancel()
			return a.up(ctx, o, daemonArgs(c.Flags()), given)
		},
	}
	o.daemon.hostFlags(c.Flags())
	o.daemon.flags(c.Flags())
	c.Flags().StringVar(&o.join, "join", "", "join the swarm of this token instead of beginning one")
	c.Flags().BoolVar(&o.noSwarm, "no-swarm", false, "neither begin nor join a swarm")
	c.Flags().BoolVar(&o.encrypt, "encrypt-all", false, "encrypt every overlay network of the new swarm, the ingress network too, as if made with --opt encrypted")
	c.Flags().StringVar(&o.unit, "unit", "skep", "name of the systemd unit")
	c.Flags().DurationVar(&o.timeout, "timeout", 2*time.Minute, "give up after this time")
	return c
}

// daemonArgs returns the daemon flags that were given, as arguments for `skep daemon`.
func daemonArgs(fs *pflag.FlagSet) []string {
	var d Daemon
	known := pflag.NewFlagSet("", pflag.ContinueOnError)
	d.hostFlags(known)
	d.flags(known)
	var out []string
	fs.Visit(func(f *pflag.Flag) {
		if known.Lookup(f.Name) == nil {
			return
		}
		if many, ok := f.Value.(pflag.SliceValue); ok {
			for _, v := range many.GetSlice() {
				out = append(out, "--"+f.Name+"="+v)
			}
			return
		}
		out = append(out, "--"+f.Name+"="+f.Value.String())
	})
	return out
}

func (a *app) up(ctx context.Context, o upOptions, given, managers []string) error {
	d := o.daemon
	if err := d.check(); err != nil {
		return err
	}
	i := slices.IndexFunc(d.Hosts, func(h string) bool { return strings.HasPrefix(h, "unix://") })
	if i < 0 {
		return errors.New("give the node a unix socket as well, with -H unix:///PATH")
	}
	want := installed{DataRoot: d.DataRoot, ExecRoot: d.ExecRoot, Host: d.Hosts[i], CgroupParent: d.CgroupParent, Args: append([]string{"daemon"}, given...)}
	if systemdRuns() {
		want.Unit = o.unit
	}
	if err := a.launch(ctx, want); err != nil {
		return err
	}
	c, err := want.client()
	if err != nil {
		return err
	}
	defer c.Close() //nolint:errcheck // only idle connections
	if !o.noSwarm {
		if err := a.enlist(ctx, c, o, managers); err != nil {
			return err
		}
	}
	if err := a.writeContext(want.Host); err != nil {
		return err
	}
	return a.announce(ctx, c, want)
}

// launch starts the daemon unless it runs, and waits until it is ready.
func (a *app) launch(ctx context.Context, want installed) error {
	for _, dir := range []string{want.DataRoot, want.ExecRoot, filepath.Dir(want.socket())} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return fmt.Errorf("make directory: %w", err)
		}
	}
	if process.Ping(ctx, want.socket()) == nil {
		have, err := readInstalled(want.DataRoot)
		switch {
		case err != nil:
			return fmt.Errorf("a daemon that `skep up` did not start answers at %s: stop it first, or give another -H, --data-root and --exec-root", want.Host)
		case !have.equal(want):
			return errors.New("the node is up with other flags: run `skep down` and then `skep up` again to change them")
		}
		a.say("the node is up already")
		return nil
	}
	data, err := json.MarshalIndent(want, "", "  ")
	if err != nil {
		return fmt.Errorf("record the installation: %w", err)
	}
	if err := os.WriteFile(recordFile(want.DataRoot), append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("record the installation: %w", err)
	}
	if want.Unit != "" {
		a.say("starting the systemd unit %s", want.Unit)
		return a.startUnit(ctx, want)
	}
	a.say("starting the node in the background, log in %s", want.logFile())
	return a.startProcess(ctx, want)
}

func readInstalled(dataRoot string) (installed, error) {
	var i installed
	data, err := os.ReadFile(recordFile(dataRoot))
	if err != nil {
		return i, fmt.Errorf("read the installation: %w", err)
	}
	if err := json.Unmarshal(data, &i); err != nil {
		return i, fmt.Errorf("read the installation: %w", err)
	}
	return i, nil
}

func (a *app) startProcess(ctx context.Context, want installed) error {
	if p, err := process.ReadPIDFile(want.pidFile()); err == nil {
		return a.awaitPing(ctx, want, p.Alive) // it is starting
	}
	if err := os.Remove(want.socket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove old socket: %w", err)
	}
	p, err := process.Start(process.Command{Path: a.Executable, Args: want.Args, Env: a.Environ(), Dir: "/", Log: want.logFile()})
	if err != nil {
		return err
	}
	if err := p.WritePIDFile(want.pidFile()); err != nil {
		return err
	}
	if err := a.awaitPing(ctx, want, p.Alive); err != nil {
		return fmt.Errorf("%w; the end of %s:\n%s", err, want.logFile(), strings.TrimSpace(process.Tail(want.logFile(), 2000)))
	}
	return nil
}

// awaitPing waits until the API answers; alive says whether there is still hope.
func (a *app) awaitPing(ctx context.Context, want installed, alive func() bool) error {
	for process.Ping(ctx, want.socket()) != nil {
		if !alive() {
			return errors.New("the daemon ended before it was ready")
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the daemon: %w", ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
	return nil
}

// enlist makes the node part of a swarm unless it is.
func (a *app) enlist(ctx context.Context, c *client.Client, o upOptions, managers []string) error {
	info, err := c.Info(ctx, client.InfoOptions{})
	if err != nil {
		return unreachable(c, err)
	}
	switch s := info.Info.Swarm; s.LocalNodeState {
	case swarm.LocalNodeStateInactive, "":
	case swarm.LocalNodeStateActive, swarm.LocalNodeStatePending:
		if o.join != "" {
			a.say("the node is in a swarm already; to join another, run `docker swarm leave` first")
		}
		return nil
	case swarm.LocalNodeStateLocked:
		a.say("this manager is locked: unlock it with `docker swarm unlock`")
		return nil
	case swarm.LocalNodeStateError:
		return fmt.Errorf("the node cannot take part in its swarm: %s", s.Error)
	}
	if o.join != "" {
		a.say("joining the swarm at %s", strings.Join(managers, ", "))
		_, err := c.SwarmJoin(ctx, client.SwarmJoinOptions{
			ListenAddr: o.daemon.ListenAddr, AdvertiseAddr: o.daemon.AdvertiseAddr, RemoteAddrs: managers,
			JoinToken: o.join, Availability: swarm.NodeAvailabilityActive,
		})
		return advertiseHint(err, "join the swarm")
	}
	a.say("beginning a swarm")
	if _, err := c.SwarmInit(ctx, client.SwarmInitOptions{
		Spec:       swarmSpec(o.encrypt),
		ListenAddr: o.daemon.ListenAddr, AdvertiseAddr: o.daemon.AdvertiseAddr, Availability: swarm.NodeAvailabilityActive,
		DefaultAddrPool: []netip.Prefix{}, SubnetSize: 24,
	}); err != nil {
		return advertiseHint(err, "begin a swarm")
	}
	return awaitReady(ctx, c, 1)
}

// swarmSpec is the specification of a new swarm.
func swarmSpec(encrypt bool) (spec swarm.Spec) {
	if encrypt {
		spec.Labels = map[string]string{model.EncryptLabel: model.EncryptAll}
	}
	return spec
}

func advertiseHint(err error, what string) error {
	switch {
	case err == nil:
		return nil
	case strings.Contains(err.Error(), "could not choose an IP address to advertise"), strings.Contains(err.Error(), "could not find the system's IP address"):
		return fmt.Errorf("%s: %w - specify one with --advertise-addr", what, err)
	default:
		return fmt.Errorf("%s: %w", what, err)
	}
}

// announce says what there is now and what to do with it.
func (a *app) announce(ctx context.Context, c *client.Client, i installed) error {
	info, err := c.Info(ctx, client.InfoOptions{})
	if err != nil {
		return unreachable(c, err)
	}
	s := info.Info.Swarm
	if a.json {
		return a.printJSON(map[string]any{
			"host": i.Host, "data_root": i.DataRoot, "unit": i.Unit, "context": contextName, "node_id": s.NodeID,
			"node_addr": s.NodeAddr, "state": s.LocalNodeState, "manager": s.ControlAvailable,
		})
	}
	role := "worker"
	if s.ControlAvailable {
		role = "manager"
	}
	if s.LocalNodeState != swarm.LocalNodeStateActive {
		role = "node in state " + string(s.LocalNodeState)
	}
	a.say("%s %s is up at %s", role, info.Info.Name, i.Host)
	a.say("try: skep status, docker --context %s info", contextName)
	if s.ControlAvailable {
		a.say("to add a machine: skep token worker")
	}
	return nil
}
