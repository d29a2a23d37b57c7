package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// netnsOf is the path of the network namespace of a process.
func netnsOf(pid int) string { return fmt.Sprintf("/proc/%d/ns/net", pid) }

// inside runs f on a thread in a network namespace. It is never the main thread, which does
// not end and by which others see where a process is.
func inside(path string, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if unix.Gettid() == unix.Getpid() {
			done <- inside(path, f)
			runtime.UnlockOSThread()
			return
		}
		ns, err := os.Open(path)
		if err != nil {
			done <- err
			return
		}
		defer ns.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

// capture is what all links of a namespace carry.
type capture struct {
	fd   int
	done chan struct{}

	mu      sync.Mutex
	seen    map[string]int // packets of each kind
	packets int
}

// newCapture captures in the network namespace of a process until the test ends, and counts
// the packets in which one of some texts is.
func newCapture(t *testing.T, pid int, texts ...string) *capture {
	t.Helper()
	return captureIn(t, netnsOf(pid), func(packet []byte) []string {
		return slices.DeleteFunc(slices.Clone(texts), func(text string) bool { return !bytes.Contains(packet, []byte(text)) })
	})
}

// captureIn captures in a network namespace until the test ends, and counts the packets of each
// kind: kindsOf says of which a packet is, from its link's header on.
func captureIn(t *testing.T, path string, kindsOf func(packet []byte) []string) *capture {
	t.Helper()
	c := &capture{seen: map[string]int{}, done: make(chan struct{})}
	all := uint16(unix.ETH_P_ALL)
	err := inside(path, func() (err error) {
		c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(all>>8|all<<8))
		if err != nil {
			return err
		}
		_ = unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20)
		return unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000})
	})
	if err != nil {
		t.Fatalf("capture: %v", err)
	}
	stop := make(chan struct{})
	go func() {
		defer close(c.done)
		buf := make([]byte, 1<<17)
		for {
			n, _, err := unix.Recvfrom(c.fd, buf, 0)
			select {
			case <-stop:
				return
			default:
			}
			if err != nil {
				if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
					continue
				}
				return
			}
			c.mu.Lock()
			c.packets++
			for _, kind := range kindsOf(buf[:n]) {
				c.seen[kind]++
			}
			c.mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		close(stop)
		<-c.done
		_ = unix.Close(c.fd)
	})
	return c
}

// count returns how many packets were of a kind, and how many there were.
func (c *capture) count(kind string) (with, all int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.seen[kind], c.packets
}

// sendUDP sends a datagram from the namespace of a process, as a user without rights.
func sendUDP(pid int, to [4]byte, port int, data []byte) error {
	return inside(netnsOf(pid), func() error {
		// Only this thread becomes that user, and it ends here.
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, 65534, 65534, 65534); e != 0 {
			return e
		}
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); e != 0 {
			return e
		}
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, data, 0, &unix.SockaddrInet4{Addr: to, Port: port})
	})
}
