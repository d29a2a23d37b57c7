package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"
)

// loadTimeout is when a request counts as failed.
const loadTimeout = 5 * time.Second

// load asks a URL at a rate until a time is over and prints how many requests there were,
// how many failed, and the failures. Every other worker keeps its connections.
func load(ctx context.Context, url, duration, perSecond string) error {
	length, err := time.ParseDuration(duration)
	if err != nil {
		return err
	}
	rate, err := strconv.Atoi(perSecond)
	if err != nil || rate < 1 {
		return fmt.Errorf("bad rate %q", perSecond)
	}
	ctx, cancel := context.WithTimeout(ctx, length)
	defer cancel()
	const workers = 16
	var (
		mu       sync.Mutex
		total    int
		failures []string
		group    sync.WaitGroup
	)
	for i := range workers {
		transport := &http.Transport{DisableKeepAlives: i%2 == 0, MaxIdleConnsPerHost: 1}
		client := &http.Client{Transport: transport, Timeout: loadTimeout}
		group.Go(func() {
			defer transport.CloseIdleConnections()
			tick := time.NewTicker(workers * time.Second / time.Duration(rate))
			defer tick.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
				err := get(client, url)
				mu.Lock()
				total++
				if err != nil && len(failures) < 100 {
					failures = append(failures, time.Now().Format("15:04:05.000 ")+err.Error())
				}
				mu.Unlock()
			}
		})
	}
	group.Wait()
	fmt.Printf("%d requests, %d failed\n", total, len(failures))
	for _, f := range slices.Compact(failures) {
		fmt.Println(f)
	}
	return nil
}

// fetch asks a URL once and prints the answer.
func fetch(url string) error {
	client := &http.Client{Timeout: loadTimeout}
	resp, err := client.Get(url)
	if err != nil {
		return err
	}
	_, err = io.Copy(os.Stdout, resp.Body)
	return errors.Join(err, resp.Body.Close())
}

func get(client *http.Client, url string) error {
	resp, err := client.Get(url)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	err = errors.Join(err, resp.Body.Close())
	if resp.StatusCode != http.StatusOK {
		err = errors.Join(err, errors.New(resp.Status))
	}
	return err
}
