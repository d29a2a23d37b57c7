package cli

import (
	"bufio"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/unlock"
)

// sharesProvider is the provider of unlock that reads shares.
const sharesProvider = "shares"

func (a *app) lockCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "lock",
		Short: "Choose who unlocks the managers of a swarm that locks them",
		Long: `Choose who unlocks the managers of a swarm that locks them: who has enough shares of the key,
or the other managers. Whether the swarm locks its managers is a setting of its own: docker
swarm update --autolock=true.`,
	}
	c.AddCommand(a.lockShare(), a.lockPeers())
	return c
}

func (a *app) lockShare() *cobra.Command {
	var n, threshold int
	c := &cobra.Command{
		Use:   "share",
		Short: "Split the unlock key into shares of which some unlock",
		Long: `Split the unlock key into shares of which some unlock, by Shamir's scheme, and print them, one
a line. Give each to another person or place. Fewer shares than needed say nothing about the
key; who has enough of them has the key. Rotating the key (docker swarm unlock-key --rotate)
makes all shares void; splitting again does not.`,
		Args: args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			d, _, err := a.manager(c.Context())
			if err != nil {
				return err
			}
			defer d.Close() //nolint:errcheck // only idle connections
			key, err := d.SwarmGetUnlockKey(c.Context())
			if err != nil {
				return err
			}
			if key.Key == "" {
				return errors.New("this swarm does not lock its managers: docker swarm update --autolock=true")
			}
			kek, err := pki.ParseUnlockKey(key.Key)
			if err != nil {
				return err
			}
			shares, err := pki.SplitKey(rand.Reader, kek, n, threshold)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(map[string]any{"threshold": threshold, "shares": shareTexts(shares)})
			}
			for _, s := range shareTexts(shares) {
				a.say("%s", s)
			}
			return nil
		},
	}
	c.Flags().IntVarP(&n, "shares", "n", 5, "number of shares to make")
	c.Flags().IntVarP(&threshold, "threshold", "m", 3, "number of shares that unlock")
	return c
}

func shareTexts(shares []pki.Share) []string {
	texts := make([]string, 0, len(shares))
	for _, s := range shares {
		texts = append(texts, s.String())
	}
	return texts
}

func (a *app) unlockCommand() *cobra.Command {
	var provider string
	c := &cobra.Command{
		Use:   "unlock",
		Short: "Unlock this manager, with a key, with shares of it, or by a provider",
		Long: `Unlock this manager, which was restarted and waits for the swarm's unlock key.

  skep unlock                              reads the key, as docker swarm unlock does
  skep unlock --provider shares            reads shares of it, one a line, until they are enough
  skep unlock --provider exec:/PATH        runs a program that prints the key
  skep unlock --provider unix:/PATH        asks a service behind a socket

A program gets one line of JSON on its standard input, a service on the connection: op
("unlock"), cluster_id, node_id, kek_version. Each answers with one line, the key. A daemon
with --unlock-provider asks by itself when it starts.`,
		Args: args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			d, err := a.connect()
			if err != nil {
				return err
			}
			defer d.Close() //nolint:errcheck // only idle connections
			info, err := d.Info(c.Context(), client.InfoOptions{})
			if err != nil {
				return unreachable(d, err)
			}
			switch info.Info.Swarm.LocalNodeState {
			case swarm.LocalNodeStateLocked:
			case swarm.LocalNodeStateInactive:
				return errors.New("this node is in no swarm")
			default:
				return errors.New("this node is not locked")
			}
			key, err := a.keyFrom(c, provider)
			if err != nil {
				return err
			}
			if _, err := d.SwarmUnlock(c.Context(), client.SwarmUnlockOptions{Key: key}); err != nil {
				return err
			}
			a.say("unlocked")
			return nil
		},
	}
	c.Flags().StringVar(&provider, "provider", "", "where the key comes from: shares, exec:/PATH or unix:/PATH (default: read it)")
	return c
}

// keyFrom returns the unlock key of a provider.
func (a *app) keyFrom(c *cobra.Command, provider string) (string, error) {
	switch provider {
	case "":
		return a.askSecret("Please enter unlock key: ")
	case sharesProvider:
		kek, err := a.askShares()
		return pki.EncodeUnlockKey(kek), err
	}
	p, err := unlock.Parse(provider)
	if err != nil {
		return "", fmt.Errorf("%w, or %s", err, sharesProvider)
	}
	// Which node asks is known to its daemon only, which does not tell while it is locked.
	kek, err := p.Key(c.Context(), unlock.Request{})
	return pki.EncodeUnlockKey(kek), err
}

// askShares reads shares until they are enough. A person may correct one with a mistake.
func (a *app) askShares() ([]byte, error) {
	in, person := bufio.NewScanner(a.In), terminalWidth(a.Out) > 0
	var shares []pki.Share
	for {
		if person {
			a.say("share %d:", len(shares)+1)
		}
		if !in.Scan() {
			if err := in.Err(); err != nil {
				return nil, fmt.Errorf("read shares: %w", err)
			}
			return pki.JoinShares(shares)
		}
		text := strings.TrimSpace(in.Text())
		if text == "" {
			continue
		}
		s, err := pki.ParseShare(text)
		if err != nil {
			if person {
				a.say("%s", err)
				continue
			}
			return nil, err
		}
		shares = append(shares, s)
		if kek, err := pki.JoinShares(shares); err == nil || len(shares) >= pki.MaxShares {
			return kek, err
		}
	}
}

// askSecret reads a line, which a terminal does not show.
func (a *app) askSecret(prompt string) (string, error) {
	if f, ok := a.In.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		a.say("%s", prompt)
		text, err := term.ReadPassword(int(f.Fd()))
		if err != nil {
			return "", fmt.Errorf("read unlock key: %w", err)
		}
		return strings.TrimSpace(string(text)), nil
	}
	return a.readKey("-")
}
