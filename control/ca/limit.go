package ca

import (
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Bounds on the requests of strangers, who show a token or the key of an expired
// certificate. Beyond them calls are refused with ResourceExhausted, and nodes try again.
const (
	joinBurst = 200
	joinRate  = 50 // a second
	// One address may be that of a network behind a router.
	sourceBurst = 50
	sourceRate  = 10 // a second
	// maxSources bounds the addresses that are remembered; when there are more, those that
	// have been quiet are forgotten, and if none has, strangers wait.
	maxSources = 10000
)

// bucket is a number of calls that may be made now, and when it was right.
type bucket struct {
	level float64
	at    time.Time
}

// take takes one from a bucket that holds burst and gains rate a second.
func (b *bucket) take(now time.Time, burst, rate float64) bool {
	b.fill(now, burst, rate)
	if b.level < 1 {
		return false
	}
	b.level--
	return true
}

func (b *bucket) fill(now time.Time, burst, rate float64) {
	b.level = min(burst, b.level+now.Sub(b.at).Seconds()*rate)
	b.at = now
}

// limiter bounds the calls of strangers, for each address and in all.
type limiter struct {
	mu      sync.Mutex
	all     bucket
	sources map[string]*bucket
}

func newLimiter() *limiter {
	return &limiter{all: bucket{level: joinBurst}, sources: map[string]*bucket{}}
}

// admit lets a call from addr, ip:port, pass or says why not. A flood from one address
// takes nothing from the others.
func (l *limiter) admit(addr string, now time.Time) error {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		host = addr
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.sources[host]
	if b == nil {
		if len(l.sources) >= maxSources {
			l.forget(now)
		}
		if len(l.sources) >= maxSources {
			return status.Error(codes.ResourceExhausted, "too many nodes are joining at once; try again")
		}
		b = &bucket{level: sourceBurst, at: now}
		l.sources[host] = b
	}
	if !b.take(now, sourceBurst, sourceRate) {
		return status.Errorf(codes.ResourceExhausted, "too many requests to join come from %s; try again", host)
	}
	if !l.all.take(now, joinBurst, joinRate) {
		return status.Error(codes.ResourceExhausted, "too many nodes are joining at once; try again")
	}
	return nil
}

// forget drops the addresses that have nothing to wait for.
func (l *limiter) forget(now time.Time) {
	for host, b := range l.sources {
		if b.fill(now, sourceBurst, sourceRate); b.level >= sourceBurst {
			delete(l.sources, host)
		}
	}
}
