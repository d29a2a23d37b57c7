package cli

import (
	"encoding/json"
	"fmt"
	"net/http"

	"github.com/spf13/cobra"

	"github.com/skep-dev/skep/api/skepv1"
)

const unlockingPath = "/skep/v1/unlocking"

func (a *app) lockPeers() *cobra.Command {
	return &cobra.Command{
		Use:       "peers on|off|status",
		Short:     "Let running managers unlock restarted ones",
		ValidArgs: []string{"on", "off", "status"},
		Long: `Let running managers unlock restarted ones; off unless somebody asks for it. Each manager keeps
a credential on its disk, in clear, for which a quorum of the managers gives it the unlock key
once, at its own address only. This protects a disk that was copied, or taken away from the
network. It does not protect against who has the disk and is in the network at that address:
remove such a node at once, or rotate the unlock key.`,
		Args: args(1, 1),
		RunE: func(c *cobra.Command, given []string) error {
			method, body := http.MethodPost, any(map[string]bool{"on": given[0] == "on"})
			switch given[0] {
			case "on", "off":
			case "status":
				method, body = http.MethodGet, nil
			default:
				return fmt.Errorf("%q must be on, off or status", given[0])
			}
			var answer skepv1.UnlockState
			d, data, err := a.ask(c.Context(), method, unlockingPath, nil, body, &answer)
			if err != nil {
				return err
			}
			defer d.Close() //nolint:errcheck // only idle connections
			switch {
			case a.json:
				return a.printJSON(json.RawMessage(data))
			case !answer.GetOn():
				a.say("off: managers do not unlock each other")
			default:
				a.say("on: running managers unlock restarted ones; %s registered", plural(len(answer.GetRegistered()), "manager"))
			}
			return nil
		},
	}
}
