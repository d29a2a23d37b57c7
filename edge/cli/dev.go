package cli

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"

	"github.com/skep-dev/skep/platform/devnet"
)

// devOptions are the flags that all dev commands share.
type devOptions struct {
	name, dir string
}

func (a *app) devCommand() *cobra.Command {
	o := &devOptions{}
	c := &cobra.Command{
		Use:   "dev",
		Short: "Run a swarm of many nodes on this machine, for trying things and for tests",
		Long: `Run a swarm of many nodes on this machine. Every node is a full daemon in a network
namespace of its own, with its own address, containerd and directories. Nodes are named
m1, m2, … (managers) and w1, w2, … (workers). The nodes reach each other and nothing else.`,
	}
	c.PersistentFlags().StringVar(&o.name, "name", "dev", "name of the dev swarm")
	c.PersistentFlags().StringVar(&o.dir, "dir", "/var/lib/skep-dev", "directory of all dev swarms; keep it short, sockets lie below it")
	c.AddCommand(a.devUp(o), a.devLs(o), a.devExec(o), a.devKill(o), a.devStart(o), a.devCut(o), a.devHeal(o), a.devDown(o))
	return c
}

func (a *app) devConfig(o *devOptions) devnet.Config {
	var env []string
	for _, e := range a.Environ() {
		if !strings.HasPrefix(e, "DOCKER_") && !strings.HasPrefix(e, "SKEP_") {
			env = append(env, e)
		}
	}
	return devnet.Config{Dir: o.dir, Binary: a.Executable, Env: env}
}

func needRoot(what string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s needs root: run it with sudo", what)
	}
	return nil
}

func (a *app) devUp(o *devOptions) *cobra.Command {
	var managers, workers int
	var encrypt bool
	var timeout time.Duration
	var daemonArgs []string
	c := &cobra.Command{
		Use:   "up",
		Short: "Make a dev swarm and print each node's socket",
		Args:  args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := needRoot("a swarm of network namespaces"); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(c.Context(), timeout)
			defer cancel()
			cfg := a.devConfig(o)
			cfg.DaemonArgs = daemonArgs
			s, err := devnet.Up(ctx, cfg, o.name, managers, workers, func(ctx context.Context, s *devnet.Swarm) error { return a.form(ctx, s, encrypt) })
			if err != nil {
				if _, known := devnet.Open(cfg, o.name); known == nil && c.Context().Err() == nil {
					return hint(err, fmt.Sprintf("what was started is left for a look; remove it with `skep dev down --name %s`", o.name))
				}
				return err
			}
			if err := a.printNodes(s.Nodes); err != nil {
				return err
			}
			a.say("\nTry: docker -H unix://%s node ls\n     skep -H unix://%s status\n     skep dev kill%s %s",
				s.Nodes[0].Socket, s.Nodes[0].Socket, nameFlag(o.name), s.Nodes[len(s.Nodes)-1].Name)
			return nil
		},
	}
	c.Flags().IntVar(&managers, "managers", 1, "number of managers")
	c.Flags().IntVar(&workers, "workers", 2, "number of workers")
	c.Flags().BoolVar(&encrypt, "encrypt-all", false, "encrypt every overlay network of the swarm")
	c.Flags().DurationVar(&timeout, "timeout", 3*time.Minute, "give up after this time")
	c.Flags().StringArrayVar(&daemonArgs, "daemon-arg", nil, "argument for every node's daemon, e.g. --daemon-arg=--debug (repeatable)")
	return c
}

func nameFlag(name string) string {
	if name == "dev" {
		return ""
	}
	return " --name " + name
}

// form makes one swarm of started nodes: the first begins it, the other managers join
// one after the other, the workers all at once.
func (a *app) form(ctx context.Context, s *devnet.Swarm, encrypt bool) error {
	first := s.Nodes[0]
	c, err := dial(endpoint{host: "unix://" + first.Socket})
	if err != nil {
		return err
	}
	defer c.Close() //nolint:errcheck // only idle connections
	if _, err := c.SwarmInit(ctx, client.SwarmInitOptions{
		Spec:       swarmSpec(encrypt),
		ListenAddr: first.Addr + ":2377", AdvertiseAddr: first.Addr, Availability: swarm.NodeAvailabilityActive,
		DefaultAddrPool: []netip.Prefix{}, SubnetSize: 24,
	}); err != nil {
		return fmt.Errorf("begin the swarm on %s: %w", first.Name, err)
	}
	tokens, err := c.SwarmInspect(ctx, client.SwarmInspectOptions{})
	if err != nil {
		return fmt.Errorf("read join tokens: %w", err)
	}
	join := func(n devnet.Node, token string) error {
		c, err := dial(endpoint{host: "unix://" + n.Socket})
		if err != nil {
			return err
		}
		defer c.Close() //nolint:errcheck // only idle connections
		if _, err := c.SwarmJoin(ctx, client.SwarmJoinOptions{
			ListenAddr: n.Addr + ":2377", AdvertiseAddr: n.Addr, RemoteAddrs: []string{first.Addr + ":2377"},
			JoinToken: token, Availability: swarm.NodeAvailabilityActive,
		}); err != nil {
			return fmt.Errorf("join %s: %w; its log is %s", n.Name, err, n.Log())
		}
		return nil
	}
	var wait sync.WaitGroup
	errs := make([]error, len(s.Nodes))
	for i, n := range s.Nodes[1:] {
		if n.Role == "manager" {
			if err := join(n, tokens.Swarm.JoinTokens.Manager); err != nil {
				return err
			}
			continue
		}
		wait.Go(func() { errs[i] = join(n, tokens.Swarm.JoinTokens.Worker) })
	}
	wait.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return awaitReady(ctx, c, len(s.Nodes))
}

