package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

func (a *app) loadCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "load FILE…",
		Short: "Load images from archives of docker save (- for standard input) onto this node",
		Args:  args(1, -1),
		RunE: func(c *cobra.Command, given []string) error {
			d, err := a.connect()
			if err != nil {
				return err
			}
			defer d.Close() //nolint:errcheck // only idle connections
			for _, file := range given {
				if err := a.load(c.Context(), d, file); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// load loads one archive and says which images it held.
func (a *app) load(ctx context.Context, d *client.Client, file string) error {
	in := a.In
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return fmt.Errorf("load images: %w", err)
		}
		defer f.Close() //nolint:errcheck // only read
		in = f
	}
	resp, err := d.ImageLoad(ctx, in, client.ImageLoadWithQuiet(true))
	if err != nil {
		return fmt.Errorf("load %s: %w", file, unreachable(d, err))
	}
	defer resp.Close() //nolint:errcheck // read to the end below
	lines := bufio.NewScanner(io.LimitReader(resp, 16<<20))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var message struct{ Stream, Error string }
		if err := json.Unmarshal(lines.Bytes(), &message); err != nil {
			return fmt.Errorf("load %s: unexpected answer %q", file, lines.Text())
		}
		if message.Error != "" {
			return fmt.Errorf("load %s: %w", file, errors.New(message.Error))
		}
		if text := strings.TrimSpace(message.Stream); text != "" {
			a.say("%s", text)
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("load %s: %w", file, err)
	}
	return nil
}
