package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"filippo.io/age"
	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/skep-dev/skep/platform/disk"
)

func (a *app) backupCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "backup",
		Short: "Save the swarm's state, encrypted, and go on from what was saved",
		Long: `Save the swarm's state, encrypted, and go on from what was saved.

A backup holds the whole state of the swarm: services, networks, secrets, the CA's key, the
join tokens, the unlock key. It is encrypted to the public keys of people or machines that
need not be in the swarm; whoever holds one of the private keys can read all of it.

  skep backup keygen -o backup.key            a key pair, to be made and kept elsewhere
  skep backup create -r age1… -o swarm.backup on any manager, while the swarm works
  skep backup restore -i backup.key swarm.backup   on a node that is in no swarm`,
	}
	c.AddCommand(a.backupCreate(), a.backupRestore(), a.backupKeygen())
	return c
}

func (a *app) backupCreate() *cobra.Command {
	var recipients []string
	var out string
	var stale bool
	c := &cobra.Command{
		Use:   "create -r RECIPIENT [-o FILE]",
		Short: "Write a backup of the swarm, encrypted to the recipients",
		Long: `Write a backup of the swarm, encrypted to the recipients, age public keys (age1…).

The backup is consistent: it is the state at one moment, and holds everything that was
acknowledged before. The swarm works on meanwhile. Volumes and images are not in it.`,
		Args: args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			if len(recipients) == 0 {
				return errors.New("a backup holds every secret of the swarm: name the public key of who may read it with -r (make one with `skep backup keygen`)")
			}
			d, _, err := a.manager(c.Context())
			if err != nil {
				return err
			}
			defer d.Close() //nolint:errcheck // only idle connections
			query := url.Values{"recipient": recipients}
			if stale {
				query.Set("stale", "1")
			}
			data, err := open(c.Context(), d, http.MethodPost, "/skep/v1/backup", query, "", http.NoBody)
			if err != nil {
				return err
			}
			defer data.Close() //nolint:errcheck // read to the end below
			if out == "" || out == "-" {
				if terminalWidth(a.Out) > 0 {
					return errors.New("a backup is no text for a terminal: name a file with -o, or redirect the output")
				}
				if _, err := io.Copy(a.Out, data); err != nil {
					return fmt.Errorf("write backup: %w", err)
				}
				return nil
			}
			size, err := writeBackup(out, data)
			if err != nil {
				return err
			}
			a.say("wrote %s, %s", out, units.HumanSize(float64(size)))
			return nil
		},
	}
	c.Flags().StringArrayVarP(&recipients, "recipient", "r", nil, "age public key of who may read the backup (repeatable)")
	c.Flags().StringVarP(&out, "output", "o", "", "file to write (default: standard output)")
	c.Flags().BoolVar(&stale, "stale", false, "keep what this manager has, without asking a leader: for a swarm that has lost its quorum")
	return c
}

// writeBackup writes a file whole and durably, or not at all.
func writeBackup(path string, data io.Reader) (size int64, err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return 0, fmt.Errorf("write backup: %w", err)
	}
	size, err = io.Copy(f, data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = disk.Replace(f.Name(), path)
	}
	if err != nil {
		return 0, errors.Join(fmt.Errorf("write backup: %w", err), os.Remove(f.Name()))
	}
	return size, nil
}

