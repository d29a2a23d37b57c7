package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// survey prints, for each name, the addresses that it and tasks.NAME have and what its
// server answers, and for each port ADDR:PORT the latter.
//
//	NAME  10.0.1.2  10.0.1.3,10.0.1.4  GREETING
//
// Who is unknown has no addresses, "-"; where nobody listens, the answer is "refused".
func survey(ctx context.Context, what []string) error {
	lines := make([]string, len(what))
	var group sync.WaitGroup
	busy := make(chan struct{}, 8)
	for i, name := range what {
		group.Go(func() {
			busy <- struct{}{}
			defer func() { <-busy }()
			if strings.Contains(name, ":") {
				lines[i] = fmt.Sprint(name, " ", greeting(ctx, name))
				return
			}
			lines[i] = fmt.Sprint(name, " ", addresses(ctx, name), " ", addresses(ctx, "tasks."+name), " ", greeting(ctx, name+":80"))
		})
	}
	group.Wait()
	fmt.Println(strings.Join(lines, "\n"))
	return nil
}

func addresses(ctx context.Context, name string) string {
	addrs, err := net.DefaultResolver.LookupHost(ctx, name)
	if err != nil { // a name that nobody here knows is asked of resolvers that may not be reached
		return "-"
	}
	slices.Sort(addrs)
	return strings.Join(addrs, ",")
}

// greeting asks a server a few times, each over a connection of its own, so that each
// task has a chance to answer, and returns the different answers.
func greeting(ctx context.Context, addr string) string {
	client := http.Client{Timeout: 4 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	var seen []string
	for range 6 {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/", nil)
		if err != nil {
			return "bad_address"
		}
		text := "refused"
		resp, err := client.Do(req)
		_, unknown := errors.AsType[*net.DNSError](err)
		switch {
		case err == nil:
			body, readErr := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			text = "cut"
			if fields := strings.Fields(string(body)); readErr == nil && len(fields) == 3 {
				text = fields[1]
			}
		case unknown:
			text = "unknown"
		case !errors.Is(err, syscall.ECONNREFUSED):
			text = strings.ReplaceAll(err.Error(), " ", "_")
		}
		if !slices.Contains(seen, text) {
			seen = append(seen, text)
		}
	}
	slices.Sort(seen)
	return strings.Join(seen, ",")
}
