package cli

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/skep-dev/skep/core/rescue"
)

// Env is what the commands need of the process that runs them.
type Env struct {
	In       io.Reader
	Out, Err io.Writer
	// Getenv looks an environment variable up; Environ lists all.
	Getenv  func(string) string
	Environ func() []string
	// Executable is the path of the skep program, to start daemons with.
	Executable string
	// Version and Commit say which build this is.
	Version, Commit string
	// Daemon runs a daemon until ctx ends.
	Daemon func(ctx context.Context, cfg Daemon) error
	// WireGuard runs a userspace WireGuard device, with the arguments that the daemon gives
	// it, until ctx ends.
	WireGuard func(ctx context.Context, args []string) error
	// Examine looks at a data root without changing it. unlockKey opens a locked one and
	// may be empty.
	Examine func(dir, unlockKey string) (rescue.Facts, error)
}

// WireGuardCommand is the command by which the daemon starts userspace WireGuard.
const WireGuardCommand = "wireguard"

// ExitError ends the program with a code of its own and without a message.
type ExitError struct{ Code int }

// Error says the code.
func (e ExitError) Error() string { return fmt.Sprintf("exit status %d", e.Code) }

// app is one run of the program: its environment and what the global flags say.
type app struct {
	Env

	host string
	json bool
}

// New returns the root command.
func New(env Env) *cobra.Command {
	a := &app{Env: env}
	root := &cobra.Command{
		Use:   "skep",
		Short: "Turn Linux machines into a swarm that the docker command drives",
		Long: `Skep turns Linux machines into a swarm that the docker command drives.

  skep up                     start a node on this machine, in a swarm of its own
  skep up --join TOKEN ADDR   start a node that joins a swarm (see: skep token)
  skep deploy compose.yaml    run the services of a compose file
  skep status                 what runs, what does not, and why`,
		Version:           fmt.Sprintf("%s (%s)", env.Version, env.Commit),
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
	}
	root.SetIn(env.In)
	root.SetOut(env.Out)
	root.SetErr(env.Err)
	root.PersistentFlags().StringVarP(&a.host, "host", "H", "",
		"API of the node to talk to: unix://PATH or tcp://HOST:PORT (default $SKEP_HOST, $DOCKER_HOST, the docker context in use, "+DefaultHost+")")
	root.PersistentFlags().BoolVar(&a.json, "json", false, "print JSON for scripts")
	root.AddGroup(
		&cobra.Group{ID: "node", Title: "This machine:"},
		&cobra.Group{ID: "swarm", Title: "The swarm:"},
		&cobra.Group{ID: "service", Title: "Services:"},
	)
	group := func(id string, commands ...*cobra.Command) {
		for _, c := range commands {
			c.GroupID = id
			root.AddCommand(c)
		}
	}
	group("node", a.upCommand(), a.downCommand(), a.daemonCommand(), a.loadCommand(), a.auditCommand(), a.recoverCommand(), a.devCommand())
	group("swarm", a.statusCommand(), a.nodesCommand(), a.tokenCommand(), a.backupCommand(), a.netCommand())
	group("swarm", a.lockCommand(), a.unlockCommand())
	group("service", a.deployCommand(), a.lsCommand(), a.psCommand(), a.logsCommand(), a.scaleCommand(), a.secretCommand(), a.explainCommand(), a.rmCommand())
	root.AddCommand(&cobra.Command{
		Use: WireGuardCommand, Short: "Run the device of an encrypted network; the daemon starts it", Hidden: true, DisableFlagParsing: true,
		RunE: func(c *cobra.Command, given []string) error { return a.WireGuard(c.Context(), given) },
	})
	for _, c := range root.Commands() {
		if c.HasSubCommands() && !c.Runnable() {
			c.Args, c.RunE, c.DisableFlagsInUseLine = cobra.ArbitraryArgs, wantCommand, true
		}
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return fmt.Errorf("%w: see `%s --help`", err, c.CommandPath())
	})
	return root
}

// wantCommand is a command that only has others: alone it shows them, and refuses what it has not.
func wantCommand(c *cobra.Command, given []string) error {
	if len(given) == 0 {
		return c.Help()
	}
	return fmt.Errorf("unknown command %q for %q: see `%s --help`", given[0], c.CommandPath(), c.CommandPath())
}

// args refuses a wrong number of arguments with the command's usage line.
func args(low, high int) cobra.PositionalArgs {
	return func(c *cobra.Command, given []string) error {
		if len(given) < low || high >= 0 && len(given) > high {
			return fmt.Errorf("wrong number of arguments: usage: %s", c.UseLine())
		}
		return nil
	}
}

// hint adds what to do to an error that a command passes on.
func hint(err error, text string) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w\n%s", err, text)
}

var errNotManager = errors.New("this node is not a manager, so it cannot see or change the swarm: " +
	"run the command on a manager, or point it at one with -H or `docker context use`")