func (a *app) backupRestore() *cobra.Command {
	var identity string
	query := url.Values{}
	var listen, advertise, dataPath string
	var alone bool
	c := &cobra.Command{
		Use:   "restore -i IDENTITY FILE",
		Short: "Make this node the only manager of a swarm that goes on from a backup",
		Long: `Make this node the only manager of a swarm that goes on from a backup. The node must be in
no swarm (docker swarm leave --force).

All managers of the backup are removed from the swarm and their certificates refused: let
those that still exist leave and join again. Workers stay, and come back by themselves if
this node has the address of one of the managers they knew; others leave and join again.
With --alone the swarm begins without nodes, as a copy on other machines does.

Two swarms from one backup trust each other's certificates: never run both, or rotate the CA
of one with docker swarm ca --rotate.`,
		Args: args(1, 1),
		RunE: func(c *cobra.Command, given []string) error {
			data, closeFile, err := openBackup(given[0], identity)
			if err != nil {
				return err
			}
			defer closeFile()
			d, err := a.connect()
			if err != nil {
				return err
			}
			defer d.Close() //nolint:errcheck // only idle connections
			for key, value := range map[string]string{"listen": listen, "advertise": advertise, "datapath": dataPath} {
				if value != "" {
					query.Set(key, value)
				}
			}
			if alone {
				query.Set("alone", "1")
			}
			stream, err := open(c.Context(), d, http.MethodPost, "/skep/v1/restore", query, "application/octet-stream", data)
			if err != nil {
				return err
			}
			defer stream.Close() //nolint:errcheck // read to the end below
			answer, err := io.ReadAll(stream)
			if err != nil {
				return fmt.Errorf("read answer: %w", err)
			}
			if a.json {
				return a.printJSON(json.RawMessage(answer))
			}
			var r struct {
				NodeID          string    `json:"node_id"`
				ClusterID       string    `json:"cluster_id"`
				CreatedAt       time.Time `json:"created_at"`
				RemovedManagers int       `json:"removed_managers"`
				RemovedWorkers  int       `json:"removed_workers"`
				OrphanedTasks   int       `json:"orphaned_tasks"`
				Locked          bool      `json:"locked"`
			}
			if err := json.Unmarshal(answer, &r); err != nil {
				return fmt.Errorf("read answer: %w", err)
			}
			a.say("swarm %s goes on as it was on %s; this node, %s, is its only manager", short(r.ClusterID), r.CreatedAt.UTC().Format(time.RFC3339), short(r.NodeID))
			if gone := r.RemovedManagers + r.RemovedWorkers; gone > 0 {
				a.say("removed %s and %s; %s of theirs will be replaced", plural(r.RemovedManagers, "manager"), plural(r.RemovedWorkers, "worker"), plural(r.OrphanedTasks, "task"))
			}
			if r.Locked {
				a.say("the swarm locks its managers, with the unlock key of the backup: docker swarm unlock-key")
			}
			a.say("\nTo add managers: docker swarm join-token manager")
			return nil
		},
	}
	c.Flags().StringVarP(&identity, "identity", "i", "", "file with the age private key that opens the backup")
	c.Flags().StringVar(&advertise, "advertise-addr", "", "address or interface that other nodes reach this one at")
	c.Flags().StringVar(&listen, "listen-addr", "", "address that the swarm port listens on")
	c.Flags().StringVar(&dataPath, "data-path-addr", "", "address or interface for traffic between containers")
	c.Flags().BoolVar(&alone, "alone", false, "remove the workers as well")
	_ = c.MarkFlagRequired("identity") // it exists
	return c
}

// openBackup returns what a backup holds, in the clear.
func openBackup(path, identityPath string) (io.Reader, func(), error) {
	key, err := os.Open(identityPath)
	if err != nil {
		return nil, nil, fmt.Errorf("read identity: %w", err)
	}
	defer key.Close() //nolint:errcheck // only read
	identities, err := age.ParseIdentities(key)
	if err != nil {
		return nil, nil, fmt.Errorf("read identity %s: %w", identityPath, err)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, fmt.Errorf("read backup: %w", err)
	}
	data, err := age.Decrypt(f, identities...)
	if err != nil {
		_ = f.Close() // only read
		if _, none := errors.AsType[*age.NoIdentityMatchError](err); none {
			return nil, nil, fmt.Errorf("%s is encrypted to another key than %s", path, identityPath)
		}
		return nil, nil, fmt.Errorf("%s is no backup: %w", path, err)
	}
	return data, func() { _ = f.Close() }, nil
}

func (a *app) backupKeygen() *cobra.Command {
	var out string
	c := &cobra.Command{
		Use:   "keygen [-o FILE]",
		Short: "Make a key pair for backups and print the public key",
		Long: `Make a key pair for backups: the private key, in age's format, goes to FILE or to standard
output; the public key, for skep backup create -r, is printed. Make it on a machine outside
of the swarm and keep the private key there.`,
		Args: args(0, 0),
		RunE: func(*cobra.Command, []string) error {
			identity, err := age.GenerateX25519Identity()
			if err != nil {
				return fmt.Errorf("make key: %w", err)
			}
			text := fmt.Sprintf("# created: %s\n# public key: %s\n%s\n", time.Now().UTC().Format(time.RFC3339), identity.Recipient(), identity)
			if out == "" || out == "-" {
				_, err := io.WriteString(a.Out, text)
				return err
			}
			f, err := os.OpenFile(out, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
			if err != nil {
				return fmt.Errorf("write key: %w", err)
			}
			if _, err = f.WriteString(text); err == nil {
				err = f.Sync()
			}
			if err := errors.Join(err, f.Close()); err != nil {
				return fmt.Errorf("write key: %w", err)
			}
			if a.json {
				return a.printJSON(map[string]string{"public_key": identity.Recipient().String()})
			}
			a.say("%s", identity.Recipient())
			return nil
		},
	}
	c.Flags().StringVarP(&out, "output", "o", "", "file to write, which must not exist (default: standard output)")
	return c
}
