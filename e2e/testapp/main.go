// Command testapp is the program inside the end-to-end tests' image. Its first argument
// says what it does: serve answers HTTP with its host name and its client's address, and may
// listen only after a while; whois does so in one line by TCP and UDP and prints it, who asks
// it from a port, survey asks for many names and ports at once, exit ends with a status after
// a while, log prints numbered lines, get asks a URL once, load for a while and counts what
// failed, resolve looks a name up. It ends on SIGTERM, a server when it has answered what it
// was asked.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "testapp:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	mode := "pause"
	if len(args) > 0 {
		mode, args = args[0], args[1:]
	}
	arg := func(i int, otherwise string) string {
		if i < len(args) {
			return args[i]
		}
		return otherwise
	}
	switch mode {
	case "pause":
		<-ctx.Done()
	case "serve":
		return serve(ctx, arg(0, ":80"), arg(1, "0s"))
	case "whois":
		return whois(ctx, args)
	case "survey":
		return survey(ctx, args)
	case "who":
		return who(arg(0, "tcp"), arg(1, "0"), args[min(2, len(args)):])
	case "get":
		return fetch(arg(0, ""))
	case "resolve":
		addrs, err := net.DefaultResolver.LookupHost(ctx, arg(0, ""))
		for _, a := range addrs {
			fmt.Println(a)
		}
		return err
	case "load":
		return load(ctx, arg(0, ""), arg(1, "10s"), arg(2, "500"))
	case "exit":
		status, err := strconv.Atoi(arg(0, "1"))
		if err != nil {
			return err
		}
		after, err := time.ParseDuration(arg(1, "0s"))
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(after):
			os.Exit(status)
		}
	case "log":
		for i := 0; ctx.Err() == nil; i++ {
			fmt.Printf("line %d\n", i)
			fmt.Fprintf(os.Stderr, "error line %d\n", i)
			select {
			case <-ctx.Done():
			case <-time.After(200 * time.Millisecond):
			}
		}
	default:
		return fmt.Errorf("unknown mode %q", mode)
	}
	return nil
}

func serve(ctx context.Context, addr, after string) error {
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	wait, err := time.ParseDuration(after)
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return nil
	case <-time.After(wait):
	}
	s := &http.Server{Addr: addr, ReadHeaderTimeout: loadTimeout, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s %s %s\n", host, os.Getenv("GREETING"), r.RemoteAddr)
	})}
	stopped := make(chan error, 1)
	go func() {
		<-ctx.Done()
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		stopped <- s.Shutdown(last)
	}()
	if err := s.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return <-stopped
}
