// Command hello is the program that `make up` runs as a service: `hello serve` answers
// HTTP requests and says where it runs, `hello tick` writes a line every few seconds,
// `hello check` is the health check of the first. It ends on SIGTERM.
package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"
)

const addr = ":8080"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	command := "serve"
	if len(os.Args) > 1 {
		command = os.Args[1]
	}
	run := map[string]func(context.Context) error{"serve": serve, "tick": tick, "check": check}[command]
	if run == nil {
		fmt.Fprintln(os.Stderr, "usage: hello serve|tick|check")
		os.Exit(2)
	}
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "hello: "+err.Error())
		os.Exit(1)
	}
}

func where() string {
	return fmt.Sprintf("task %s on node %s", os.Getenv("TASK"), os.Getenv("NODE"))
}

func serve(ctx context.Context) error {
	var served atomic.Int64
	server := &http.Server{
		Addr: addr, ReadHeaderTimeout: 5 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/health" {
				return
			}
			n := served.Add(1)
			fmt.Printf("request %d from %s\n", n, r.RemoteAddr)
			fmt.Fprintf(w, "Hello from %s. This is request %d.\n", where(), n)
		}),
	}
	go func() {
		<-ctx.Done()
		wait, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		_ = server.Shutdown(wait) // the process ends either way
	}()
	fmt.Printf("listening on %s as %s\n", addr, where())
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve: %w", err)
	}
	return nil
}

func tick(ctx context.Context) error {
	for n := 1; ; n++ {
		fmt.Printf("tick %d from %s\n", n, where())
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(3 * time.Second):
		}
	}
}

func check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1"+addr+"/health", http.NoBody)
	if err != nil {
		return fmt.Errorf("check: %w", err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return fmt.Errorf("check: %w", err)
	}
	_ = resp.Body.Close() // nothing was read
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("check: %s", resp.Status)
	}
	return nil
}
