// Command skep is a node of a swarm (`skep daemon`) and the commands with which a person
// starts, fills and questions one. It only wires package cli to the process: streams,
// environment, signals and exit code, and to package node, which is the daemon.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/skep-dev/skep/edge/cli"
	"github.com/skep-dev/skep/node"
	"github.com/skep-dev/skep/worker/wireguard"
)

// Set by the linker.
var (
	version = "dev"
	commit  = "unknown" //nolint:gochecknoglobals // the linker sets it
)

func main() { os.Exit(run()) }

// run returns the exit code: 0 for success, 1 for an error, 130 after a
// signal; only the daemon is meant to end by one.
func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	executable, err := os.Executable()
	if err != nil {
		executable = os.Args[0]
	}
	root := cli.New(cli.Env{
		In: os.Stdin, Out: os.Stdout, Err: os.Stderr,
		Getenv: os.Getenv, Environ: os.Environ, Executable: executable,
		Version: version, Commit: commit,
		Daemon: runDaemon, WireGuard: wireguard.ServeArgs, Examine: node.Examine,
	})
	root.SetArgs(os.Args[1:])
	command, err := root.ExecuteContextC(ctx)
	var exit cli.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.Code
	case ctx.Err() != nil && command.Name() != "daemon": // its error is that it was ended, in whatever words
		return 130
	default:
		fmt.Fprintln(os.Stderr, "skep: "+err.Error())
		return 1
	}
}