// awaitReady waits until a swarm counts as many nodes ready.
func awaitReady(ctx context.Context, c *client.Client, want int) error {
	for {
		nodes, err := c.NodeList(ctx, client.NodeListOptions{})
		ready := 0
		for _, n := range nodes.Items {
			if n.Status.State == swarm.NodeStateReady {
				ready++
			}
		}
		if err == nil && ready >= want {
			return nil
		}
		select {
		case <-ctx.Done():
			if err == nil {
				err = ctx.Err()
			}
			return fmt.Errorf("wait for nodes: %d of %d are ready: %w", ready, want, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (a *app) printNodes(nodes []devnet.Node) error {
	if a.json {
		if nodes == nil {
			nodes = []devnet.Node{}
		}
		return a.printJSON(nodes)
	}
	var rows [][]string
	for _, n := range nodes {
		pid := "-"
		if n.PID > 0 {
			pid = strconv.Itoa(n.PID)
		}
		rows = append(rows, []string{n.Name, n.Role, n.State, n.Addr, pid, "unix://" + n.Socket})
	}
	return a.table([]string{"NODE", "ROLE", "STATE", "ADDRESS", "PID", "SOCKET"}, rows)
}

func (a *app) devLs(o *devOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List the nodes of a dev swarm, or all dev swarms",
		Args:  args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			cfg := a.devConfig(o)
			s, err := devnet.Open(cfg, o.name)
			if err == nil {
				return a.printNodes(s.Nodes)
			}
			names, listErr := devnet.Names(cfg)
			if c.Flags().Changed("name") || listErr != nil || len(names) > 0 && a.json {
				return errors.Join(err, listErr)
			}
			if a.json {
				return a.printNodes(nil)
			}
			if len(names) == 0 {
				a.say("no dev swarms: make one with `skep dev up`")
				return nil
			}
			a.say("dev swarms: %s (choose one with --name)", strings.Join(names, ", "))
			return nil
		},
	}
}

// onNode makes a command that does something with one node.
func (a *app) onNode(o *devOptions, use, does string, run func(ctx context.Context, s *devnet.Swarm, n devnet.Node) error) *cobra.Command {
	return &cobra.Command{
		Use:   use + " NODE",
		Short: does,
		Args:  args(1, 1),
		RunE: func(c *cobra.Command, given []string) error {
			if err := needRoot("a swarm of network namespaces"); err != nil {
				return err
			}
			s, err := devnet.Open(a.devConfig(o), o.name)
			if err != nil {
				return err
			}
			n, err := s.Node(given[0])
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(c.Context(), 2*time.Minute)
			defer cancel()
			return run(ctx, s, n)
		},
	}
}

func (a *app) devExec(o *devOptions) *cobra.Command {
	c := a.onNode(o, "exec", "Run a command in a node's network, with DOCKER_HOST set to its socket", nil)
	c.Use = "exec NODE [--] CMD [ARG…]"
	c.Args = args(2, -1)
	c.RunE = func(_ *cobra.Command, given []string) error {
		if err := needRoot("entering a network namespace"); err != nil {
			return err
		}
		s, err := devnet.Open(a.devConfig(o), o.name)
		if err != nil {
			return err
		}
		n, err := s.Node(given[0])
		if err != nil {
			return err
		}
		command := given[1:]
		if command[0] == "--" {
			command = command[1:]
		}
		if len(command) == 0 {
			return errors.New("name a command to run")
		}
		return s.Exec(n, command, a.Environ())
	}
	// What follows the node belongs to the command.
	c.Flags().SetInterspersed(false)
	return c
}

func (a *app) devKill(o *devOptions) *cobra.Command {
	var everything bool
	c := a.onNode(o, "kill", "Kill a node's daemon with SIGKILL; its containers run on", func(ctx context.Context, s *devnet.Swarm, n devnet.Node) error {
		return s.Kill(ctx, n.Name, everything)
	})
	c.Flags().BoolVar(&everything, "containers", false, "kill everything on the node, as when the machine loses power")
	return c
}

func (a *app) devStart(o *devOptions) *cobra.Command {
	return a.onNode(o, "start", "Start the daemon of a killed node again", func(ctx context.Context, s *devnet.Swarm, n devnet.Node) error {
		return s.Start(ctx, n.Name)
	})
}

func (a *app) devCut(o *devOptions) *cobra.Command {
	var from string
	c := a.onNode(o, "cut", "Cut a node from the others, as by a pulled cable", func(_ context.Context, s *devnet.Swarm, n devnet.Node) error {
		if from == "" {
			return s.Cut(n)
		}
		other, err := s.Node(from)
		if err != nil {
			return err
		}
		return s.Partition(n, other)
	})
	c.Flags().StringVar(&from, "from", "", "cut it from this node only")
	return c
}

func (a *app) devHeal(o *devOptions) *cobra.Command {
	return a.onNode(o, "heal", "Undo every cut of a node", func(_ context.Context, s *devnet.Swarm, n devnet.Node) error {
		return s.Heal(n)
	})
}

func (a *app) devDown(o *devOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "Remove a dev swarm: processes, containers, namespaces and data",
		Args:  args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := needRoot("a swarm of network namespaces"); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(c.Context(), 2*time.Minute)
			defer cancel()
			return devnet.Down(ctx, a.devConfig(o), o.name)
		},
	}
}
