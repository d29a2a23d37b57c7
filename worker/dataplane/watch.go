package dataplane

import (
	"context"
	"errors"
	"fmt"
	"os"

	mdnetlink "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// watchTables writes to removed once, and whenever a table of this machine is removed, until
// ctx ends: a firewall that is loaded anew often removes all of them, ours too. What is lost
// while removed has a value already is in that value.
func (d *Dataplane) watchTables(ctx context.Context, removed chan<- struct{}) error {
	conn, err := mdnetlink.Dial(unix.NETLINK_NETFILTER, &mdnetlink.Config{NetNS: int(d.hostNS)})
	if err != nil {
		return fmt.Errorf("watch nftables: %w", err)
	}
	defer conn.Close() //nolint:errcheck // nothing was written
	if err := conn.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		return fmt.Errorf("watch nftables: %w", err)
	}
	removed <- struct{}{} // what was removed until now, nobody has told
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	for {
		messages, err := conn.Receive()
		gone := errors.Is(err, unix.ENOBUFS) // there was too much to tell
		switch {
		case ctx.Err() != nil || errors.Is(err, os.ErrClosed):
			return nil
		case err != nil && !gone:
			return fmt.Errorf("watch nftables: %w", err)
		}
		for _, m := range messages {
			gone = gone || m.Header.Type == unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_DELTABLE
		}
		if !gone {
			continue
		}
		select {
		case removed <- struct{}{}:
		default:
		}
	}
}
